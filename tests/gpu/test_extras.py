"""Every kind of extra on a GPU, in one batch with plain adapters, against PEFT."""

from __future__ import annotations

import pytest
import torch

from openlora.engine import Engine, EngineConfig
from tests.engine.test_extras import assert_tokens_of_peft, bench  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_every_kind_in_one_batch_gives_the_tokens_of_peft(bench) -> None:  # noqa: F811
    root, _ = bench
    engine = Engine(
        EngineConfig(
            str(root / "model"),
            device="cuda",
            dtype="float32",
            num_kv_blocks=200,
            adapter_pages=(16,) * 4,
            adapter_host_bytes=1 << 24,
            max_num_seqs=16,
        )
    )
    assert_tokens_of_peft(engine, bench)
    engine.close()
