"""Trains the demo adapters: ``python -m openlora.demo.train [--adapter NAME] [--device auto]``.

Plain LoRA fine-tuning with PEFT (Hu et al., 2021; rsLoRA: Kalajdzievski, 2023): the conversation
in the model's own chat template, the loss on the response alone, the base model frozen in fp32.
On one H100 an adapter takes about 20 seconds, on two CPU cores about an hour.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from openlora.demo.adapters import DEMO_ADAPTERS, DemoAdapter
from openlora.demo.model import MODEL_ID, ensure_demo_model

BATCH_SIZE = 16
SEED = 20
LORA_DROPOUT = 0.05
WARMUP_SHARE = 0.06
MAX_GRAD_NORM = 1.0
IGNORED_LABEL = -100
"""What transformers' loss leaves out."""

Example = tuple[list[int], list[int]]
"""Token IDs of a whole conversation, and its labels: IGNORED_LABEL for the prompt's tokens."""


def load_examples(data_file: Path, tokenizer: Any) -> list[Example]:
    """Reads the prompt and response lines and puts them into the chat template.

    The prompt is exactly what a chat client sends, up to and with the header of the assistant's
    turn; the response ends with the end-of-turn token, so that the model learns to stop.
    """
    examples = []
    for line in data_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        conversation = [{"role": "user", "content": row["prompt"]}]
        prompt: list[int] = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False
        )
        response = tokenizer.encode(row["response"], add_special_tokens=False)
        response.append(tokenizer.eos_token_id)
        examples.append((prompt + response, [IGNORED_LABEL] * len(prompt) + response))
    return examples


def train(
    adapter: DemoAdapter, model_dir: Path, device: torch.device, report: Callable[[str], None]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Trains ``adapter`` on its data and returns PEFT's configuration and fp32 state dict.

    Deterministic for one device and library version: initialisation, dropout and the order of
    the examples all follow from SEED.
    """
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.target_modules),
        use_rslora=adapter.use_rslora,
        lora_dropout=LORA_DROPOUT,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).to(device).train()
    examples = load_examples(adapter.data_file, tokenizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=adapter.learning_rate, weight_decay=0.01)
    num_steps = adapter.epochs * -(-len(examples) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    shuffler = random.Random(SEED)
    for epoch in range(adapter.epochs):
        losses = []
        for batch in _batches(examples, tokenizer.pad_token_id, shuffler, device):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        mean_loss = torch.stack(losses).mean().item()
        report(f"{adapter.name}: epoch {epoch + 1}/{adapter.epochs}, loss {mean_loss:.3f}")
    return config, get_peft_model_state_dict(model)


def save(config: LoraConfig, weights: dict[str, torch.Tensor], directory: Path) -> None:
    """Writes PEFT's two files: the weights in bf16, the configuration without machine paths."""
    directory.mkdir(parents=True, exist_ok=True)
    compact = {name: w.to("cpu", torch.bfloat16).contiguous() for name, w in weights.items()}
    save_file(compact, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    config_file = directory / "adapter_config.json"
    content = json.loads(config_file.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = MODEL_ID
    content["inference_mode"] = True
    # PEFT keeps a set, whose order changes from run to run.
    content["target_modules"] = sorted(content["target_modules"])
    config_file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rate(step: int, num_steps: int) -> float:
    """The share of the peak learning rate: linear up over the warm-up, then linear down to zero."""
    warmup_steps = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (num_steps - step) / max(1, num_steps - warmup_steps)


def _batches(
    examples: list[Example], pad_token_id: int, shuffler: random.Random, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields one shuffled pass as model inputs of shape (batch, longest), padded on the right."""
    order = shuffler.sample(examples, len(examples))
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        longest = max(len(ids) for ids, _ in batch)
        padded = {
            "input_ids": [ids + [pad_token_id] * (longest - len(ids)) for ids, _ in batch],
            "attention_mask": [[1] * len(i) + [0] * (longest - len(i)) for i, _ in batch],
            "labels": [ls + [IGNORED_LABEL] * (longest - len(ls)) for _, ls in batch],
        }
        yield {name: torch.tensor(rows, device=device) for name, rows in padded.items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def main() -> None:
    """Trains the adapters named on the command line, or all."""
    names = [adapter.name for adapter in DEMO_ADAPTERS]
    parser = argparse.ArgumentParser(prog="python -m openlora.demo.train", description=__doc__)
    parser.add_argument("--adapter", choices=names, action="append", help="default: all of them")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path.home() / ".cache" / "openlora",
        help="where the demo model is, or will be converted to",
    )
    arguments = parser.parse_args()
    device = _device(arguments.device)
    model_dir = ensure_demo_model(arguments.cache_dir)
    for adapter in DEMO_ADAPTERS:
        if arguments.adapter and adapter.name not in arguments.adapter:
            continue
        config, weights = train(adapter, model_dir, device, print)
        save(config, weights, adapter.directory)
        print(f"{adapter.name}: written to {adapter.directory}")


if __name__ == "__main__":
    main()
