"""Angles of the rotary position embedding (Su et al. 2021) and the ways to stretch them.

Scaling as in ``transformers.modeling_rope_utils``: linear, Llama 3, YaRN (Peng et al. 2023) and
LongRoPE (Ding et al. 2024). Dynamic NTK changes nothing up to ``max_position_embeddings``, which
is the longest context that such a model is served with, so it needs no code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
"""``rope_type`` of a config.json, as far as it is supported."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies beyond its first context length.

    Attributes:
        kind: "linear" divides every frequency by ``factor``; "llama3" divides only the long
            wavelengths and blends between two bounds; "yarn" blends likewise along dimensions;
            "longrope" divides each frequency by its own number.
        factor: the stretch.
        low_freq_factor, high_freq_factor: the bounds of "llama3".
        original_max_len: the first context length; not used by "linear".
        attention_factor: cos and sin are multiplied by it ("yarn", "longrope").
        beta_fast, beta_slow, truncate: the bounds of "yarn", in rotations over the first context.
        short_factors, long_factors: divisors of "longrope", one per frequency, for models that
            serve contexts up to ``original_max_len``, and beyond.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


def read_scaling(
    fields: Mapping[str, Any], max_len: int, original_max_len: int | None
) -> RopeScaling | None:
    """The scaling of a config.json's ``rope_parameters``; None where there is none.

    Args:
        fields: the parameters, in the form of transformers 4 or 5; of one of ``KINDS``.
        max_len: ``max_position_embeddings``.
        original_max_len: a value that the configuration has outside of ``fields``; it goes first.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or makes no sense.
    """
    kind = rope_kind(fields)
    if kind in ("default", "dynamic"):
        return None
    original = original_max_len or int(fields.get("original_max_position_embeddings") or max_len)
    if kind == "linear":
        return RopeScaling(kind, float(fields["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind,
            factor=float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_max_len=original,
        )
    factor = float(fields.get("factor") or max_len / original)
    if kind == "yarn":
        return RopeScaling(
            kind,
            factor=factor,
            original_max_len=original,
            attention_factor=_yarn_attention_factor(fields, factor),
            beta_fast=float(fields.get("beta_fast") or 32),
            beta_slow=float(fields.get("beta_slow") or 1),
            truncate=bool(fields.get("truncate", True)),
        )
    attention_factor = fields.get("attention_factor")
    if attention_factor is None:
        stretched = factor > 1
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if stretched else 1
    return RopeScaling(
        kind,
        factor=factor,
        original_max_len=original,
        attention_factor=float(attention_factor),
        short_factors=tuple(float(value) for value in fields["short_factor"]),
        long_factors=tuple(float(value) for value in fields["long_factor"]),
    )


def rope_kind(fields: Mapping[str, Any]) -> str:
    """``rope_type`` by the name it has now; Phi-3's first configurations said "su" or "yarn"."""
    kind = str(fields.get("rope_type") or fields.get("type") or "default")
    return "longrope" if kind in ("su", "yarn") and "short_factor" in fields else kind


def _yarn_attention_factor(fields: Mapping[str, Any], factor: float) -> float:
    given = fields.get("attention_factor")
    if given is not None:
        return float(given)
    mscale, mscale_all_dim = fields.get("mscale"), fields.get("mscale_all_dim")

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return of(float(mscale)) / of(float(mscale_all_dim))
    return of(1.0)


def inverse_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling | None, max_len: int = 0
) -> torch.Tensor:
    """[rotary_dim / 2] fp32 angles per position, on CPU.

    Args:
        rotary_dim: how many dimensions of a head are rotated.
        theta: the base.
        scaling: how they are stretched.
        max_len: longest context to be served: LongRoPE has frequencies for short and long ones.
            One set serves a model throughout, for cached keys cannot be rotated anew.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    inv_freq = 1.0 / theta**exponent
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    if scaling.kind == "yarn":
        stretched = _yarn_ramp(rotary_dim, theta, scaling)
        return inv_freq / scaling.factor * stretched + inv_freq * (1 - stretched)
    if scaling.kind == "longrope":
        is_long = max_len > scaling.original_max_len
        return inv_freq / _tensor(scaling.long_factors if is_long else scaling.short_factors)
    wavelength = 2 * math.pi / inv_freq
    smooth = (scaling.original_max_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq


def _yarn_ramp(rotary_dim: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """[rotary_dim / 2]: 0 keeps a frequency, 1 divides it by the factor."""

    def dimension_of(rotations: float) -> float:
        """Where a dimension turns this often within the first context."""
        turns = scaling.original_max_len / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    dimension = torch.arange(rotary_dim // 2, dtype=torch.float32)
    return ((dimension - low) / (high - low if high != low else 1e-3)).clamp(0, 1)


def _tensor(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)
