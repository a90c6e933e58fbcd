"""A step's rows as flat int32 arrays, the form in which they travel to a GPU. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from openlora.engine.step import PENDING_TOKEN, StepRow

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the kernels read of a step, rows in the order given. All int32.

    Attributes:
        token_ids: [tokens], 0 where the token is still on the device.
        sources: [tokens], where among the tokens drawn last each of those lies; -1 elsewhere.
        positions: [tokens].
        slots: [tokens], block ID · block_size + place in the block.
        spans: [rows, 3]: first token, number of tokens, position of the first.
        context_lens: [rows], cached positions after this step.
        block_tables: [rows, widest], 0 behind a row's end.
        sampled: [sampled rows], index of the token whose hidden state becomes logits.
    """

    token_ids: Ints
    sources: Ints
    positions: Ints
    slots: Ints
    spans: Ints
    context_lens: Ints
    block_tables: Ints
    sampled: Ints

    @property
    def owners(self) -> Ints:
        """[tokens], the row of each."""
        counts = self.spans[:, 1]
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def decode_inputs(
    rows: Sequence[StepRow], drawn_at: Mapping[int, int], block_size: int
) -> StepInputs:
    """The inputs of a step of one token per row.

    Args:
        rows: each with one token.
        drawn_at: sequence ID → its place among the tokens drawn last; read for pending tokens.
        block_size: positions in a KV block.
    """
    num_rows = len(rows)
    token_ids = np.fromiter((row.token_ids[0] for row in rows), np.int32, num_rows)
    positions = np.fromiter((row.start for row in rows), np.int32, num_rows)
    sources = np.full(num_rows, -1, np.int32)
    for index in np.flatnonzero(token_ids == PENDING_TOKEN).tolist():
        sources[index] = drawn_at[rows[index].sequence_id]
    token_ids[sources >= 0] = 0
    block_tables = _block_tables(rows)
    at = np.arange(num_rows, dtype=np.int32)
    blocks = block_tables[at, positions // block_size]
    spans = np.stack([at, np.ones_like(at), positions], axis=1)
    return StepInputs(
        token_ids=token_ids,
        sources=sources,
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        spans=spans,
        context_lens=positions + 1,
        block_tables=block_tables,
        sampled=at[[row.sampling is not None for row in rows]],
    )


def mixed_inputs(
    rows: Sequence[StepRow], drawn_at: Mapping[int, int], block_size: int
) -> StepInputs:
    """The inputs of any step; arguments as for ``decode_inputs``."""
    counts = np.array([len(row.token_ids) for row in rows], np.int32)
    starts = np.array([row.start for row in rows], np.int32)
    ends = counts.cumsum(dtype=np.int32)
    first = ends - counts
    token_ids = np.concatenate([np.asarray(row.token_ids, np.int32) for row in rows])
    owners = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    positions = np.arange(len(token_ids), dtype=np.int32) - first[owners] + starts[owners]
    sources = np.full(len(token_ids), -1, np.int32)
    for index in np.flatnonzero(token_ids == PENDING_TOKEN).tolist():
        sources[index] = drawn_at[rows[owners[index]].sequence_id]
    token_ids[sources >= 0] = 0
    block_tables = _block_tables(rows)
    blocks = block_tables[owners, positions // block_size]
    return StepInputs(
        token_ids=token_ids,
        sources=sources,
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        spans=np.stack([first, counts, starts], axis=1),
        context_lens=starts + counts,
        block_tables=block_tables,
        sampled=(ends - 1)[[row.sampling is not None for row in rows]],
    )


def by_token(inputs: StepInputs) -> StepInputs:
    """The same step with each token as a row of its own, with the context that it sees."""
    owners = inputs.owners
    at = np.arange(len(owners), dtype=np.int32)
    return replace(
        inputs,
        spans=np.stack([at, np.ones_like(at), inputs.positions], axis=1),
        context_lens=inputs.positions + 1,
        block_tables=inputs.block_tables[owners],
    )


def query_tiles(spans: Ints, first_row: int, tile_tokens: int) -> Ints:
    """Cut the rows from ``first_row`` on into query tiles: int32 [tiles, 2] (row, first token)."""
    tiles = [
        (row, at)
        for row in range(first_row, len(spans))
        for at in range(0, int(spans[row, 1]), tile_tokens)
    ]
    return np.array(tiles, np.int32).reshape(-1, 2)


def _block_tables(rows: Sequence[StepRow]) -> Ints:
    tables = np.zeros((len(rows), max(len(row.block_table) for row in rows)), np.int32)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.block_table)] = row.block_table
    return tables
