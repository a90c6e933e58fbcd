"""What PEFT's adapter_config.json says, as far as it is supported. Stdlib only.

The meaning of each field follows ``peft.LoraConfig`` and ``peft.tuners.tuners_utils``.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openlora.adapters.patterns import compile_pattern
from openlora.errors import AdapterFailed

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 4096
MAX_PATTERNS = 2048
"""Of a field: one for each linear of 126 layers is 882. Each module is matched with all of them."""
MAX_BASE_MODEL_CHARS = 1000
"""It is kept in the registry."""

_REFUSED = {
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices (changed embeddings)",
    "target_parameters": "target_parameters",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
"""Fields that change what the adapter computes in ways not supported, by name."""

_BIASES = ("none", "all", "lora_only")

_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base weights as they are."""

_READ = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("base_model_name_or_path", "init_lora_weights"),
        *("use_dora", "lora_bias", "modules_to_save"),
    }
)
_WITHOUT_EFFECT = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
        *("lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core", "loftq_config"),
        *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
        *("ensure_weight_tying",),
    }
)
"""Fields about training, or about a feature that another field turns on."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The supported fields, checked. Attributes are named as in PEFT."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...]
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]
    target_modules: re.Pattern[str] | tuple[str, ...]
    exclude_modules: re.Pattern[str] | tuple[str, ...]
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[re.Pattern[str], ...]
    base_model: str
    use_dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()

    def rank(self, module: str) -> int:
        """Rank of ``module``, e.g. "model.layers.0.self_attn.q_proj"."""
        return next((r for pattern, r in self.rank_pattern if pattern.match(module)), self.r)

    def scale(self, module: str) -> float:
        """α/r of ``module``; α/√r with rsLoRA."""
        alpha = next(
            (alpha for pattern, alpha in self.alpha_pattern if pattern.match(module)),
            self.lora_alpha,
        )
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str, layer: int) -> bool:
        """Whether the adapter changes ``module``, which is in ``layer``."""
        if _matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, re.Pattern):
            return _matches(self.target_modules, module)
        if module in self.target_modules:
            return True
        return self._is_in_layers(module, layer) and _matches(self.target_modules, module)

    def _is_in_layers(self, module: str, layer: int) -> bool:
        if self.layers_to_transform is None:
            return True
        if self.layers_pattern:
            # A pattern names what stands before the layer's number; where none does, PEFT finds
            # no number and leaves the module out.
            found = (pattern.match(module) for pattern in self.layers_pattern)
            numbers = [int(match["number"]) for match in found if match]
            return bool(numbers) and numbers[0] in self.layers_to_transform
        return layer in self.layers_to_transform


ALL_LINEAR = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("qkv_proj", "gate_up_proj"),
)
"""What PEFT's "all-linear" means in the supported models: every linear but the head."""


def _matches(targets: re.Pattern[str] | tuple[str, ...], module: str) -> bool:
    if isinstance(targets, re.Pattern):
        return targets.fullmatch(module) is not None
    return any(module == target or module.endswith("." + target) for target in targets)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        AdapterFailed: it cannot be read, a field has a value of the wrong kind, or it asks for
            something that is not supported, by name.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterFailed(f"{path.name} is over {MAX_CONFIG_BYTES} bytes")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterFailed(f"{path.name} is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterFailed(f"{path.name} holds no JSON object")
    return parse_adapter_config(raw)


def parse_adapter_config(raw: Mapping[str, Any]) -> AdapterConfig:
    """As ``read_adapter_config``, from the parsed file."""
    _refuse(raw)
    r = _rank(raw.get("r", 8), "r")
    return AdapterConfig(
        r=r,
        lora_alpha=_number(raw.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=bool(raw.get("use_rslora")),
        rank_pattern=tuple(
            (pattern, _rank(value, "rank_pattern"))
            for pattern, value in _patterns(raw, "rank_pattern")
        ),
        alpha_pattern=tuple(
            (pattern, _number(value, "alpha_pattern"))
            for pattern, value in _patterns(raw, "alpha_pattern")
        ),
        target_modules=_targets(raw.get("target_modules"), "target_modules"),
        exclude_modules=_targets(raw.get("exclude_modules") or [], "exclude_modules"),
        layers_to_transform=_layers(raw.get("layers_to_transform")),
        layers_pattern=_layers_pattern(raw.get("layers_pattern")),
        base_model=_base_model(raw.get("base_model_name_or_path") or ""),
        use_dora=bool(raw.get("use_dora")),
        bias=str(raw.get("bias") or "none"),
        lora_bias=bool(raw.get("lora_bias")),
        modules_to_save=_names(raw.get("modules_to_save") or [], "modules_to_save"),
    )


def _refuse(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise AdapterFailed(
            f"{CONFIG_FILE}: peft_type is {str(raw.get('peft_type'))[:100]}; only LORA is supported"
        )
    for field, what in _REFUSED.items():
        if raw.get(field):
            raise AdapterFailed(f"{CONFIG_FILE}: {what} is not supported; train without {field}")
    if (raw.get("bias") or "none") not in _BIASES:
        raise AdapterFailed(
            f"{CONFIG_FILE}: bias is {str(raw['bias'])[:100]}; choose one of {', '.join(_BIASES)}"
        )
    if raw.get("use_dora") and raw.get("lora_bias"):
        raise AdapterFailed(f"{CONFIG_FILE}: use_dora and lora_bias together are not supported")
    init = raw.get("init_lora_weights", True)
    if init == "loftq":
        raise AdapterFailed(
            f"{CONFIG_FILE}: init_lora_weights is loftq, which quantises the base model once more "
            "wherever it is loaded; serve the base model that was saved with the adapter, and set "
            "init_lora_weights to true, as PEFT's LoftQ example does"
        )
    if init not in _PLAIN_INITS:
        raise AdapterFailed(
            f"{CONFIG_FILE}: init_lora_weights is {str(init)[:100]}, which changes the base "
            "model's weights; save it as plain LoRA (path_initial_model_for_weight_conversion)"
        )
    for field, value in raw.items():
        if value and field not in _READ | _WITHOUT_EFFECT | _REFUSED.keys():
            raise AdapterFailed(f"{CONFIG_FILE}: field {field[:100]} is not supported")


def _rank(value: Any, field: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterFailed(
            f"{CONFIG_FILE}: {field} is {str(value)[:100]}; ranks are 1 to {MAX_RANK}"
        )
    return value


def _number(value: Any, field: str) -> float:
    # Python's integers may be larger than any float, which is an error rather than infinity.
    is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    if not is_number:
        raise AdapterFailed(f"{CONFIG_FILE}: {field} is {str(value)[:100]}; it must be a number")
    return float(value)


def _base_model(value: Any) -> str:
    # Half of a surrogate pair, which JSON can hold, is no text that could be sent on.
    if type(value) is not str or len(value) > MAX_BASE_MODEL_CHARS or not _is_text(value):
        raise AdapterFailed(
            f"{CONFIG_FILE}: base_model_name_or_path is {str(value)[:100]}; it must be a name of "
            f"at most {MAX_BASE_MODEL_CHARS} characters"
        )
    return value


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _patterns(raw: Mapping[str, Any], field: str) -> list[tuple[re.Pattern[str], Any]]:
    patterns = raw.get(field) or {}
    if not isinstance(patterns, dict):
        raise AdapterFailed(f"{CONFIG_FILE}: {field} is no object of patterns")
    if len(patterns) > MAX_PATTERNS:
        raise AdapterFailed(
            f"{CONFIG_FILE}: {field} has {len(patterns)} patterns; at most {MAX_PATTERNS} are taken"
        )
    found = []
    for key, value in patterns.items():
        # PEFT matches a key against the end of the module's name, at a dot.
        found.append((compile_pattern(key, field, r"(?:.*\.)?", "$"), value))
    return found


def _targets(value: Any, field: str) -> re.Pattern[str] | tuple[str, ...]:
    if isinstance(value, str):
        if value.lower() == "all-linear" and field == "target_modules":
            return ALL_LINEAR
        return compile_pattern(value, field)
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        # PEFT writes a set, in another order each time.
        return tuple(sorted(value))
    raise AdapterFailed(
        f"{CONFIG_FILE}: {field} is {str(value)[:100]}; "
        "it must be a list of module names or a pattern"
    )


def _layers_pattern(value: Any) -> tuple[re.Pattern[str], ...]:
    patterns = [value] if isinstance(value, str) else value or []
    if not isinstance(patterns, list) or not all(isinstance(item, str) for item in patterns):
        raise AdapterFailed(
            f"{CONFIG_FILE}: layers_pattern is {str(value)[:100]}; it must hold names"
        )
    found = []
    for pattern in filter(None, patterns):
        after = r"\.(?P<number>\d+)\."
        found.append(compile_pattern(pattern, "layers_pattern", r"(?:^|.*?\.)", after))
    return tuple(found)


def _names(value: Any, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise AdapterFailed(f"{CONFIG_FILE}: {field} is {str(value)[:100]}; it must list names")
    return tuple(value)


def _layers(value: Any) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise AdapterFailed(
            f"{CONFIG_FILE}: layers_to_transform is {str(value)[:100]}; it must hold layer numbers"
        )
    return frozenset(layers)
