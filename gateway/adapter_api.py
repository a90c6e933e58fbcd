"""``/v1/adapters``: list, search, show, add, pin, roll back, remove, for what a tenant may see."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.bodies import read_body
from gateway.registration import NewAdapter
from gateway.system import Gateway
from openlora.errors import Forbidden, InvalidRequest
from openlora.protocol.status import AdapterRecord, Heartbeat
from openlora.registry import OPERATOR, check_adapter_id
from openlora.registry.records import key_of, owner_of

MAX_BODY_BYTES = 1 << 20
MAX_LIMIT = 1000
PAGE_RANK = 16
"""Ranks of a page, as workers count them (openlora/adapters/lora_set.py)."""
PIN_SHARE = 0.5
"""Of a worker's pages, what pins may take, as engines see it (openlora/engine/residency.py)."""

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
TenantHandler = Callable[[Request, str], Awaitable[Response]]


class Rollback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/adapters/{id}/rollback``; None: the version before the one in use."""

    version: int | None = None


def adapter_routes(gateway: Gateway, keyed: Callable[[TenantHandler], Handler]) -> list[Route]:
    """The routes. ``keyed`` puts a handler behind the API key and gives it the key's tenant."""
    api = AdapterApi(gateway)
    return [
        Route("/v1/adapters", keyed(api.list_adapters), methods=["GET"]),
        Route("/v1/adapters", keyed(api.add), methods=["POST"]),
        Route("/v1/adapters/{id}/versions", keyed(api.versions), methods=["GET"]),
        Route("/v1/adapters/{id}/rollback", keyed(api.rollback), methods=["POST"]),
        Route("/v1/adapters/{id}/pin", keyed(api.pin), methods=["POST"]),
        Route("/v1/adapters/{id}/pin", keyed(api.unpin), methods=["DELETE"]),
        Route("/v1/adapters/{id}", keyed(api.show), methods=["GET"]),
        Route("/v1/adapters/{id}", keyed(api.remove), methods=["DELETE"]),
    ]


class AdapterApi:
    """The handlers, over one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._directory = gateway.directory
        self._registrar = gateway.registrar

    async def list_adapters(self, request: Request, tenant: str) -> Response:
        """Adapters by ID. Query: ``search`` (part of an ID or base model), ``after`` (an ID),
        ``limit``."""
        records = select(
            await self._directory.list(tenant),
            search=request.query_params.get("search", ""),
            after=request.query_params.get("after", ""),
            limit=_limit(request.query_params.get("limit")),
        )
        return _json(await self._shown(records, tenant))

    async def add(self, request: Request, tenant: str) -> Response:
        """Registers an adapter: 201 with its record."""
        new = await _decoded(request, NewAdapter, '{"id": "…", "source": "directory"}')
        record = await self._registrar.register(new, tenant)
        return _json((await self._shown([record], tenant))[0], 201)

    async def show(self, request: Request, tenant: str) -> Response:
        """One adapter's record: of the version in use, or of ``id@version``."""
        record = await self._directory.get(request.path_params["id"], tenant)
        return _json((await self._shown([record], tenant))[0])

    async def versions(self, request: Request, tenant: str) -> Response:
        """All kept versions of an adapter, the oldest first."""
        records = await self._directory.versions(request.path_params["id"], tenant)
        return _json(await self._shown(records, tenant))

    async def rollback(self, request: Request, tenant: str) -> Response:
        """Requests get another version from now on: its record."""
        body = await _decoded(request, Rollback, '{"version": 3}, or {} for the one before')
        record = await self._directory.rollback(request.path_params["id"], tenant, body.version)
        return _json((await self._shown([record], tenant))[0])

    async def pin(self, request: Request, tenant: str) -> Response:
        """Workers keep the version in use in their pages from now on: its record. For the
        operator; a tenant's private adapter is named with ``?tenant=``."""
        return await self._set_pin(request, tenant, pinned=True)

    async def unpin(self, request: Request, tenant: str) -> Response:
        """It is evicted like any other again: its record."""
        return await self._set_pin(request, tenant, pinned=False)

    async def _set_pin(self, request: Request, tenant: str, *, pinned: bool) -> Response:
        if tenant != OPERATOR:
            raise Forbidden("only the operator's key may pin: pages are shared by all tenants")
        owner = request.query_params.get("tenant", tenant)
        record = await self._directory.get(check_adapter_id(request.path_params["id"]), owner)
        if pinned:
            heartbeats = await self._gateway.job_log.heartbeats()
            check_pins([*(await self._directory.pinned()).values(), record], heartbeats)
        await self._directory.pin(record, pinned=pinned)
        return _json((await self._shown([record], tenant))[0])

    async def remove(self, request: Request, tenant: str) -> Response:
        """Forgets an adapter, or one version of it: 204. Jobs accepted with it still run."""
        await self._directory.remove(request.path_params["id"], tenant)
        return Response(status_code=204)

    async def _shown(
        self, records: Iterable[AdapterRecord], tenant: str
    ) -> list[dict[str, object]]:
        places = residency(await self._gateway.job_log.heartbeats())
        pins = await self._directory.pinned()
        return [
            record_fields(record, tenant, places.get(record.hash, {}), key_of(record) in pins)
            for record in records
        ]


def select(
    records: list[AdapterRecord], *, search: str = "", after: str = "", limit: int | None = None
) -> list[AdapterRecord]:
    """The page of ``records`` (by ID) that a query asks for. Pure."""
    if search:
        part = search.lower()
        records = [
            record
            for record in records
            if part in record.id.lower() or part in record.base_model.lower()
        ]
    if after:
        records = [record for record in records if record.id > after]
    return records if limit is None else records[:limit]


def residency(heartbeats: Iterable[Heartbeat]) -> dict[str, dict[str, list[str]]]:
    """Content hash → tier → IDs of the workers that have it there now."""
    places: dict[str, dict[str, list[str]]] = {}
    for heartbeat in heartbeats:
        tiers = {"device": heartbeat.resident_adapters}
        tiers |= {tier.tier: tier.contents for tier in heartbeat.tiers}
        for tier, contents in tiers.items():
            for content in contents:
                places.setdefault(content, {}).setdefault(tier, []).append(heartbeat.id)
    return places


def check_pins(records: Iterable[AdapterRecord], heartbeats: Iterable[Heartbeat]) -> None:
    """Refuses more pins than the worker with the least memory can keep.

    Raises:
        InvalidRequest: with what they would take and what there is.
    """
    ranks = [heartbeat.max_lora_rank for heartbeat in heartbeats if heartbeat.max_lora_rank]
    if not ranks:
        return  # no worker says what it has: each sees to its own limit
    wanted = {record.hash: -(-record.rank // PAGE_RANK) for record in records}
    pages, have = sum(wanted.values()), min(ranks) // PAGE_RANK
    if pages > have * PIN_SHARE:
        raise InvalidRequest(
            f"the pinned adapters would take {pages} pages of rank {PAGE_RANK}; pins may take half "
            f"of the {have} that a worker has: unpin others, or give workers a larger adapter "
            "budget"
        )


def record_fields(
    record: AdapterRecord, tenant: str, places: Mapping[str, list[str]], pinned: bool
) -> dict[str, object]:
    """A record as ``tenant`` is shown it: where it came from is told to its owner alone."""
    fields = msgspec.structs.asdict(record) | {
        "owner": owner_of(record),
        "resident_on": places.get("device", []),
        "tiers": places,
        "pinned": pinned,
    }
    if owner_of(record) != tenant:
        fields["source"] = ""
    return fields


def _limit(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_LIMIT:
        raise InvalidRequest(f"limit is {text[:64]!r}; it must be a whole number, 1 to {MAX_LIMIT}")
    return int(text)


def _json(value: object, status: int = 200) -> Response:
    """Encoded by msgspec: ten thousand records in milliseconds."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _decoded(request: Request, kind: type[T], example: str) -> T:
    body = await read_body(request, MAX_BODY_BYTES)
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequest(f"the body is not valid: {error}; send {example}") from error
