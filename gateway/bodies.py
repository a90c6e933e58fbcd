"""Bodies of HTTP requests, read no further than they may be long."""

from __future__ import annotations

from starlette.requests import Request

from openlora.errors import PayloadTooLarge


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        PayloadTooLarge: there is more than ``max_bytes``; the rest is not read.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise PayloadTooLarge(f"the body is over {max_bytes} bytes; send less")
    return bytes(body)
