"""Steps as graphs hold them, in the interpreter, against the same steps in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from openlora.adapters.lora_set import LoRASet
from openlora.engine.drawn_tokens import DrawnTokens
from openlora.engine.graph_steps import GraphSteps, buckets
from openlora.engine.runner import batch_order
from openlora.engine.sgmv_plan import build_plan
from openlora.engine.step import PENDING_TOKEN, StepRow
from openlora.engine.step_graphs import StepGraphs, rereads
from openlora.engine.step_inputs import decode_inputs, mixed_inputs
from tests.engine.step_bench import DEVICE, GREEDY, MIXED, PREFILL, StepBench, lora_set

pytestmark = [
    pytest.mark.long,
    # Records behind a plan's last hold rubbish here: kernels ask for them, and do not use them.
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="graphs themselves are tested in tests/gpu"),
]
MAX_ROWS = 3


@dataclass
class LaunchedAgain:
    """A graph that launches again what it was captured of, into the tensors of the capture."""

    run: Callable[[], tuple[torch.Tensor, ...]]
    outputs: tuple[torch.Tensor, ...]

    def replay(self) -> None:
        for kept, again in zip(self.outputs, self.run(), strict=True):
            kept.copy_(again)


class NewBuffers:
    """Uploads whose buffers hold rubbish until they are filled."""

    def __init__(self, num_ints: int) -> None:
        self._num_ints = num_ints

    def take(self) -> torch.Tensor:
        return torch.full((self._num_ints,), 12345, dtype=torch.int32)

    def sent(self, buffer: torch.Tensor) -> None:
        buffer.fill_(12345)


class Device:
    num_processors = 1

    def capture(self, run):
        outputs = run()
        return LaunchedAgain(run, outputs), outputs

    def upload_ring(self, num_ints: int) -> NewBuffers:
        return NewBuffers(num_ints)


class GraphBench(StepBench):
    def __init__(self) -> None:
        super().__init__()
        self.drawn = DrawnTokens(MAX_ROWS, DEVICE)
        self.graphs = StepGraphs(self.steps(self.drawn.tokens), Device())

    def steps(
        self: StepBench, drawn: torch.Tensor, max_tokens: int = 12, *, deterministic: bool = False
    ) -> GraphSteps:
        return GraphSteps(
            self.model,
            self.pages,
            self.cache,
            drawn,
            num_processors=Device.num_processors,
            max_rows=MAX_ROWS,
            max_tokens=max_tokens,
            max_model_len=64,
            deterministic=deterministic,
        )

    def compare(self, rows: list[StepRow]) -> None:
        """Runs ``rows``, which lie in a step's order, and in torch."""
        assert batch_order(rows) == list(range(len(rows)))
        counts = [len(row.token_ids) for row in rows]
        to_inputs = decode_inputs if sum(counts) == len(rows) else mixed_inputs
        inputs = to_inputs(rows, self.drawn.at, self.cache.block_size)
        sets = [row.lora_set for row in rows]
        plan = build_plan(sets, counts, chunk_rows=self.graphs.chunk_rows)
        assert self.graphs.fits(len(rows), sum(counts), plan)
        step = self.graphs.run(inputs, plan)
        known = [
            replace(row, token_ids=[self.drawn.tokens[self.drawn.at[row.sequence_id]].item()])
            if PENDING_TOKEN in row.token_ids
            else row
            for row in rows
        ]
        logits = step.sampled(step.logits)
        self.assert_same(logits, known)
        assert step.sampled(step.token_ids).tolist() == logits.argmax(-1).tolist()


@pytest.fixture(scope="module")
def shared() -> GraphBench:
    with torch.inference_mode():
        return GraphBench()


@torch.inference_mode()
def test_chunks_and_then_decodes_beside_chunks(shared: GraphBench) -> None:
    shared.compare(PREFILL)  # ten tokens: more than rows
    shared.compare(MIXED)
    shared.compare(MIXED[:2])  # decodes alone


@torch.inference_mode()
def test_a_chunk_that_leaves_tokens_without_samples_within_the_rows(shared: GraphBench) -> None:
    shared.compare(PREFILL)
    shared.compare([MIXED[0], replace(MIXED[2], token_ids=[13, 14])])


@torch.inference_mode()
def test_steps_of_the_base_model_between_steps_with_adapters(shared: GraphBench) -> None:
    base = [replace(row, lora_set=LoRASet.EMPTY) for row in PREFILL]
    shared.compare(base)
    shared.compare(PREFILL)
    shared.compare(base)
    shared.compare([replace(row, lora_set=LoRASet.EMPTY) for row in MIXED[:2]])


@torch.inference_mode()
def test_without_samples_there_are_no_tokens(shared: GraphBench) -> None:
    shared.compare([replace(row, sampling=None) for row in PREFILL])


@torch.inference_mode()
def test_every_row_of_a_large_step_is_sampled(shared: GraphBench) -> None:
    shared.compare([replace(row, sampling=GREEDY) for row in PREFILL])


@torch.inference_mode()
def test_pending_tokens_beside_a_chunk_come_from_the_last_step(shared: GraphBench) -> None:
    shared.compare(PREFILL)
    shared.drawn.tokens.copy_(torch.tensor([30, 10, 24]))
    shared.drawn.at = {1: 1, 3: 2}
    pending = [replace(row, token_ids=[PENDING_TOKEN]) for row in MIXED[:2]]
    shared.compare([*pending, MIXED[2]])


@torch.inference_mode()
def test_what_a_wider_step_left_behind_is_not_read(shared: GraphBench) -> None:
    wide = StepRow(4, list(range(9)), 0, [4, 5, 2], lora_set((2, 1.5)), GREEDY)
    shared.compare([wide])
    shared.compare([replace(PREFILL[2], block_table=[3])])


@torch.inference_mode()
def test_what_does_not_fit_is_told(shared: GraphBench) -> None:
    graphs = shared.graphs
    many = tuple((0, 1.0) for _ in range(200))
    plans = {
        name: build_plan([own], [rows], chunk_rows=graphs.chunk_rows)
        for name, own, rows in (
            ("small", lora_set((0, 1.0)), 3),
            ("pages", LoRASet((many,) * 4, "many"), 3),
        )
    }
    assert graphs.takes_chunks
    assert graphs.fits(3, 12, plans["small"])
    assert not graphs.fits(4, 12, plans["small"])
    assert not graphs.fits(3, 13, plans["small"])
    assert not graphs.fits(3, 12, plans["pages"])


@pytest.mark.parametrize(
    ("max_tokens", "deterministic", "holds"),
    [(12, False, 12), (12, True, 3), (3, False, 3), (0, False, 3)],
)
def test_only_sums_that_need_not_repeat_hold_chunks(max_tokens, deterministic, holds) -> None:
    drawn = torch.zeros(MAX_ROWS, dtype=torch.int64)
    steps = GraphBench.steps(StepBench(), drawn, max_tokens, deterministic=deterministic)
    assert steps.max_tokens == holds
    assert steps.nearest(2, "shared") == (2, "distinct" if deterministic else "shared")


@pytest.mark.parametrize(
    ("max_rows", "max_tokens", "expected"),
    [
        (1, 0, (1,)),
        (9, 9, (1, 2, 4, 8, 9)),
        (64, 300, (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 300)),
        (128, 256, (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)),
        (3, 2, (1, 2, 3)),
    ],
)
def test_sizes(max_rows: int, max_tokens: int, expected: tuple[int, ...]) -> None:
    assert buckets(max_rows, max_tokens) == expected


def test_only_chunks_read_again() -> None:
    assert rereads(MIXED) == 3 * 5
    assert rereads(MIXED[:2]) == 0
    assert rereads(PREFILL) == 25 + 9 + 4
