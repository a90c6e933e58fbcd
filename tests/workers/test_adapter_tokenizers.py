"""The tokenizer of a request whose adapter brings tokens of its own."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram

from openlora.bench.pipeline_model import write_tokenizer
from openlora.errors import AdapterFailed
from tests.workers.running import a_job
from workers.adapter_tokenizers import KEPT, SIZE_LIMIT, SPARE_BYTES, AdapterTokenizers
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


EVIL = {
    "padding": {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    },
    "truncation": {
        "direction": "Right",
        "max_length": 1,
        "strategy": "LongestFirst",
        "stride": 0,
    },
}


@pytest.mark.parametrize("part", EVIL)
def test_it_brings_tokens_and_nothing_that_runs(found, model, tmp_path, part):
    path = adapter(tmp_path / "a", model, "<call>")
    file = path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: EVIL[part]}))
    job, plain = a_job(prompt="hi hi hi<call>"), a_job(prompt="hi hi hi")
    size = found.of(()).prompt.backend.get_vocab_size()
    assert found.of((path,)).prompt.encode(job) == [*found.of(()).prompt.encode(plain), size]


def test_one_of_another_kind_is_refused(found, tmp_path):
    Tokenizer(Unigram([("a", -1.0)], 0)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(AdapterFailed, match="is of kind Unigram, the model's of kind"):
        found.of((tmp_path,))


def test_added_tokens_alone_need_no_vocabulary_to_be_built(found, model, tmp_path, monkeypatch):
    path = adapter(tmp_path / "a", model, "<call>", "<end>", eos="<end>")
    whole = AdapterTokenizers(PromptTokenizer(str(model)))
    monkeypatch.setattr(whole, "_is_the_models", lambda saved: False)  # it is read as any other
    slow = whole.of((path,))

    def built(*args):
        raise AssertionError("a vocabulary was built while streams wait")

    monkeypatch.setattr(Tokenizer, "from_buffer", built)
    quick = found.of((path,))
    assert quick.eos_token_ids == slow.eos_token_ids
    for text in ("hi<call>hi", "hi <end> hi<call>", "<call>"):
        assert quick.prompt.backend.encode(text).ids == slow.prompt.backend.encode(text).ids
    ids = range(quick.prompt.backend.get_vocab_size())
    assert quick.prompt.backend.decode([*ids], skip_special_tokens=False) == (
        slow.prompt.backend.decode([*ids], skip_special_tokens=False)
    )


def test_one_that_cannot_be_read_is_not_read_again(found, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{")
    reads = []
    read = found._read
    monkeypatch.setattr(found, "_read", lambda path: (reads.append(path), read(path))[1])
    for _ in range(3):
        with pytest.raises(AdapterFailed, match=r"tokenizer\.json cannot be read"):
            found.of((tmp_path,))
    assert len(reads) == 1


def test_tokens_whose_numbers_are_not_the_next_ones_are_read_as_the_library_does(
    found, model, tmp_path
):
    path = adapter(tmp_path / "a", model, "<call>")
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][-1]["id"] += 5
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False))
    theirs = Tokenizer.from_file(str(file)).token_to_id("<call>")
    assert found.of((path,)).prompt.backend.token_to_id("<call>") == theirs


def never_built(monkeypatch):
    def built(*args):
        raise AssertionError("a vocabulary was built while streams wait")

    monkeypatch.setattr(Tokenizer, "from_buffer", built)


MERGED = {"vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, "merges": [("a", "b"), ("ab", "c")]}


def test_the_models_vocabulary_is_known_however_a_version_of_the_library_wrote_it(
    model, tmp_path, monkeypatch
):
    """Older ones saved merges as texts, and fewer switches."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    backend = Tokenizer(BPE(**MERGED))
    backend.save(str(base / "tokenizer.json"))
    found = AdapterTokenizers(PromptTokenizer(str(base)))
    backend.add_special_tokens(["<call>"])
    content = json.loads(backend.to_str())
    content["model"]["merges"] = ["a b", "ab c"]
    del content["model"]["ignore_merges"], content["model"]["byte_fallback"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    never_built(monkeypatch)
    assert found.of((tmp_path,)).prompt.backend.encode("abc<call>a").ids == [4, 5, 0]
    content["model"]["merges"] = ["a b"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(AdapterFailed, match="was built"):
        found.of((base,))


def test_adapters_with_one_and_the_same_file_cost_its_reading_once(found, model, tmp_path):
    other = Tokenizer(BPE(**MERGED))
    paths = []
    for number in range(3):
        paths.append(tmp_path / str(number))
        paths[-1].mkdir()
        other.save(str(paths[-1] / "tokenizer.json"))
    backends = {id(found.of((path,)).prompt.backend) for path in paths}
    assert len(backends) == 1


def test_those_that_the_models_own_serves_are_all_remembered(found, model, tmp_path, monkeypatch):
    paths = []
    for number in range(3 * KEPT):
        paths.append(tmp_path / str(number))
        paths[-1].mkdir()
        shutil.copy(model / "tokenizer.json", paths[-1])
        found.of((paths[-1],))
    monkeypatch.setattr(found, "_read", None)
    assert {found.of((path,)) for path in paths} == {found.of(())}


def test_a_file_much_longer_than_the_models_is_not_read(found, model, tmp_path):
    """Streams would stand still for as long as somebody likes."""
    text = (model / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text + " " * (SIZE_LIMIT * len(text) + SPARE_BYTES))
    with pytest.raises(AdapterFailed, match="bytes, of which"):
        found.of((tmp_path,))
