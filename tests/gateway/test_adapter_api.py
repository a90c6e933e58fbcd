"""Pages of adapters, and what of a record is shown to whom."""

from __future__ import annotations

import msgspec
import pytest

from gateway.adapter_api import _limit, check_pins, record_fields, residency, select
from openlora.errors import InvalidRequest
from openlora.protocol.status import AdapterRecord, TierStatus
from tests.gateway.test_workers_view import heartbeat


def record(adapter_id: str, **fields: object) -> AdapterRecord:
    made = AdapterRecord(adapter_id, 1, adapter_id, 8, ("q_proj",), "Org/Llama", 10, "/secret", 5)
    return msgspec.structs.replace(made, **fields)


RECORDS = [record("cat"), record("dog", base_model="Org/Qwen"), record("hotdog"), record("yak")]


def ids(records: list[AdapterRecord]) -> list[str]:
    return [found.id for found in records]


def test_a_page_starts_behind_an_id() -> None:
    assert ids(select(RECORDS, limit=2)) == ["cat", "dog"]
    assert ids(select(RECORDS, after="dog", limit=2)) == ["hotdog", "yak"]
    assert ids(select(RECORDS, after="e")) == ["hotdog", "yak"]
    assert select(RECORDS, after="yak") == []


def test_a_search_is_in_ids_and_base_models() -> None:
    assert ids(select(RECORDS, search="DOG")) == ["dog", "hotdog"]
    assert ids(select(RECORDS, search="qwen")) == ["dog"]
    assert ids(select(RECORDS, search="dog", after="dog")) == ["hotdog"]


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1001", "1.5", "٣"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match="limit is"):
        _limit(text)


def test_the_source_is_told_to_the_owner_alone() -> None:
    theirs = record("a", owner="them")
    assert record_fields(theirs, "them", {}, False)["source"] == "/secret"
    assert record_fields(theirs, "me", {}, False)["source"] == ""
    shown = record_fields(record("a"), "default", {"device": ["w1"], "host": ["w2"]}, True)
    assert shown["resident_on"] == ["w1"]
    assert shown["tiers"] == {"device": ["w1"], "host": ["w2"]}
    assert shown["pinned"] is True


def test_residency_is_by_content_and_tier() -> None:
    tiers = (
        TierStatus("device", contents=("a", "b")),
        TierStatus("host", contents=("b",)),
        TierStatus("disk", contents=("c",)),
    )
    beats = [heartbeat(id="v", tiers=tiers), heartbeat(resident_adapters=("b",))]
    assert residency(beats) == {
        "a": {"device": ["v"]},
        "b": {"device": ["v", "w"], "host": ["v"]},
        "c": {"disk": ["v"]},
    }


def test_pins_take_half_of_the_least_workers_pages() -> None:
    beats = [heartbeat(max_lora_rank=16 * 8), heartbeat(max_lora_rank=16 * 4), heartbeat()]
    check_pins([record("a", rank=8), record("b", rank=16)], beats)
    check_pins([record("a", rank=8), record("b", rank=16), record("a", rank=8)], beats)
    with pytest.raises(InvalidRequest, match=r"would take 3 pages .* half of the 4"):
        check_pins([record("a", rank=8), record("b", rank=17)], beats)
    check_pins([record("a", rank=999)], [heartbeat()])
