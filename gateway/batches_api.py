"""``/v1/batches``: batches in OpenAI's shape, with their progress beside it."""

from __future__ import annotations

import re
import secrets
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.bodies import read_body
from gateway.config import GatewayConfig
from gateway.files_api import Keyed, file_routes, storing
from gateway.keys import RateLimits
from openlora.errors import (
    BatchNotFound,
    FileNotFound,
    Forbidden,
    InvalidRequest,
    RateLimited,
)
from openlora.joblog import redis_client
from producer.bulk.files import FileStore
from producer.bulk.openai_body import CHAT_URL, TEXT_URL
from producer.bulk.records import BatchRecord, BatchState, LineError, Part, result_file_id
from producer.bulk.state import BatchStates, now_ms

MAX_BODY_BYTES = 1 << 16
MAX_METADATA = 16
LONGEST_WINDOW_S = 7 * 86_400
MAX_PAGE = 100
_WINDOW = re.compile(r"([0-9]{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_RETRY_AFTER_MS = 10_000


class NewBatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/batches``; ``adapter``: of the lines that name none."""

    input_file_id: str
    endpoint: str | None = None
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    adapter: str | None = None


def bulk_routes(config: GatewayConfig, rates: RateLimits, keyed: Keyed) -> list[Route]:
    """The routes of files and batches, over Redis and the folder that producers share."""
    client = redis_client(config.redis)
    store = FileStore(config.batches, client)
    states = BatchStates(client)
    api = BatchesApi(states, store, rates, config.max_batches)
    return [*file_routes(store, keyed), *batch_routes(api, keyed)]


def batch_routes(api: BatchesApi, keyed: Keyed) -> list[Route]:
    """All routes of batches."""
    return [
        Route("/v1/batches", keyed(api.list), methods=["GET"]),
        Route("/v1/batches", keyed(api.create), methods=["POST"]),
        Route("/v1/batches/{id}", keyed(api.show), methods=["GET"]),
        Route("/v1/batches/{id}/cancel", keyed(api.cancel), methods=["POST"]),
        Route("/v1/batches/{id}/results", keyed(api.results), methods=["GET"]),
        Route("/v1/batches/{id}/adapters", keyed(api.adapters), methods=["GET"]),
    ]


class BatchesApi:
    """The handlers. What they make, the producers take up.

    ``max_open``: batches that a tenant may have under way. A batch counts as one request of its
    key; its lines do not, since they take what requests leave.
    """

    def __init__(
        self, states: BatchStates, store: FileStore, rates: RateLimits, max_open: int
    ) -> None:
        self._states = states
        self._store = store
        self._rates = rates
        self._max_open = max_open

    async def create(self, request: Request, tenant: str) -> Response:
        """Makes a batch of a file that was sent."""
        if request.state.policy.adapters is not None:
            raise Forbidden(
                "this key is limited to some adapters, and a batch's lines may name any; ask the "
                "operator for a key that is not, or send the lines as requests"
            )
        body = await read_body(request, MAX_BODY_BYTES)
        try:
            new = msgspec.json.decode(body, type=NewBatch)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise InvalidRequest(f"the body is not valid: {error}") from error
        window_s = _checked(new)
        await self._rates.take(request.state.policy)

        def make() -> BatchState:
            file = self._store.get(new.input_file_id, tenant)
            if file.batch_id:
                raise InvalidRequest(f"{file.id} is a result; a batch's input is a file you sent")
            try:
                mtime_ns = self._store.path(file).stat().st_mtime_ns
            except FileNotFoundError as error:
                raise FileNotFound(f"the content of {file.id} is gone; send it again") from error
            created = now_ms()
            record = BatchRecord(
                id=f"batch_{secrets.token_hex(12)}",
                tenant=tenant,
                input_file_id=file.id,
                input_hash=file.sha256,
                input_size=file.size,
                input_mtime_ns=mtime_ns,
                created_ms=created,
                expires_ms=created + window_s * 1000,
                endpoint=new.endpoint,
                adapter=new.adapter,
                completion_window=new.completion_window,
                metadata=new.metadata or {},
            )
            if not self._states.create(record, self._max_open):
                raise RateLimited(
                    f"{self._max_open} batches of yours are under way; wait for one, or cancel it",
                    retry_after_ms=_RETRY_AFTER_MS,
                )
            return BatchState(record=record)

        return JSONResponse(batch_fields(await run_in_threadpool(storing(make)), []))

    async def list(self, request: Request, tenant: str) -> Response:
        """The tenant's batches, newest first, a page at a time."""
        limit = request.query_params.get("limit", "20")
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= MAX_PAGE:
            raise InvalidRequest(f"limit is {limit[:32]!r}; it must be 1 to {MAX_PAGE}")
        after = request.query_params.get("after")
        states, has_more = await run_in_threadpool(
            lambda: self._states.page(tenant, int(limit), after)
        )
        return JSONResponse(
            {
                "object": "list",
                "data": [batch_fields(state, []) for state in states],
                "first_id": states[0].id if states else None,
                "last_id": states[-1].id if states else None,
                "has_more": has_more,
            }
        )

    async def show(self, request: Request, tenant: str) -> Response:
        """One batch as it is now."""
        return JSONResponse(await self._fields(request, tenant))

    async def cancel(self, request: Request, tenant: str) -> Response:
        """Ends a batch early: workers drop its lines within seconds, what is done stays."""
        state = await self._state(request, tenant)
        await run_in_threadpool(lambda: self._states.end(state.id, "cancelled"))
        return JSONResponse(await self._fields(request, tenant))

    async def results(self, request: Request, tenant: str) -> Response:
        """Answers and errors together, one line for each line of the input, in its order."""
        state = await self._state(request, tenant)
        if state.phase != "over":
            raise InvalidRequest(
                f"{state.id} is {state.status}; its results are there once it is over"
            )
        if state.done and not self._store.folder(state.id).results():
            raise FileNotFound(f"the result files of {state.id} were deleted")
        return StreamingResponse(self._store.results(state.id), media_type="application/jsonl")

    async def adapters(self, request: Request, tenant: str) -> Response:
        """Lines done by adapter; "" is the base model, and what was refused unseen."""
        state = await self._state(request, tenant)
        return JSONResponse(
            await run_in_threadpool(lambda: self._states.adapter_progress(state.id))
        )

    async def _fields(self, request: Request, tenant: str) -> dict[str, Any]:
        state = await self._state(request, tenant)
        errors = await run_in_threadpool(lambda: self._states.errors(state.id))
        return batch_fields(state, errors)

    async def _state(self, request: Request, tenant: str) -> BatchState:
        batch_id: str = request.path_params["id"]
        state = await run_in_threadpool(lambda: self._states.get(batch_id))
        if state is None or state.record.tenant != tenant:
            raise BatchNotFound(f"there is no batch {batch_id[:64]!r}; GET /v1/batches lists them")
        return state


def _checked(new: NewBatch) -> int:
    """The window in seconds. Raises InvalidRequest."""
    if new.endpoint not in (None, CHAT_URL, TEXT_URL):
        raise InvalidRequest(
            f"endpoint is {new.endpoint[:64]!r}; it must be {CHAT_URL} or {TEXT_URL}"
        )
    metadata = new.metadata or {}
    if len(metadata) > MAX_METADATA or any(
        len(key) > 64 or len(value) > 512 for key, value in metadata.items()
    ):
        raise InvalidRequest(
            f"metadata holds too much; send at most {MAX_METADATA} keys of 64 and values of 512 "
            "characters"
        )
    match = _WINDOW.fullmatch(new.completion_window)
    window_s = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 1 <= window_s <= LONGEST_WINDOW_S:
        raise InvalidRequest(
            f"completion_window is {new.completion_window[:32]!r}; write 24h, or another number "
            "of s, m, h or d up to 7d"
        )
    return window_s


def batch_fields(state: BatchState, errors: list[LineError]) -> dict[str, Any]:
    """A batch as OpenAI shows it; ``progress`` is ours. Times that did not come yet are null."""
    record = state.record

    def seconds(value_ms: int) -> int | None:
        return value_ms // 1000 or None

    def ended(status: str) -> int | None:
        return seconds(state.over_ms) if state.status == status else None

    def file_id(part: Part, size: int) -> str | None:
        return result_file_id(record.id, part) if state.phase == "over" and size else None

    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "errors": {"object": "list", "data": [_error_fields(error) for error in errors]}
        if errors
        else None,
        "input_file_id": record.input_file_id,
        "completion_window": record.completion_window,
        "status": state.status,
        "output_file_id": file_id("answers", state.answers_bytes),
        "error_file_id": file_id("errors", state.errors_bytes),
        "created_at": record.created_ms // 1000,
        "in_progress_at": seconds(state.started_ms),
        "expires_at": record.expires_ms // 1000,
        "finalizing_at": seconds(state.assembling_ms),
        "completed_at": ended("completed"),
        "failed_at": ended("failed"),
        "expired_at": ended("expired"),
        "cancelling_at": seconds(state.ending_ms) if state.ending == "cancelled" else None,
        "cancelled_at": ended("cancelled"),
        "request_counts": {
            "total": state.total,
            "completed": state.done - state.failed,
            "failed": state.failed,
        },
        "metadata": record.metadata or None,
        "progress": {
            "phase": state.phase,
            "lines_read": state.total,
            "lines_done": state.done,
            "lines_at_workers": state.outstanding,
            "prompt_tokens": state.prompt_tokens,
            "completion_tokens": state.completion_tokens,
            "bytes_read": state.offset,
            "bytes": record.input_size,
            "problem": state.problem or None,
        },
    }


def _error_fields(error: LineError) -> dict[str, object]:
    return {"code": error.code, "message": error.message, "line": error.line, "param": None}
