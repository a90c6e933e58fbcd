"""Prompts to token IDs, with the model's own tokenizer and chat template."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from openlora.errors import InvalidRequest, OpenLoRAError, PromptTooLong, SetupError
from openlora.protocol.jobs import Message

if TYPE_CHECKING:
    import tokenizers

HEAD_CHARS_PER_TOKEN = 8
"""Twice as many as a token has in most texts: what this much of a prompt does not fill the context
with is read whole."""
CUT_TOKENS = 256
"""So many more tokens a text may have where it is cut off in the middle of one."""


class Prompted(Protocol):
    """What asks for a completion: a job, or a line of a bundle."""

    @property
    def prompt(self) -> str | None:
        """A text to continue, or None."""

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """A conversation to answer, or None."""


def is_tokenizers_own(error: BaseException) -> bool:
    """Whether the tokenizers library raises such errors: plain ones, and panics of its Rust code,
    which are no ``Exception`` and have no class to import."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class PromptTokenizer:
    """The model's tokenizer. ``backend`` is the ``tokenizers.Tokenizer`` that detokenises.

    Args:
        model: directory or hub ID.

    Raises:
        SetupError: there is no usable tokenizer.
    """

    def __init__(self, model: str) -> None:
        try:
            self._tokenizer: Any = _load(model)
        except (OSError, ValueError, ImportError) as error:
            first_line = str(error).partition("\n")[0]
            raise SetupError(f"no usable tokenizer in {model}: {first_line}") from error
        if not self._tokenizer.is_fast:
            raise SetupError(f"the tokenizer of {model} has no tokenizer.json; convert it first")
        self.backend = cast("tokenizers.Tokenizer", self._tokenizer.backend_tokenizer)

    def with_backend(self, backend: tokenizers.Tokenizer) -> PromptTokenizer:
        """The same chat template over other tokens."""
        other = copy.copy(self)
        other.backend = backend
        return other

    def encode(self, job: Prompted) -> list[int]:
        """The job's prompt, or its messages in the chat template with the assistant's turn open.

        Raises:
            InvalidRequest: the model has no chat template, the template refuses the messages, the
                tokenizer cannot read the text, or nothing is left to prefill.
        """
        is_prompt = job.messages is None
        with _own_errors():
            token_ids: list[int] = self.backend.encode(
                self._text(job), add_special_tokens=is_prompt
            ).ids
        return _some(token_ids)

    def encode_aside(self, job: Prompted, max_tokens: int) -> list[int]:
        """As ``encode``, for a thread beside others: they run on meanwhile.

        Raises:
            InvalidRequest: as ``encode``.
            PromptTooLong: the beginning alone has more than ``max_tokens``; the rest is not read.
        """
        is_prompt = job.messages is None
        text = self._text(job)
        head = text[: HEAD_CHARS_PER_TOKEN * max_tokens]
        with _own_errors():
            if len(head) < len(text):
                tokens = len(self._encode_released(head, is_prompt))
                if tokens > max_tokens + CUT_TOKENS:
                    raise PromptTooLong(
                        f"the prompt has more than {max_tokens} tokens, which is what the model's "
                        "context holds; shorten it"
                    )
            return _some(self._encode_released(text, is_prompt))

    def _encode_released(self, text: str, is_prompt: bool) -> list[int]:
        """A list of texts is read without the interpreter's lock, a text by itself is not."""
        (encoded,) = self.backend.encode_batch([text], add_special_tokens=is_prompt)
        token_ids: list[int] = encoded.ids
        return token_ids

    def _text(self, job: Prompted) -> str:
        return job.prompt or "" if job.messages is None else self._render(job)

    def _render(self, job: Prompted) -> str:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; send prompt instead of messages")
        messages = [
            {"role": message.role, "content": message.content} for message in job.messages or ()
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        # a template is code of the model's maker: its own errors are of any of these kinds
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(f"the chat template refuses the messages: {error}") from error
        return cast(str, text)


def _some(token_ids: list[int]) -> list[int]:
    if not token_ids:
        raise InvalidRequest("the prompt is empty; send at least one character")
    return token_ids


@contextmanager
def _own_errors() -> Iterator[None]:
    try:
        yield
    except OpenLoRAError:
        raise
    except BaseException as error:
        if not is_tokenizers_own(error):
            raise
        raise InvalidRequest(f"the tokenizer cannot read the text: {error}") from error


def _load(model: str) -> Any:
    path = Path(model)
    if (path / "tokenizer.json").is_file():
        # All there is to know is in that file. AutoTokenizer would import torch to find out which
        # class stands for it: seconds and 200 MB that the I/O process has no other use for.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(model)
    from transformers import AutoTokenizer

    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return AutoTokenizer.from_pretrained(model)
