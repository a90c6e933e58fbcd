"""Token IDs → text, one token at a time, never half a character."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenTexts(dict[int, str]):
    """Texts of tokens that always decode alike, by token ID; "" for those that do not.

    A byte-level decoder joins its tokens' bytes, so a token whose bytes are whole characters has
    the same text behind any other that ended with one. Other decoders look at the neighbours.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        decoder = tokenizer.decoder
        kind = None if decoder is None else json.loads(decoder.__getstate__()).get("type")
        self._tokenizer = tokenizer
        self.is_byte_level = kind == "ByteLevel"

    def __missing__(self, token_id: int) -> str:
        text: str = ""
        if self.is_byte_level:
            text = self._tokenizer.decode([token_id], skip_special_tokens=True)
            if REPLACEMENT in text:
                text = ""
        self[token_id] = text
        return text


texts_of = lru_cache(maxsize=4)(TokenTexts)


class Detokenizer:
    """Decodes one output incrementally; special tokens and the end of the sequence have no text.

    The texts of all tokens and of ``flush`` joined are what the tokenizer decodes from the output
    as a whole. A token whose bytes do not complete a character has text ""; the character comes
    with the token that completes it. (One exception: a tokenizer with byte fallback replaces a
    whole run of byte tokens by � where its last ones are not UTF-8. Characters of the run that
    were complete before that stay as they were shown.)

    Args:
        tokenizer: the model's.
        eos_token_ids: tokens without text even where the tokenizer does not call them special.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._texts = texts_of(tokenizer)
        self._stream: DecodeStream | None = None  # None between whole characters, if texts serve
        self._token_ids: list[int] = []
        self._num_chars = 0
        self._is_complete = True

    def feed(self, token_id: int) -> str:
        """The text that ``token_id`` completes, "" where it completes none."""
        if token_id in self._eos_token_ids:
            return ""
        self._token_ids.append(token_id)
        if self._stream is None:
            text = self._texts[token_id]
            if text:
                self._num_chars += len(text)
                return text
            self._stream = DecodeStream(skip_special_tokens=True)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._num_chars += len(text)
        self._is_complete = bool(text)
        if text and self._texts.is_byte_level:
            self._stream = None
        return text

    def flush(self) -> str:
        """What the last tokens left incomplete, as the tokenizer shows it (�); for the end."""
        if self._is_complete:
            return ""
        text: str = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        rest = text[self._num_chars :]
        self._num_chars, self._is_complete = len(text), True
        return rest
