"""Merged adapters as directories of their own, made once and kept by content.

``recipe`` names the directory that a merge will be in and writes down how to make it, which takes
no reading; ``materialize`` makes it, in the thread that loads it. From then on it is a PEFT adapter
like any other, for any part of the program that reads one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from openlora.adapters.adapter_config import CONFIG_FILE
from openlora.adapters.extra_format import words
from openlora.adapters.loader import FileTensors
from openlora.adapters.merge import Merger, Part
from openlora.adapters.merge_spec import MergeSpec
from openlora.adapters.peft_files import WEIGHTS_FILE
from openlora.adapters.peft_format import AdapterLayout, LoRAModule, read_layout
from openlora.adapters.stamp import stamp
from openlora.errors import AdapterFailed

MAX_BYTES = 4 << 30
KEPT_S = 60.0
"""A merge used so recently is not deleted: somebody may be about to read it."""
RECIPE_KEPT_S = 86400.0
"""Each weighting is a merge of its own, and clients choose weights: recipes must not pile up."""
RECIPE_FILE = "recipe.json"
_PREFIX = "merged-"
# PEFT walks the model's modules; the random methods draw in that order.
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj")
_making = threading.Lock()


def recipe(root: Path, parts: Sequence[tuple[Path, float]], spec: MergeSpec) -> Path:
    """The directory of the merge of ``parts``, adapters' directories with their weights.

    Equal content, weights, order and settings have equal directories.
    """
    fields = {
        "parts": [[str(path), weight] for path, weight in parts],
        "merge": asdict(spec),
    }
    # Where a directory is named by its content, its name alone says what it is.
    identity = [(path.name if not (at := stamp(path)) else (str(path), at)) for path, _ in parts]
    weights = [weight for _, weight in parts]
    key = hashlib.sha256(json.dumps([identity, weights, asdict(spec)]).encode()).hexdigest()
    directory = root / f"{_PREFIX}{key}"
    if not (directory / RECIPE_FILE).exists():
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f"{RECIPE_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(fields))
        temporary.replace(directory / RECIPE_FILE)
    else:
        os.utime(directory)
    return directory


def is_made(directory: Path) -> bool:
    """Whether a directory is no merge, or one that has been made."""
    return not directory.name.startswith(_PREFIX) or (directory / CONFIG_FILE).exists()


def parts_of(directory: Path) -> list[Path]:
    """The directories that a merge is made of; none where ``directory`` has no recipe."""
    try:
        fields = json.loads((directory / RECIPE_FILE).read_bytes())
    except FileNotFoundError:
        return []
    return [Path(path) for path, _ in fields["parts"]]


def materialize(directory: Path) -> None:
    """Make the merge that ``directory`` has the recipe of, unless it is there, or it is no merge.

    Raises:
        AdapterFailed: a part is unusable, or they cannot be merged so; says why.
        OSError: the directory cannot be written.
    """
    if not directory.name.startswith(_PREFIX) or not (directory / RECIPE_FILE).exists():
        return
    if (directory / CONFIG_FILE).exists():
        os.utime(directory)
        return
    # One at a time: merges are large, and two threads may want the same one.
    with _making, torch.inference_mode():
        if not (directory / CONFIG_FILE).exists():
            fields = json.loads((directory / RECIPE_FILE).read_bytes())
            spec = MergeSpec(**fields["merge"])
            paths = [(Path(path), weight) for path, weight in fields["parts"]]
            _write(directory, *_merged(paths, spec))
            trim(directory.parent)


def trim(root: Path, max_bytes: int = MAX_BYTES, kept_s: float = KEPT_S) -> None:
    """Delete the merges that were not used for longest, down to ``max_bytes`` in all; and recipes
    that nobody has asked for in ``RECIPE_KEPT_S``."""
    made = []
    for directory in root.glob(f"{_PREFIX}*"):
        weights = directory / WEIGHTS_FILE
        with contextlib.suppress(FileNotFoundError):  # another process trims as well
            used_at = directory.stat().st_mtime
            if weights.exists():
                made.append((used_at, weights.stat().st_size, directory))
            elif time.time() - used_at > RECIPE_KEPT_S:
                shutil.rmtree(directory, ignore_errors=True)
    left = sum(size for _, size, _ in made)
    for used_at, size, directory in sorted(made):
        if left <= max_bytes or time.time() - used_at < kept_s:
            return
        # The recipe stays a while, and with it what a registered adapter needs to be made again.
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        (directory / WEIGHTS_FILE).unlink(missing_ok=True)
        left -= size


def _merged(
    parts: Sequence[tuple[Path, float]], spec: MergeSpec
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of the merge."""
    layouts = [read_layout(path) for path, _ in parts]
    for layout in layouts:
        if layout.extras:
            raise AdapterFailed(
                f"an adapter with {words(layout.extras)} cannot be merged; use it alone"
            )
    rank = _result_rank(layouts, spec)
    merger = Merger(spec, rank)
    files = [FileTensors(path, layout) for (path, _), layout in zip(parts, layouts, strict=True)]
    modules: dict[tuple[int, int, str], list[tuple[int, LoRAModule]]] = {}
    for number, layout in enumerate(layouts):
        for module in layout.modules:
            leaf = module.path.rpartition(".")[2]
            place = _ORDER.index(leaf) if leaf in _ORDER else len(_ORDER)
            modules.setdefault((module.layer, place, module.path), []).append((number, module))
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for _, found in sorted(modules.items()):
        name = found[0][1].name
        inputs = [
            Part(
                files[number].get(module.a).float(),
                files[number].get(module.b).float(),
                module.scale,
                parts[number][1],
            )
            for number, module in found
        ]
        _check(name, inputs, spec)
        a, b = merger.merge(inputs)
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = a.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = b.contiguous()
        ranks[name] = a.shape[0]
    patterns = {re.escape(name): r for name, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),
        "base_model_name_or_path": layouts[0].config.base_model,
    }
    return config, tensors


def _result_rank(layouts: Sequence[AdapterLayout], spec: MergeSpec) -> int:
    ranks = [
        max(layout.config.r, *(rank for _, rank in layout.config.rank_pattern), 0)
        for layout in layouts
    ]
    if not spec.method.endswith("svd") and len(set(ranks)) > 1:
        raise AdapterFailed(
            f"merge method {spec.method!r} needs adapters of one rank; these have "
            f"{', '.join(map(str, ranks))}: use 'cat', 'svd' or a method that ends in _svd"
        )
    return max(ranks)


def _check(name: str, parts: Sequence[Part], spec: MergeSpec) -> None:
    shapes = {(part.a.shape[1], part.b.shape[0]) for part in parts}
    if len(shapes) > 1:
        raise AdapterFailed(f"{name}: the adapters were made for different base models: {shapes}")
    ranks = {part.a.shape[0] for part in parts}
    if not spec.method.endswith("svd") and len(ranks) > 1:
        raise AdapterFailed(
            f"{name}: merge method {spec.method!r} needs one rank, the adapters have {ranks} here; "
            "use 'cat', 'svd' or a method that ends in _svd"
        )


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=directory))
    try:
        save_file(tensors, temporary / WEIGHTS_FILE)
        (temporary / CONFIG_FILE).write_text(json.dumps(config))
        # The configuration last: where it is, all is there.
        (temporary / WEIGHTS_FILE).replace(directory / WEIGHTS_FILE)
        (temporary / CONFIG_FILE).replace(directory / CONFIG_FILE)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
