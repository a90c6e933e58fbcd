"""Keys and channels follow from a job ID alone, on one Redis Cluster slot."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.protocol import names


@given(st.integers(0, names.SHARD_COUNT - 1))
def test_a_job_lives_in_the_slot_of_its_shard(shard: int) -> None:
    job_id = names.new_job_id(shard)
    assert names.is_job_id(job_id)
    assert names.shard_of(job_id) == shard
    places = [
        *(names.job_key(job_id), names.log_key(job_id, 1), names.open_jobs_key(shard)),
        *(names.cancels_key(shard), names.events_channel(shard)),
    ]
    assert len(set(places)) == len(places)
    assert {re.search(r"\{(.*?)\}", place).group(1) for place in places} == {f"{shard:02x}"}


@pytest.mark.parametrize(
    "text", ["", "00", "0" * 25, "0" * 27, "G" * 26, "0" * 25 + "}", "ABCDEF" + "0" * 20, "٣" * 26]
)
def test_what_is_no_job_id(text: str) -> None:
    assert not names.is_job_id(text)


@given(*[st.text(st.sampled_from("a:1"), max_size=4)] * 4)
def test_idempotency_keys_of_two_tenants_are_apart(t1: str, k1: str, t2: str, k2: str) -> None:
    same = names.idempotency_key(t1, k1) == names.idempotency_key(t2, k2)
    assert same == ((t1, k1) == (t2, k2))
