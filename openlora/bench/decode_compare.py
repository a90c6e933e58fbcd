"""``bench decode --model``: this engine beside transformers and PEFT, in one run on one machine."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openlora.bench.measure import RowWriter, make_requests, read_bytes_per_s, run_batch
from openlora.bench.random_adapters import adapter_bytes, write_adapter
from openlora.engine import Engine, EngineConfig, Request
from openlora.errors import SetupError
from openlora.models.config import ModelConfig, read_config
from openlora.models.load import DTYPES

_REPEATS = 2
"""Each case counts with its best run: what else the machine does only ever slows one down."""


@dataclass(frozen=True, slots=True)
class Case:
    """``batch`` requests over ``distinct`` adapters; 0: the base model."""

    batch: int
    distinct: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What all systems of the run share."""

    model: Path
    config: ModelConfig
    adapters: tuple[Path, ...]
    device: str
    dtype: str
    prompt: int
    output: int
    seed: int

    def requests(self, case: Case) -> list[Request]:
        """The same prompts and adapters for every system."""
        return make_requests(
            case.batch,
            [path.name for path in self.adapters[: case.distinct]],
            prompt_tokens=self.prompt,
            output_tokens=self.output,
            vocab_size=self.config.vocab_size,
            seed=self.seed,
        )


def compare(args: argparse.Namespace) -> None:
    """Measure all cases on all systems; prints rows and then what they amount to.

    Raises:
        SetupError: transformers or PEFT is missing, or the model is no directory.
    """
    cases = [
        Case(batch, distinct)
        for batch in args.batch or (1, 8)
        for distinct in (args.distinct if args.distinct is not None else (0, 1, 8))
        if distinct <= batch
    ]
    model = _model_directory(args.model)
    config = read_config(model)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    dtype = args.dtype if args.dtype != "auto" else "float32" if device == "cpu" else config.dtype
    with tempfile.TemporaryDirectory(prefix="openlora-bench-") as folder:
        adapters = tuple(
            write_adapter(
                Path(folder) / f"adapter-{number}",
                config,
                rank=args.rank,
                seed=args.seed + number,
                dtype=DTYPES[dtype],
            )
            for number in range(max(case.distinct for case in cases))
        )
        setting = Setting(
            model, config, adapters, device, dtype, args.prompt or 64, args.output or 48, args.seed
        )
        bandwidth = read_bytes_per_s(torch.device(device))
        ours = _run_openlora(setting, cases)
        theirs, weight_bytes = _run_transformers(setting, cases)
    element = DTYPES[dtype].itemsize
    per_adapter = adapter_bytes(config, args.rank, element)
    rows = RowWriter(args.out)
    rows.write({"case": "memory", "device": device, "dtype": dtype, "read_gb_s": bandwidth / 1e9})
    for case in cases:
        limit = case.batch * bandwidth / (weight_bytes + case.distinct * per_adapter)
        rows.write(
            {
                "case": "compare",
                "batch": case.batch,
                "distinct": case.distinct,
                "rank": args.rank,
                "prompt": setting.prompt,
                "output": setting.output,
                "openlora_tok_s": ours[case],
                "peers": "PEFT" if case.distinct else "transformers",
                "peers_tok_s": theirs[case],
                "ratio": ours[case] / theirs[case],
                "read_limit_tok_s": limit,
                "share_of_read_limit": ours[case] / limit,
            }
        )


def _model_directory(name: str) -> Path:
    if name == "demo":
        from openlora.commands.config import cache_dir, process_environment
        from openlora.demo.model import ensure_demo_model

        return ensure_demo_model(
            cache_dir(process_environment()),
            lambda stage, _: print(f"demo model: {stage}", file=sys.stderr),
        )
    path = Path(name)
    if not (path / "config.json").is_file():
        raise SetupError(f"model is {name!r}; it must be demo or a directory with a config.json")
    return path


def _run_openlora(setting: Setting, cases: Sequence[Case]) -> dict[Case, float]:
    engine = Engine(
        EngineConfig(
            model=str(setting.model),
            device=setting.device,
            dtype=setting.dtype,
            max_num_seqs=max(case.batch for case in cases),
            enable_prefix_caching=False,
        )
    )
    for path in setting.adapters:
        engine.load_adapter(path.name, path)
    speeds = {}
    for case in cases:
        requests = setting.requests(case)
        run_batch(engine, requests[:1])
        seconds = min(run_batch(engine, requests).total_s for _ in range(_REPEATS))
        speeds[case] = case.batch * setting.output / seconds
        _say("openlora", case, speeds[case])
    engine.close()
    del engine
    gc.collect()
    return speeds


def _run_transformers(setting: Setting, cases: Sequence[Case]) -> tuple[dict[Case, float], int]:
    """tok/s of transformers (base cases) and PEFT (adapter cases), and the weights' bytes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        setting.model, dtype=DTYPES[setting.dtype]
    ).to(setting.device)
    model.eval()
    # Tied embeddings are one tensor, and one read a step: that of the head.
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    speeds = {
        case: _generate_speed(model, setting, case, {}) for case in cases if not case.distinct
    }
    if not setting.adapters:
        return speeds, weight_bytes
    first, *rest = setting.adapters
    model = PeftModel.from_pretrained(model, first, adapter_name=first.name)
    for path in rest:
        model.load_adapter(path, adapter_name=path.name)
    model.eval()
    for case in cases:
        if case.distinct == 1:
            # One adapter for all is PEFT's fast path; a mixed batch needs the names per row.
            model.set_adapter(first.name)
            speeds[case] = _generate_speed(model, setting, case, {})
        elif case.distinct:
            names = [next(iter(request.adapters)) for request in setting.requests(case)]
            speeds[case] = _generate_speed(model, setting, case, {"adapter_names": names})
    return speeds, weight_bytes


def _generate_speed(model: Any, setting: Setting, case: Case, options: dict[str, Any]) -> float:
    prompts = [request.prompt_token_ids for request in setting.requests(case)]
    input_ids = torch.tensor(prompts, device=setting.device)
    best_s = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                min_new_tokens=setting.output,
                max_new_tokens=setting.output,
                pad_token_id=0,
                **options,
            )
        best_s = min(best_s, time.perf_counter() - started)
        assert output.shape[1] == setting.prompt + setting.output
    speed = case.batch * setting.output / best_s
    _say("PEFT" if case.distinct else "transformers", case, speed)
    return speed


def _say(system: str, case: Case, tok_s: float) -> None:
    """Progress for whoever waits: a run takes minutes on a CPU."""
    print(
        f"{system}: batch {case.batch}, {case.distinct} adapters: {tok_s:.1f} tok/s",
        file=sys.stderr,
    )
