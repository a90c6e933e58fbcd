"""Bad and unusual input against a whole system: each a clear answer, everything else unharmed."""

from __future__ import annotations

import json

import httpx
import pytest
from tokenizers import Tokenizer
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.integration.bad_client import Client, text_of, token_ids
from tests.workers.running import wait_until

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

GREEDY = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
SAMPLED = {"temperature": 1.5, "max_tokens": 24, "seed": 7, "ignore_eos": True}
UNKNOWN_JOB = "0" * 26


@pytest.fixture
def folder(up_folder):
    return up_folder


@pytest.fixture(scope="module")
def system(guarded_system):
    yield guarded_system
    assert guarded_system.process.poll() is None, guarded_system.output
    assert "was killed" not in guarded_system.output
    assert "exited with status" not in guarded_system.output


@pytest.fixture
def client(system):
    with Client(system.url, "one") as client:
        yield client


@pytest.fixture
def witness(system):
    """A stream of another client, which must be what it is without anything beside it."""
    ask = {"prompt": "the sea", "params": {**GREEDY, "max_tokens": 200}}
    with Client(system.url, "two") as other:
        alone = other.run("alone", **ask)
        other.generate("beside", **ask)
        yield
        assert text_of(other.until_end("beside")) == text_of(alone)


def generate(**fields) -> str:
    return json.dumps({"type": "generate", "request_id": "x", "prompt": "a", **fields})


def raw_generate(rest: str) -> str:
    """A frame with what ``json.dumps`` would not write."""
    return '{"type":"generate","request_id":"x","prompt":"a",' + rest + "}"


BAD_FRAMES = {
    "no JSON": "{",
    "nothing": "",
    "a list": "[]",
    "deep": "[" * 100_000,
    "no type": '{"request_id":"x"}',
    "unknown type": '{"type":"frobnicate","request_id":"x"}',
    "type is a number": '{"type":3,"request_id":"x"}',
    "no request_id": '{"type":"generate","prompt":"x"}',
    "request_id is a number": '{"type":"generate","request_id":3,"prompt":"x"}',
    "long request_id": generate(request_id="r" * 129),
    "prompt is a number": generate(prompt=3),
    "unknown field": generate(foo=1),
    "prompt and messages": generate(messages=[{"role": "user", "content": "a"}]),
    "neither": generate(prompt=None),
    "empty prompt": generate(prompt=""),
    "no messages": generate(prompt=None, messages=[]),
    "empty message": generate(prompt=None, messages=[{"role": "user", "content": ""}]),
    "unknown role": generate(prompt=None, messages=[{"role": "king", "content": "a"}]),
    "lone surrogate": raw_generate('"idempotency_key":"\\ud800"'),
    "adapter and adapters": generate(adapter="pirate", adapters=[{"id": "poet"}]),
    "adapter is a path": generate(adapter="../etc"),
    "weight NaN": raw_generate('"adapters":[{"id":"poet","weight":NaN}]'),
    "weight Infinity": raw_generate('"adapters":[{"id":"poet","weight":-Infinity}]'),
    "weight 1e999": raw_generate('"adapters":[{"id":"poet","weight":1e999}]'),
    "weight is text": generate(adapters=[{"id": "poet", "weight": "1"}]),
    "merge method": generate(merge={"method": "ties"}),
    "max_tokens 0": generate(params={"max_tokens": 0}),
    "temperature NaN": raw_generate('"params":{"temperature":NaN}'),
    "seed": generate(params={"seed": -1}),
    "empty stop string": generate(params={"stop": [""]}),
    "logprobs 21": generate(params={"logprobs": 21}),
    "priority": generate(priority="urgent"),
    "deadline 0": generate(deadline_s=0),
    "cancel of nothing": '{"type":"cancel","request_id":"x"}',
    "job_id is a path": '{"type":"resume","request_id":"x","job_id":"../../x","after":-1}',
    "after -2": json.dumps(
        {"type": "resume", "request_id": "x", "job_id": UNKNOWN_JOB, "after": -2}
    ),
}


def test_each_bad_frame_costs_its_sender_one_error(client, witness):
    for name, frame in BAD_FRAMES.items():
        client.send_text(frame)
        error = client.receive()
        assert (name, error["type"], error["code"]) == (name, "error", "invalid_request")
        assert error["message"], name
        assert error["retriable"] is False, name
    assert client.run("after", prompt="a", params=GREEDY)[-1]["type"] == "done"


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (generate(adapter="nobody"), "unknown_adapter"),
        (generate(prompt="word " * 40_000), "prompt_too_long"),
        (generate(prompt="x" * 10_000_000), "payload_too_large"),
        (generate(deadline_s=0.001), "deadline_exceeded"),
        (
            json.dumps({"type": "resume", "request_id": "x", "job_id": UNKNOWN_JOB, "after": -1}),
            "job_not_found",
        ),
    ],
)
def test_each_error_has_its_code_and_the_connection_lives(client, witness, frame, code):
    client.send_text(frame)
    while (answer := client.receive())["type"] == "accepted":
        pass
    assert (answer["type"], answer["code"]) == ("error", code)
    assert client.run("after", prompt="a", params=GREEDY)[-1]["type"] == "done"


def test_a_frame_over_16_mib_closes_only_its_connection(client, witness):
    client.send_text("x" * (16 * 2**20 + 1))
    with pytest.raises(ConnectionClosed) as closed:
        client.receive()
    assert closed.value.rcvd.code == 1009


def test_a_thousand_requests_on_one_connection_all_end(client, witness):
    names = [f"r{number}" for number in range(1000)]
    ask = {"prompt": "hi", "params": {"max_tokens": 1, "temperature": 0, "ignore_eos": True}}
    waiting = iter(names)
    ends: dict[str, str] = {}
    for name in (next(waiting) for _ in range(200)):
        client.generate(name, **ask)
    while len(ends) < len(names):
        frame = client.receive()
        assert frame["type"] in ("accepted", "token", "done"), frame
        if frame["type"] == "done":
            assert frame["request_id"] not in ends
            ends[frame["request_id"]] = frame["finish_reason"]
            if (name := next(waiting, None)) is not None:
                client.generate(name, **ask)
    assert set(ends.values()) == {"length"}


def test_unusual_requests_give_what_the_tokenizer_decodes(client, folder):
    tokenizer = Tokenizer.from_file(str(folder / "model/tokenizer.json"))
    prompts = ("👩‍🚀🏴‍☠️ é\u0301 \u0000 \u202e", "日本語", " ", "\n" * 50)
    for number, prompt in enumerate(prompts):
        frames = client.run(f"r{number}", prompt=prompt, params=SAMPLED)
        expected = tokenizer.decode(token_ids(frames), skip_special_tokens=True)
        assert text_of(frames) == expected, prompt
    one = client.run("one", prompt="a", params={**GREEDY, "max_tokens": 1, "logprobs": 20})
    (token,) = (frame for frame in one if frame["type"] == "token")
    assert len(token["top_logprobs"]) == 20
    assert token["top_logprobs"][0]["logprob"] == pytest.approx(token["logprob"])
    assert one[-1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 1}


def test_a_stop_string_across_tokens_is_cut_out(client):
    ask = {"prompt": "the sea", "adapter": "poet"}
    whole = text_of(client.run("whole", **ask, params={**GREEDY, "max_tokens": 40}))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 9]
    frames = client.run("cut", **ask, params={**GREEDY, "max_tokens": 40, "stop": [stop]})
    assert frames[-1]["finish_reason"] == "stop"
    assert text_of(frames) == whole[: whole.index(stop)]


def test_equal_seeds_give_equal_text_alone_and_in_a_batch(client):
    ask = {"prompt": "the sea", "adapter": "pirate", "params": SAMPLED}
    alone = text_of(client.run("alone", **ask))
    names = [f"r{number}" for number in range(6)]
    for number, name in enumerate(names):
        other = {"prompt": f"other {number}", "params": SAMPLED}
        client.generate(name, **(ask if number % 2 else other))
    streams = client.until_ends(names)
    assert [text_of(streams[name]) for name in names[1::2]] == [alone] * 3


def test_a_finished_job_is_resumed_from_anywhere_by_its_tenant_alone(client, system):
    frames = client.run("r", prompt="the sea", params=GREEDY)
    job_id, whole = frames[0]["job_id"], token_ids(frames)
    for after in (-1, 7, len(whole) - 1):
        name = f"again{after}"
        client.send(type="resume", request_id=name, job_id=job_id, after=after)
        again = client.until_end(name)
        assert again[0]["type"] == "accepted"
        assert token_ids(again) == whole[after + 1 :]
        assert again[-1]["finish_reason"] == "length"
    with Client(system.url, "two") as stranger:
        stranger.send(type="resume", request_id="r", job_id=job_id, after=-1)
        assert stranger.receive()["code"] == "job_not_found"


def test_an_idempotency_key_names_one_request(client):
    ask = {"params": GREEDY, "idempotency_key": "key"}
    first = client.run("first", prompt="a", **ask)
    again = client.run("again", prompt="a", **ask)
    assert again[0]["job_id"] == first[0]["job_id"]
    assert text_of(again) == text_of(first)
    assert client.run("other", prompt="b", **ask)[-1]["code"] == "invalid_request"


def test_a_cancel_ends_the_stream_whenever_it_comes(client):
    long = {"prompt": "a", "params": {**GREEDY, "max_tokens": 3000}}
    client.generate("at once", **long)
    client.send(type="cancel", request_id="at once")
    assert client.until_end("at once")[-1]["finish_reason"] == "cancelled"
    client.generate("running", **long)
    while client.receive()["type"] != "token":
        pass
    client.send(type="cancel", request_id="running")
    end = client.until_end("running")[-1]
    assert end["finish_reason"] == "cancelled"
    assert 0 < end["usage"]["completion_tokens"] < 3000
    client.send(type="cancel", request_id="running")
    assert client.run("after", prompt="a", params=GREEDY)[-1]["type"] == "done"


def running_of(system) -> int:
    """Requests in the engine, by the worker's heartbeat."""
    headers = {"Authorization": "Bearer one"}
    (worker,) = httpx.get(f"{system.url}/v1/workers", headers=headers).json()
    return worker["running"]


def test_the_job_of_a_client_that_left_is_cancelled_with_its_usage(system, client):
    with Client(system.url, "one") as leaving:
        # More than the engine says within the grace.
        leaving.generate("r", prompt="a", params={**GREEDY, "max_tokens": 30_000})
        while (frame := leaving.receive())["type"] != "token":
            pass
        wait_until(lambda: running_of(system) == 1)
        leaving.hang_up()
    wait_until(lambda: running_of(system) == 0, 60)
    job_id = frame["job_id"]
    client.send(type="resume", request_id=job_id, job_id=job_id, after=-1)
    end = client.until_end(job_id)[-1]
    assert end["finish_reason"] == "cancelled"
    assert 0 < end["usage"]["completion_tokens"] < 30_000


def test_keys_and_origins_are_checked_at_the_door(system):
    for headers, status, code in (
        ({}, 401, "unauthorized"),
        ({"Authorization": "Bearer three"}, 401, "unauthorized"),
        ({"Authorization": "Bearer one", "Origin": "http://evil.example"}, 403, "forbidden"),
    ):
        answer = httpx.get(f"{system.url}/v1/adapters", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        with pytest.raises(InvalidStatus) as refused, Client(system.url, headers=headers):
            pass
        assert refused.value.response.status_code == status
