"""A step's rows as arrays: positions, slots, spans and where pending tokens come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from openlora.adapters.lora_set import LoRASet
from openlora.engine.step import PENDING_TOKEN, RowSampling, StepRow
from openlora.engine.step_inputs import by_token, decode_inputs, mixed_inputs, query_tiles
from openlora.sampling_params import SamplingParams

BLOCK_SIZE = 4
SAMPLING = RowSampling(SamplingParams(), 0, 0, (), ())


def row(
    sequence_id: int,
    tokens: Sequence[int],
    start: int,
    table: Sequence[int],
    sampling: RowSampling | None = SAMPLING,
) -> StepRow:
    return StepRow(sequence_id, tokens, start, table, LoRASet.EMPTY, sampling)


def test_decodes_and_chunks_lie_behind_each_other() -> None:
    rows = [
        row(7, [PENDING_TOKEN], 5, [9, 3]),
        row(8, [21], 0, [2]),
        row(9, [30, 31, 32], 3, [5, 6], None),
        row(4, [40, 41], 0, [1]),
    ]
    inputs = mixed_inputs(rows, {7: 2}, BLOCK_SIZE)
    assert inputs.token_ids.tolist() == [0, 21, 30, 31, 32, 40, 41]
    assert inputs.sources.tolist() == [2, -1, -1, -1, -1, -1, -1]
    assert inputs.positions.tolist() == [5, 0, 3, 4, 5, 0, 1]
    assert inputs.slots.tolist() == [13, 8, 23, 24, 25, 4, 5]
    assert inputs.spans.tolist() == [[0, 1, 5], [1, 1, 0], [2, 3, 3], [5, 2, 0]]
    assert inputs.context_lens.tolist() == [6, 1, 6, 2]
    assert inputs.block_tables.tolist() == [[9, 3], [2, 0], [5, 6], [1, 0]]
    assert inputs.sampled.tolist() == [0, 1, 6]
    assert query_tiles(inputs.spans, 2, 2).tolist() == [[2, 0], [2, 2], [3, 0]]
    assert query_tiles(inputs.spans[:2], 2, 2).shape == (0, 2)


def test_a_step_by_token_has_a_row_for_each_with_the_context_that_it_sees() -> None:
    rows = [row(7, [20], 5, [9, 3]), row(9, [30, 31, 32], 3, [5, 6], None), row(4, [40], 0, [1])]
    inputs = by_token(mixed_inputs(rows, {}, BLOCK_SIZE))
    assert inputs.token_ids.tolist() == [20, 30, 31, 32, 40]
    assert inputs.context_lens.tolist() == [6, 4, 5, 6, 1]
    assert inputs.block_tables.tolist() == [[9, 3], [5, 6], [5, 6], [5, 6], [1, 0]]
    assert inputs.spans.tolist() == [[0, 1, 5], [1, 1, 3], [2, 1, 4], [3, 1, 5], [4, 1, 0]]
    assert inputs.sampled.tolist() == [0, 4]


@pytest.mark.parametrize("num_rows", [1, 5, 64])
def test_decode_inputs_are_the_mixed_ones_of_single_tokens(num_rows: int) -> None:
    generator = np.random.default_rng(num_rows)
    rows = []
    for sequence_id in range(num_rows):
        start = int(generator.integers(0, 40))
        token = PENDING_TOKEN if sequence_id % 3 else 100 + sequence_id
        table = generator.integers(0, 99, start // BLOCK_SIZE + 1).tolist()
        rows.append(row(sequence_id, [token], start, table))
    drawn_at = {sequence_id: num_rows - sequence_id for sequence_id in range(num_rows)}
    decode = decode_inputs(rows, drawn_at, BLOCK_SIZE)
    mixed = mixed_inputs(rows, drawn_at, BLOCK_SIZE)
    for name in decode.__slots__:
        assert np.array_equal(getattr(decode, name), getattr(mixed, name)), name


def test_a_pending_token_of_a_sequence_that_drew_none_is_an_error() -> None:
    with pytest.raises(KeyError):
        decode_inputs([row(1, [PENDING_TOKEN], 2, [0])], {2: 0}, BLOCK_SIZE)
