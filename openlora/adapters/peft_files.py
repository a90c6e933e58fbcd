"""Which files of a directory make up an adapter. Stdlib only."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

from openlora.errors import AdapterFailed

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""Of an adapter whose vocabulary may have grown; of others they are left where they are."""
MAX_TOKENIZER_BYTES = 64 << 20
"""Those of the largest vocabularies have about 20 MB."""
MAX_INDEX_BYTES = 16 << 20

_SHARD = re.compile(r"adapter_model-\d{1,5}-of-\d{1,5}\.safetensors")


def inside(directory: Path, name: str) -> Path:
    """A path of the directory's file ``name``, a plain name; a link may not lead out of it."""
    path = directory / name
    try:
        # Most are no links, and to resolve a path is a look at each folder above it.
        if stat.S_ISREG(path.lstat().st_mode):
            return path
    except OSError:
        pass  # as for what else is no file
    if not path.is_file():
        raise AdapterFailed(f"{name} is missing in {directory}")
    real, root = path.resolve(), directory.resolve()
    if not real.is_relative_to(root):
        raise AdapterFailed(f"{name} is a link out of {directory}; put the file itself there")
    return real


def weight_files(directory: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the weight files, and of the index where there is one."""
    if (directory / WEIGHTS_FILE).exists():
        return (WEIGHTS_FILE,), ()
    if (directory / INDEX_FILE).exists():
        return shards_of(inside(directory, INDEX_FILE)), (INDEX_FILE,)
    for name in PICKLE_FILES:
        if (directory / name).exists():
            raise AdapterFailed(
                f"{name} is a pickle file, which can run code when read; convert to safetensors "
                "(PEFT: save_pretrained(…, safe_serialization=True))"
            )
    raise AdapterFailed(f"{WEIGHTS_FILE} is missing in {directory}")


def tokenizer_files(directory: Path) -> tuple[str, ...]:
    """Names of the tokenizer's files, where it has one of its own."""
    found = tuple(name for name in TOKENIZER_FILES if (directory / name).exists())
    for name in found:
        size = inside(directory, name).stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise AdapterFailed(f"{name} has {size} bytes; at most {MAX_TOKENIZER_BYTES} are taken")
    return found if TOKENIZER_FILES[0] in found else ()


def shards_of(index: Path) -> tuple[str, ...]:
    """Names of the weight files that an index names, sorted.

    Raises:
        AdapterFailed: it is no index, or names anything but shards beside it.
    """
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise AdapterFailed(f"{INDEX_FILE} is over {MAX_INDEX_BYTES} bytes")
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterFailed(f"{INDEX_FILE} has no usable weight_map: {error!r}") from error
    for name in shards:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise AdapterFailed(f"{INDEX_FILE} names the file {str(name)[:200]!r}")
    if not shards:
        raise AdapterFailed(f"{INDEX_FILE} names no files")
    return tuple(shards)
