"""Many adapters over HTTP: pages, searches, one of ten thousand."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import msgspec
import psutil
import pytest

from openlora.joblog import redis_client
from openlora.local import ServerProcess
from openlora.protocol.codec import encode
from openlora.protocol.names import ADAPTERS_KEY, ADAPTERS_REVISION_KEY
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from tests.gateway.running import RunningGateway

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def redis_address(redis_server: ServerProcess) -> str:
    """No adapters but those of a test."""
    with redis_client(redis_server.address) as client:
        client.flushall()
    return redis_server.address


@pytest.fixture
def http(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url) as client:
        yield client


def test_adapters_are_paged_and_searched(http: httpx.Client, redis_server: ServerProcess) -> None:
    with redis_client(redis_server.address) as client:
        registry = AdapterRegistry(client)
        for number in range(7):
            registry.put(AdapterRecord(f"page-{number}", 0, str(number), 8, (), "B", 1, "/x", 0))
        seen, after = [], "page"
        while page := http.get(f"/v1/adapters?search=page-&limit=3&after={after}").json():
            seen.append([record["id"] for record in page])
            after = seen[-1][-1]
        assert [len(part) for part in seen] == [3, 3, 1]
        assert [adapter_id for part in seen for adapter_id in part] == [
            f"page-{number}" for number in range(7)
        ]
        refused = http.get("/v1/adapters?limit=many")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
        for number in range(7):
            registry.remove(f"page-{number}")


def cpu_s(gateway: RunningGateway) -> float:
    """Seconds that it has worked; other work on the machine does not count."""
    times = psutil.Process(gateway.process.pid).cpu_times()
    return times.user + times.system


def test_ten_thousand_adapters_are_listed_searched_and_found_at_once(
    gateway: RunningGateway, http: httpx.Client, redis_server: ServerProcess
) -> None:
    count = 10_000
    with redis_client(redis_server.address) as client:
        record = AdapterRecord("x", 1, "f" * 64, 8, ("q_proj", "v_proj"), "Org/Base", 1, "/x", 0)
        made = (
            msgspec.structs.replace(record, id=f"a{number:05d}", hash=f"{number:064x}")
            for number in range(count)
        )
        client.hset(ADAPTERS_KEY, mapping={new.id: encode(new) for new in made})
        client.incr(ADAPTERS_REVISION_KEY)
        assert len(http.get("/v1/adapters").json()) == count
        for path in ("?limit=100&after=a05000", "?search=a0777&limit=10", "/a09999"):
            before_s = cpu_s(gateway)
            assert http.get(f"/v1/adapters{path}").status_code == 200
            assert cpu_s(gateway) - before_s < 0.5, path
        client.delete(ADAPTERS_KEY)
        client.incr(ADAPTERS_REVISION_KEY)
