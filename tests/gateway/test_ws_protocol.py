"""Frames built by hand are the frames that the websocket library builds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from gateway.ws_protocol import frame_head, join_frames


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 1023, 1024, 65535, 65536, 100_000])
def test_lengths_around_each_change_of_their_encoding(length: int) -> None:
    whole = Frame(Opcode.TEXT, b"x" * length).serialize(mask=False)
    assert frame_head(length) == whole[: len(whole) - length]
    assert join_frames(["x" * length]) == whole


@given(st.lists(st.text(max_size=300), max_size=20))
def test_any_texts(texts: list[str]) -> None:
    expected = [Frame(Opcode.TEXT, text.encode()).serialize(mask=False) for text in texts]
    assert join_frames(texts) == b"".join(expected)
