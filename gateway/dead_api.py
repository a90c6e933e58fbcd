"""``/v1/dead``: jobs and messages that could not be run, shown and tried again."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.auth import DEFAULT_TENANT, KeyPolicy
from gateway.system import Gateway
from gateway.threads import in_daemon_thread
from openlora.errors import InvalidRequest, JobNotFound, Overloaded, SetupError
from openlora.protocol.bulk import (
    BULK_PREFIX,
    BulkMessage,
    decode_bulk_message,
    line_job_id,
    seed_of,
)
from openlora.protocol.codec import decode_job
from openlora.protocol.dead import DeadLetter
from openlora.protocol.jobs import Job
from openlora.protocol.names import SHARD_COUNT, new_job_id
from openlora.registry.records import owner_of
from producer.dead_topic import read_dead_letters

RETRY_AFTER_MS = 1000


class DeadApi:
    """The handlers. A tenant sees its own jobs; the operator, whose tenant is the default one,
    sees all, lines of batches, and messages that are no job."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._turn = asyncio.Lock()  # one reads at a time: each holds all letters

    async def list(self, request: Request, tenant: str) -> Response:
        """All letters, without the messages themselves."""
        letters = await self._letters(tenant)
        return JSONResponse([_fields(number, letter) for number, letter in letters.items()])

    async def show(self, request: Request, tenant: str) -> Response:
        """One letter with its message: the job, or the bytes in base64 where it is none."""
        number, letter = await self._letter(request, tenant)
        job = _job_of(letter)
        message = {"value": letter.value} if job is None else {"job": msgspec.to_builtins(job)}
        return JSONResponse(_fields(number, letter) | message)

    async def retry(self, request: Request, tenant: str) -> Response:
        """Accept the job once more, as a new one that nobody has to watch: 201 with its ID.

        It counts as any request does. Adapters that were quarantined for it are released, where
        they are the caller's; the operator's key releases any.
        """
        number, letter = await self._letter(request, tenant)
        job = _job_of(letter)
        if job is None:
            raise InvalidRequest(f"letter {number} holds no job: {letter.reason}")
        policy: KeyPolicy = request.state.policy
        for adapter in job.adapters:
            policy.check_adapter(adapter.id)
        await self._gateway.rates.take(policy)
        fresh = msgspec.structs.replace(
            job,
            job_id=new_job_id(secrets.randbelow(SHARD_COUNT)),
            created_ms=time.time_ns() // 1_000_000,
            deadline_ms=None,
            leased=False,
        )
        for adapter in fresh.adapters:
            if self._may_release(adapter.hash, tenant):
                await self._gateway.quarantine.release(adapter.hash)
        await self._gateway.intake.commit(fresh)
        return JSONResponse({"job_id": fresh.job_id, "letter": number}, 201)

    def _may_release(self, content_hash: str, tenant: str) -> bool:
        owners = {owner_of(r) for r in self._gateway.directory.known if r.hash == content_hash}
        return tenant == DEFAULT_TENANT or owners == {tenant}

    async def _letter(self, request: Request, tenant: str) -> tuple[int, DeadLetter]:
        number = request.path_params["number"]
        letter = (await self._letters(tenant)).get(number)
        if letter is None:
            raise JobNotFound(f"there is no dead letter {number}; GET /v1/dead lists them")
        return number, letter

    async def _letters(self, tenant: str) -> dict[int, DeadLetter]:
        servers = self._gateway.config.kafka
        try:
            async with self._turn:
                letters = await in_daemon_thread(lambda: read_dead_letters(servers))
        except SetupError as error:
            raise Overloaded(error.message, retry_after_ms=RETRY_AFTER_MS) from error
        if tenant == DEFAULT_TENANT:
            return letters
        return {
            number: letter
            for number, letter in letters.items()
            if (job := _job_of(letter)) is not None and job.tenant == tenant
        }


def _job_of(letter: DeadLetter) -> Job | None:
    """The job in the letter; None where its message was none, or was too large to keep whole."""
    try:
        message = base64.b64decode(letter.value)
        if message.startswith(BULK_PREFIX):
            return _job_of_line(decode_bulk_message(message))
        return decode_job(message)
    except (InvalidRequest, ValueError):
        return None


def _job_of_line(bundle: BulkMessage) -> Job | None:
    """A line of a batch as a job of its own, the operator's: its batch has its answer already."""
    if len(bundle.lines) != 1:
        return None
    (line,) = bundle.lines
    job_id = line_job_id(bundle.batch_id, bundle.input_hash, line.line)
    return Job(
        job_id=job_id,
        tenant=DEFAULT_TENANT,
        created_ms=0,
        params=line.params.sampling(seed_of(job_id)),
        prompt=line.prompt,
        messages=line.messages,
        adapters=bundle.group.adapters,
        priority="batch",
        leased=False,
    )


def _fields(number: int, letter: DeadLetter) -> dict[str, object]:
    fields: dict[str, object] = msgspec.to_builtins(letter)
    del fields["value"]
    return {"number": number, **fields}
