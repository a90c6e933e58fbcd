"""Adapter IDs, references and who sees what, without Redis."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest

from openlora.errors import Forbidden, InvalidRequest, UnknownAdapter
from openlora.protocol.codec import encode
from openlora.protocol.status import AdapterRecord
from openlora.registry.records import (
    Reference,
    check_adapter_id,
    key_of,
    parse_reference,
    put_call,
    records_of,
    result_of,
    visible_records,
)


def record(adapter_id: str = "a", **fields: object) -> AdapterRecord:
    made = AdapterRecord(adapter_id, 0, "f" * 64, 8, ("q_proj",), "base", 10, "/x", 5)
    return msgspec.structs.replace(made, **fields)


@pytest.mark.parametrize("good", ["a", "pirate-v2", "Org_1.model", "-", "x" * 128, "0"])
def test_good_ids_are_given_back(good: str) -> None:
    assert check_adapter_id(good) == good
    assert parse_reference(good) == Reference(good)
    assert parse_reference(f"{good}@12") == Reference(good, 12)


@pytest.mark.parametrize(
    "bad",
    ["", ".", "..", ".a", "a/b", "a\\b", "a b", "a\n", "ä", "a#version", "x" * 129, "a\0", "%2e"],
)
def test_ids_that_could_mean_something_else_are_refused(bad: str) -> None:
    with pytest.raises(InvalidRequest, match="adapter ID"):
        check_adapter_id(bad)
    with pytest.raises(InvalidRequest, match="adapter ID"):
        parse_reference(f"{bad}@1")


@pytest.mark.parametrize("pin", ["", "0", "-1", "1.5", "01", "1@2", "latest", "9" * 10, "١"])
def test_pins_that_are_no_version_are_refused(pin: str) -> None:
    with pytest.raises(InvalidRequest, match="pins no version"):
        parse_reference(f"a@{pin}")


def test_a_visibility_that_there_is_not_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="visibility is 'secret'"):
        put_call(record(visibility="secret"), 0)


def test_private_keys_meet_no_other() -> None:
    assert key_of(record("a", owner="t", visibility="public")) == "a"
    assert key_of(record("a", owner="t", visibility="private")) == "t/a"


def test_a_tenant_sees_what_is_public_and_its_own_which_goes_first() -> None:
    mine = record("a", owner="me", visibility="private", hash="1")
    theirs = record("a", owner="them", visibility="private", hash="2")
    shared = record("a", owner="them", hash="3")
    other = record("b", owner="", hash="4")
    everything = [shared, theirs, mine, other]
    for records in (everything, everything[::-1]):
        seen = {t: [r.hash for r in visible_records(records, t)] for t in ("me", "them", "x")}
        assert seen == {"me": ["1", "4"], "them": ["2", "4"], "x": ["3", "4"]}


def test_the_index_holds_records_beside_their_last_versions() -> None:
    made = record("b", version=2)
    fields = {b"b": encode(made), b"b#version": b"2", b"gone#version": b"7"}
    assert records_of(fields) == {"b": made}


@dataclass(frozen=True)
class Refusal:
    reply: list[bytes]
    error: type[Exception]


@pytest.mark.parametrize(
    "case",
    [
        Refusal([b"forbidden", b"them"], Forbidden),
        Refusal([b"missing"], UnknownAdapter),
        Refusal([b"current"], InvalidRequest),
    ],
)
def test_what_a_script_refuses_is_said_without_naming_others(case: Refusal) -> None:
    with pytest.raises(case.error) as caught:
        result_of(case.reply, Reference("a", 3))
    assert "'a@3'" in str(caught.value)
    assert "them" not in str(caught.value)
