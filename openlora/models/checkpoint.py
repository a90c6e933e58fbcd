"""Weights from safetensors files, single or sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from openlora.errors import SetupError

DTYPES = ("F32", "F16", "BF16")
"""As safetensors names them."""

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that are computed instead."""


class SafetensorsCheckpoint:
    """The tensors of a model directory, read one by one through a memory map.

    Raises:
        SetupError: no safetensors files, a missing shard, or a file that is not safetensors.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        for name in _file_names(directory):
            path = directory / name
            try:
                self._files[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise SetupError(f"{path} cannot be read as safetensors: {error}") from error
        self._home = {
            tensor: name
            for name, file in self._files.items()
            for tensor in file.keys()  # noqa: SIM118
        }

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """SetupError unless the files hold exactly these tensors, in these shapes, as floats.

        A tied model may carry lm_head.weight as a copy of its embedding.
        """
        for name, shape in shapes.items():
            if name not in self._home:
                raise SetupError(f"model {self._directory}: tensor {name} is missing")
            tensor = self._files[self._home[name]].get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                raise SetupError(
                    f"model {self._directory}: tensor {name} has dtype {tensor.get_dtype()}; "
                    f"supported: {', '.join(DTYPES)}"
                )
            found = tuple(tensor.get_shape())
            if found != shape:
                raise SetupError(
                    f"model {self._directory}: tensor {name} has shape {list(found)}; "
                    f"its config.json asks for {list(shape)}"
                )
        for name in self._home:
            if name not in shapes and name != "lm_head.weight":
                if name.endswith(IGNORED_SUFFIXES):
                    continue
                raise SetupError(f"model {self._directory}: tensor {name} is not expected")

    def get(self, name: str) -> torch.Tensor:
        """The tensor, in its own dtype, on CPU."""
        tensor: torch.Tensor = self._files[self._home[name]].get_tensor(name)
        return tensor


def _file_names(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise SetupError(f"{index} cannot be read: {error}") from error
        for name in names:
            if Path(name).name != name or not (directory / name).is_file():
                raise SetupError(f"model {directory}: shard {name} is missing")
        return names
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    for name in PICKLES:
        if (directory / name).is_file():
            raise SetupError(
                f"model {directory} has its weights in {name}, a pickle file, which can run code "
                "when read; save them as safetensors (transformers: save_pretrained)"
            )
    raise SetupError(
        f"model {directory}: there is no model.safetensors; only safetensors weights are read"
    )
