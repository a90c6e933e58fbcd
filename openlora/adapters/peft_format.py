"""A PEFT LoRA directory, described and checked without loading it. Stdlib only.

What is no LoRA of a decoder is refused by name. Shapes against a base model, and the values, are
checked by loader.py.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from openlora.adapters.adapter_config import CONFIG_FILE, AdapterConfig, read_adapter_config
from openlora.adapters.extra_format import (
    ExtraTensor,
    check_extras,
    has_tables,
    parse_extra,
    without_copies,
)
from openlora.adapters.peft_files import (
    inside,
    tokenizer_files,
    weight_files,
)
from openlora.adapters.safetensors_header import Header, TensorEntry, read_header
from openlora.errors import AdapterFailed

DTYPES = ("F32", "F16", "BF16")
MAX_ADAPTER_BYTES = 8 << 30
"""Rank 256 on all linears of a 70B model, in fp32, is 6.6 GB."""
MAX_TENSORS = 8192
"""DoRA with trained biases on all linears of 126 layers is 3,528."""
_CHUNK_BYTES = 8 << 20
"""Behind each read and each update of a hash, a thread waits for the interpreter's lock: beside a
busy one, files are hashed in half the time that chunks of 1 MiB take, and no faster in larger."""

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>(?:model\.)?layers\.(?P<layer>\d{1,6})\."
    r"(?P<path>[a-z_]{1,64}\.[a-z_]{1,64}))\.lora_(?P<matrix>[AB])(?:\.default)?\.weight"
)


@dataclass(frozen=True, slots=True)
class LoRAModule:
    """The A, B pair of one linear.

    Attributes:
        name: the module, e.g. "model.layers.0.self_attn.q_proj".
        layer: which layer it is in.
        path: its name within the layer, e.g. "self_attn.q_proj".
        rank: rows of A, columns of B.
        scale: what BA is multiplied with: α/r, or α/√r with rsLoRA.
        a, b: tensor names.
    """

    name: str
    layer: int
    path: str
    rank: int
    scale: float
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What an adapter directory holds.

    Attributes:
        rank: the largest rank of any module.
        targets: module names it changes, e.g. ("k_proj", "q_proj"), sorted.
        base_model: ``base_model_name_or_path``, "" where it is not said.
        size_bytes: of the files that count (configuration, weights, index).
        hash: SHA-256 over those files' names, sizes and content, in order of name.
        tensors: name → (dtype as safetensors names it, shape).
    """

    rank: int
    targets: tuple[str, ...]
    base_model: str
    size_bytes: int
    hash: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterLayout:
    """The parsed description of a directory: what the loader works from.

    Directories alike in configuration, headers and sizes share one object while it is remembered,
    which stands for all that follows from it.

    Attributes:
        config: adapter_config.json.
        files: (name, size in bytes) of the files that count, by name.
        tensors: every tensor and the file it is in.
        modules: the pairs, by layer and path.
        extras: what else there is.
    """

    config: AdapterConfig
    files: tuple[tuple[str, int], ...]
    tensors: Mapping[str, TensorEntry]
    modules: tuple[LoRAModule, ...]
    extras: tuple[ExtraTensor, ...] = ()


def inspect_adapter(directory: Path) -> AdapterInfo:
    """Check a directory and describe it.

    Raises:
        AdapterFailed: naming the file, tensor or field at fault and what to do.
    """
    layout = read_layout(directory)
    digest = ContentHash()
    largest = max(size for _, size in layout.files)
    # Not a bytearray: that is filled with zeros first, with the interpreter's lock held.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    length = min(largest + 1, _CHUNK_BYTES)
    with mmap.mmap(-1, length, private) as memory, memoryview(memory) as chunk:
        for name, size in layout.files:
            digest.begin(name, size)
            with (directory / name).open("rb", buffering=0) as file:
                while count := file.readinto(chunk):
                    digest.update(chunk[:count])
    return describe(layout, digest.hexdigest())


def describe(layout: AdapterLayout, content_hash: str) -> AdapterInfo:
    """The description of a directory whose layout and hash are known."""
    tables = {extra.module for extra in layout.extras if extra.kind == "a"}
    ranks = [module.rank for module in layout.modules] + [layout.config.rank(t) for t in tables]
    paths = {module.path for module in layout.modules} | tables
    targets = {path.rpartition(".")[2] for path in paths}
    return AdapterInfo(
        rank=max(ranks),
        targets=tuple(sorted(targets)),
        base_model=layout.config.base_model,
        size_bytes=sum(size for _, size in layout.files),
        hash=content_hash,
        tensors={name: (entry.dtype, entry.shape) for name, entry in layout.tensors.items()},
    )


def read_layout(directory: Path) -> AdapterLayout:
    """Check configuration and headers; no tensor data is read. Raises as ``inspect_adapter``."""
    if not directory.is_dir():
        raise AdapterFailed(f"{directory} is no directory; name a PEFT adapter's directory")
    config = read_adapter_config(inside(directory, CONFIG_FILE))
    weights, extra = weight_files(directory)
    headers = tuple(read_header(inside(directory, name)) for name in weights)
    files = _sizes(directory, (CONFIG_FILE, *weights, *extra))
    layout = _layout(config, headers, files)
    if has_tables(layout.extras) and (tokenizer := tokenizer_files(directory)):
        files = _sizes(directory, (*(name for name, _ in files), *tokenizer))
        return replace(layout, files=files)
    return layout


# The headers are equal only where they are the same object, so that a miss costs no comparison.
@lru_cache(maxsize=32)
def _layout(
    config: AdapterConfig, headers: tuple[Header, ...], files: tuple[tuple[str, int], ...]
) -> AdapterLayout:
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        for tensor, entry in header.tensors.items():
            if tensor in tensors:
                raise AdapterFailed(f"tensor {tensor[:200]} is in two files")
            tensors[tensor] = entry
    if len(tensors) > MAX_TENSORS:
        raise AdapterFailed(
            f"the weights hold {len(tensors)} tensors; at most {MAX_TENSORS} are taken"
        )
    modules, extras = _contents(config, tensors)
    return AdapterLayout(config, files, MappingProxyType(tensors), modules, extras)


def _sizes(directory: Path, names: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """(name, bytes) by name, where they are not too many."""
    files = tuple((name, (directory / name).stat().st_size) for name in sorted(names))
    size = sum(size for _, size in files)
    if size > MAX_ADAPTER_BYTES:
        raise AdapterFailed(
            f"the adapter has {size} bytes; at most {MAX_ADAPTER_BYTES} are taken: save it in a "
            "smaller rank or in half precision"
        )
    return files


class ContentHash:
    """SHA-256 over name, size and content of the files that count, fed in order of their names."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin(self, name: str, size: int) -> None:
        """The next file; exactly ``size`` bytes follow."""
        self._digest.update(f"{name}\0{size}\0".encode())

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """More bytes of the file begun last."""
        self._digest.update(data)

    def hexdigest(self) -> str:
        """The hash in hex."""
        return self._digest.hexdigest()


def _contents(
    config: AdapterConfig, tensors: Mapping[str, TensorEntry]
) -> tuple[tuple[LoRAModule, ...], tuple[ExtraTensor, ...]]:
    """The pairs of layers' linears, and all else."""
    pairs: dict[tuple[int, str], dict[str, str]] = {}
    names: dict[tuple[int, str], str] = {}
    extras: list[ExtraTensor] = []
    for tensor, entry in tensors.items():
        match = _TENSOR.fullmatch(tensor)
        if match is None:
            extra = parse_extra(tensor)
            if extra is None:
                raise AdapterFailed(
                    f"tensor {tensor[:200]} is not expected in a LoRA adapter of a decoder"
                )
            _check_dtype(tensor, entry)
            extras.append(extra)
            continue
        key = (int(match["layer"]), match["path"])
        if match["matrix"] in pairs.setdefault(key, {}):
            raise AdapterFailed(f"tensor {tensor} is there twice, under two names")
        pairs[key][match["matrix"]] = tensor
        names[key] = match["module"]
    if not pairs and not any(extra.kind == "a" for extra in extras):
        raise AdapterFailed("the weights hold no LoRA tensors")
    modules = tuple(_module(config, tensors, names[key], *key, pairs[key]) for key in sorted(pairs))
    extras = without_copies(extras)
    check_extras(config, extras, [f"model.layers.{m.layer}.{m.path}" for m in modules])
    return modules, tuple(extras)


def _module(
    config: AdapterConfig,
    tensors: Mapping[str, TensorEntry],
    name: str,
    layer: int,
    path: str,
    pair: Mapping[str, str],
) -> LoRAModule:
    for matrix in "AB":
        if matrix not in pair:
            raise AdapterFailed(f"{name}: lora_{matrix} is missing")
    if not config.targets(name, layer):
        raise AdapterFailed(f"tensor {pair['A']} is not expected: {CONFIG_FILE} does not target it")
    a, b = tensors[pair["A"]], tensors[pair["B"]]
    for tensor, entry in ((pair["A"], a), (pair["B"], b)):
        _check_dtype(tensor, entry)
        if len(entry.shape) != 2:
            raise AdapterFailed(f"tensor {tensor} has shape {list(entry.shape)}; must be 2-D")
    rank = config.rank(name)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterFailed(
            f"{name}: lora_A has shape {list(a.shape)} and lora_B {list(b.shape)}; "
            f"{CONFIG_FILE} gives it rank {rank}"
        )
    return LoRAModule(name, layer, path, rank, config.scale(name), pair["A"], pair["B"])


def _check_dtype(tensor: str, entry: TensorEntry) -> None:
    if entry.dtype not in DTYPES:
        raise AdapterFailed(
            f"tensor {tensor} has dtype {entry.dtype}; supported: {', '.join(DTYPES)}"
        )
