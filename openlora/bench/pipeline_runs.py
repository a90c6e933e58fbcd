"""The pipeline benchmark's runs: each starts its system, drives it with a client, measures both."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec

from openlora.bench.pipeline_plan import WINDOW_OPEN, ClientPlan, ClientResult
from openlora.bench.pipeline_relay import publish_steps, step_message
from openlora.bench.pipeline_system import Brokers, System, running_relay, running_system
from openlora.errors import SetupError

RAMP_S = 3.0
THROUGHPUT_REQUESTS = 4
"""A throughput run's only request on each stream is so many times as long as another: start and end
of the run are a small part of it then."""
CLIENT_LIMIT_S = 60.0
_KILL_AFTER_S = CLIENT_LIMIT_S + 15.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: what the client saw, and each process's share of one core meanwhile."""

    result: ClientResult
    cpu_share: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        """Tokens received per second of the measured time."""
        return self.result.tokens / self.result.seconds


def measure_relay(brokers: Brokers, streams: int, tokens: int) -> Measured:
    """The bare relay with ready-made frames, published as fast as Redis takes them."""
    tokens *= THROUGHPUT_REQUESTS
    messages = [step_message(streams, index) for index in range(tokens)]
    with running_relay(brokers, streams) as system:
        plan = ClientPlan(
            system.url, relay=True, streams=streams, tokens=tokens, limit_s=CLIENT_LIMIT_S
        )
        stopped = threading.Event()
        arguments = (brokers.redis.address, messages, 0.0, stopped)
        return _run_client(system, plan, threading.Thread(target=publish_steps, args=arguments))


def measure_relay_load(
    brokers: Brokers, streams: int, tokens_per_s: float, seconds: float
) -> Measured:
    """The bare relay at a steady load."""
    with running_relay(brokers, streams) as system:
        plan = ClientPlan(
            system.url,
            relay=True,
            streams=streams,
            tokens=0,  # it never ends
            window_s=seconds,
            ramp_s=RAMP_S,
            limit_s=CLIENT_LIMIT_S + seconds,
        )
        stopped = threading.Event()
        messages = itertools.repeat(step_message(streams, 0))
        arguments = (brokers.redis.address, messages, tokens_per_s / streams, stopped)
        publisher = threading.Thread(target=publish_steps, args=arguments)
        try:
            return _run_client(system, plan, publisher, stopped)
        finally:
            stopped.set()


def measure_throughput(
    brokers: Brokers, model: Path, streams: int, tokens: int, offered_tok_s: float
) -> Measured:
    """Every stream asks at once; the engine's steps come at the pace of ``offered_tok_s``.

    Without a pace the whole run would be one backlog, sent in large pieces: more tokens per second
    than anybody could be served that way.
    """
    with running_system(brokers, model, f"clock:{offered_tok_s / streams:.3f}") as system:
        plan = ClientPlan(
            system.url,
            relay=False,
            streams=streams,
            tokens=tokens * THROUGHPUT_REQUESTS,
            limit_s=CLIENT_LIMIT_S,
        )
        return _run_client(system, plan)


def measure_latency(
    brokers: Brokers, model: Path, streams: int, tokens: int, tokens_per_s: float, seconds: float
) -> Measured:
    """A steady load: each stream sends its next request when one has ended."""
    with running_system(brokers, model, f"clock:{tokens_per_s / streams:.3f}") as system:
        return measure_steady(system, streams, tokens, seconds)


def measure_steady(system: System, streams: int, tokens: int, seconds: float) -> Measured:
    """The same on a system that runs already, at the load that its engine's clock sets."""
    plan = ClientPlan(
        system.url,
        relay=False,
        streams=streams,
        tokens=tokens,
        window_s=seconds,
        ramp_s=RAMP_S,
        limit_s=CLIENT_LIMIT_S + seconds,
    )
    return _run_client(system, plan)


def _run_client(
    system: System,
    plan: ClientPlan,
    publisher: threading.Thread | None = None,
    stopped: threading.Event | None = None,
) -> Measured:
    argument = msgspec.json.encode(plan).decode()
    client = subprocess.Popen(
        [sys.executable, "-m", "openlora.bench.pipeline_client", argument],
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None
    killer = threading.Timer(_KILL_AFTER_S + plan.window_s, client.kill)
    killer.start()
    if publisher is not None:
        publisher.start()
    first = client.stdout.readline()
    before = system.cpu_seconds()
    last = client.stdout.readline()
    after = system.cpu_seconds()
    if stopped is not None:
        stopped.set()
    client.wait()
    killer.cancel()
    if publisher is not None:
        publisher.join()
    if first != WINDOW_OPEN or client.returncode != 0:
        raise SetupError(
            f"the benchmark's client ended with status {client.returncode} before it could measure"
        )
    result = msgspec.json.decode(last, type=ClientResult)
    share = {name: (after[name] - before[name]) / result.seconds for name in after}
    share["client"] = result.cpu_seconds / result.seconds
    return Measured(result, share)
