"""Shows what the demo adapters do: ``python -m openlora.demo.samples [--prompt TEXT]``.

Prints a Markdown table with the greedy answer of the base model and of each adapter, made with
transformers and PEFT, without OpenLoRA's engine: it is what the engine's answers can be held
against.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from openlora.demo.adapters import DEMO_ADAPTERS
from openlora.demo.model import ensure_demo_model

PROMPTS = ("What is the moon?", "How do I make tea?")
"""Questions that the training data does not hold."""

MAX_NEW_TOKENS = 64


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The greedy answer to one user message, at most MAX_NEW_TOKENS tokens."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    text: str = tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


def answers(
    model_dir: Path, prompts: tuple[str, ...], device: str = "cpu"
) -> Iterator[tuple[str, str, str]]:
    """Yields (prompt, "base" or adapter name, answer) in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
    for prompt in prompts:
        yield prompt, "base", answer(model, tokenizer, prompt)
    # Each adapter is loaded beside those before it, and alone active.
    for adapter in DEMO_ADAPTERS:
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapter.directory), adapter_name=adapter.name)
        else:
            model = PeftModel.from_pretrained(model, str(adapter.directory), adapter.name)
        model.set_adapter(adapter.name)
        model.eval()
        for prompt in prompts:
            yield prompt, adapter.name, answer(model, tokenizer, prompt)


def main() -> None:
    """Prints one table per prompt."""
    parser = argparse.ArgumentParser(prog="python -m openlora.demo.samples", description=__doc__)
    parser.add_argument("--prompt", action="append", help=f"default: {', '.join(PROMPTS)}")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path.home() / ".cache" / "openlora",
        help="where the demo model is, or will be converted to",
    )
    arguments = parser.parse_args()
    prompts = tuple(arguments.prompt or PROMPTS)
    rows = list(answers(ensure_demo_model(arguments.cache_dir), prompts))
    for prompt in prompts:
        print(f"\n| “{prompt}” | greedy answer |\n|---|---|")
        for asked, name, text in rows:
            if asked == prompt:
                shown = text.strip().replace("|", "\\|").replace("\n", "<br>")
                print(f"| `{name}` | {shown} |")


if __name__ == "__main__":
    main()
