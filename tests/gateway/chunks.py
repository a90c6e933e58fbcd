"""Chunks in short, and what a stream made of them."""

from __future__ import annotations

import json
from typing import Any

from openlora.protocol.events import Chunk, End, Token

JOB_ID = "07" + "a" * 24


def chunk(first: int, texts: str, *, epoch: int = 1, end: bool = False, new: bool = False) -> Chunk:
    tokens = tuple(Token(ord(text), text) for text in texts)
    return Chunk(JOB_ID, epoch, first, tokens, End("stop") if end else None, new)


def told(frames: list[str]) -> str:
    """Frames in short: each token's text, "<" for restarted, "." for done; indices checked."""
    short = ""
    index: int | None = None
    for text in frames:
        frame: dict[str, Any] = json.loads(text)
        if frame["type"] == "token":
            assert index is None or frame["index"] == index
            index = frame["index"] + 1
            short += frame["text"]
        elif frame["type"] == "restarted":
            index = 0
            short += "<"
        else:
            short += "."
    return short
