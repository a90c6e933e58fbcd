"""Extras share the life of their adapter's pages, within a budget of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from openlora.adapters.extras import AdapterExtras
from openlora.adapters.pages import PagePool
from openlora.engine.adapter_entry import Adapter as Entry
from openlora.engine.adapter_fit import check_fit
from openlora.engine.residency import ResidentAdapters


@dataclass(frozen=True)
class Adapter:
    page_counts: tuple[int, ...]
    extras: AdapterExtras | None = None
    info: None = None


def adapter(size=0, pages=1):
    extras = AdapterExtras(norms={"model.norm": torch.zeros(size, dtype=torch.uint8)})
    return Adapter((pages,) * 4, extras if size else None)


@pytest.fixture
def resident():
    return ResidentAdapters(PagePool((4,) * 4), lambda pages, loaded: None, extras_bytes=100)


def place(resident, key, loaded, wanted=()):
    placed = resident.place(key, loaded, lambda name: name in wanted)
    resident.check_integrity()
    return placed


def test_extras_come_and_go_with_the_pages(resident):
    one = adapter(60)
    assert place(resident, "one", one)
    assert place(resident, "plain", adapter())
    assert resident.extras("one") is one.extras
    assert resident.extras("plain") is None
    resident.evict("one")
    assert resident.extras("one") is None


def test_a_full_budget_evicts_the_longest_unused_that_has_extras(resident):
    place(resident, "plain", adapter())
    place(resident, "one", adapter(60))
    place(resident, "two", adapter(30))
    assert place(resident, "three", adapter(50))
    assert resident.keys == ("plain", "two", "three")


def test_pinned_extras_stay(resident):
    place(resident, "one", adapter(60))
    resident.pin("one")
    assert not place(resident, "two", adapter(50))
    assert place(resident, "small", adapter(40))
    assert resident.keys == ("one", "small")


def test_pages_may_be_what_is_short(resident):
    place(resident, "one", adapter(10, pages=3))
    assert place(resident, "two", adapter(10, pages=2))
    assert resident.keys == ("two",)


def test_extras_that_never_fit_beside_held_ones_are_refused_not_left_to_wait(resident):
    place(resident, "held", adapter(50))
    assert resident.hold("held")
    large = Entry("large", "large", Path("large"), page_counts=(1,) * 4, extras_bytes=60)
    error = check_fit([large], resident)
    assert "take 60 bytes; at most 50 are kept beside pinned adapters" in error.message
    resident.unhold("held")
    assert check_fit([large], resident) is None
