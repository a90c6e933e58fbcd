"""Texts looked up by token are the texts that the tokenizer's own stream gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import ByteLevel

from openlora.engine.detokenizer import Detokenizer, TokenTexts

ALPHABET = sorted(ByteLevel.alphabet())
PIECES = ["Ġhello", "é", "Ã©", "ðŁ", "ĺĢ", "ðŁĺĢ", "Ċ", "ï¿½"]


def tokenizer() -> Tokenizer:
    """Every byte, some whole words, half and whole characters, a literal �, a special token."""
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys([*ALPHABET, *PIECES]))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.add_tokens(["naïve ☃"])
    return made


TOKENIZER = tokenizer()


def streamed(token_ids: list[int]) -> list[str]:
    stream = DecodeStream(skip_special_tokens=True)
    return [stream.step(TOKENIZER, token_id) or "" for token_id in token_ids]


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_any_tokens(token_ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    texts = [detokenizer.feed(token_id) for token_id in token_ids]
    whole = TOKENIZER.decode(token_ids, skip_special_tokens=True)
    assert "".join(texts) + detokenizer.flush() == whole


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=20))
def test_texts_come_with_the_tokens_that_complete_them(numbers: list[int]) -> None:
    valid = [PIECES[number] for number in numbers if PIECES[number] not in ("ðŁ", "ĺĢ")]
    token_ids = [TOKENIZER.token_to_id(piece) for piece in valid]
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.feed(token_id) for token_id in token_ids] == streamed(token_ids)


def test_only_a_byte_level_decoder_is_looked_up() -> None:
    other = Tokenizer(models.BPE(vocab={"▁a": 0, "b": 1}, merges=[]))
    other.decoder = decoders.Metaspace()
    assert TokenTexts(other)[0] == ""
    detokenizer = Detokenizer(other)
    assert [detokenizer.feed(0), detokenizer.feed(0)] == ["a", " a"]
    assert TokenTexts(TOKENIZER)[TOKENIZER.token_to_id("Ġhello")] == " hello"


@pytest.mark.parametrize("piece", ["ðŁ", "ï¿½", "<end>"])
def test_what_has_no_text_of_its_own_is_left_to_the_stream(piece: str) -> None:
    assert TokenTexts(TOKENIZER)[TOKENIZER.token_to_id(piece)] == ""
