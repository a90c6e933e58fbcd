"""What a PEFT directory holds beside the A, B pairs of a layer's linears: *extras*. Stdlib only.

DoRA's magnitudes, trained biases, LoRA on embeddings and head, and whole weights (modules_to_save).
They follow the adapter through its life, and are computed on a path of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from openlora.adapters.adapter_config import CONFIG_FILE, AdapterConfig
from openlora.errors import AdapterFailed

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MAX_ADDED_TOKENS = 1 << 16
"""An adapter's tokens behind the base model's vocabulary."""

_PREFIX = "base_model.model."
_LINEAR = r"model\.layers\.\d{1,6}\.[a-z_]+\.[a-z_]+"
_NORM = r"model\.norm|model\.layers\.\d{1,6}\.(?:[a-z_]+layernorm|self_attn\.[qk]_norm)"
_END = r"(?:\.default)?(?:\.weight)?"
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.weight$)")
_KINDS = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "magnitude": rf"(?P<module>{_LINEAR})\.lora_magnitude_vector{_END}",
        "lora_bias": rf"(?P<module>{_LINEAR})\.lora_B(?:\.default)?\.bias",
        "bias": rf"(?P<module>{_LINEAR})(?:\.base_layer)?\.bias",
        "a": rf"(?P<module>model\.embed_tokens)\.lora_embedding_A{_END}"
        r"|(?P<head>lm_head)\.lora_A(?:\.default)?\.weight",
        "b": rf"(?P<module>model\.embed_tokens)\.lora_embedding_B{_END}"
        r"|(?P<head>lm_head)\.lora_B(?:\.default)?\.weight",
        "weight": rf"(?P<module>model\.embed_tokens|lm_head|{_NORM})"
        r"(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.weight",
        "original": r"(?P<module>model\.embed_tokens|lm_head)\.original_module\.weight",
    }.items()
}


@dataclass(frozen=True, slots=True)
class ExtraTensor:
    """One tensor of an adapter's extras.

    Attributes:
        kind: "magnitude", "lora_bias" or "bias" of a linear; "a" or "b" of LoRA on embeddings or
            head; "weight", whole; "original", what a whole weight has taken the place of.
        module: as the base model's checkpoint names it, e.g. "model.layers.0.self_attn.q_proj".
        tensor: its name in the adapter's files.
    """

    kind: str
    module: str
    tensor: str

    @property
    def what(self) -> str:
        """In words, for messages."""
        if self.kind == "magnitude":
            return "DoRA"
        if self.kind in ("bias", "lora_bias"):
            return "trained biases"
        if self.kind == "weight":
            return f"a whole {self.module.removeprefix('model.')}"
        return f"LoRA on {self.module.removeprefix('model.')}"


def parse_extra(tensor: str) -> ExtraTensor | None:
    """What a tensor that is no pair of a layer's linear is; None: it is not known."""
    name = tensor.removeprefix(_PREFIX)
    if name == tensor:
        return None
    if name.startswith(("layers.", "embed_tokens.", "norm.")):
        name = "model." + name
    for kind, pattern in _KINDS.items():
        match = pattern.fullmatch(name)
        if match is not None:
            groups = match.groupdict()
            return ExtraTensor(kind, groups["module"] or groups["head"], tensor)
    return None


def without_copies(extras: Iterable[ExtraTensor]) -> list[ExtraTensor]:
    """Without what PEFT saves twice: where the vocabulary has grown, embedding and head that are
    trained whole are there under three names, and the untrained ones with them."""
    extras = [extra for extra in extras if extra.kind != "original"]
    plain = {extra.tensor for extra in extras}

    def is_copy(extra: ExtraTensor) -> bool:
        name = _SAVED.sub("", extra.tensor)
        return extra.module in (EMBEDDING, HEAD) and name != extra.tensor and name in plain

    return [extra for extra in extras if not is_copy(extra)]


def has_tables(extras: Iterable[ExtraTensor]) -> bool:
    """Whether embedding or head are there whole, with which a vocabulary can grow."""
    return any(extra.kind == "weight" and extra.module in (EMBEDDING, HEAD) for extra in extras)


def words(extras: Iterable[ExtraTensor]) -> str:
    """All that an adapter has beside plain pairs, e.g. "DoRA and trained biases"."""
    found = sorted({extra.what for extra in extras})
    return " and ".join(found[:3]) + (" and more" if len(found) > 3 else "")


def check_extras(
    config: AdapterConfig, extras: Sequence[ExtraTensor], linears: Sequence[str]
) -> None:
    """Check that the files hold just the extras that adapter_config.json speaks of.

    Args:
        linears: modules with plain pairs, named as ``ExtraTensor.module``.

    Raises:
        AdapterFailed: naming the tensor that is missing or should not be there.
    """
    found: dict[tuple[str, str], str] = {}
    for extra in extras:
        other = found.setdefault((extra.kind, extra.module), extra.tensor)
        if other != extra.tensor:
            raise AdapterFailed(f"tensors {other} and {extra.tensor} are the same one twice")
        if not _is_expected(config, extra):
            raise AdapterFailed(
                f"tensor {extra.tensor} ({extra.what}) is not expected: {CONFIG_FILE} does not "
                "speak of it"
            )
    for module in (EMBEDDING, HEAD):
        pair = [("a", module) in found, ("b", module) in found]
        if config.targets(module, -1) and not all(pair):
            raise AdapterFailed(f"{module}: lora_A or lora_B is missing, though it is targeted")
        if any(pair) and config.use_dora:
            raise AdapterFailed(f"DoRA on {module} is not supported; use it on linears of layers")
    if config.use_dora:
        for module in linears:
            if ("magnitude", module) not in found:
                raise AdapterFailed(f"{module}: lora_magnitude_vector is missing")
    for name in config.modules_to_save:
        if not any(kind == "weight" and _is_called(module, name) for kind, module in found):
            raise AdapterFailed(
                f"{CONFIG_FILE}: modules_to_save names {name[:100]}; supported: embed_tokens, "
                "lm_head and norms, and the files must hold them"
            )


def _is_expected(config: AdapterConfig, extra: ExtraTensor) -> bool:
    if extra.kind == "magnitude":
        return config.use_dora
    if extra.kind == "bias":
        return config.bias != "none"
    if extra.kind == "lora_bias":
        return config.lora_bias
    is_targeted = extra.module in (EMBEDDING, HEAD) and config.targets(extra.module, -1)
    if extra.kind in ("a", "b"):
        return is_targeted
    # PEFT saves embedding and head whole where either is targeted or its vocabulary has grown.
    return extra.module in (EMBEDDING, HEAD) or any(
        _is_called(extra.module, name) for name in config.modules_to_save
    )


def _is_called(module: str, name: str) -> bool:
    # As PEFT has it: "norm" means "input_layernorm" as well.
    return module.endswith(name)
