"""What can be broken, one thing at a time, and mended again as its keeper would."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from openlora.bench.chaos_proxy import Proxy
from openlora.bench.chaos_redis import RedisMoment
from openlora.bench.chaos_system import ChaosSystem, Process

Fault = Callable[[ChaosSystem, random.Random], None]
"""Breaks something, mends it, and returns; the system is not waited for."""

RESTART_AFTER_S = 0.5
"""What ``openlora up`` waits before it starts a dead process again."""
ZOMBIE_S = 11.0
"""Longer than the session timeout and a rebalance: others have the zombie's partitions by then."""
OUTAGE_S = 2.0
LAST_MOMENTS_S = 1.5
"""What Redis may lose of what it acknowledged, with ``appendfsync everysec``: up to two seconds."""
DELAY_S = 0.15


def kill_engine(system: ChaosSystem, chance: random.Random) -> None:
    """kill -9 an engine process; its I/O process leaves the group and exits, and is restarted."""
    worker = chance.choice(system.workers)
    _kill(worker.engine_pid())
    _restart_when_gone(system, worker)


def kill_worker_io(system: ChaosSystem, chance: random.Random) -> None:
    """kill -9 a worker's I/O process; its engine ends with it."""
    worker = chance.choice(system.workers)
    worker.signal(signal.SIGKILL)
    _restart_when_gone(system, worker)


def kill_whole_worker(system: ChaosSystem, chance: random.Random) -> None:
    """kill -9 both processes of a worker."""
    worker = chance.choice(system.workers)
    engine = worker.engine_pid()
    worker.signal(signal.SIGKILL)
    _kill(engine)
    _restart_when_gone(system, worker)


def worker_leaves(system: ChaosSystem, chance: random.Random) -> None:
    """SIGTERM to a worker: it hands its partitions over and ends; then it comes back."""
    worker = chance.choice(system.workers)
    worker.signal(signal.SIGTERM)
    _restart_when_gone(system, worker)


def worker_joins(system: ChaosSystem, chance: random.Random) -> None:
    """One more worker joins for a while, and leaves politely."""
    worker = system.add_worker()
    worker.start()
    system.wait_ready()
    time.sleep(OUTAGE_S)
    worker.end(timeout_s=60)
    system.workers.remove(worker)


def zombie(system: ChaosSystem, chance: random.Random) -> None:
    """SIGSTOP a worker's I/O process past its session, then let it go on."""
    worker = chance.choice(system.workers)
    worker.signal(signal.SIGSTOP)
    time.sleep(ZOMBIE_S)
    worker.signal(signal.SIGCONT)


def redis_restarts(system: ChaosSystem, chance: random.Random) -> None:
    """kill -9 Redis; it comes back with what it had acknowledged."""
    system.redis.kill()
    time.sleep(OUTAGE_S)
    system.redis.start()


def redis_falls_back(system: ChaosSystem, chance: random.Random) -> None:
    """kill -9 Redis; it comes back without the last of what it had acknowledged."""
    moment = RedisMoment.of(system.redis)
    time.sleep(LAST_MOMENTS_S)
    system.redis.kill()
    moment.fall_back()
    time.sleep(OUTAGE_S)
    system.redis.start()


def redis_falls_back_without_worker(system: ChaosSystem, chance: random.Random) -> None:
    """The same, and with it dies a worker that still had what Redis lost."""
    worker = chance.choice(system.workers)
    moment = RedisMoment.of(system.redis)
    time.sleep(LAST_MOMENTS_S)
    worker.signal(signal.SIGKILL)
    system.redis.kill()
    moment.fall_back()
    time.sleep(OUTAGE_S)
    system.redis.start()
    _restart_when_gone(system, worker)


def redis_loses_data(system: ChaosSystem, chance: random.Random) -> None:
    """kill -9 Redis; it comes back empty."""
    system.lose_redis_data()
    time.sleep(OUTAGE_S)
    system.redis.start()


def broker_restarts(system: ChaosSystem, chance: random.Random) -> None:
    """kill -9 the broker; an in-memory one comes back empty."""
    system.broker.kill()
    time.sleep(OUTAGE_S)
    system.broker.start(60)


def kill_gateway(system: ChaosSystem, chance: random.Random) -> None:
    """kill -9 a gateway; its clients resume at another."""
    gateway = chance.choice(system.gateways)
    gateway.signal(signal.SIGKILL)
    _restart_when_gone(system, gateway)


def cut_connections(system: ChaosSystem, chance: random.Random) -> None:
    """Reset every connection there is: clients, Redis, Kafka."""
    for proxy in _proxies(system):
        proxy.cut()


def slow_network(system: ChaosSystem, chance: random.Random) -> None:
    """Everything that moves takes longer for a while."""
    for proxy in _proxies(system):
        proxy.delay_s = DELAY_S
    time.sleep(2 * OUTAGE_S)
    for proxy in _proxies(system):
        proxy.delay_s = 0.0


def silent_network(system: ChaosSystem, chance: random.Random) -> None:
    """Nothing moves for a while, and no connection says so."""
    for proxy in _proxies(system):
        proxy.hold()
    time.sleep(OUTAGE_S)
    for proxy in _proxies(system):
        proxy.release()


def overtaking_network(system: ChaosSystem, chance: random.Random) -> None:
    """What is under way to Redis stands still, is overtaken on new connections, and arrives."""
    for proxy in system.proxies["redis"]:
        proxy.hold_old()
    time.sleep(3 * OUTAGE_S)  # longer than a client waits for its answer
    for proxy in system.proxies["redis"]:
        proxy.release()


FAULTS: dict[str, Fault] = {
    "kill -9 worker I/O": kill_worker_io,
    "kill -9 engine": kill_engine,
    "kill -9 worker, both": kill_whole_worker,
    "worker leaves (SIGTERM)": worker_leaves,
    "worker joins": worker_joins,
    "zombie (SIGSTOP, SIGCONT)": zombie,
    "kill -9 gateway": kill_gateway,
    "Redis killed, data kept": redis_restarts,
    "Redis killed, last moments lost": redis_falls_back,
    "Redis and worker killed, last moments lost": redis_falls_back_without_worker,
    "Redis killed, data lost": redis_loses_data,
    "Kafka killed": broker_restarts,
    "connections cut": cut_connections,
    "network slow": slow_network,
    "network silent": silent_network,
    "network overtaking": overtaking_network,
}

NEEDS_PROXIES = frozenset(
    ("connections cut", "network slow", "network silent", "network overtaking")
)


def _restart_when_gone(system: ChaosSystem, process: Process) -> None:
    system.wait_until(lambda: not process.running, 60)
    time.sleep(RESTART_AFTER_S)
    process.start()


def _kill(pid: int | None) -> None:
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _proxies(system: ChaosSystem) -> list[Proxy]:
    return [proxy for proxies in system.proxies.values() for proxy in proxies]
