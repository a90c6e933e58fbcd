"""The kept connection: an error stands in its call's place, and what was lost is made anew."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import redis

from openlora.bench.chaos_proxy import Proxy, ProxyThread
from openlora.joblog import JobLog, redis_client
from openlora.joblog.script_channel import ScriptChannel
from openlora.joblog.scripts import Call, Script
from openlora.local import ServerProcess
from tests.joblog.jobs import a_job

pytestmark = pytest.mark.services

ECHO = Script("return ARGV[1]")
FAIL = Script("return redis.error_reply('ERR no')")


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    client = redis_client(redis_url)
    for script in (ECHO, FAIL):
        client.script_load(script.source)
    return client


def echo(text: str) -> Call:
    return Call(ECHO, [], [text])


def test_replies_are_in_the_order_of_the_calls_and_one_error_spoils_no_other(client) -> None:
    channel = ScriptChannel(client)
    replies = channel.run([echo("a"), Call(FAIL, [], []), echo("b")])
    assert (replies[0], replies[2]) == (b"a", b"b")
    assert isinstance(replies[1], redis.ResponseError)
    assert channel.run([echo("c")]) == [b"c"]


def test_a_connection_that_redis_closed_is_made_anew(client) -> None:
    channel = ScriptChannel(client)
    assert channel.run([echo("a")]) == [b"a"]
    client.client_kill_filter(_type="normal", skipme=True)
    assert channel.run([echo("b")]) == [b"b"]


def test_a_client_that_was_closed_connects_again(client) -> None:
    channel = ScriptChannel(client)
    assert channel.run([echo("a")]) == [b"a"]
    client.close()
    assert channel.run([echo("b")]) == [b"b"]


def test_a_part_is_sent_before_the_next_is_made(client) -> None:
    note = Script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
    client.script_load(note.source)
    client.delete("parts")

    def parts():
        yield [Call(note, ["parts"], [1])]
        deadline = time.monotonic() + 10
        while client.get("parts") != b"1":
            assert time.monotonic() < deadline
        yield []
        yield [Call(note, ["parts"], [2]), echo("c")]

    channel = ScriptChannel(client)
    assert channel.run_in_parts(parts()) == [1, 3, b"c"]
    assert channel.run([echo("d")]) == [b"d"]


def test_all_parts_go_again_over_a_connection_that_was_lost_between_them(client) -> None:
    def parts():
        yield [echo("a")]
        client.client_kill_filter(_type="normal", skipme=True)
        yield [echo("b")]

    channel = ScriptChannel(client)
    assert channel.run_in_parts(parts()) == [b"a", b"b"]


def test_replies_to_parts_that_were_never_finished_are_nobody_s(client) -> None:
    def parts():
        yield [echo("a")]
        raise ValueError("the maker failed")

    channel = ScriptChannel(client)
    with pytest.raises(ValueError, match="the maker failed"):
        channel.run_in_parts(parts())
    assert channel.run([echo("b")]) == [b"b"]


def test_threads_take_turns(client) -> None:
    channel, wrong = ScriptChannel(client), []

    def ask(name: str) -> None:
        for number in range(200):
            text = f"{name} {number}"
            if channel.run([echo(text)]) != [text.encode()]:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_server_that_is_not_there_is_an_error_each_time() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        channel = ScriptChannel(redis_client(f"redis://127.0.0.1:{unused.getsockname()[1]}/0"))
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                channel.run([echo("a")])


def test_a_connection_that_says_nothing_any_more_is_given_up_for_a_new_one(
    redis_server: ServerProcess,
) -> None:
    """As that of a server which died with its machine: streams stand still until then."""
    thread = ProxyThread()
    proxy = Proxy(thread, redis_server.spec.port)
    address = redis_server.address.replace(f":{redis_server.spec.port}/", f":{proxy.port}/")
    with redis_client(address) as client:
        log = JobLog(client)
        assert log.claim([a_job().job_id], "w")[0].status == "missing"
        proxy.hold_old()
        began = time.monotonic()
        assert log.claim([a_job().job_id], "w")[0].status == "missing"
        assert time.monotonic() - began < 15
    thread.close()
