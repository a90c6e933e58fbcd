"""Messages survive their bytes; bytes that are no message say so."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.errors import InvalidRequest
from openlora.protocol import codec
from openlora.protocol.events import Candidate, Chunk, End, Failure, Token
from openlora.protocol.jobs import AdapterRef, Job, Merge, Message
from openlora.protocol.names import new_job_id
from openlora.protocol.status import Heartbeat, PartitionStatus
from openlora.sampling_params import SamplingParams

floats = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(max_size=20)
indices = st.integers(0, 2**31)
candidates = st.builds(Candidate, indices, texts, floats)
tokens = st.builds(
    Token, indices, texts, st.none() | floats, st.lists(candidates, max_size=3).map(tuple)
)
failures = st.builds(Failure, texts, texts, st.booleans())
ends = st.builds(
    End,
    st.none() | st.sampled_from(["stop", "length", "cancelled"]),
    st.none() | failures,
    texts,
    *[indices] * 2,
    *[floats] * 3,
)
chunks = st.builds(
    Chunk,
    texts,
    indices,
    indices,
    st.lists(tokens, max_size=4).map(tuple),
    st.none() | ends,
    st.booleans(),
)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 9999),
    temperature=st.floats(0, 2),
    seed=st.integers(0, 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
)
jobs = st.builds(
    Job,
    job_id=st.integers(0, 255).map(new_job_id),
    tenant=texts,
    created_ms=indices,
    params=params,
    prompt=st.none() | texts,
    messages=st.none() | st.lists(st.builds(Message, texts, texts), max_size=3).map(tuple),
    adapters=st.lists(st.builds(AdapterRef, texts, indices, texts, floats), max_size=3).map(tuple),
    merge=st.builds(Merge, texts, st.none() | floats, texts, indices),
    priority=st.sampled_from(["interactive", "batch"]),
    deadline_ms=st.none() | indices,
    leased=st.booleans(),
)


@given(chunks)
def test_a_chunk_survives(chunk: Chunk) -> None:
    assert codec.decode_chunk(codec.encode(chunk)) == chunk


@given(st.lists(chunks, max_size=4).map(tuple))
def test_an_array_is_its_chunks_joined_by_commas(several: tuple[Chunk, ...]) -> None:
    """The log's Lua joins stored chunks so, without parsing them."""
    joined = b"[" + b",".join(codec.encode(chunk) for chunk in several) + b"]"
    assert codec.decode_chunks(joined) == several


@given(jobs)
def test_a_job_survives(job: Job) -> None:
    assert codec.decode_job(codec.encode(job)) == job


def test_a_heartbeat_survives() -> None:
    status = PartitionStatus("openlora.jobs", 3, 1, 2, 9, paused=True)
    facts = {"host": "h", "device": "cpu", "dtype": "float32", "model": "m", "model_id": "m"}
    heartbeat = Heartbeat(
        id="w",
        pid=1,
        engine_pid=2,
        max_model_len=8,
        ready=True,
        started_ms=1,
        written_ms=2,
        partitions=(status,),
        resident_adapters=("a",),
        **facts,
    )
    assert codec.decode_heartbeat(codec.encode(heartbeat)) == heartbeat


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"job_id":"x"}', b'"text"'),
        codec.encode({"job_id": "x", "tenant": "t", "created_ms": "soon", "params": {}}),
        codec.encode({"job_id": "x", "tenant": "t", "created_ms": 1, "params": {"top_p": 7}}),
        b'{"unknown":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_what_is_no_job_is_an_invalid_request(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        codec.decode_job(data)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_chunk_or_an_invalid_request(data: bytes) -> None:
    try:
        chunk = codec.decode_chunk(data)
    except InvalidRequest:
        return
    assert codec.decode_chunk(codec.encode(chunk)) == chunk


def test_a_chunk_of_one_token_is_small() -> None:
    chunk = Chunk(new_job_id(3), 1, 17, (Token(1234, "Hello"),))
    assert len(codec.encode(chunk)) <= 72


def test_fields_added_later_do_not_break_an_older_reader() -> None:
    """Gateways and workers are upgraded one by one."""
    job = Job(new_job_id(3), "t", 1, SamplingParams(seed=1), prompt="hi")
    newer = msgspec.to_builtins(job) | {"field_of_next_year": 1}
    assert codec.decode_job(codec.encode(newer)) == job
    token_of_next_year = [1234, "Hello", None, [], "more"]
    chunk = codec.decode_chunk(
        codec.encode(["00", 1, 0, [token_of_next_year], None, False, "more"])
    )
    assert chunk.tokens == (Token(1234, "Hello"),)
