"""A request body of OpenAI's API → what a line runs with. Pure.

What changes the answer and is not done here is refused by name; what only labels a request
(user, metadata, store) is accepted.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from openlora.errors import InvalidRequest
from openlora.protocol.bulk import LineParams
from openlora.protocol.jobs import Message
from openlora.sampling_params import MAX_LOGPROBS

CHAT_URL = "/v1/chat/completions"
TEXT_URL = "/v1/completions"


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One text of a message's content."""

    text: str
    type: Literal["text"]


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message as OpenAI writes it; ``content`` may come in parts."""

    role: str
    content: str | tuple[TextPart, ...] | None = None
    name: str | None = None

    def plain(self) -> Message:
        """The same message with its parts joined."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return Message(self.role, content)


class OpenAIBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What chat and text completions share; None is OpenAI's way to say "default"."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    n: int | None = None
    stream: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    # not OpenAI's, but taken by most servers beside theirs
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None

    def _params(self, alternatives: int | None) -> LineParams:
        """The sampling settings. Raises InvalidRequest for what a batch line cannot ask.

        ``alternatives``: to tell of each token; 0: its own logprob alone; None: not even that.
        """
        if self.n not in (None, 1):
            raise InvalidRequest(f"n is {self.n}; a batch line gives one answer, so send n lines")
        if self.stream:
            raise InvalidRequest("stream is true; a batch has no stream: leave it out")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        given: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": stop,
            "ignore_eos": self.ignore_eos,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logprobs": None if alternatives is None else max(1, alternatives),
        }
        return LineParams(**{name: value for name, value in given.items() if value is not None})


class ChatBody(OpenAIBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/v1/chat/completions``."""

    messages: tuple[ChatMessage, ...]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def alternatives(self) -> int | None:
        """Alternatives to tell of each token; 0: its own logprob alone; None: not even that."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def params(self) -> LineParams:
        """The sampling settings; ``max_completion_tokens`` is the newer name of max_tokens.

        Raises:
            InvalidRequest: for what a batch line cannot ask.
        """
        if self.top_logprobs is not None:
            if not self.logprobs:
                raise InvalidRequest("top_logprobs needs logprobs: true beside it")
            _check_alternatives("top_logprobs", self.top_logprobs)
        params = self._params(self.alternatives)
        if self.max_completion_tokens is None:
            return params
        if self.max_tokens is not None:
            raise InvalidRequest("both of max_tokens and max_completion_tokens given; send one")
        return msgspec.structs.replace(params, max_tokens=self.max_completion_tokens)


class TextBody(OpenAIBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of ``/v1/completions``."""

    prompt: str
    logprobs: int | None = None

    @property
    def alternatives(self) -> int | None:
        """As ``ChatBody.alternatives``."""
        return self.logprobs

    def params(self) -> LineParams:
        """The sampling settings. Raises InvalidRequest for what a batch line cannot ask."""
        if self.logprobs is not None:
            _check_alternatives("logprobs", self.logprobs)
        return self._params(self.logprobs)


def _check_alternatives(name: str, value: int) -> None:
    if not 0 <= value <= MAX_LOGPROBS:
        raise InvalidRequest(f"{name} is {value}; it must be in [0, {MAX_LOGPROBS}]")


def chat_answer(
    job_id: str,
    created_s: int,
    model: str,
    text: str,
    reason: str,
    usage: dict[str, int],
    logprobs: dict[str, object] | None,
) -> dict[str, object]:
    """A chat completion object."""
    message = {"role": "assistant", "content": text}
    return {
        "id": f"chatcmpl-{job_id}",
        "object": "chat.completion",
        "created": created_s,
        "model": model,
        "choices": [
            {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}
        ],
        "usage": usage,
    }


def text_answer(
    job_id: str,
    created_s: int,
    model: str,
    text: str,
    reason: str,
    usage: dict[str, int],
    logprobs: dict[str, object] | None,
) -> dict[str, object]:
    """A text completion object."""
    return {
        "id": f"cmpl-{job_id}",
        "object": "text_completion",
        "created": created_s,
        "model": model,
        "choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}],
        "usage": usage,
    }
