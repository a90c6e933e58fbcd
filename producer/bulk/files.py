"""Files of the store: inputs as they were sent, and what batches made of them.

    files/<file id>                      an input, immutable
    batches/<batch id>/unread            chunks of what was read so far         (while it is read)
    batches/<batch id>/chunks, ids       lines by what they run on; custom_ids  (while it runs)
    batches/<batch id>/segments          results as they came                   (while it runs)
    batches/<batch id>/results/NNNNNN    results of a range of lines, in their order

The folder is shared by gateways and producers; what the files are is in Redis.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import redis

from openlora.errors import FileNotFound, InvalidRequest, PayloadTooLarge
from openlora.joblog.clients import redis_errors
from openlora.protocol.codec import encode
from producer.bulk.blocks import sync_folder, write_durably
from producer.bulk.records import FileRecord
from producer.bulk.state import now_ms

MAX_FILE_BYTES = 16 << 30
_COPY_BYTES = 1 << 20
_UNFINISHED_S = 86_400
_FAILED = b'"error":{'
_ERROR_BYTES = 8192
"""An error comes last in its line, and its message is cut long before this."""


class BatchFolder:
    """Where a batch keeps its files."""

    def __init__(self, root: Path, batch_id: str) -> None:
        self.path = root / "batches" / batch_id
        self.segments = self.path / "segments"

    def unread_chunk(self, number: int) -> Path:
        """Where the lines of a piece of the input are written, by bucket, while it is read."""
        return self.path / "unread" / f"{number:06d}"

    def chunk(self, number: int) -> Path:
        """The same lines once all pieces are read."""
        return self.path / "chunks" / f"{number:06d}"

    def settle_chunks(self) -> None:
        """All pieces are read: a reading that comes late does not change what the plan is made of.

        Raises:
            OSError: not now; try again.
        """
        if not (self.path / "chunks").exists():
            with suppress(FileNotFoundError):  # there are none, or somebody else was first
                (self.path / "unread").rename(self.path / "chunks")

    def ids(self, number: int) -> Path:
        """custom_ids of the same piece."""
        return self.path / "ids" / f"{number:06d}"

    @property
    def plan(self) -> Path:
        """What is published when."""
        return self.path / "plan.json"

    def result(self, number: int) -> Path:
        """Results of a range of lines."""
        return self.path / "results" / f"{number:06d}"

    def remove_working_files(self) -> None:
        """The results are complete: all else goes, each folder at once. A step that is done twice
        by now would take what is left of one for all of it."""
        for name in ("unread", "chunks", "ids", "segments"):
            with suppress(FileNotFoundError):
                (self.path / name).rename(self.path / f".{name}.{secrets.token_hex(4)}")
        self.plan.unlink(missing_ok=True)
        # These, and what whoever was killed has not finished.
        for path in (*self.path.glob(".*"), *(self.path / "results").glob(".*")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def results(self) -> list[Path]:
        """All of them, in the order of the lines."""
        return sorted((self.path / "results").glob("[0-9]*"))

    def remove_results(self, part: str) -> None:
        """Take one part's lines out of the results, and with the last of them the folder.

        Raises:
            OSError: the disk is full.
        """
        for path in self.results():
            if any(is_of(line, part) for line in _lines(path)):
                write_durably(path, (line for line in _lines(path) if not is_of(line, part)))
                if not path.stat().st_size:
                    path.unlink()
        if not self.results():
            shutil.rmtree(self.path, ignore_errors=True)


class FileStore:
    """Files by ID, each of one tenant. Safe for several threads."""

    def __init__(self, root: Path, client: redis.Redis) -> None:
        self.root = root
        self._redis: Any = client

    def put(self, source: BinaryIO, tenant: str, filename: str, purpose: str) -> FileRecord:
        """Copy ``source`` to its end into the store; it is there whole or not at all.

        Raises:
            InvalidRequest: it is empty. PayloadTooLarge: it is over the limit.
            OSError: the disk is full, or the folder cannot be written.
            Overloaded: Redis does not answer.
        """
        file_id = f"file-{secrets.token_hex(12)}"
        path = self.root / "files" / file_id
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_unfinished(path.parent)
        temporary = path.with_name(f".{file_id}")
        try:
            digest, size = _copy(source, temporary)
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
        record = FileRecord(file_id, tenant, filename, purpose, size, now_ms(), digest)
        self.record(record)
        return record

    def record(self, record: FileRecord) -> None:
        """Make a file known whose content is in place. Raises Overloaded."""
        with redis_errors(self._redis), self._redis.pipeline() as pipeline:
            pipeline.set(_file_key(record.id), encode(record))
            pipeline.zadd(_files_key(record.tenant), {record.id: record.created_ms})
            pipeline.execute()

    def get(self, file_id: str, tenant: str) -> FileRecord:
        """A file of this tenant. Raises FileNotFound, Overloaded."""
        with redis_errors(self._redis):
            value = self._redis.get(_file_key(file_id))
        record = None if value is None else msgspec.json.decode(value, type=FileRecord)
        if record is None or record.tenant != tenant:
            raise FileNotFound(f"there is no file {file_id[:64]!r}; GET /v1/files lists them")
        return record

    def all_of(self, tenant: str) -> list[FileRecord]:
        """All files of the tenant, newest first. Raises Overloaded."""
        with redis_errors(self._redis):
            ids = self._redis.zrevrange(_files_key(tenant), 0, -1)
            values = self._redis.mget([_file_key(i.decode()) for i in ids]) if ids else []
        return [msgspec.json.decode(value, type=FileRecord) for value in values if value]

    def remove(self, record: FileRecord) -> None:
        """Take a file's content away, and forget it; a batch that reads it then fails.

        Raises:
            OSError: the disk is full (one of two result files is taken out of what holds both).
            Overloaded: Redis does not answer.
        """
        # In this order: what is still known can be removed again.
        if record.batch_id:
            self.folder(record.batch_id).remove_results(record.part)
        else:
            self.path(record).unlink(missing_ok=True)
        with redis_errors(self._redis), self._redis.pipeline() as pipeline:
            pipeline.delete(_file_key(record.id))
            pipeline.zrem(_files_key(record.tenant), record.id)
            pipeline.execute()

    def path(self, record: FileRecord) -> Path:
        """An input's content."""
        return self.root / "files" / record.id

    def content(self, record: FileRecord) -> Iterator[bytes]:
        """The file's bytes, a few at a time. Raises FileNotFound where its content is gone."""
        if not record.batch_id:
            yield from _read(self.path(record))
            return
        found: list[bytes] = []
        size = 0
        for path in self.folder(record.batch_id).results():
            for line in _lines(path):
                if is_of(line, record.part):
                    found.append(line)
                    size += len(line)
                if size >= _COPY_BYTES:
                    yield b"".join(found)
                    found, size = [], 0
        yield b"".join(found)

    def results(self, batch_id: str) -> Iterator[bytes]:
        """Answers and errors of a batch, in the order of its input."""
        for path in self.folder(batch_id).results():
            yield from _read(path)

    def folder(self, batch_id: str) -> BatchFolder:
        """Where a batch keeps its files."""
        return BatchFolder(self.root, batch_id)


def is_failed(result: bytes) -> bool:
    """Whether a line of results is an error. Within a string the quotes would be escaped."""
    return result.rfind(_FAILED, max(0, len(result) - _ERROR_BYTES)) >= 0


def is_of(result: bytes, part: str) -> bool:
    """Whether a line of results belongs to the part."""
    return is_failed(result) == (part == "errors")


def _copy(source: BinaryIO, path: Path) -> tuple[str, int]:
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as target:
        while part := source.read(_COPY_BYTES):
            size += len(part)
            if size > MAX_FILE_BYTES:
                raise PayloadTooLarge(f"the file is over {MAX_FILE_BYTES} bytes; split it")
            digest.update(part)
            target.write(part)
        if not size:
            raise InvalidRequest("the file is empty; send at least one line")
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest(), size


def _drop_unfinished(folder: Path) -> None:
    """Copies that nobody has written to for a day: whoever made them was killed."""
    for path in folder.glob(".file-*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _UNFINISHED_S:
                path.unlink()


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _read(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while part := file.read(_COPY_BYTES):
                yield part
    except FileNotFoundError as error:
        raise FileNotFound(f"the content of {path.name} is gone from the store") from error


def _file_key(file_id: str) -> str:
    return f"openlora:file:{file_id}"


def _files_key(tenant: str) -> str:
    return f"openlora:files:of:{tenant}"
