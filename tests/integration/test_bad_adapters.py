"""Bad adapters and bad messages on the topic against a whole system: refused, named, passed by."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import time
from pathlib import Path

import httpx
import pytest
import torch
from kafka import KafkaProducer
from safetensors.torch import load_file, save_file

from openlora.protocol.names import JOBS_TOPIC
from tests.integration.bad_client import Client, read_dead_letters, text_of

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

WEIGHTS = "adapter_model.safetensors"
PARTITION = 7
OPERATOR = {"Authorization": "Bearer root"}
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture
def folder(up_folder):
    return up_folder


@pytest.fixture(scope="module")
def system(guarded_system):
    yield guarded_system
    assert "exited with status" not in guarded_system.output


@pytest.fixture
def http(system):
    """As its operator."""
    with httpx.Client(base_url=system.url, headers=OPERATOR, timeout=30) as client:
        yield client


def change_tensors(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors, sorted(tensors))
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / WEIGHTS)


def wrong_shape(directory, _):
    change_tensors(directory, lambda t, names: t.update({names[0]: t[names[0]][:, :-3]}))


def wrong_rank(directory, _):
    change_tensors(directory, lambda t, names: t.update({names[0]: t[names[0]][:-3]}))


def missing_tensor(directory, _):
    change_tensors(directory, lambda t, names: t.pop(names[0]))


def not_a_number(directory, _):
    change_tensors(directory, lambda t, names: t[names[0]].fill_(torch.nan))


def other_base(directory, _):
    # every tensor fits the others, but of a model twice as wide
    def widen(tensors, names):
        for name in names:
            side = 1 if "lora_A" in name else 0
            tensors[name] = torch.cat([tensors[name]] * 2, dim=side)

    change_tensors(directory, widen)


def a_pickle(directory, _):
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def pickle_in_disguise(directory, _):
    (directory / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))


def truncated(directory, _):
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def symlink_out(directory, outside):
    (directory / WEIGHTS).rename(outside / "secret")
    (directory / WEIGHTS).symlink_to(outside / "secret")


def no_config(directory, _):
    (directory / "adapter_config.json").unlink()


def broken_config(directory, _):
    (directory / "adapter_config.json").write_text('{"r": NaN')


BREAKS = (
    wrong_shape,
    wrong_rank,
    missing_tensor,
    other_base,
    a_pickle,
    pickle_in_disguise,
    not_a_number,
    truncated,
    symlink_out,
    no_config,
    broken_config,
)


def test_each_unusable_adapter_is_refused_with_the_reason(system, http, folder, tmp_path):
    with Client(system.url, "root") as client:
        alone = client.run("alone", prompt="the sea", adapter="poet", params=GREEDY)
        for damage in BREAKS:
            directory, outside = tmp_path / damage.__name__, tmp_path / f"{damage.__name__}-out"
            shutil.copytree(folder / "adapters/poet", directory)
            outside.mkdir()
            damage(directory, outside)
            body = {"id": damage.__name__, "source": str(directory)}
            answer = http.post("/v1/adapters", json=body)
            error = answer.json().get("error", answer.json())
            seen = (damage.__name__, answer.status_code, error.get("code"))
            assert seen == (damage.__name__, 422, "adapter_failed"), error
            assert error["message"]
        known = {row["id"] for row in http.get("/v1/adapters").json()}
        assert known == {"pirate", "poet"}
        again = client.run("again", prompt="the sea", adapter="poet", params=GREEDY)
        assert text_of(again) == text_of(alone)


def test_merges_go_through_the_whole_system_and_bad_ones_fail_alone(system):
    """With weight 0 for the other one, the best approximation of the sum is the one itself."""
    pair = [{"id": "poet", "weight": 1.0}, {"id": "pirate", "weight": 0.0}]
    with Client(system.url, "root") as client:
        alone = client.run("alone", prompt="the sea", adapter="poet", params=GREEDY)
        merged = client.run(
            "svd", prompt="the sea", adapters=pair, merge={"method": "svd"}, params=GREEDY
        )
        assert text_of(merged) == text_of(alone)
        pruned = {"method": "dare_ties_svd", "density": 0.2, "seed": 3}
        first, again = (
            client.run(name, prompt="the sea", adapters=pair, merge=pruned, params=GREEDY)
            for name in ("first", "again")
        )
        assert text_of(first) == text_of(again)
        client.generate("bad", prompt="x", adapters=pair, merge={"method": "ties"})
        assert client.until_end("bad")[-1]["code"] == "invalid_request"


def test_content_that_changed_in_the_store_fails_its_requests_alone(system, http, folder, tmp_path):
    """Other bytes under a content's name: the worker that loads them finds out."""
    shutil.copytree(folder / "adapters/poet", tmp_path / "other")
    change_tensors(tmp_path / "other", lambda t, names: t[names[0]].mul_(1.5))
    body = {"id": "other", "source": str(tmp_path / "other")}
    record = http.post("/v1/adapters", json=body).json()
    not_a_number(Path(system.environ["OPENLORA_STORE"]) / record["hash"], None)
    with Client(system.url, "root") as client:
        client.generate("good", prompt="the sea", adapter="poet", params=GREEDY)
        mix = [{"id": "other", "weight": 0.5}, {"id": "poet", "weight": 0.5}]
        client.generate("bad", prompt="the sea", adapters=mix, params=GREEDY)
        streams = client.until_ends(["good", "bad"])
        assert text_of(streams["good"])
        assert streams["bad"][-1]["code"] == "adapter_failed"
        assert "is damaged" in streams["bad"][-1]["message"]
    http.delete("/v1/adapters/other").raise_for_status()


def test_an_adapter_that_appears_in_the_folder_is_served(system, http, folder):
    # Whole from the start: the folder is looked at all the time.
    shutil.copytree(folder / "adapters/poet", folder / "late")
    change_tensors(folder / "late", lambda t, names: t[names[0]].mul_(0.5))
    (folder / "late").rename(folder / "adapters/late")
    deadline = time.monotonic() + 30
    while http.get("/v1/adapters/late").status_code == 404:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with Client(system.url, "root") as client:
        assert text_of(client.run("late", prompt="the sea", adapter="late", params=GREEDY))
    assert "Adapter late is registered" in system.output
    shutil.rmtree(folder / "adapters/late")
    http.delete("/v1/adapters/late").raise_for_status()


def test_the_command_says_it_in_one_line(system, folder, tmp_path):
    shutil.copytree(folder / "adapters/poet", tmp_path / "cut")
    truncated(tmp_path / "cut", None)
    for source in (str(tmp_path / "cut"), str(tmp_path / "nowhere")):
        result = system.command("adapters", "add", "cut", source)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.startswith("openlora: ")
        assert result.stderr.count("\n") == 1, result.stderr


def kafka_of(system):
    """Address of the system's own broker, from its command line."""
    argv = next(c.cmdline() for c in system.children() if "--listener-url" in c.cmdline())
    return argv[argv.index("--listener-url") + 1].removeprefix("tcp://")


def test_bad_messages_go_to_the_dead_topic_and_the_partition_moves_on(system):
    job = {
        "tenant": "default",
        "created_ms": 0,
        "params": {"max_tokens": 4, "seed": 1},
        "prompt": "hi",
        "leased": False,
    }

    def value(number, **fields):
        return json.dumps({**job, "job_id": f"{number:026x}", **fields}).encode()

    adapter = {"id": "x", "version": 1, "hash": "ab" * 32}
    bad = {
        b"\xff\xfe no job": "not a valid job",
        b"": "not a valid job",
        b"{}": "job_id",
        value(1, params={"max_tokens": -5}): "max_tokens is -5",
        value(2, job_id="../../evil"): "no job ID",
        value(3, prompt=None, messages=[]): "",
        value(4, prompt="word " * 40_000): "context",
        value(5, adapters=[adapter]): "not in the store",
        value(6, adapters=[{**adapter, "hash": "../../etc"}]): "no content hash",
        value(7, merge={"method": "ties"}): "'ties'",
        value(8, prompt=None, messages=[{"role": "forbidden", "content": "x"}]): "no such role",
    }
    producer = KafkaProducer(bootstrap_servers=kafka_of(system), acks="all")
    offsets = [
        producer.send(JOBS_TOPIC, message, partition=PARTITION).get(10).offset for message in bad
    ]
    good = value(9)
    producer.send(JOBS_TOPIC, good, partition=PARTITION).get(10)
    producer.close()
    letters = read_dead_letters(kafka_of(system), PARTITION, offsets)
    for offset, (message, reason) in zip(offsets, bad.items(), strict=True):
        assert reason in letters[offset]["reason"]
        kept = base64.b64decode(letters[offset]["value"])
        if reason in ("not a valid job", "job_id", "no job ID", "max_tokens is -5"):
            assert kept == message
        else:
            assert json.loads(kept)["job_id"] == json.loads(message)["job_id"]
    with Client(system.url, "root") as client:
        client.send(type="resume", request_id="r", job_id=json.loads(good)["job_id"], after=-1)
        assert client.until_end("r")[-1]["finish_reason"] == "length"
