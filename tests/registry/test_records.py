"""Adapter IDs and versions, without Redis."""

from __future__ import annotations

import pytest

from openlora.errors import InvalidRequest
from openlora.protocol.codec import encode
from openlora.protocol.status import AdapterRecord
from openlora.registry.records import check_adapter_id, fields_of, next_record, records_of


def record(adapter_id: str = "a", content: str = "f", version: int = 0) -> AdapterRecord:
    return AdapterRecord(adapter_id, version, content * 64, 8, ("q_proj",), "base", 10, "/x", 5)


@pytest.mark.parametrize("good", ["a", "pirate-v2", "Org_1.model", "-", "x" * 128, "0"])
def test_good_ids_are_given_back(good: str) -> None:
    assert check_adapter_id(good) == good


@pytest.mark.parametrize(
    "bad",
    ["", ".", "..", ".a", "a/b", "a\\b", "a b", "a\n", "ä", "a#version", "x" * 129, "a\0", "%2e"],
)
def test_ids_that_could_mean_something_else_are_refused(bad: str) -> None:
    with pytest.raises(InvalidRequest, match="adapter ID"):
        check_adapter_id(bad)


def test_versions_count_up_and_go_on_after_a_removal() -> None:
    first = next_record(record(), None, None)
    assert first is not None
    assert first.version == 1
    again = next_record(record(content="e"), None, b"7")
    assert again is not None
    assert again.version == 8


def test_the_same_content_is_no_new_version() -> None:
    assert next_record(record(), encode(record(version=3)), b"3") is None


def test_fields_hold_the_records_and_their_versions() -> None:
    fields: dict[bytes, bytes] = {}
    for made in (record("b", version=2), record("a", version=9)):
        fields |= {
            k.encode(): str(v).encode() if isinstance(v, int) else v
            for k, v in fields_of(made).items()
        }
    assert [(r.id, r.version) for r in records_of(fields)] == [("a", 9), ("b", 2)]
