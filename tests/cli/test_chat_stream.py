"""The terminal's stream against a scripted server: lost connections, restarts, cancels, errors."""

from __future__ import annotations

import asyncio
import json

import pytest
from websockets.asyncio.server import serve

from openlora.commands.chat import Chat, parse_mix
from openlora.commands.chat_stream import AnswerStream
from openlora.commands.config import ClientConfig
from openlora.errors import InvalidRequest, RateLimited, SetupError, UnknownAdapter

DONE = {
    "type": "done",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 1, "completion_tokens": 3},
    "timings": {"queue_ms": 1, "ttft_ms": 2, "total_ms": 3},
    "text": "!",
}
ACCEPTED = {"type": "accepted", "job_id": "j1", "adapters": []}
DROP = "drop"
WAIT_FOR_CANCEL = "wait"


def token(index, text):
    return {"type": "token", "job_id": "j1", "index": index, "token_id": index, "text": text}


def run(script, act=None):
    """Stream against a server that plays ``script``: one list of frames per connection.

    Returns what was shown, the answer or error, and the first frame of each connection.
    """
    opening, shown = [], []
    connections = iter(script)

    async def play(socket):
        opening.append(json.loads(await socket.recv()))
        for frame in next(connections):
            if frame == DROP:
                socket.transport.abort()
                return
            if frame == WAIT_FOR_CANCEL:
                assert json.loads(await socket.recv())["type"] == "cancel"
                continue
            await socket.send(json.dumps({"request_id": opening[0]["request_id"], **frame}))
        await socket.wait_closed()

    async def main():
        async with serve(play, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            stream = AnswerStream(
                ClientConfig(f"http://127.0.0.1:{port}", None),
                on_text=lambda text: (shown.append(text), act and act(stream, text)),
                on_restart=lambda: shown.append("<restart>"),
            )
            return await asyncio.wait_for(stream.run([{"role": "user", "content": "hi"}], {}), 20)

    answer = asyncio.run(main())
    return "".join(shown), answer, opening


def test_an_answer_is_shown_as_it_comes():
    shown, answer, opening = run([[ACCEPTED, token(0, "a"), token(1, ""), token(2, "b"), DONE]])
    assert shown == answer.text == "ab!"
    assert (answer.finish_reason, answer.completion_tokens) == ("stop", 3)
    assert opening[0]["messages"] == [{"role": "user", "content": "hi"}]


def test_a_lost_connection_resumes_behind_the_last_token():
    shown, answer, opening = run(
        [
            [ACCEPTED, token(0, "a") | {"epoch": 7}, token(1, "b"), DROP],
            [ACCEPTED, token(2, "c"), DONE],
        ]
    )
    assert shown == answer.text == "abc!"
    asked = {"type": "resume", "request_id": "chat", "job_id": "j1", "after": 1, "epoch": 7}
    assert opening[1] == asked


def test_a_connection_lost_before_accepted_asks_again_with_the_same_key():
    _, answer, opening = run([[DROP], [ACCEPTED, token(0, "a"), DONE]])
    assert answer.text == "a!"
    assert opening[0] == opening[1]
    assert opening[0]["idempotency_key"]


def test_a_restarted_job_begins_again():
    shown, answer, _ = run([[ACCEPTED, token(0, "x"), {"type": "restarted"}, token(0, "a"), DONE]])
    assert shown == "x<restart>a!"
    assert answer.text == "a!"


def test_a_cancel_ends_with_the_server_s_word():
    cancels = []
    script = [[ACCEPTED, token(0, "a"), WAIT_FOR_CANCEL, {**DONE, "finish_reason": "cancelled"}]]

    def cancel(stream, text):
        if not cancels:
            cancels.append(asyncio.create_task(stream.cancel()))

    _, answer, _ = run(script, cancel)
    assert answer.finish_reason == "cancelled"


def test_a_cancel_survives_a_lost_connection():
    cancels = []
    script = [
        [ACCEPTED, token(0, "a"), WAIT_FOR_CANCEL, DROP],
        [WAIT_FOR_CANCEL, ACCEPTED, {**DONE, "finish_reason": "cancelled"}],
    ]

    def cancel(stream, text):
        if not cancels:
            cancels.append(asyncio.create_task(stream.cancel()))

    _, answer, opening = run(script, cancel)
    assert answer.finish_reason == "cancelled"
    assert opening[1]["type"] == "resume"


def test_the_server_s_error_comes_back_as_its_class():
    error = {"type": "error", "code": "unknown_adapter", "message": "no poet", "retriable": False}
    with pytest.raises(UnknownAdapter, match="no poet"):
        run([[error]])
    busy = {"type": "error", "code": "rate_limited", "message": "slow", "retry_after_ms": 5}
    with pytest.raises(RateLimited) as raised:
        run([[busy]])
    assert raised.value.retry_after_ms == 5


def test_nobody_at_the_url_is_said_at_once():
    stream = AnswerStream(
        ClientConfig("http://127.0.0.1:1", None), on_text=print, on_restart=lambda: None
    )
    with pytest.raises(SetupError, match="no OpenLoRA answers at http"):
        asyncio.run(stream.run([], {}))


def test_a_mix_is_read_and_shown():
    mix = parse_mix(["pirate=0.6", "a=b=-1"])
    assert mix == [{"id": "pirate", "weight": 0.6}, {"id": "a=b", "weight": -1.0}]
    config = ClientConfig("http://127.0.0.1:1", None)
    assert Chat(config, {}, mix).voice == "0.6·pirate+-1·a=b"
    assert Chat(config, {}, [{"id": "poet"}]).voice == "poet"
    assert Chat(config, {}, []).voice == "base"


@pytest.mark.parametrize("words", [["pirate"], ["=1"], ["pirate=much"], []])
def test_a_bad_mix_is_named(words):
    with pytest.raises(InvalidRequest, match=r"for example"):
        parse_mix(words)
