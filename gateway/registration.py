"""Registering an adapter: checked, copied into the store by content, and only then announced."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from openlora.adapters.peft_format import AdapterInfo, AdapterLayout
from openlora.adapters.safetensors_header import TensorEntry
from openlora.adapters.sources import fetch
from openlora.adapters.stores import Store
from openlora.errors import AdapterFailed, Forbidden, InvalidRequest
from openlora.protocol.status import AdapterRecord
from openlora.registry import OPERATOR, check_adapter_id
from openlora.registry.records import check_remote

if TYPE_CHECKING:
    from gateway.system import Gateway

MAX_LICENCE_CHARS = 200
STORING_MS = 3_600_000
"""Longer than it takes to copy the largest adapter into a store."""
MAX_FETCHES = 4
"""Processes that fetch at a time."""
_READS_HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv_proj", "gate_up_proj")
_WRITES_HIDDEN = ("o_proj", "down_proj")


class NewAdapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/adapters``.

    ``visibility`` None: "private" for a tenant with a name, "public" for keys without one.
    """

    id: str
    source: str
    visibility: str | None = None
    licence: str = ""


class Registrar:
    """Registers adapters for one gateway, one at a time: each reads and writes whole files, and
    the disk serves the open streams as well. What comes from elsewhere is fetched before its turn,
    so that a slow server holds up nobody."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._turn = asyncio.Lock()
        self._fetches = asyncio.Semaphore(MAX_FETCHES)

    async def register(
        self, new: NewAdapter, tenant: str, also_from: Sequence[str] = ()
    ) -> AdapterRecord:
        """Validates, stores and registers ``new``; a changed adapter gets the next version.

        ``also_from``: URL prefixes that are allowed beside those that tenants may add from.

        Raises:
            InvalidRequest: the ID, visibility or licence is malformed, or the source is neither a
                local directory nor a URL.
            Forbidden: the ID is another tenant's, or the source is not for this one.
            AdapterFailed: the files are unusable, or fit another base model than the workers'.
            Overloaded: Redis does not answer.
        """
        check_adapter_id(new.id)
        if len(new.licence) > MAX_LICENCE_CHARS:
            raise InvalidRequest(
                f"licence has {len(new.licence)} characters; send at most {MAX_LICENCE_CHARS}, "
                "such as an SPDX name"
            )
        if "://" in new.source:
            check_remote(new.source)
            if tenant != OPERATOR:
                # A tenant may not have the gateway read what only the gateway can reach.
                allowed = (*self._gateway.config.adapter_sources, *also_from)
                check_prefixes(new.source, allowed, "OPENLORA_ADAPTER_SOURCES")
            async with self._fetches:
                fetched = await asyncio.to_thread(_fetched, new.source, self._gateway.store.scratch)
            try:
                return await self._register(new, tenant, Path(fetched.name))
            finally:
                await asyncio.to_thread(fetched.cleanup)
        return await self._register(new, tenant, _directory(new.source, tenant))

    async def _register(self, new: NewAdapter, tenant: str, source: Path) -> AdapterRecord:
        heartbeats = await self._gateway.job_log.heartbeats()
        hidden_sizes = {beat.hidden_size for beat in heartbeats if beat.hidden_size}
        registry = self._gateway.directory.registry
        async with self._turn:
            holder = await registry.holder()
            loop = asyncio.get_running_loop()

            def announce(content_hash: str) -> None:
                # In the registry before it is in the store: were this gateway to die in between,
                # nobody would ever delete it.
                expected = registry.expect(content_hash, STORING_MS)
                asyncio.run_coroutine_threadsafe(expected, loop).result()

            info = await asyncio.to_thread(
                _store, self._gateway.store, source, holder, hidden_sizes, announce
            )
            await registry.expect(info.hash)
            visibility = new.visibility or ("public" if tenant == OPERATOR else "private")
            record = record_of(new.id, info, _without_secrets(new.source))
            return await self._gateway.directory.put(
                msgspec.structs.replace(
                    record, owner=tenant, visibility=visibility, licence=new.licence
                )
            )


def record_of(adapter_id: str, info: AdapterInfo, source: str) -> AdapterRecord:
    """What the registry is to keep of an adapter in the store; it assigns the version."""
    return AdapterRecord(
        id=adapter_id,
        version=0,
        hash=info.hash,
        rank=info.rank,
        targets=tuple(info.targets),
        base_model=info.base_model,
        size_bytes=info.size_bytes,
        source=source,
        created_ms=time.time_ns() // 1_000_000,
        owner=OPERATOR,
    )


def check_hidden_size(tensors: Mapping[str, TensorEntry], hidden_sizes: set[int]) -> None:
    """Tells an adapter of another base model before a worker has to refuse it.

    ``lora_A`` of what reads the hidden state has its size as second dimension, ``lora_B`` of what
    writes it as first. Without a worker nothing can be compared: the worker checks again.

    Raises:
        AdapterFailed: names a tensor, its shape, and the size that the workers' model has.
    """
    if not hidden_sizes:
        return
    for name, entry in sorted(tensors.items()):
        parts = name.split(".")
        hidden = None
        if "lora_A" in parts and any(part in _READS_HIDDEN for part in parts):
            hidden = entry.shape[1]
        elif "lora_B" in parts and any(part in _WRITES_HIDDEN for part in parts):
            hidden = entry.shape[0]
        if hidden is not None and hidden not in hidden_sizes:
            sizes = ", ".join(map(str, sorted(hidden_sizes)))
            raise AdapterFailed(
                f"{name} has shape {list(entry.shape)}: it belongs to a model of hidden size "
                f"{hidden}, but the workers' model has {sizes}; train the adapter on the served "
                "base model"
            )


def check_prefixes(url: str, allowed: Sequence[str], setting: str) -> None:
    """Refuses a URL that is below none of ``allowed``, or is written so that it may not be.

    Raises:
        Forbidden: with what is allowed, and the ``setting`` that says so.
    """
    plain = not any(part in url for part in ("..", "::", "%", "\\"))
    if not plain or not url.startswith(tuple(allowed)):
        raise Forbidden(
            f"adapters may be taken from {', '.join(allowed) or 'no URL'}, not from {url[:200]!r}; "
            f"ask the operator ({setting})"
        )


def _without_secrets(source: str) -> str:
    """A URL without the password and the query, which may be a key."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        return source
    host, slash, path = rest.partition("?")[0].partition("/")
    user, at, bare = host.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{bare}{slash}{path}"


def _fetched(url: str, scratch_dir: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        scratch_dir.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".incoming-", dir=scratch_dir)
    except OSError as error:
        raise AdapterFailed(f"{scratch_dir} cannot be written: {error}") from error
    try:
        fetch(url, Path(scratch.name))
    except AdapterFailed:
        scratch.cleanup()
        raise
    return scratch


def _directory(source: str, tenant: str) -> Path:
    if "\0" in source or not source:
        raise InvalidRequest(f"source {source[:200]!r} is no path; name a PEFT adapter's directory")
    if tenant != OPERATOR:
        # Otherwise a tenant could read other tenants' adapters out of the store, or any other
        # directory of the machine that looks like one.
        raise Forbidden(
            "directories of the gateway's machine are for keys without a tenant; "
            "ask the operator to add it"
        )
    path = Path(source).expanduser()
    if not path.is_absolute():
        raise InvalidRequest(f"source {source[:200]!r} is relative; name the whole path")
    if not path.is_dir():
        hint = f"; name an archive as file://{source[:200]}" if path.suffix == ".zip" else ""
        raise InvalidRequest(
            f"source {source[:200]!r} is no directory on the gateway's machine{hint}"
        )
    return path


def _store(
    store: Store,
    source: Path,
    holder: str,
    hidden_sizes: set[int],
    announce: Callable[[str], None],
) -> AdapterInfo:
    def check(layout: AdapterLayout) -> None:
        check_hidden_size(layout.tensors, hidden_sizes)

    try:
        return store.put(source, holder=holder, check=check, announce=announce)
    except OSError as error:
        raise AdapterFailed(
            f"{source.name} cannot be copied into the store {store.name}: {error}; free space "
            "there, or see whether it can be reached"
        ) from error
