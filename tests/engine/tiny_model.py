"""A tiny random Llama and PEFT adapters, and what transformers + PEFT make of them one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 160
EOS = 2
NEAR_TIE = 1e-4

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "r4": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "r8": LoraConfig(r=8, lora_alpha=8, target_modules=ATTENTION),
    "r16": LoraConfig(r=16, lora_alpha=32, target_modules=ATTENTION + MLP),
    "r64": LoraConfig(r=64, lora_alpha=32, target_modules=ATTENTION + MLP),
    "rs": LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=["down_proj", "k_proj"]),
}


ADAPTER_MIXES: list[dict[str, float]] = [
    {},
    {"r4": 1.0},
    {"r8": 1.0},
    {"r16": 1.0},
    {"r64": 1.0},
    {"rs": 1.0},
    {"r16": 0.6, "rs": 0.4},
    {"r4": 1.5, "r64": -0.5, "r8": 0.25},
]
"""None, each of them alone, and two ensembles."""


def make_tiny_model(directory: Path, **changes: Any) -> None:
    """Save a random Llama with grouped heads and untied embeddings.

    ``changes``: of its ``LlamaConfig``.
    """
    torch.manual_seed(11)
    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": EOS,
        "bos_token_id": 1,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(LlamaConfig(**(config | changes)))
    model.save_pretrained(directory, safe_serialization=True)


def make_adapters(
    model_dir: Path, root: Path, configs: Mapping[str, LoraConfig] = ADAPTERS
) -> dict[str, Path]:
    """Save one PEFT adapter of each kind, strong enough to change the tokens."""
    paths = {}
    for number, (name, config) in enumerate(configs.items()):
        torch.manual_seed(100 + number)
        base = AutoModelForCausalLM.from_pretrained(model_dir)
        model = get_peft_model(base, deepcopy(config))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.15)
        paths[name] = root / name
        model.save_pretrained(paths[name])
    return paths


@dataclass(frozen=True)
class Greedy:
    """Greedy tokens, and the first index at which two logits are closer than ``NEAR_TIE``."""

    token_ids: list[int]
    near_tie: int | None


class Reference:
    """transformers + PEFT, one request at a time, without any cache."""

    def __init__(self, model_dir: Path, adapters: Mapping[str, Path]) -> None:
        base = AutoModelForCausalLM.from_pretrained(
            # The only one that caps its scores, where a model asks for that.
            model_dir,
            dtype=torch.float32,
            attn_implementation="eager",
        )
        first, *others = adapters.items()
        self._model = PeftModel.from_pretrained(base, first[1], adapter_name=first[0])
        for name, path in others:
            self._model.load_adapter(path, adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], adapters: Mapping[str, float]) -> torch.Tensor:
        """float32 [len(token_ids), vocab]."""
        ids = torch.tensor([list(token_ids)])
        if not adapters:
            with self._model.disable_adapter():
                return self._model(ids).logits[0]
        self._model.set_adapter(self._adapter_for(adapters))
        return self._model(ids).logits[0]

    def greedy(self, prompt: Sequence[int], adapters: Mapping[str, float], count: int) -> Greedy:
        """``count`` tokens, past EOS."""
        tokens, near_tie = list(prompt), None
        for index in range(count):
            top = self.logits(tokens, adapters)[-1].topk(2)
            if near_tie is None and float(top.values[0] - top.values[1]) < NEAR_TIE:
                near_tie = index
            tokens.append(int(top.indices[0]))
        return Greedy(tokens[len(prompt) :], near_tie)

    def greedy_given(
        self, prompt: Sequence[int], tokens: Sequence[int], adapters: Mapping[str, float]
    ) -> Greedy:
        """The greedy token behind each part of ``tokens``: equal to them, if they are greedy."""
        logits = self.logits([*prompt, *tokens], adapters)[len(prompt) - 1 : -1]
        top = logits.topk(2)
        gaps = (top.values[:, 0] - top.values[:, 1]).tolist()
        near_tie = next((i for i, gap in enumerate(gaps) if gap < NEAR_TIE), None)
        return Greedy(top.indices[:, 0].tolist(), near_tie)

    def _adapter_for(self, adapters: Mapping[str, float]) -> str:
        # PEFT takes use_rslora of the joined adapter from the first one, and then scales the join
        # by √r: name an adapter without rsLoRA first.
        names, weights = list(adapters), list(adapters.values())
        if weights == [1.0]:
            return names[0]
        joined = "_".join(f"{name}-{weight}" for name, weight in adapters.items()).replace(".", "d")
        if joined not in self._model.peft_config:
            self._model.add_weighted_adapter(names, weights, joined, combination_type="cat")
            # Its dropout is new and would be in training mode.
            self._model.eval()
        return joined


def assert_same_tokens(got: Sequence[int], reference: Greedy, what: object = "") -> None:
    """Token IDs are equal; behind a near tie they need not be, which is said instead."""
    if reference.near_tie is None:
        assert list(got) == reference.token_ids, what
        return
    print(
        f"{what}: two logits closer than {NEAR_TIE} at output {reference.near_tie}; "
        "tokens are compared up to there"
    )
    assert list(got)[: reference.near_tie] == reference.token_ids[: reference.near_tie], what
