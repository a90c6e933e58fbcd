"""Tokenizers of adapters that bring tokens of their own."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from openlora.errors import AdapterFailed
from workers.tokenizer import PromptTokenizer, is_tokenizers_own

if TYPE_CHECKING:
    import tokenizers

KEPT = 16
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class ChosenTokenizer:
    """What a request's texts are read and written with.

    Attributes:
        prompt: makes token IDs of prompts; its ``backend`` makes texts of answers.
        eos_token_ids: that end an answer beside the model's.
    """

    prompt: PromptTokenizer
    eos_token_ids: tuple[int, ...] = ()


class AdapterTokenizers:
    """Finds a request's tokenizer. Used by one thread.

    Args:
        base: the model's; its chat template serves adapters as well.
    """

    def __init__(self, base: PromptTokenizer) -> None:
        self._base = ChosenTokenizer(base)
        self._known = _tokens(base.backend)
        self._model = _Saved.of(base.backend.to_str(pretty=True).encode()).model_digest
        # What cannot be read stays unreadable: a directory is named by its content.
        self._kept: OrderedDict[Path, ChosenTokenizer | AdapterFailed] = OrderedDict()

    def of(self, directories: Iterable[Path]) -> ChosenTokenizer:
        """That of the first of these adapters that has one with other tokens than the model's.

        More than one such adapter cannot be in a request: the engine refuses it.

        Raises:
            AdapterFailed: a tokenizer file cannot be read.
        """
        for directory in directories:
            if (directory / TOKENIZER_FILE).is_file():
                chosen = self._load(directory)
                if chosen is not self._base:
                    return chosen
        return self._base

    def _load(self, directory: Path) -> ChosenTokenizer:
        chosen = self._kept.get(directory)
        if chosen is None:
            try:
                chosen = self._read(directory)
            except AdapterFailed as error:
                chosen = error
            self._kept[directory] = chosen
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(directory)
        if isinstance(chosen, AdapterFailed):
            raise AdapterFailed(chosen.message)
        return chosen

    def _read(self, directory: Path) -> ChosenTokenizer:
        from tokenizers import Tokenizer

        try:
            data = (directory / TOKENIZER_FILE).read_bytes()
            backend = self._of_the_models_kind(data) or Tokenizer.from_buffer(data)
            if _tokens(backend) == self._known:
                return self._base
            eos = _eos_token(directory / CONFIG_FILE)
        except BaseException as error:
            if not is_tokenizers_own(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise AdapterFailed(
                f"the adapter's {TOKENIZER_FILE} cannot be read: {reason}"
            ) from error
        _cut_as(backend, self._base.prompt.backend)
        found = None if eos is None else backend.token_to_id(eos)
        prompt = self._base.prompt.with_backend(backend)
        return ChosenTokenizer(prompt, () if found is None else (found,))

    def _of_the_models_kind(self, data: bytes) -> tokenizers.Tokenizer | None:
        """The model's tokenizer with other added tokens, where the file is no more than that: it
        shares the model's vocabulary, which takes a quarter of a second to build, in which the
        worker's streams would stand still. None where it is something else."""
        from tokenizers import AddedToken, Tokenizer

        try:
            saved = _Saved.of(data)
        except msgspec.MsgspecError:
            return None  # for the library to say what is wrong
        if saved.model_digest != self._model:
            return None
        base = self._base.prompt.backend
        backend = Tokenizer(base.model)
        backend.normalizer = base.normalizer
        added = sorted(saved.added_tokens, key=lambda token: token.id)
        for token in added:
            options = msgspec.structs.asdict(token)
            del options["id"], options["content"]
            backend.add_tokens([AddedToken(token.content, **options)])
        found = {number: t.content for number, t in backend.get_added_tokens_decoder().items()}
        return backend if found == {token.id: token.content for token in added} else None


class _Added(msgspec.Struct):
    """A token beside the vocabulary, as tokenizer.json has it."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Saved(msgspec.Struct):
    """The parts of a tokenizer.json that tell tokenizers of one model apart."""

    model: msgspec.Raw
    added_tokens: tuple[_Added, ...] = ()

    @classmethod
    def of(cls, data: bytes) -> _Saved:
        """Raises MsgspecError: it is no such file."""
        return msgspec.json.decode(data, type=cls)

    @property
    def model_digest(self) -> bytes:
        """Of the vocabulary and its merges."""
        return hashlib.sha256(bytes(self.model)).digest()


def _tokens(backend: tokenizers.Tokenizer) -> tuple[int, frozenset[tuple[int, str]]]:
    """What tells tokenizers of one family apart: how many tokens, and which were added."""
    added = backend.get_added_tokens_decoder()
    return backend.get_vocab_size(), frozenset((i, token.content) for i, token in added.items())


def _cut_as(backend: tokenizers.Tokenizer, base: tokenizers.Tokenizer) -> None:
    """An adapter brings tokens, nothing else. Patterns and templates of its file could run for
    ever, fill the memory or end the process, which serves other tenants as well.

    Raises:
        AdapterFailed: it is of another kind than the model's.
    """
    kind, wanted = type(backend.model).__name__, type(base.model).__name__
    if kind != wanted:
        raise AdapterFailed(
            f"the adapter's {TOKENIZER_FILE} is of kind {kind}, the model's of kind {wanted}; save "
            "the model's tokenizer with the tokens that were added"
        )
    backend.no_padding()
    backend.no_truncation()
    backend.normalizer, backend.pre_tokenizer = base.normalizer, base.pre_tokenizer
    backend.post_processor, backend.decoder = base.post_processor, base.decoder


def _eos_token(path: Path) -> str | None:
    if not path.is_file():
        return None
    token = json.loads(path.read_bytes()).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
