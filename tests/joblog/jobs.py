"""Jobs and chunks as these tests need them."""

from __future__ import annotations

from itertools import count

from openlora.protocol.events import Chunk, End, Token
from openlora.protocol.jobs import Job
from openlora.protocol.names import new_job_id
from openlora.sampling_params import SamplingParams

SHARD = 7
_numbers = count()


def a_job(shard: int = SHARD, **fields) -> Job:
    fields = {"tenant": "t", "created_ms": 1, "params": SamplingParams(seed=1)} | fields
    return Job(job_id=new_job_id(shard), prompt="hi", **fields)


def a_chunk(
    job_id: str, epoch: int, first_index: int, count: int = 1, end: bool = False, **fields
) -> Chunk:
    """Its tokens are unlike all others, so that a log shows whose they are."""
    tokens = tuple(Token(next(_numbers), "é") for _ in range(count))
    return Chunk(job_id, epoch, first_index, tokens, End("stop") if end else None, **fields)
