"""The chaos benchmark's judgement: what a client writes down, how it is counted, and the proxy."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import pytest

from openlora.bench.chaos_faults import FAULTS
from openlora.bench.chaos_proxy import Proxy, ProxyThread
from openlora.bench.chaos_report import add_rows, fault_row
from openlora.bench.chaos_streams import Answer, Ask, Stream, asks

ANSWER = Answer((7, 8, 9), "abc")


def a_stream(*frames):
    stream = Stream(Ask("one", {}), ANSWER)
    stream.take({"type": "accepted", "job_id": "j"})
    for frame in frames:
        stream.take(frame)
    return stream


def token(index, token_id=None, text=None):
    token_id = ANSWER.token_ids[index] if token_id is None else token_id
    text = ANSWER.text[index] if text is None else text
    return {"type": "token", "index": index, "token_id": token_id, "text": text}


DONE = {"type": "done", "finish_reason": "length", "text": ""}
RESTARTED = {"type": "restarted"}


def kinds(stream):
    return [mishap.kind for mishap in stream.mishaps]


def test_the_right_answer_is_no_mishap_also_after_a_restart():
    assert kinds(a_stream(token(0), token(1), token(2), DONE)) == []
    again = a_stream(token(0), RESTARTED, token(0), token(1), token(2), DONE)
    assert kinds(again) == []
    assert len(again.restarts) == 1


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ((token(0), token(0), token(1), token(2), DONE), ["repeated"]),
        ((token(0), token(2), DONE), ["lost", "changed"]),
        ((token(0), token(1), DONE), ["lost"]),
        ((token(0), token(1, token_id=5), token(2), DONE), ["changed"]),
        ((token(0), token(1, text="x"), token(2), DONE), ["changed"]),
        ((token(0), {"type": "error", "code": "internal", "message": "m"}), ["failed"]),
        ((token(0), RESTARTED, token(1), token(2), DONE), ["lost", "changed"]),
    ],
)
def test_anything_else_is_written_down(frames, expected):
    assert kinds(a_stream(*frames)) == expected


def test_a_row_counts_what_happened_in_its_time():
    early, late = a_stream(token(0), token(0)), a_stream(token(0), token(1), token(2), DONE)
    early.times, late.times = [0.0, 1.0, 9.0], [8.0, 8.5, 8.6, 8.7]
    early.mishaps[0] = type(early.mishaps[0])(5.0, "repeated", "detail")
    late.ended_at = 8.7
    row = fault_row("f", [early, late], at=4.0, until=10.0)
    assert (row.hit, row.repeated, row.lost, row.is_clean) == (1, 1, 0, False)
    assert (row.worst_stall_s, row.worst_wait_s) == (8.0, 0.5)
    before = fault_row("f", [early, late], at=0.5, until=4.0)
    assert before.is_clean
    both = add_rows([before, row])
    assert (both.times, both.hit, both.repeated, both.worst_stall_s) == (2, 2, 1, 8.0)


def test_requests_differ_and_each_kind_is_among_them():
    made = asks(8, 5)
    assert len({str(ask.fields) for ask in made}) == 8
    assert any("messages" in ask.fields for ask in made)
    assert {ask.fields["params"]["temperature"] for ask in made} == {0, 0.9}
    assert len(FAULTS) == 16


@pytest.fixture
def proxied():
    """A proxy before a server that sends back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection):
        with connection, suppress(ConnectionResetError):  # cut on purpose
            while data := connection.recv(1000):
                connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    thread = ProxyThread()
    yield Proxy(thread, server.getsockname()[1])
    thread.close()
    server.close()


def dial(proxy):
    connection = socket.create_connection(("127.0.0.1", proxy.port))
    connection.settimeout(5)
    return connection


def test_the_proxy_forwards_delays_holds_and_cuts(proxied):
    with dial(proxied) as old:
        old.sendall(b"a")
        assert old.recv(10) == b"a"
        proxied.delay_s = 0.05
        started = time.monotonic()
        old.sendall(b"b")
        assert old.recv(10) == b"b"
        assert time.monotonic() - started > 0.09  # there and back
        proxied.delay_s = 0.0
        proxied.hold_old()
        old.sendall(b"c")
        with dial(proxied) as new:  # overtakes
            new.sendall(b"d")
            assert new.recv(10) == b"d"
        proxied.release()
        assert old.recv(10) == b"c"
        proxied.cut()
        with pytest.raises(ConnectionResetError):
            old.recv(10)


def test_a_server_that_is_killed_resets_the_clients_of_the_proxy():
    """With bytes unread a dead server resets its connections, instead of closing them."""
    server = socket.create_server(("127.0.0.1", 0))
    thread = ProxyThread()
    with dial(Proxy(thread, server.getsockname()[1])) as client:
        killed, _ = server.accept()
        client.sendall(b"a" * 1000)
        killed.recv(1)
        killed.close()
        with pytest.raises(ConnectionResetError):
            client.recv(10)
    thread.close()
    server.close()
