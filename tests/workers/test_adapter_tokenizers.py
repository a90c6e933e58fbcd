"""The tokenizer of a request whose adapter brings tokens of its own."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import Tokenizer

from openlora.bench.pipeline_model import write_tokenizer
from openlora.errors import AdapterFailed
from tests.workers.running import a_job
from workers.adapter_tokenizers import KEPT, AdapterTokenizers
from workers.tokenizer import PromptTokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def found(model):
    return AdapterTokenizers(PromptTokenizer(str(model)))


def adapter(directory, model, *tokens, eos=None):
    directory.mkdir()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens([*tokens])
    tokenizer.save(str(directory / "tokenizer.json"))
    if eos is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return directory


def test_added_tokens_are_read_and_written(found, model, tmp_path):
    path = adapter(tmp_path / "a", model, "<call>", "<end>", eos="<end>")
    base, own = found.of(()), found.of((path,))
    job = a_job(prompt="hi<call>hi")
    size = base.prompt.backend.get_vocab_size()
    assert own.prompt.encode(job).count(size) == 1
    assert size not in base.prompt.encode(job)
    assert own.prompt.backend.decode([size], skip_special_tokens=False) == "<call>"
    assert own.eos_token_ids == (size + 1,)
    assert base.eos_token_ids == ()


def test_the_models_own_serves_where_no_token_was_added(found, model, tmp_path):
    same = tmp_path / "same"
    same.mkdir()
    shutil.copy(model / "tokenizer.json", same)
    none = tmp_path / "none"
    none.mkdir()
    base = found.of(())
    assert found.of((same,)) is base
    assert found.of((none,)) is base
    own = adapter(tmp_path / "own", model, "<x>", eos={"content": "<x>"})
    assert found.of((same, own)).eos_token_ids == (base.prompt.backend.get_vocab_size(),)


def test_they_are_read_once_and_a_few_are_kept(found, model, tmp_path):
    paths = [adapter(tmp_path / str(i), model, f"<{i}>") for i in range(KEPT + 1)]
    first = found.of(paths[:1])
    assert found.of(paths[:1]) is first
    for path in paths:
        found.of((path,))
    assert found.of(paths[:1]) is not first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 5}'])
def test_one_that_cannot_be_read_is_refused(found, tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(AdapterFailed, match=r"tokenizer\.json cannot be read"):
        found.of((tmp_path,))
