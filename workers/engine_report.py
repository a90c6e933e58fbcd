"""What the engine process tells of its engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from openlora.adapters.tier_stats import LOAD_BUCKETS_S, TierStats
from openlora.protocol.status import MAX_CONTENTS, TierStatus
from workers.messages import ModelFacts
from workers.scripted_engine import SCRIPTED_SEATS, ScriptedEngine

if TYPE_CHECKING:
    from openlora.engine import Engine


def facts_of(engine: Engine | ScriptedEngine) -> ModelFacts:
    """The model, as the I/O process hears of it once it is loaded."""
    info = engine.model_info
    return ModelFacts(
        pid=os.getpid(),
        device=str(info.device),
        dtype=str(info.dtype).removeprefix("torch."),
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        eos_token_ids=tuple(info.eos_token_ids),
        hidden_size=info.hidden_size,
        max_lora_rank=getattr(info, "max_lora_rank", 0),
        attention_backend=info.attention_backend,
        max_num_seqs=engine.config.max_num_seqs if hasattr(engine, "config") else SCRIPTED_SEATS,
    )


def tier_status(stats: TierStats) -> TierStatus:
    """What a heartbeat says of a tier of adapters."""
    return TierStatus(
        stats.tier,
        stats.adapters,
        stats.bytes_used,
        stats.bytes_limit,
        stats.hits,
        stats.loads,
        stats.failures,
        stats.evictions,
        round(stats.load_seconds, 6),
        stats.load_counts,
        LOAD_BUCKETS_S,
        stats.names[-MAX_CONTENTS:],
    )
