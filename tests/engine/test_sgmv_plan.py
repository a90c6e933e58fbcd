"""The plan says of every row, at every site, which pages work on it, and keeps their h apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlora.adapters.lora_set import SITES, LoRASet
from openlora.engine.sgmv_plan import build_plan
from openlora.models.ops import GATE_UP

ENTRIES = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1.0, 0.5, -2.0])), max_size=4)
SETS = st.lists(
    st.tuples(*[ENTRIES] * len(SITES)).map(
        lambda sites: LoRASet(tuple(map(tuple, sites)), str(sites))
    ),
    min_size=1,
    max_size=4,
)
GROUPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=8)


@given(SETS, GROUPS, st.sampled_from([4, 16]))
def test_every_row_gets_its_pages_and_every_item_its_own_rows_of_h(sets, groups, chunk_rows):
    lora_sets = [sets[which % len(sets)] for which, _ in groups]
    counts = [count for _, count in groups]
    of_row = [own for own, count in zip(lora_sets, counts, strict=True) for _ in range(count)]
    plan = build_plan(lora_sets, counts, chunk_rows=chunk_rows)
    most = 0
    for site in range(len(SITES)):
        items, chunks = plan.items[site], plan.chunks[site]
        assert items.dtype == chunks.dtype == np.int32
        found: list[Counter[tuple[int, float]]] = [Counter() for _ in of_row]
        covered: Counter[int] = Counter()
        at = h_row = 0
        for start, rows, first, end, page, h_first, bits, _ in chunks.tolist():
            assert 0 < rows <= chunk_rows
            assert first == at <= end
            covered.update(range(start, start + rows))
            if first < end:  # the first item once more, so that no kernel waits for its record
                assert (page, h_first, bits) == tuple(items[first, [0, 3, 4]].tolist())
            for page, start_again, rows_again, h_at, bits, *_ in items[first:end].tolist():
                assert (start_again, rows_again, h_at) == (start, rows, h_row)
                weight = float(np.int32(bits).view(np.float32))
                for row in range(start, start + rows):
                    found[row][page, weight] += 1
                h_row += rows
            at = end
        assert at == len(items)
        most = max(most, h_row)
        wanted = [Counter(own.pages[site]) for own in of_row]
        assert found == wanted
        rows_in = [row for row, own in enumerate(of_row) if site == GATE_UP or own.pages[site]]
        assert covered == Counter(rows_in)
    assert plan.h_rows == most
    assert plan.is_empty == (most == 0)


@given(SETS, st.integers(1, 40))
def test_equal_neighbours_are_one_segment(sets, count):
    apart = build_plan([sets[0], sets[0]], [count, 3], chunk_rows=16)
    joined = build_plan([sets[0]], [count + 3], chunk_rows=16)
    for site in range(len(SITES)):
        np.testing.assert_array_equal(apart.items[site], joined.items[site])
        np.testing.assert_array_equal(apart.chunks[site], joined.chunks[site])


@pytest.mark.parametrize(
    ("rows", "distinct", "rows_share"),
    [
        (1, 1, False),
        (16, 16, False),
        (64, 64, False),
        (16, 8, True),  # few chunks: two rows each are enough
        (64, 16, True),
        (256, 64, False),  # four rows each, and many chunks
        (512, 64, True),
        (64, 1, True),
    ],
)
def test_which_kernels_a_batch_takes(rows, distinct, rows_share):
    sets = [LoRASet((((at * distinct // rows, 1.0),),) * len(SITES)) for at in range(rows)]
    assert build_plan(sets, [1] * rows, chunk_rows=16).rows_share is rows_share
