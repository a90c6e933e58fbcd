"""API keys from a file: hashed at rest, each with its tenant, its adapters and its rate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import redis.asyncio

from gateway.auth import KeyPolicy
from openlora.errors import RateLimited, SetupError
from openlora.joblog.clients import redis_errors
from openlora.protocol import names

_HEX_DIGEST = 64

# Generic cell rate algorithm: one number per key says when its next request would be in time.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local due = math.max(now, tonumber(redis.call('GET', KEYS[1]) or now))
local wait = due - now - interval * (burst - 1)
if wait > 0 then return math.ceil(wait) end
redis.call('SET', KEYS[1], due + interval, 'PX', math.ceil(due + interval - now) + 1000)
return 0
"""


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the key file. ``sha256`` of the key in hex: the key itself is nowhere."""

    sha256: str
    tenant: str
    adapters: tuple[str, ...] | None = None
    per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None


def read_key_file(path: Path) -> list[tuple[bytes, str, KeyPolicy]]:
    """(digest, tenant, policy) of each entry of a JSON file: a list of ``KeyEntry``.

    Raises:
        SetupError: the file cannot be read, an entry is unusable, or there is none: that must not
            open the gateway to everybody.
    """
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=list[KeyEntry])
    except OSError as error:
        raise SetupError(f"the key file {path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise SetupError(f"the key file {path} is not valid: {error}") from error
    if not entries:
        raise SetupError(
            f"the key file {path} names no key; add one with `openlora keys new`, or leave the "
            "setting unset to let everybody in"
        )
    found = []
    for number, entry in enumerate(entries, start=1):
        try:
            digest = bytes.fromhex(entry.sha256)
        except ValueError:
            digest = b""
        if len(entry.sha256) != _HEX_DIGEST or not digest:
            raise SetupError(f"entry {number} of {path}: sha256 must be {_HEX_DIGEST} hex digits")
        policy = KeyPolicy(entry.sha256[:12], entry.adapters, entry.per_minute)
        found.append((digest, entry.tenant, policy))
    return found


class RateLimits:
    """Counts the requests of keys that have a rate, over all gateways."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis: Any = client  # redis-py's annotations leave replies open

    async def take(self, policy: KeyPolicy) -> None:
        """One request of the key.

        Raises:
            RateLimited: too many in the last minute; carries ``retry_after_ms``.
            Overloaded: Redis does not answer.
        """
        if policy.per_minute is None:
            return
        interval_ms = 60_000 / policy.per_minute
        burst = max(1.0, policy.per_minute / 6)  # what ten seconds bring
        with redis_errors(self._redis):
            key = names.rate_key(policy.key_id)
            wait_ms = await self._redis.eval(_TAKE, 1, key, interval_ms, burst)
        if wait_ms:
            raise RateLimited(
                f"this key may send {policy.per_minute:g} requests a minute; send this one again "
                "later",
                retry_after_ms=int(wait_ms),
            )
