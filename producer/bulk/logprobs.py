"""Log-probabilities of an answer's tokens in OpenAI's two shapes, and in the plain one. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from openlora.protocol.events import Candidate, Token

_UNKNOWN = "\ufffd"
"""A token that holds a part of a character has no text of its own."""


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, object]:
    """``choices[].logprobs`` of a chat completion."""
    return {
        "content": [
            {**_entry(token), "top_logprobs": [_entry(other) for other in token.top_logprobs]}
            for token in tokens
        ],
        "refusal": None,
    }


def text_logprobs(tokens: Sequence[Token]) -> dict[str, object]:
    """``choices[].logprobs`` of a text completion."""
    offsets, offset = [], 0
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {other.text: other.logprob for other in token.top_logprobs} for token in tokens
        ],
        "text_offset": offsets,
    }


def plain_logprobs(tokens: Sequence[Token]) -> list[dict[str, object]]:
    """As token frames of a websocket say it."""
    return [
        {
            "token_id": token.token_id,
            "text": token.text,
            "logprob": token.logprob,
            "top_logprobs": [
                {"token_id": other.token_id, "text": other.text, "logprob": other.logprob}
                for other in token.top_logprobs
            ],
        }
        for token in tokens
    ]


def _entry(token: Token | Candidate) -> dict[str, object]:
    known = _UNKNOWN not in token.text
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.text.encode()) if known else None,
    }
