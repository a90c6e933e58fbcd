"""Adapters named by URL in a request: allowed by a setting, fetched once, and kept apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps

import pytest

from gateway.directory import AdapterDirectory
from gateway.drafts import GenerateRequest, draft_of
from gateway.intake import Intake
from gateway.remote_adapters import MAX_FIRST_USES, RemoteAdapters, remote_id
from openlora.errors import (
    AdapterFailed,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    Overloaded,
    UnknownAdapter,
)
from openlora.joblog import async_redis_client
from openlora.registry.records import check_adapter_id
from tests.gateway.test_adapter_api import record

URL = "hf://acme/poet@main"


def in_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


class Directory:
    def __init__(self) -> None:
        self.records = {}

    async def get(self, reference, tenant):
        if (tenant, reference) not in self.records:
            raise UnknownAdapter(reference)
        return self.records[tenant, reference]


class Registrar:
    """Registers when it is let; ``error`` instead, if there is one."""

    def __init__(self, directory) -> None:
        self.directory, self.calls = directory, []
        self.gate, self.error = asyncio.Event(), None

    async def register(self, new, tenant, also_from):
        self.calls.append((new.source, tenant, new.visibility))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        found = record(new.id, owner=tenant, visibility=new.visibility)
        self.directory.records[tenant, new.id] = found
        return found


def made(*allowed):
    directory = Directory()
    registrar = Registrar(directory)
    return RemoteAdapters(directory, registrar, allowed), registrar


@in_loop
async def test_concurrent_first_uses_share_one_download_and_later_ones_need_none():
    remote, registrar = made("hf://acme/")
    uses = [asyncio.create_task(remote.get(URL, "one")) for _ in range(5)]
    await asyncio.sleep(0)
    uses[0].cancel()  # whoever leaves takes nothing from the others
    await asyncio.sleep(0)
    registrar.gate.set()
    found = await asyncio.gather(*uses[1:])
    assert {each.id for each in found} == {remote_id(URL)}
    assert await remote.get(URL, "one") == found[0]
    assert registrar.calls == [(URL, "one", "private")]
    await remote.get(URL, "two")  # another tenant's is its own
    assert registrar.calls[1:] == [(URL, "two", "private")]


@in_loop
async def test_off_by_default_and_else_only_what_is_allowed():
    remote, registrar = made()
    with pytest.raises(Forbidden, match="OPENLORA_REMOTE_ADAPTERS is not set"):
        await remote.get(URL, "default")
    remote, registrar = made("hf://acme/")
    for url in ("hf://evil/poet", "https://acme/x", "hf://acme/../evil/x", "zip::hf://acme/x"):
        with pytest.raises(Forbidden, match="not from"):
            await remote.get(url, "default")
    assert registrar.calls == []


@in_loop
async def test_what_failed_is_not_asked_for_again_at_once():
    remote, registrar = made("hf://acme/")
    registrar.gate.set()
    registrar.error = AdapterFailed("nothing there")
    for _ in range(3):
        with pytest.raises(AdapterFailed, match="nothing there"):
            await remote.get(URL, "one")
    assert len(registrar.calls) == 1


@in_loop
async def test_too_many_at_once_are_sent_away():
    remote, registrar = made("hf://acme/")
    uses = [asyncio.create_task(remote.get(f"{URL}{i}", "one")) for i in range(MAX_FIRST_USES)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await remote.get("hf://acme/more", "one")
    registrar.gate.set()
    await asyncio.gather(*uses)
    await remote.get("hf://acme/more", "one")


@in_loop
async def test_a_deadline_ends_the_wait_and_not_the_fetch():
    remote, registrar = made("hf://acme/")
    intake = object.__new__(Intake)
    intake._directory = AdapterDirectory(async_redis_client("redis://127.0.0.1:1"))
    intake._directory.remote = remote.get
    draft = draft_of(GenerateRequest(prompt="x", adapter=URL, deadline_s=0.01))
    with pytest.raises(DeadlineExceeded, match="while an adapter named by URL was fetched"):
        await intake._resolve(draft, "one")
    registrar.gate.set()
    (ref,) = await intake._resolve(draft, "one")
    assert (ref.id, len(registrar.calls)) == (remote_id(URL), 1)


def test_an_id_is_readable_well_formed_and_no_other_urls():
    urls = [URL, "hf://acme/poet", "https://a/" + "x" * 1900, "s3://b/€ü..", "hf://-/."]
    ids = [remote_id(url) for url in urls]
    assert len(set(ids)) == len(urls)
    assert ids[0].startswith("acme-poet-main-")
    for adapter_id in ids:
        check_adapter_id(adapter_id)


def test_requests_may_name_urls_and_no_nonsense():
    draft = draft_of(GenerateRequest(prompt="x", adapter=URL))
    assert draft.adapters[0].id == URL
    for bad in ("hf://a b", "hf://" + "x" * 2000, "hf://a\n"):
        with pytest.raises(InvalidRequest, match="is no URL"):
            draft_of(GenerateRequest(prompt="x", adapter=bad))
