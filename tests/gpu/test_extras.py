"""Every kind of extra on a GPU, in one batch with plain adapters, against PEFT."""

from __future__ import annotations

import pytest
import torch

from openlora.engine import Engine, EngineConfig, Request, SamplingParams
from tests.engine.test_extras import NUM_TOKENS, bench  # noqa: F401 - a fixture
from tests.engine.tiny_model import assert_same_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_every_kind_in_one_batch_gives_the_tokens_of_peft(bench) -> None:  # noqa: F811
    root, cases = bench
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
    for name in cases:
        if name:
            engine.load_adapter(name, root / name)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    requests = [
        Request(prompt, {name: 1.0} if name else {}, params) for name, (prompt, _) in cases.items()
    ]
    for done, (name, (_, wanted)) in zip(engine.generate(requests), cases.items(), strict=True):
        assert done.error is None, (name, done.error)
        assert_same_tokens(done.token_ids, wanted, name)
    engine.close()
