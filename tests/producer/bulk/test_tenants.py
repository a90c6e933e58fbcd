"""What one tenant's batches may take, and see of another's."""

from __future__ import annotations

import json

import openai
import pytest

from tests.gateway.running import running_gateway
from tests.producer.bulk.running import BulkSystem

pytestmark = pytest.mark.services

LINE = json.dumps({"prompt": "hello", "max_tokens": 100_000}).encode() + b"\n"


def test_a_tenant_has_so_many_batches_under_way_and_sees_only_its_own(bulk: BulkSystem) -> None:
    settings = {
        "OPENLORA_API_KEYS": "acme:one,other:two",
        "OPENLORA_MAX_BATCHES": "2",
        "OPENLORA_BATCHES": str(bulk.directory / "batches"),
    }
    kafka, redis_url = bulk.system.kafka, bulk.system.redis_url
    with running_gateway(kafka, redis_url, bulk.directory, **settings) as gateway:

        def client(key: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)

        with client("one") as acme, client("two") as other:
            file = acme.files.create(file=("in.jsonl", LINE), purpose="batch")

            def create() -> str:
                return acme.batches.create(
                    input_file_id=file.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                ).id

            made = [create(), create()]
            with pytest.raises(openai.RateLimitError, match="2 batches of yours are under way"):
                create()
            with pytest.raises(openai.NotFoundError):
                other.batches.create(
                    input_file_id=file.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                )
            with pytest.raises(openai.NotFoundError):
                other.batches.retrieve(made[0])
            with pytest.raises(openai.NotFoundError):
                other.batches.cancel(made[0])
            assert list(other.batches.list()) == []
            assert {batch.id for batch in acme.batches.list()} == set(made)
            acme.batches.cancel(made[0])
            bulk.wait_over(made[0])
            made.append(create())
            assert {batch.id for batch in acme.batches.list(limit=1)} == set(made)  # page by page
            for batch_id in made[1:]:
                acme.batches.cancel(batch_id)
                bulk.wait_over(batch_id)
