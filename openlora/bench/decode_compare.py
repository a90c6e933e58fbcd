"""``bench decode --model``: this engine beside transformers and PEFT, in one run on one machine."""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openlora.bench.measure import RowWriter, make_requests, read_bytes_per_s, run_batch
from openlora.bench.random_adapters import adapter_bytes, write_adapter
from openlora.engine import Engine, EngineConfig, Request
from openlora.engine.build import choose_device
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
    """Measure all cases on all systems; a row of results each, after one of the memory's speed.

    Raises:
        SetupError: the model is no directory, or no case is left to run.
    """
    cases = _cases(args)
    with tempfile.TemporaryDirectory(prefix="openlora-bench-") as folder:
        setting = _setting(args, Path(folder), max(case.distinct for case in cases))
        peers = Peers(setting)
        ours = Ours(setting, max(case.batch for case in cases))
        our_speed, peer_speed = dict.fromkeys(cases, 0.0), dict.fromkeys(cases, 0.0)
        bandwidth = 0.0
        # In turns, so that what else the machine does meets all of them alike.
        for _ in range(_REPEATS):
            bandwidth = max(bandwidth, read_bytes_per_s(torch.device(setting.device)))
            for case in cases:
                tokens = case.batch * setting.output
                our_speed[case] = max(our_speed[case], tokens / ours.seconds(case))
                peer_speed[case] = max(peer_speed[case], tokens / peers.seconds(case))
                _say(case, our_speed[case], peer_speed[case])
    rows = RowWriter(args.out)
    rows.write(
        {
            "case": "memory",
            "device": setting.device,
            "dtype": setting.dtype,
            "read_gb_s": bandwidth / 1e9,
        }
    )
    per_adapter = adapter_bytes(setting.config, args.rank, DTYPES[setting.dtype].itemsize)
    for case in cases:
        limit = case.batch * bandwidth / (peers.weight_bytes + case.distinct * per_adapter)
        rows.write(
            {
                "case": "compare",
                "batch": case.batch,
                "distinct": case.distinct,
                "rank": args.rank,
                "prompt": setting.prompt,
                "output": setting.output,
                "openlora_tok_s": our_speed[case],
                "peers": "PEFT" if case.distinct else "transformers",
                "peers_tok_s": peer_speed[case],
                "ratio": our_speed[case] / peer_speed[case],
                "read_limit_tok_s": limit,
                "share_of_read_limit": our_speed[case] / limit,
            }
        )


def _cases(args: argparse.Namespace) -> list[Case]:
    """Every batch with every number of adapters that it can hold."""
    batches = args.batch or (1, 8)
    distinct = args.distinct if args.distinct is not None else (0, 1, 8)
    cases = [Case(b, d) for b in batches for d in distinct if d <= b]
    if not cases or min(batches) < 1:
        raise SetupError(
            f"batches {batches} cannot hold {distinct} adapters; a batch is at least 1 and at "
            "least its number of adapters"
        )
    return cases


def _setting(args: argparse.Namespace, folder: Path, num_adapters: int) -> Setting:
    model = _model_directory(args.model)
    config = read_config(model)
    device = choose_device(args.device)
    dtype = args.dtype if args.dtype != "auto" else "float32" if device == "cpu" else config.dtype
    adapters = tuple(
        write_adapter(
            folder / f"adapter-{number}",
            config,
            rank=args.rank,
            seed=args.seed + number,
            dtype=DTYPES[dtype],
        )
        for number in range(num_adapters)
    )
    return Setting(
        model, config, adapters, device, dtype, args.prompt or 64, args.output or 48, args.seed
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


class Ours:
    """This engine with all adapters resident."""

    def __init__(self, setting: Setting, max_num_seqs: int) -> None:
        self._setting = setting
        self._engine = Engine(
            EngineConfig(
                model=str(setting.model),
                device=setting.device,
                dtype=setting.dtype,
                max_num_seqs=max_num_seqs,
                enable_prefix_caching=False,
            )
        )
        for path in setting.adapters:
            self._engine.load_adapter(path.name, path)

    def seconds(self, case: Case) -> float:
        """Time of the whole batch, from its submission to its last token."""
        return run_batch(self._engine, self._setting.requests(case)).total_s


class Peers:
    """transformers for the base cases, PEFT on the same model for those with adapters.

    Attributes:
        weight_bytes: of the base model; tied embeddings are one tensor, and one read a step.
    """

    def __init__(self, setting: Setting) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self._setting = setting
        dtype = DTYPES[setting.dtype]
        base = AutoModelForCausalLM.from_pretrained(setting.model, dtype=dtype).to(setting.device)
        base.eval()
        self.weight_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
        self._base: Any = base
        self._peft: Any = None
        if setting.adapters:
            # A copy: PEFT puts its layers into the model it is given.
            first, *rest = setting.adapters
            self._peft = PeftModel.from_pretrained(copy.deepcopy(base), first, first.name)
            for path in rest:
                self._peft.load_adapter(path, adapter_name=path.name)
            self._peft.eval()

    def seconds(self, case: Case) -> float:
        """Time of one ``generate`` over the case's batch."""
        setting = self._setting
        requests = setting.requests(case)
        model, options = self._base, {}
        if case.distinct:
            model = self._peft
            # One adapter for all is PEFT's fast path; a mixed batch needs the names per row.
            model.set_adapter(setting.adapters[0].name)
            if case.distinct > 1:
                options["adapter_names"] = [next(iter(r.adapters)) for r in requests]
        input_ids = torch.tensor([r.prompt_token_ids for r in requests], device=setting.device)
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
        seconds = time.perf_counter() - started
        assert output.shape[1] == setting.prompt + setting.output
        return seconds


def _say(case: Case, ours: float, peers: float) -> None:
    """Progress for whoever waits: a run takes minutes on a CPU."""
    print(
        f"batch {case.batch}, {case.distinct} adapters: {ours:.1f} tok/s, "
        f"{'PEFT' if case.distinct else 'transformers'} {peers:.1f}",
        file=sys.stderr,
    )
