"""Keys from a file: hashed, with a tenant, adapters and a rate."""

from __future__ import annotations

import asyncio
import hashlib
import json
import stat
import subprocess
import sys

import pytest

from gateway.auth import ANYTHING, ApiKeys, KeyPolicy
from gateway.keys import RateLimits, read_key_file
from openlora.errors import Forbidden, RateLimited, SetupError, Unauthorized
from openlora.joblog import async_redis_client

DIGEST = hashlib.sha256(b"s3cret").hexdigest()


@pytest.fixture
def key_file(tmp_path):
    def write(content):
        path = tmp_path / "keys.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_key_is_known_by_its_hash_and_brings_its_policy(key_file):
    entry = {"sha256": DIGEST, "tenant": "acme", "adapters": ["pirate", "acme-*"], "per_minute": 6}
    keys = ApiKeys.parse("umbrella:two").with_entries(read_key_file(key_file([entry])))
    tenant, policy = keys.caller_of("s3cret")
    assert (tenant, policy.per_minute) == ("acme", 6)
    assert keys.caller_of("two") == ("umbrella", ANYTHING)
    with pytest.raises(Unauthorized):
        keys.caller_of(DIGEST)
    assert "s3cret" not in repr(keys)


def test_only_the_named_adapters_may_be_used():
    policy = KeyPolicy("k", ("pirate", "acme-*"))
    policy.check_adapter("pirate")
    policy.check_adapter("acme-7")
    for name in ("poet", "Pirate", "x-acme-7"):
        with pytest.raises(Forbidden, match=f"may not use adapter '{name}'"):
            policy.check_adapter(name)
    with pytest.raises(Forbidden, match="none"):
        KeyPolicy("k", ()).check_adapter("pirate")
    ANYTHING.check_adapter("whatever")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is not valid"),
        ([], "names no key"),
        ([{"sha256": "ab", "tenant": "t"}], "entry 1 of .* must be 64 hex digits"),
        ([{"sha256": "zz" * 32, "tenant": "t"}], "must be 64 hex digits"),
        ([{"sha256": DIGEST}], "missing required field `tenant`"),
        ([{"sha256": DIGEST, "tenant": "t", "rate": 1}], "unknown field `rate`"),
        ([{"sha256": DIGEST, "tenant": "t", "per_minute": 0}], "per_minute"),
    ],
)
def test_an_unusable_file_is_one_clear_line(key_file, content, line):
    with pytest.raises(SetupError, match=line):
        read_key_file(key_file(content))


def test_a_tenant_that_could_not_be_a_name_is_refused(key_file):
    entries = read_key_file(key_file([{"sha256": DIGEST, "tenant": "a b"}]))
    with pytest.raises(SetupError, match="tenant 'a b'"):
        ApiKeys().with_entries(entries)


def test_the_command_writes_what_the_gateway_reads(tmp_path):
    path = tmp_path / "keys.json"
    for tenant in ("acme", "umbrella"):
        words = ["keys", "new", "--tenant", tenant, "--adapters", "a,b", "--per-minute", "60"]
        done = subprocess.run(
            [sys.executable, "-m", "openlora", *words, "--file", str(path)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    key = done.stdout.split()[-1]
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    tenant, policy = ApiKeys().with_entries(read_key_file(path)).caller_of(key)
    assert (tenant, policy.adapters, policy.per_minute) == ("umbrella", ("a", "b"), 60)


@pytest.mark.services
def test_a_rate_is_kept_over_all_gateways_and_grows_back(redis_url):
    async def main():
        async with async_redis_client(redis_url) as one, async_redis_client(redis_url) as two:
            gateways = [RateLimits(one), RateLimits(two)]
            policy = KeyPolicy("k", None, 600)  # ten a second, a hundred at once
            for number in range(100):
                await gateways[number % 2].take(policy)
            with pytest.raises(RateLimited) as caught:
                await asyncio.gather(*(gateways[0].take(policy) for _ in range(20)))
            assert 0 < caught.value.retry_after_ms <= 100
            await asyncio.sleep(caught.value.retry_after_ms / 1000)
            await gateways[1].take(policy)
            await gateways[0].take(KeyPolicy("another", None, 600))
            await gateways[0].take(ANYTHING)

    asyncio.run(main())
