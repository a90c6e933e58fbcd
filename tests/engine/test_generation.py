"""Completions with text: stop strings, held-back text, resuming."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from openlora.engine import Request, SamplingParams
from openlora.engine.generation import load_tokenizer
from openlora.errors import InvalidRequest
from tests.engine.fake_device import EOS, VOCAB_SIZE, fake_engine

TEXT = "one two### three##"


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine whose model writes TEXT, one byte a token, then ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    script = [*tokenizer.encode(TEXT).ids, EOS]
    monkeypatch.setattr(
        "tests.engine.fake_device.next_token", lambda tokens, content, seed, index: script[index]
    )
    made, _ = fake_engine(model=str(tmp_path))
    made.script = script
    return made


def complete(engine, *, stop=(), max_tokens=50, output=()):
    params = SamplingParams(max_tokens=max_tokens, stop=tuple(stop))
    (completion,) = engine.generate([Request([1, 2], params=params, output_token_ids=output)])
    return completion


def test_text_is_the_decoded_output_and_eos_has_none(engine):
    completion = complete(engine)
    assert completion.text == TEXT
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == EOS


def test_a_stop_string_ends_the_output_and_is_not_shown(engine):
    completion = complete(engine, stop=["###"])
    assert (completion.text, completion.finish_reason) == ("one two", "stop")
    assert len(completion.token_ids) == len("one two###")
    assert not engine.has_work()


def test_text_held_back_is_shown_at_the_end(engine):
    completion = complete(engine, stop=["####"])
    assert (completion.text, completion.finish_reason) == (TEXT, "stop")
    assert complete(engine, stop=["###"], max_tokens=9).text == "one two##"


def test_a_resumed_request_finds_its_stop_string_across_the_seam(engine):
    completion = complete(engine, stop=["###"], output=engine.script[:9])
    assert (completion.text, completion.finish_reason) == ("one two", "stop")
    assert list(completion.token_ids) == engine.script[:10]


def test_a_request_whose_known_output_already_holds_its_stop_string_has_ended(engine):
    completion = complete(engine, stop=["###"], output=engine.script[:10])
    assert (completion.text, completion.finish_reason) == ("one two", "stop")
    assert list(completion.token_ids) == engine.script[:10]


def test_without_a_tokenizer_there_is_no_text_and_stop_strings_are_refused(tmp_path):
    assert load_tokenizer(str(tmp_path)) is None
    engine, _ = fake_engine(model=str(tmp_path))
    assert complete(engine, max_tokens=2).text is None
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json"):
        complete(engine, stop=["x"])
    assert VOCAB_SIZE > 256
