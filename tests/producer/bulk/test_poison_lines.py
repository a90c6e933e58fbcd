"""A line that kills the engine: it alone is given up; all others of its batch are answered once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from kafka import KafkaConsumer, TopicPartition

from openlora.protocol.bulk import line_job_id
from openlora.protocol.names import DEAD_TOPIC
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from producer.bulk.records import BatchState
from tests.producer.bulk.running import BulkSystem, running_bulk

pytestmark = [pytest.mark.services, pytest.mark.timeout(170)]

POISON = "this one holds a soft hyphen: \u00ad"


def lines(count: int, poison: tuple[int, ...]) -> bytes:
    """Over adapters a, b and c, the poisonous lines among them."""
    prompts = [POISON if n in poison else f"say {n}" for n in range(1, count + 1)]
    return b"".join(
        json.dumps({"prompt": prompt, "max_tokens": 20, "adapter": "abc"[n % 3]}).encode() + b"\n"
        for n, prompt in enumerate(prompts, start=1)
    )


def wait_over(bulk: BulkSystem, batch_id: str) -> tuple[BatchState, int]:
    """Start the worker again whenever it dies, as ``openlora up`` does; → (state, deaths)."""
    deadline = time.monotonic() + 120
    deaths = 0
    while (state := bulk.state(batch_id)).phase != "over":
        assert time.monotonic() < deadline, (state, bulk.system.workers[-1].log_text()[-3000:])
        if bulk.system.workers[-1].process.poll() is not None:
            deaths += 1
            # it may die again before anybody sees that it is ready
            bulk.system.start_worker("--engine", "scripted:200", ready=False)
        time.sleep(0.05)
    return state, deaths


def dead_letters(bulk: BulkSystem) -> dict[str, dict[str, object]]:
    consumer = KafkaConsumer(
        bootstrap_servers=bulk.broker.address,
        auto_offset_reset="earliest",
        consumer_timeout_ms=2000,
    )
    consumer.assign([TopicPartition(DEAD_TOPIC, 0)])
    letters = [json.loads(message.value) for message in consumer]
    consumer.close()
    assert len({letter["job_id"] for letter in letters}) == len(letters)
    return {letter["job_id"]: letter for letter in letters}


@pytest.mark.long
def test_only_the_line_that_kills_alone_is_given_up(tmp_path: Path) -> None:
    with running_bulk(tmp_path) as bulk:
        bulk.register("a", "b", "c")
        bulk.start_worker("scripted:200")
        bulk.start_producer()
        batch_id = bulk.submit(lines(150, (70,)))
        state, deaths = wait_over(bulk, batch_id)
        assert (state.total, state.done, state.failed) == (150, 150, 1)
        results = [json.loads(line) for line in bulk.results(batch_id)]
        assert [result["line"] for result in results] == list(range(1, 151))
        [failed] = [result for result in results if "error" in result]
        assert failed["line"] == 70
        assert failed["error"]["code"] == "internal"
        assert "ended the engine 2 times when nothing else ran" in failed["error"]["message"]
        job_id = line_job_id(batch_id, state.record.input_hash, 70)
        letters = dead_letters(bulk)
        assert list(letters) == [job_id]
        assert deaths == 3
        assert [crash["jobs"] for crash in letters[job_id]["story"]][1:] == [1, 1]


@pytest.mark.slow
def test_an_adapter_whose_lines_kill_is_quarantined_and_its_other_lines_fail(
    tmp_path: Path,
) -> None:
    with running_bulk(tmp_path) as bulk:
        bulk.register("a", "b")
        digest = "dead" * 16
        (bulk.directory / "store" / digest).mkdir(parents=True)
        AdapterRegistry(bulk.system.redis).put(
            AdapterRecord("c", 0, digest, 8, ("q_proj",), "", 1, "test", 1)
        )
        bulk.start_worker("scripted:200")
        bulk.start_producer()
        batch_id = bulk.submit(lines(150, ()))
        state, deaths = wait_over(bulk, batch_id)
        results = [json.loads(line) for line in bulk.results(batch_id)]
        assert [result["line"] for result in results] == list(range(1, 151))
        codes = [result["error"]["code"] for result in results if "error" in result]
        assert {r["adapter"] for r in results if "error" not in r} == {"a", "b"}
        assert sorted(set(codes)) == ["adapter_failed", "internal"]
        assert (state.failed, codes.count("internal")) == (50, 2)
        assert deaths <= 5
        assert len(dead_letters(bulk)) == 2
