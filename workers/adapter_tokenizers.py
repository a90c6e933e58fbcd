"""Tokenizers of adapters that bring tokens of their own."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from openlora.errors import AdapterFailed
from workers.tokenizer import PromptTokenizer, is_tokenizers_own

if TYPE_CHECKING:
    import tokenizers

K = TypeVar("K")
V = TypeVar("V")

KEPT = 16
KEPT_AS_MODELS = 1 << 16
"""Directories of which no more is kept than that the model's tokenizer serves them."""
SIZE_LIMIT = 4
"""Times the model's: what an adapter's file may have. While a vocabulary is built the library keeps
the interpreter to itself, 0.4 s for 50,000 tokens, in which the worker's streams stand still."""
SPARE_BYTES = 1 << 20
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
        saved = base.backend.to_str(pretty=True).encode()
        self._most_bytes = SIZE_LIMIT * len(saved) + SPARE_BYTES
        self._model = _Saved.of(saved).model_digest
        self._vocabulary = b""  # its digest, made when it is first asked for
        self._as_models: OrderedDict[Path, None] = OrderedDict()
        # Adapters of one training bring the same file: it is read once for all of them.
        self._backends: OrderedDict[bytes, tokenizers.Tokenizer] = OrderedDict()
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
        if directory in self._as_models:
            return self._base
        chosen = self._kept.get(directory)
        if chosen is None:
            try:
                chosen = self._read(directory)
            except AdapterFailed as error:
                chosen = error
            if chosen is self._base:
                _keep(self._as_models, directory, None, KEPT_AS_MODELS)
                return chosen
        _keep(self._kept, directory, chosen, KEPT)
        if isinstance(chosen, AdapterFailed):
            raise AdapterFailed(chosen.message)
        return chosen

    def _read(self, directory: Path) -> ChosenTokenizer:
        path = directory / TOKENIZER_FILE
        try:
            size = path.stat().st_size
            if size > self._most_bytes:
                raise AdapterFailed(
                    f"the adapter's {TOKENIZER_FILE} has {size} bytes, of which {self._most_bytes} "
                    "are read: save the model's tokenizer with the tokens that were added"
                )
            backend = self._backend(path.read_bytes())
            if _tokens(backend) == self._known:
                return self._base
            eos = _eos_token(directory / CONFIG_FILE)
        except AdapterFailed:
            raise
        except BaseException as error:
            if not is_tokenizers_own(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise AdapterFailed(
                f"the adapter's {TOKENIZER_FILE} cannot be read: {reason}"
            ) from error
        found = None if eos is None else backend.token_to_id(eos)
        prompt = self._base.prompt.with_backend(backend)
        return ChosenTokenizer(prompt, () if found is None else (found,))

    def _backend(self, data: bytes) -> tokenizers.Tokenizer:
        """What a file describes, cut to the tokens that it brings."""
        from tokenizers import Tokenizer

        digest = hashlib.sha256(data).digest()
        backend = self._backends.get(digest)
        if backend is None:
            backend = self._of_the_models_kind(data) or Tokenizer.from_buffer(data)
            _cut_as(backend, self._base.prompt.backend)
        _keep(self._backends, digest, backend, KEPT)
        return backend

    def _of_the_models_kind(self, data: bytes) -> tokenizers.Tokenizer | None:
        """The model's tokenizer with other added tokens, where the file is no more than that: it
        shares the model's vocabulary, which takes a quarter of a second to build, in which the
        worker's streams would stand still. None where it is something else."""
        from tokenizers import AddedToken, Tokenizer

        try:
            saved = _Saved.of(data)
            if not self._is_the_models(saved):
                return None
        except (msgspec.MsgspecError, TypeError):
            return None  # for the library to say what is wrong
        base = self._base.prompt.backend
        backend = Tokenizer(base.model)
        backend.normalizer = base.normalizer
        added = sorted(saved.added_tokens, key=lambda token: token.id)
        # At once: with each call the library prepares its search for all of them anew.
        backend.add_tokens([AddedToken(token.content, **token.options) for token in added])
        found = {number: t.content for number, t in backend.get_added_tokens_decoder().items()}
        return backend if found == {token.id: token.content for token in added} else None

    def _is_the_models(self, saved: _Saved) -> bool:
        """Whether the vocabulary and its merges are the model's, whoever wrote them: versions of
        the library save one and the same in several ways."""
        if saved.model_digest == self._model:
            return True
        if not self._vocabulary:
            own = self._base.prompt.backend.to_str(pretty=False).encode()
            self._vocabulary = _Saved.of(own).vocabulary_digest
        return saved.vocabulary_digest == self._vocabulary


class _Added(msgspec.Struct):
    """A token beside the vocabulary, as tokenizer.json has it."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    @property
    def options(self) -> dict[str, bool]:
        """How it is found in a text."""
        options = msgspec.structs.asdict(self)
        del options["id"], options["content"]
        return options


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
        """Of the vocabulary and its merges, as they are written."""
        return hashlib.sha256(bytes(self.model)).digest()

    @property
    def vocabulary_digest(self) -> bytes:
        """Of the same, however they are written: merges as texts or pairs, what is off or none
        there or left out. Raises MsgspecError: it is no object."""
        model = msgspec.json.decode(self.model, type=dict[str, Any])
        merges = model.get("merges")
        if isinstance(merges, list):
            model["merges"] = [m if isinstance(m, str) else " ".join(map(str, m)) for m in merges]
        said = {name: value for name, value in model.items() if value not in (None, False, "")}
        return hashlib.sha256(msgspec.json.encode(said, order="sorted")).digest()


def _keep(kept: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)


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
