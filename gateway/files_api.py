"""``/v1/files``: inputs and results of batches, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.adapter_api import Handler, TenantHandler
from openlora.errors import InvalidRequest, Overloaded
from producer.bulk.files import FileStore
from producer.bulk.records import FileRecord

T = TypeVar("T")
Keyed = Callable[[TenantHandler], Handler]
"""Puts a handler behind the API key and gives it the key's tenant."""

PURPOSE = "batch"
MAX_FILENAME_CHARS = 255
_RETRY_AFTER_MS = 5000


def file_routes(store: FileStore, keyed: Keyed) -> list[Route]:
    """All routes of files."""
    api = FilesApi(store)
    return [
        Route("/v1/files", keyed(api.list), methods=["GET"]),
        Route("/v1/files", keyed(api.upload), methods=["POST"]),
        Route("/v1/files/{id}", keyed(api.show), methods=["GET"]),
        Route("/v1/files/{id}", keyed(api.remove), methods=["DELETE"]),
        Route("/v1/files/{id}/content", keyed(api.content), methods=["GET"]),
    ]


class FilesApi:
    """The handlers, over one store."""

    def __init__(self, store: FileStore) -> None:
        self._store = store

    async def upload(self, request: Request, tenant: str) -> Response:
        """Takes a file as form data; it exists only once all of it has come and is on disk."""
        try:
            form = await request.form(max_files=1, max_fields=8)
        except HTTPException as error:
            raise InvalidRequest(
                f"the body is no form with a file ({error.detail}); send multipart/form-data with "
                f"file and purpose={PURPOSE}"
            ) from error
        except OSError as error:  # what comes is kept in a temporary file
            raise _no_room(error) from error
        try:
            upload = form.get("file")
            purpose = form.get("purpose")
            if not isinstance(upload, UploadFile):
                raise InvalidRequest("the form has no file; send it as the field 'file'")
            if purpose != PURPOSE:
                raise InvalidRequest(f"purpose is {purpose!r:.80}; it must be {PURPOSE!r}")
            name = (upload.filename or "input.jsonl")[:MAX_FILENAME_CHARS]
            source = upload.file
            record = await run_in_threadpool(
                storing(lambda: self._store.put(source, tenant, name, PURPOSE))
            )
        finally:
            await form.close()
        return JSONResponse(file_fields(record))

    async def list(self, request: Request, tenant: str) -> Response:
        """All files of the tenant, newest first."""
        records = await run_in_threadpool(lambda: self._store.all_of(tenant))
        data = [file_fields(record) for record in records]
        return JSONResponse({"object": "list", "data": data, "has_more": False})

    async def show(self, request: Request, tenant: str) -> Response:
        """One file's record."""
        return JSONResponse(file_fields(await self._record(request, tenant)))

    async def content(self, request: Request, tenant: str) -> Response:
        """The file itself."""
        record = await self._record(request, tenant)
        return StreamingResponse(self._store.content(record), media_type="application/jsonl")

    async def remove(self, request: Request, tenant: str) -> Response:
        """Forgets a file, and its content where it was sent."""
        record = await self._record(request, tenant)
        await run_in_threadpool(storing(lambda: self._store.remove(record)))
        return JSONResponse({"id": record.id, "object": "file", "deleted": True})

    async def _record(self, request: Request, tenant: str) -> FileRecord:
        file_id = request.path_params["id"]
        return await run_in_threadpool(lambda: self._store.get(file_id, tenant))


def storing(call: Callable[[], T]) -> Callable[[], T]:
    """``call`` with a full disk told as ``Overloaded``."""

    def checked() -> T:
        try:
            return call()
        except OSError as error:
            raise _no_room(error) from error

    return checked


def _no_room(error: OSError) -> Overloaded:
    return Overloaded(
        f"the file store cannot be written now: {error.strerror or error}",
        retry_after_ms=_RETRY_AFTER_MS,
    )


def file_fields(record: FileRecord) -> dict[str, object]:
    """A file as OpenAI shows it, with the SHA-256 of what was sent."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.size,
        "created_at": record.created_ms // 1000,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "sha256": record.sha256 or None,
    }
