"""Every kind of extra through an engine on the Triton kernels, in the interpreter, against PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openlora.engine import Engine, EngineConfig
from openlora.engine.build import build_parts
from openlora.engine.mixed_steps import MixedSteps
from openlora.engine.runner import FinishedStep, ModelRunner, batch_order
from openlora.engine.sampler import sample_rows
from openlora.engine.step import SampledToken, StepRow
from tests.engine.test_extras import assert_tokens_of_peft, bench  # noqa: F401 - a fixture


class MixedRunner:
    """All steps as a GPU's eager ones, on the tensors of a runner on CPU."""

    def __init__(self, runner: ModelRunner, max_model_len: int) -> None:
        self._steps = MixedSteps(
            runner._model,
            runner._pages,
            runner._kv_cache,
            num_processors=1,
            max_num_seqs=16,
            max_model_len=max_model_len,
            to_device=torch.from_numpy,
        )

    @torch.inference_mode()
    def launch(self, rows: list[StepRow]) -> FinishedStep:
        order = batch_order(rows)
        ordered = [rows[index] for index in order]
        logits = self._steps.logits(ordered, {}, torch.zeros(1, dtype=torch.int64))
        sampled = [place for place, row in enumerate(ordered) if row.sampling is not None]
        tokens: list[SampledToken | None] = [None] * len(rows)
        drawn = sample_rows(logits, [ordered[place].sampling for place in sampled])
        for place, token in zip(sampled, drawn, strict=True):
            tokens[order[place]] = token
        return FinishedStep(tuple(tokens))


@pytest.mark.slow  # The interpreter takes about a second a step.
@pytest.mark.parametrize("bench", ["llama, biases", "qwen3"], indirect=True)
def test_every_kind_in_one_batch_gives_the_tokens_of_peft(bench) -> None:  # noqa: F811
    root, _ = bench
    config = EngineConfig(
        str(root / "model"),
        device="cpu",
        cpu_kernels="torch",
        adapter_pages=(16,) * 4,
        max_num_seqs=16,
    )
    parts = build_parts(config)
    runner = MixedRunner(parts.runner, parts.model_info.max_model_len)
    engine = Engine(config, parts=replace(parts, runner=runner))
    assert_tokens_of_peft(engine, bench)
    engine.close()
