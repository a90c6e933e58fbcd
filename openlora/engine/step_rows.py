"""From what the scheduler chose to what the runner reads."""

from __future__ import annotations

from openlora.engine.step import PENDING_TOKEN, RowSampling, StepRow
from openlora.engine.step_budget import ScheduledRow


def step_row(row: ScheduledRow, block_size: int) -> StepRow:
    """One scheduled row as data, nothing of it shared with the sequence, which moves on."""
    sequence, end = row.sequence, row.start + row.num_tokens
    token_ids = sequence.token_ids[row.start : end]
    if len(token_ids) < row.num_tokens:
        token_ids.append(PENDING_TOKEN)
    sampling = None
    if row.samples:
        penalised = sequence.params.has_penalties
        split = sequence.num_prompt_tokens
        sampling = RowSampling(
            params=sequence.params,
            seed=sequence.seed,
            output_index=sequence.num_tokens - split,
            prompt_token_ids=sequence.token_ids[:split] if penalised else (),
            output_token_ids=sequence.token_ids[split:] if penalised else (),
        )
    return StepRow(
        sequence_id=sequence.sequence_id,
        token_ids=token_ids,
        start=row.start,
        block_table=sequence.block_table[: -(-end // block_size)],
        lora_set=sequence.lora_set,
        sampling=sampling,
    )
