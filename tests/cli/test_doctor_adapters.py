"""What doctor says of the adapter store: a directory, a URL and its cache, a missing package."""

from __future__ import annotations

import pytest

from openlora.adapters.stores import cache_of
from openlora.commands import doctor


@pytest.fixture
def found(monkeypatch, tmp_path):
    def found(store):
        environ = {"OPENLORA_STORE": store, "OPENLORA_ADAPTER_CACHE": str(tmp_path)}
        monkeypatch.setattr(doctor, "process_environment", lambda: environ)
        return [(f.part, f.state, f.detail) for f in doctor._adapter_tiers()]

    return found


def test_a_directory_needs_no_cache(found):
    (finding,) = found("/some/where")
    assert finding[:2] == ("adapter store", "ok")
    assert "/some/where" in finding[2]


def test_a_url_has_one_on_this_machine(found, tmp_path):
    url = "memory://adapters"
    assert found(url)[1][2].endswith("(0 adapters of the store)")
    (cache_of(url, tmp_path) / ("a" * 64)).mkdir(parents=True)
    (cache_of(url, tmp_path) / ".locks").mkdir()
    assert found(url)[1][2].endswith("(1 adapters of the store)")


def test_a_package_that_is_missing_is_named(found):
    ((part, state, detail),) = found("nonsense://x")
    assert (part, state) == ("adapter store", "missing")
    assert "nonsense" in detail
