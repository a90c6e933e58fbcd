"""The ASGI application: routes, websocket door, errors in their one shape."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Match, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from gateway.auth import SUBPROTOCOL, key_of
from gateway.frames import error_fields
from gateway.http_api import api_routes
from gateway.system import Gateway
from gateway.ws_protocol import TEXT_FRAMES
from openlora.errors import InternalError, InvalidRequest, OpenLoRAError

log = logging.getLogger(__name__)

STATIC = Path(__file__).with_name("static")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build_app(gateway: Gateway) -> Starlette:
    """The application; its lifespan starts and stops ``gateway``."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        gateway.start()
        yield
        await gateway.stop()

    return Starlette(
        routes=[
            Route("/", _page),
            Mount("/static", StaticFiles(directory=STATIC)),
            WebSocketRoute("/v1/ws", WebsocketDoor(gateway)),
            *api_routes(gateway),
        ],
        exception_handlers={
            OpenLoRAError: _openlora_error,
            HTTPException: _http_error,
            Exception: _unexpected,
        },
        lifespan=lifespan,
    )


class WebsocketDoor:
    """`/v1/ws`: checks key and origin, answers the handshake, then runs the connection."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        offered: list[str] = scope["subprotocols"]
        try:
            self._gateway.config.check_page(headers.get("origin"), headers.get("host"))
            key = key_of(headers.get("authorization"), offered)
            tenant, policy = self._gateway.config.api_keys.caller_of(key)
        except OpenLoRAError as error:
            await error_response(error)(scope, receive, send)
            return
        await receive()
        subprotocol = SUBPROTOCOL if SUBPROTOCOL in offered else None
        await send({"type": "websocket.accept", "subprotocol": subprotocol})
        await self._gateway.serve(receive, scope["extensions"][TEXT_FRAMES], tenant, policy)


def error_response(error: OpenLoRAError) -> Response:
    """``error`` in the shape of the interfaces, with its status."""
    headers = {}
    if error.retry_after_ms is not None:
        headers["Retry-After"] = str(-(-error.retry_after_ms // 1000))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error_fields(error)}, error.status, headers)


def _page(request: Request) -> Response:
    return FileResponse(
        STATIC / "index.html",
        headers={
            "Content-Security-Policy": PAGE_POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )


def _openlora_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OpenLoRAError)
    return error_response(error)


def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    fields = error_fields(InvalidRequest(f"{message}; the README lists the paths"))
    headers = error.headers
    if error.status_code == 405:
        headers = {"Allow": ", ".join(sorted(_methods_of(request)))}
    return JSONResponse({"error": fields}, error.status_code, headers)


def _methods_of(request: Request) -> set[str]:
    """What the path takes: each method has a route of its own, and Starlette names the first's."""
    app: Starlette = request.app
    return {
        method
        for route in app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }


def _unexpected(request: Request, error: Exception) -> Response:
    # Starlette raises the error on to uvicorn, which logs it with its traceback
    return error_response(InternalError("the gateway failed on this request; see its log"))
