"""Steps of mixed rows: what the runner computes per row does not depend on who shares the step."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from openlora.adapters.loader import load_adapter
from openlora.adapters.lora_set import LoRASet
from openlora.adapters.page_tensors import PageTensors
from openlora.adapters.pages import PagePool, join_lora_set
from openlora.engine import runner as runner_module
from openlora.engine.kv_cache import KVCache, block_bytes
from openlora.engine.runner import ModelRunner
from openlora.engine.step import RowSampling, SampledToken, StepRow
from openlora.models.load import load_model
from openlora.sampling_params import SamplingParams

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "qv": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "wide": LoraConfig(r=40, lora_alpha=30, target_modules=LINEARS),
    "rs": LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=["down_proj", "k_proj"]),
    "patterns": LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=LINEARS,
        rank_pattern={"k_proj": 3, r"layers\.1\.mlp\.up_proj": 20},
        alpha_pattern={"o_proj": 2, "down_proj": 24},
    ),
    "one layer": LoraConfig(
        r=8, lora_alpha=8, target_modules=["gate_proj"], layers_to_transform=[1]
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model, its adapters, and PEFT with all of them."""
    root = tmp_path_factory.mktemp("runner")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for name, lora in ADAPTERS.items():
        model = get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), lora)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(root / name)
    first, *others = ADAPTERS
    base = LlamaForCausalLM.from_pretrained(root / "base")
    peft = PeftModel.from_pretrained(base, root / first, adapter_name=first).eval()
    for name in others:
        peft.load_adapter(root / name, adapter_name=name)
    return root, peft


class Bench:
    """A runner with every adapter resident, whose logits are kept instead of sampled."""

    def __init__(self, root, monkeypatch):
        model = load_model(str(root / "base"))
        pool = PagePool((12,) * 4)
        pages = PageTensors(model.config, pool.num_pages, model.dtype, model.device)
        for name in ADAPTERS:
            adapter = load_adapter(root / name, model.config, model.dtype)
            pages.write(pool.allocate(name, adapter.page_counts), adapter)
        self.pool = pool
        self.runner = ModelRunner(model, pages, KVCache(model.config, 64, model.dtype, "cpu", 16))
        self.logits = []
        monkeypatch.setattr(runner_module, "sample_rows", self._keep)

    def _keep(self, logits, rows):
        self.logits = [row.clone() for row in logits]
        return [SampledToken(row.output_index) for row in rows]

    def lora_set(self, weights):
        parts = [(self.pool.pages(name), weight) for name, weight in weights.items()]
        return join_lora_set(parts, str(weights))

    def step(self, rows):
        """Logits of the rows with sampling, by their output_index (the row's mark)."""
        tokens = self.runner.launch(rows).wait()
        assert [token is not None for token in tokens] == [row.sampling is not None for row in rows]
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                assert token.token_id == row.sampling.output_index
        return self.logits


@pytest.fixture
def bench(saved, monkeypatch):
    return Bench(saved[0], monkeypatch)


def mark(index):
    return RowSampling(SamplingParams(temperature=0), 0, index, (), ())


@torch.inference_mode()
def peft_logits(peft, token_ids, weights):
    ids = torch.tensor([token_ids])
    if not weights:
        with peft.disable_adapter():
            return peft(ids).logits[0, -1]
    if list(weights.values()) == [1.0]:
        peft.set_adapter(next(iter(weights)))
        return peft(ids).logits[0, -1]
    peft.add_weighted_adapter(
        list(weights), list(weights.values()), adapter_name="mix", combination_type="cat"
    )
    peft.set_adapter("mix")
    try:
        return peft(ids).logits[0, -1]
    finally:
        peft.delete_adapter("mix")


MIX = [
    {},
    {"qv": 1.0},
    {"wide": 1.0},
    {"rs": 1.0},
    {"patterns": 1.0},
    {"one layer": 1.0},
    {"wide": 0.7, "qv": 0.3},
    # A plain adapter first: PEFT gives the joined one the first one's rsLoRA and layer settings.
    {"patterns": 0.25, "rs": 1.5, "one layer": 1.0},
    {"wide": 1.0},
    {},
]


def prompt(index, length):
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(index)).tolist()


def test_a_mixed_batch_has_the_logits_of_peft_one_by_one(saved, bench):
    """Prefill of ragged lengths, then two decode steps, ten LoRA sets together."""
    lengths = [1, 5, 16, 17, 9, 33, 12, 3, 30, 15]
    texts = [prompt(index, length) for index, length in enumerate(lengths)]
    tables = [[3 * index, 3 * index + 2, 3 * index + 1] for index in range(len(MIX))]
    starts = [0] * len(MIX)
    for step in range(3):
        rows = [
            StepRow(index, text[start:], start, table, bench.lora_set(weights), mark(index))
            for index, (text, start, table, weights) in enumerate(
                zip(texts, starts, tables, MIX, strict=True)
            )
        ]
        order = sorted(range(len(rows)), key=lambda index: runner_module._sort_key(rows[index]))
        for index, got in zip(order, bench.step(rows), strict=True):
            want = peft_logits(saved[1], texts[index], MIX[index])
            torch.testing.assert_close(got, want, atol=5e-4, rtol=5e-4)
        starts = [len(text) for text in texts]
        texts = [[*text, (7 * index + step) % 96] for index, text in enumerate(texts)]


def test_a_prefill_in_chunks_equals_one_in_whole(bench):
    text = prompt(1, 40)
    lora = bench.lora_set({"wide": 1.0})
    whole = bench.step([StepRow(0, text, 0, [0, 1, 2], lora, mark(0))])[0]
    bench.runner.launch([StepRow(1, text[:7], 0, [5, 4, 3], lora, None)])
    bench.runner.launch([StepRow(1, text[7:39], 7, [5, 4, 3], lora, None)])
    chunked = bench.step([StepRow(1, text[39:], 39, [5, 4, 3], lora, mark(0))])[0]
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)


def test_rows_without_sampling_have_no_logits(bench):
    rows = [
        StepRow(0, prompt(0, 20), 0, [0, 1], LoRASet.EMPTY, None),
        StepRow(1, prompt(1, 4), 0, [2], bench.lora_set({"qv": 1.0}), mark(1)),
        StepRow(2, prompt(2, 1), 0, [3], LoRASet.EMPTY, None),
    ]
    assert len(bench.step(rows)) == 1
    assert bench.runner.launch(rows[:1]).wait() == [None]


def test_no_rows_at_all(bench):
    assert bench.runner.launch([]).wait() == []


def test_pages_rewritten_between_steps_are_used(saved, bench):
    """The LoRA plan is kept while sets stay the same; the weights behind it are not."""
    lora = bench.lora_set({"qv": 1.0})
    row = StepRow(0, prompt(0, 6), 0, [0], lora, mark(0))
    before = bench.step([row])[0]
    site = bench.runner._pages.sites[0]
    site.b[bench.pool.pages("qv")[0][0]].zero_()
    after = bench.step([row])[0]
    base = bench.step([StepRow(0, prompt(0, 6), 0, [0], LoRASet.EMPTY, mark(0))])[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, base, atol=1e-5, rtol=1e-5)


def test_block_bytes(saved):
    config = load_model(str(saved[0] / "base")).config
    cache = KVCache(config, 5, torch.bfloat16, "cpu", block_size=8)
    assert cache.tensor.nbytes == 5 * block_bytes(config, torch.bfloat16, 8)
