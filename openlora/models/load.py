"""From a directory, a GGUF file, a hub ID or a dummy shape to a model ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from openlora.errors import SetupError, UnknownModel
from openlora.kernels.linear import Linear
from openlora.models.checkpoint import SafetensorsCheckpoint
from openlora.models.config import ModelConfig, read_config
from openlora.models.decoder import Decoder
from openlora.models.dummy import DUMMY_CONFIGS, dummy_weights
from openlora.models.gguf import read_gguf
from openlora.models.weights import GetWeight, MakeLinear, weight_shapes

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Progress = Callable[[int, int], None]
"""Called with (done, total) layers while a model loads."""


def load_model(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    load_format: str = "auto",
    progress: Progress | None = None,
    configure: Callable[[ModelConfig], ModelConfig] | None = None,
    make_linear: MakeLinear = Linear,
) -> Decoder:
    """Load a base model.

    Args:
        source: a directory with config.json and safetensors, a .gguf file, a hub ID, or with
            ``load_format="dummy"`` a shape, "8b" (Llama-3.1-8B), "1b" (Llama-3.2-1B), or a
            directory of which only config.json is read.
        dtype: "float32", "bfloat16", "float16"; "auto" is the checkpoint's own on CUDA and
            float32 on CPU, where greedy output is then reproducible to the token.
        device: "cpu", "cuda" or "cuda:N".
        load_format: "auto" or "dummy" (random weights, for benchmarks).
        progress: told of each layer.
        configure: called with the configuration before any weight is read: what it returns is
            built, what it raises is raised.
        make_linear: what the model's linears are made of.

    Raises:
        UnknownModel: no such model, or one of an unsupported kind.
        SetupError: its files are broken, or the settings make no sense.
    """
    base_weight: GetWeight | None = None
    if load_format == "dummy":
        config = _adjusted(_dummy_config(source), configure)
        target = _target_dtype(dtype, config, device)
        get = dummy_weights(weight_shapes(config), target, torch.device(device))
    elif load_format == "auto":
        path = find_model(source)
        if path.suffix == ".gguf":
            config, tensors = read_gguf(path)
            config = _adjusted(config, configure)
            target = _target_dtype(dtype, config, device)
            get = _converting(tensors.__getitem__, target, torch.device(device))
        else:
            config = _adjusted(read_config(path), configure)
            target = _target_dtype(dtype, config, device)
            checkpoint = SafetensorsCheckpoint(path)
            checkpoint.check(weight_shapes(config))
            get = _converting(checkpoint.get, target, torch.device(device))
            base_weight = _converting(checkpoint.get, target, torch.device("cpu"))
    else:
        raise SetupError(f"load_format is {load_format!r}; use auto or dummy")
    with torch.inference_mode():
        model = Decoder(
            replace(config, dtype=str(target).removeprefix("torch.")),
            get,
            target,
            torch.device(device),
            progress,
            make_linear,
        )
    model.base_weight = base_weight
    return model


def _adjusted(
    config: ModelConfig, configure: Callable[[ModelConfig], ModelConfig] | None
) -> ModelConfig:
    return config if configure is None else configure(config)


def _dummy_config(source: str) -> ModelConfig:
    if source in DUMMY_CONFIGS:
        return DUMMY_CONFIGS[source]
    if Path(source).is_dir():
        return read_config(Path(source))
    raise UnknownModel(
        f"there is no dummy shape {source!r}, nor a directory; known: {', '.join(DUMMY_CONFIGS)}"
    )


def find_model(source: str) -> Path:
    """The local directory or .gguf file of ``source``; a hub ID is downloaded or found cached.

    Raises:
        UnknownModel: there is nothing of that name.
    """
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise UnknownModel(f"model {source} is neither a directory nor a .gguf file")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UnknownModel(f"model {source}: there is no such directory or file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnknownModel(f"model {source} cannot be fetched from the hub: {reason}") from error


def _target_dtype(dtype: str, config: ModelConfig, device: str) -> torch.dtype:
    if dtype == "auto":
        dtype = config.dtype if torch.device(device).type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise SetupError(f"dtype is {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _converting(get: GetWeight, dtype: torch.dtype, device: torch.device) -> GetWeight:
    return lambda name: get(name).to(device=device, dtype=dtype)
