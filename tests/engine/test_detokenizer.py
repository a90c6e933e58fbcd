"""Joined texts equal the decoded output; no half characters on the way."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from openlora.engine.detokenizer import Detokenizer


def byte_level() -> Tokenizer:
    """One token for each byte, and a special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Words that begin with ▁, bytes as <0x..>, as Llama 2 has it."""
    words = ["<unk>", "▁Hello", "▁", "world", "▁a", "b", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BYTES = byte_level()
PIECES = sentencepiece()


def feed(tokenizer, token_ids, eos=()):
    detokenizer = Detokenizer(tokenizer, eos)
    texts = [detokenizer.feed(token_id) for token_id in token_ids]
    return texts, detokenizer.flush()


@given(text=st.text(max_size=12))
@settings(max_examples=200)
def test_any_text_comes_out_whole_and_never_with_half_a_character(text):
    token_ids = BYTES.encode(text).ids
    texts, rest = feed(BYTES, token_ids)
    assert "".join(texts) + rest == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(texts)


@given(token_ids=st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=16))
@settings(max_examples=150)
def test_any_bytes_give_what_decoding_them_gives(token_ids):
    texts, rest = feed(BYTES, token_ids)
    assert "".join(texts) + rest == BYTES.decode(token_ids, skip_special_tokens=True)


word = st.integers(0, 5).map(lambda token_id: [token_id])
character = st.characters(exclude_categories=["Cs"]).map(
    lambda c: [PIECES.token_to_id(f"<0x{byte:02X}>") for byte in c.encode()]
)


@given(pieces=st.lists(word | character, max_size=12), cut=st.integers(0, 3))
@settings(max_examples=150)
def test_byte_fallback_gives_what_decoding_gives_even_where_it_ends_within_a_character(pieces, cut):
    token_ids = [token_id for piece in pieces for token_id in piece]
    # What was shown of a run of bytes cannot be taken back where the run ends badly, so only a
    # character that stands behind a word is cut.
    if pieces and cut < len(pieces[-1]) and (len(pieces) < 2 or pieces[-2][0] <= 5):
        token_ids = token_ids[: len(token_ids) - cut]
    texts, rest = feed(PIECES, token_ids)
    assert "".join(texts) + rest == PIECES.decode(token_ids, skip_special_tokens=True)


def test_a_character_comes_with_the_token_that_completes_it():
    token_ids = BYTES.encode("é€").ids
    texts, rest = feed(BYTES, token_ids)
    assert (texts, rest) == (["", "é", "", "", "€"], "")


def test_what_is_incomplete_at_the_end_is_shown_as_the_tokenizer_shows_it():
    token_ids = BYTES.encode("a€").ids[:-1]
    texts, rest = feed(BYTES, token_ids)
    assert "".join(texts) == "a"
    assert rest == BYTES.decode(token_ids)[1:]
    assert "\ufffd" in rest


def test_special_tokens_and_eos_have_no_text():
    (end,) = BYTES.encode("<end>").ids
    (plain,) = BYTES.encode("x").ids
    assert feed(BYTES, [end, plain])[0] == ["", "x"]
    assert feed(BYTES, [plain], eos=[plain])[0] == [""]


def test_flush_gives_its_text_once():
    detokenizer = Detokenizer(BYTES)
    detokenizer.feed(BYTES.encode("€").ids[0])
    assert detokenizer.flush()
    assert detokenizer.flush() == ""
