"""cos and sin of the rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import torch


def rope_cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of a step's positions, as ``rope_and_write_kv`` takes them.

    Args:
        positions: [tokens] int64.
        inv_freq: [rotary_dim / 2] fp32.
        dtype: of the result; angles are computed in fp32.
        factor: multiplies both (YaRN's and LongRoPE's attention factor).

    Returns:
        Two [tokens, 1, rotary_dim]; the first half of sin is negated.
    """
    angles = positions.to(torch.float32)[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    if factor != 1.0:
        cos, sin = cos.mul_(factor), sin.mul_(factor)
    return (
        torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
        torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
    )
