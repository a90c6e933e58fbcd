"""HTTP beside the websocket: health, metrics, models, adapters, workers.

The OpenAI-shaped endpoints belong here too: they turn a body into a ``GenerateRequest`` and go
through the same draft, intake and relay as a websocket's frames.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.adapter_api import adapter_routes
from gateway.auth import DEFAULT_TENANT, key_of
from gateway.batches_api import MAX_BODY_BYTES, bulk_routes
from gateway.bodies import read_body
from gateway.dead_api import DeadApi
from gateway.system import Gateway
from gateway.workers_view import model_fields, queue_depth, worker_fields
from openlora.errors import Forbidden, InvalidRequest, Overloaded

Handler = Callable[[Request], Awaitable[Response]]
TenantHandler = Callable[[Request, str], Awaitable[Response]]


class ScaleTopics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/topics/scale``."""

    partitions: Annotated[int, msgspec.Meta(ge=1, le=10_000)]


def api_routes(gateway: Gateway) -> list[Route]:
    """All HTTP routes but the page's."""
    api = HttpApi(gateway)
    dead = DeadApi(gateway)
    return [
        Route("/healthz", api.healthz),
        Route("/readyz", api.readyz),
        Route("/metrics", api.metrics),
        Route("/v1/models", api.keyed(api.models)),
        Route("/v1/workers", api.keyed(api.workers)),
        Route("/v1/topics", api.keyed(api.topics)),
        Route("/v1/topics/scale", api.keyed(api.scale_topics), methods=["POST"]),
        *adapter_routes(gateway, api.keyed),
        *bulk_routes(gateway.config, gateway.rates, api.keyed),
        Route("/v1/dead", api.keyed(dead.list)),
        Route("/v1/dead/{number:int}", api.keyed(dead.show)),
        Route("/v1/dead/{number:int}/retry", api.keyed(dead.retry), methods=["POST"]),
    ]


class HttpApi:
    """The handlers, over one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def keyed(self, handler: TenantHandler) -> Handler:
        """``handler`` behind the API key, whose tenant it gets, and the browsers' origin check.

        The key's policy is in ``request.state``.
        """

        @wraps(handler)
        async def checked(request: Request) -> Response:
            headers, config = request.headers, self._gateway.config
            config.check_page(headers.get("origin"), headers.get("host"))
            key = key_of(request.headers.get("authorization"))
            tenant, request.state.policy = config.api_keys.caller_of(key)
            return await handler(request, tenant)

        return checked

    async def healthz(self, request: Request) -> Response:
        """200 while the process lives."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """200 when brokers answer and a worker is ready; else what is missing. Of workers that
        start, the share of the model that they have loaded."""
        readiness = await self._gateway.readiness()
        starting = [
            {"id": heartbeat.id, "pid": heartbeat.pid, "loaded": heartbeat.loaded}
            for heartbeat in readiness.starting
        ]
        status = 503 if readiness.waiting_for else 200
        fields: dict[str, object] = {"waiting_for": readiness.waiting_for}
        return JSONResponse(fields | ({"starting": starting} if starting else {}), status)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        try:
            heartbeats = await self._gateway.job_log.heartbeats()
            self._gateway.metrics.queue_depth.set(queue_depth(heartbeats))
            records = self._gateway.directory.known
            self._gateway.metrics.tiers.update(heartbeats, records)
        except Overloaded:
            self._gateway.metrics.queue_depth.set(float("nan"))
        return Response(
            self._gateway.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def models(self, request: Request, tenant: str) -> Response:
        """The base models that workers serve, and the adapters, in OpenAI's list shape."""
        heartbeats = await self._gateway.job_log.heartbeats()
        records = await self._gateway.directory.list(tenant)
        return JSONResponse({"object": "list", "data": model_fields(heartbeats, records)})

    async def workers(self, request: Request, tenant: str) -> Response:
        """All workers with a heartbeat; of resident adapters, those that the tenant may see."""
        heartbeats = await self._gateway.job_log.heartbeats()
        ids = {record.hash: record.id for record in await self._gateway.directory.list(tenant)}
        return JSONResponse([worker_fields(heartbeat, ids) for heartbeat in heartbeats])

    async def topics(self, request: Request, tenant: str) -> Response:
        """Every partition of the job topics with its owner, offsets and lag."""
        return JSONResponse(msgspec.to_builtins(await self._gateway.partition_rows()))

    async def scale_topics(self, request: Request, tenant: str) -> Response:
        """Adds partitions to the job topics; → partitions by topic. For the operator alone."""
        if tenant != DEFAULT_TENANT:
            raise Forbidden("only the operator's key may change topics")
        body = await read_body(request, MAX_BODY_BYTES)
        try:
            wanted = msgspec.json.decode(body, type=ScaleTopics).partitions
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidRequest(
                f'the body is not valid: {error}; send {{"partitions": 64}}'
            ) from error
        return JSONResponse(await self._gateway.broker.scale(wanted))
