"""Frames survive any cut, and a sender never blocks."""

from __future__ import annotations

import socket

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from workers.framing import FrameSender, FrameSplitter, pack_frame, receive_frame


@given(st.lists(st.binary(max_size=300), max_size=20), st.randoms(use_true_random=False))
def test_frames_come_back_whole_whatever_the_cuts(messages, random):
    stream = b"".join(map(pack_frame, messages))
    splitter = FrameSplitter()
    bodies = []
    while stream:
        cut = random.randint(1, len(stream))
        bodies += splitter.feed(stream[:cut])
        stream = stream[cut:]
    assert [msgspec.msgpack.decode(body) for body in bodies] == messages


def test_a_full_socket_does_not_block_the_sender():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        sender = FrameSender(ours)
        message = b"x" * 50_000
        for _ in range(20):
            sender.send(message)
        assert sender.pending_bytes > 0
        splitter = FrameSplitter()
        received = []
        while len(received) < 20:
            received += receive_frame(theirs, splitter)
            sender.flush()
        assert sender.pending_bytes == 0
        assert all(msgspec.msgpack.decode(body) == message for body in received)


def test_a_closed_peer_ends_the_receiver():
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        assert receive_frame(theirs, FrameSplitter()) == []
