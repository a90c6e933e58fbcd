"""What a heartbeat says."""

from __future__ import annotations

import os
import time
from pathlib import Path

from workers.config import WorkerConfig
from workers.heartbeat import HeartbeatWriter
from workers.messages import Load, ModelFacts

FACTS = ModelFacts(7, "cpu", "float32", 2048, 100, (2,), 64, 16, "torch")


def test_it_says_who_what_and_how_fast():
    config = WorkerConfig("/models/tiny", "k:1", "redis://r", Path("/s"), worker_id="w")
    writer = HeartbeatWriter(config, FACTS)
    time.sleep(0.05)
    first = writer.build((), Load(3, 7, ("a",), (), 6), tokens_logged=10, ready=True)
    assert (first.id, first.pid, first.engine_pid) == ("w", os.getpid(), 7)
    assert (first.model_id, first.max_model_len, first.dtype) == ("tiny", 2048, "float32")
    assert (first.running, first.waiting, first.resident_adapters) == (3, 7, ("a",))
    assert first.waiting_batch == 6
    assert 0 < first.tokens_per_s <= 200
    time.sleep(0.01)
    assert writer.build((), Load(0, 0, ()), tokens_logged=10, ready=False).tokens_per_s == 0
