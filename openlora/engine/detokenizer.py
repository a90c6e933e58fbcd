"""Token IDs → text, one token at a time, never half a character."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


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
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._num_chars = 0
        self._is_complete = True

    def feed(self, token_id: int) -> str:
        """The text that ``token_id`` completes, "" where it completes none."""
        if token_id in self._eos_token_ids:
            return ""
        self._token_ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._num_chars += len(text)
        self._is_complete = bool(text)
        return text

    def flush(self) -> str:
        """What the last tokens left incomplete, as the tokenizer shows it (�); for the end."""
        if self._is_complete:
            return ""
        text: str = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        rest = text[self._num_chars :]
        self._num_chars, self._is_complete = len(text), True
        return rest
