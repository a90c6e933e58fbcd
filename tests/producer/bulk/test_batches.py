"""Batches from end to end, on real servers and processes, through the doors that users take."""

from __future__ import annotations

import asyncio
import io
import json
import time
from pathlib import Path

import httpx
import openai
import pytest

from gateway.adapter_collector import AdapterCollector
from openlora.adapters.store import AdapterStore
from openlora.joblog import AsyncJobLog, async_redis_client
from openlora.registry import AsyncAdapterRegistry
from tests.gateway.peft_dirs import write_adapter
from tests.producer.bulk.running import MODEL, BulkSystem
from tests.workers.running import wait_until

pytestmark = pytest.mark.services


def plain(number: int, **fields: object) -> dict[str, object]:
    return {"prompt": f"say {number}", "max_tokens": 3, **fields}


def jsonl(*lines: object) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def openai_line(custom_id: str, model: str = MODEL, **body: object) -> dict[str, object]:
    messages = [{"role": "user", "content": f"hello {custom_id}"}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": model, "messages": messages, "max_tokens": 4, **body},
    }


def test_every_line_ends_in_one_result_in_the_order_of_the_input(bulk: BulkSystem) -> None:
    lines: list[dict[str, object]] = [
        plain(number, adapter="abcd"[number % 4], custom_id=f"c{number}") for number in range(300)
    ]
    lines[7]["adapter"] = "nobody"
    lines[11]["max_tokens"] = 0
    lines[13]["custom_id"] = "c12"
    lines[17]["weather"] = "fine"
    lines.append(dict(lines[299], custom_id="c300"))  # two equal prompts both count
    data = jsonl(*lines) + b"\n" + b'{"prompt": "cut o'
    batch_id = bulk.submit(data)
    state = bulk.wait_over(batch_id)
    assert state.status == "completed"
    results = [json.loads(line) for line in bulk.results(batch_id)]
    # line 302 is blank and counts as none; 303 was cut off
    assert [r["line"] for r in results] == [*range(1, 302), 303]
    errors = {r["line"]: r["error"]["code"] for r in results if "error" in r}
    assert errors == {
        8: "unknown_adapter",
        12: "invalid_request",
        14: "invalid_request",
        18: "invalid_request",
        303: "invalid_request",
    }
    assert "line 13" in results[13]["error"]["message"]
    good = [r for r in results if "error" not in r]
    assert all(r["usage"]["completion_tokens"] == 3 and r["text"] for r in good)
    assert results[299]["text"] == results[300]["text"]  # greedy script, equal prompts
    assert results[4]["custom_id"] == "c4"
    assert results[5]["adapter"] == "b"
    assert (state.total, state.done, state.failed) == (302, 302, 5)
    assert {error.line for error in bulk.states.errors(batch_id)} == set(errors)


def test_the_openai_client_runs_a_batch(bulk: BulkSystem) -> None:
    with openai.OpenAI(base_url=f"{bulk.gateway.url}/v1", api_key="none") as client:
        lines = [openai_line(f"r{n}", MODEL if n % 2 else "a") for n in range(6)]
        lines[4] = openai_line("r4", "no-such-model")
        file = client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
        assert file.bytes == len(jsonl(*lines))
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"owner": "test"},
        )
        assert batch.status == "validating"
        deadline = time.monotonic() + 30
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            assert time.monotonic() < deadline, batch
            time.sleep(0.1)
            batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert batch.metadata == {"owner": "test"}
        assert batch.request_counts is not None
        assert batch.request_counts.model_dump() == {"total": 6, "completed": 5, "failed": 1}
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        answers = [
            json.loads(line)
            for line in client.files.content(batch.output_file_id).text.splitlines()
        ]
        assert [answer["custom_id"] for answer in answers] == ["r0", "r1", "r2", "r3", "r5"]
        body = answers[0]["response"]["body"]
        completion = openai.types.chat.ChatCompletion.model_validate(body)
        assert completion.model == "a"
        assert completion.choices[0].message.content
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 4
        [error] = client.files.content(batch.error_file_id).text.splitlines()
        assert json.loads(error)["error"]["code"] == "unknown_model"
        assert json.loads(error)["custom_id"] == "r4"
        assert batch.id in {found.id for found in client.batches.list(limit=5)}
        assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)


def test_cancel_stops_within_seconds_and_keeps_what_is_done(bulk: BulkSystem) -> None:
    slow = [plain(n, max_tokens=100_000 if n % 50 else 2) for n in range(200)]
    with openai.OpenAI(base_url=f"{bulk.gateway.url}/v1", api_key="none") as client:
        batch_id = bulk.submit(jsonl(*slow[:1], *[plain(n) for n in range(64)]))
        bulk.wait_over(batch_id)
        long = bulk.submit(jsonl(*slow))
        wait_until(lambda: bulk.state(long).published == 200, 60)
        assert client.batches.cancel(long).status in ("cancelling", "cancelled")
        state = bulk.wait_over(long, 30)  # its lines would take a quarter of an hour
        assert state.status == "cancelled"
    results = [json.loads(line) for line in bulk.results(long)]
    assert [r["line"] for r in results] == list(range(1, 201))
    unfinished = [r for r in results if "error" in r]
    assert {r["error"]["code"] for r in unfinished} == {"batch_cancelled"}
    assert state.failed == len(unfinished) > 150
    # workers drop the lines: the next batch does not wait for them
    assert bulk.wait_over(bulk.submit(jsonl(plain(1))), 20).status == "completed"


def test_a_batch_expires_with_its_window(bulk: BulkSystem) -> None:
    batch_id = bulk.submit(jsonl(plain(1, max_tokens=100_000), plain(2)), completion_window="2s")
    state = bulk.wait_over(batch_id, 20)
    assert state.status == "expired"
    results = [json.loads(line) for line in bulk.results(batch_id)]
    assert results[0]["error"]["code"] == "deadline_exceeded"


def test_a_batch_of_bad_lines_says_so_at_once(bulk: BulkSystem) -> None:
    state = bulk.wait_over(bulk.submit(b"not json\n{}\n"), 15)
    assert (state.status, state.total, state.failed) == ("failed", 2, 2)
    errors = bulk.states.errors(state.id)
    assert [error.line for error in errors] == [1, 2]
    assert len(bulk.results(state.id)) == 2
    state = bulk.wait_over(bulk.submit(b"\n\n"), 15)
    assert (state.status, state.total) == ("failed", 0)
    assert "no line" in bulk.states.errors(state.id)[0].message


def test_the_command_line_runs_a_batch(bulk: BulkSystem, tmp_path) -> None:
    table = tmp_path / "in.csv"
    table.write_text('question,adapter\n"one, two",a\n"with ""quotes""\nand lines",\n,b\n')
    done = bulk.command("batch", "submit", str(table), "--column", "question", "--wait")
    assert done.returncode == 0, done.stderr
    batch_id = done.stdout.split()[-1]
    assert "completed" in done.stderr
    status = bulk.command("batch", "status", batch_id)
    assert status.stdout.startswith("completed  3/3 lines  1 failed")
    assert "line 3: invalid_request" in status.stdout
    target = tmp_path / "out.jsonl"
    assert bulk.command("batch", "results", batch_id, "-o", str(target)).returncode == 0
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert [r.get("adapter") for r in results] == ["a", None, None]
    assert "error" in results[2]
    listed = bulk.command("batch", "list", "--json")
    assert json.loads(listed.stdout)[0]["id"] == batch_id
    missing = bulk.command("batch", "status", "batch_none")
    assert missing.returncode == 1
    assert "no batch" in missing.stderr


def test_limits_and_other_tenants_files(bulk: BulkSystem) -> None:
    with httpx.Client(base_url=bulk.gateway.url) as client:
        assert client.post("/v1/files", data={"purpose": "batch"}).status_code == 400
        answer = client.post("/v1/files", data={"purpose": "x"}, files={"file": b"a"})
        assert "purpose" in answer.json()["error"]["message"]
        empty = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("f", b"")})
        assert "empty" in empty.json()["error"]["message"]
        for body in ({}, {"input_file_id": "f", "completion_window": "9d"}, {"nonsense": 1}):
            assert client.post("/v1/batches", json=body).status_code == 400
        assert client.post("/v1/batches", json={"input_file_id": "f"}).status_code == 404
    foreign = bulk.store.put(io.BytesIO(b"x"), "other", "x.jsonl", "batch")
    with httpx.Client(base_url=bulk.gateway.url) as client:
        assert client.get(f"/v1/files/{foreign.id}").status_code == 404
        answer = client.post("/v1/batches", json={"input_file_id": foreign.id})
        assert answer.json()["error"]["code"] == "file_not_found"


def test_celerys_own_tools_see_the_producer(bulk: BulkSystem) -> None:
    from producer.bulk.app import make_app

    app = make_app(bulk.system.redis_url)
    replies = app.control.inspect(timeout=15, limit=1).registered()
    [tasks] = replies.values()
    assert "openlora.batch.publish" in tasks


def test_the_content_of_a_removed_adapter_stays_until_its_batch_is_over(
    bulk: BulkSystem, tmp_path: Path
) -> None:
    """By the collector's own steps, without its minute of grace."""
    store = AdapterStore(bulk.directory / "store")

    async def collect() -> list[str]:
        client = async_redis_client(bulk.system.redis_url)
        try:
            registry, job_log = AsyncAdapterRegistry(client), AsyncJobLog(client)
            return await AdapterCollector(registry, job_log, client, store).collect(0)
        finally:
            await client.aclose()

    source = write_adapter(tmp_path / "one", fill=3)
    with httpx.Client(base_url=bulk.gateway.url) as http:
        record = http.post("/v1/adapters", json={"id": "gone", "source": str(source)}).json()
        line = {"prompt": "p", "adapter": "gone", "max_tokens": 5000, "ignore_eos": True}
        batch_id = bulk.submit(jsonl(line))
        wait_until(lambda: bulk.state(batch_id).phase == "running", 60)
        assert http.delete("/v1/adapters/gone").status_code == 204
        assert asyncio.run(collect()) == []
        assert store.path(record["hash"]).is_dir()
        assert http.post(f"/v1/batches/{batch_id}/cancel").status_code == 200
    bulk.wait_over(batch_id)
    assert asyncio.run(collect()) == [record["hash"]]
