# ruff: noqa: ANN001, ANN201, ANN202 - Triton kernels take pointers and compile-time constants.
"""The gated activations of an MLP in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from openlora.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    launch_options,
    overlaps_launches,
)


@triton.jit
def activate(gate, up, GELU: tl.constexpr):
    """act(gate) · up; the activation is rounded before the product."""
    wide = gate.to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        # tanh by way of the sigmoid: one exponential.
        activated = wide / (1.0 + tl.exp(-2.0 * inner))
    else:
        activated = wide / (1.0 + tl.exp(-wide))
    return activated.to(gate.dtype) * up


@triton.jit
def _gate_kernel(
    gate_up_ptr,
    out_ptr,
    num_elements,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = index < num_elements
    row = index // WIDTH
    # gate of element (row, column) lies at row · 2 · WIDTH + column, up a WIDTH behind it.
    at = index + row * WIDTH
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up_ptr + at, mask=in_range, other=0.0)
    up = tl.load(gate_up_ptr + at + WIDTH, mask=in_range, other=0.0)
    tl.store(out_ptr + index, activate(gate, up, GELU), mask=in_range)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) · up; see ``openlora.kernels.activation``.

    Args:
        gate_up: [rows, 2 · intermediate] contiguous, gate first; rows may be 0.
    """
    return _launch_gate(gate_up, gelu=False)


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """GELU(gate), by its tanh approximation, · up; as ``silu_and_mul``."""
    return _launch_gate(gate_up, gelu=True)


def _launch_gate(gate_up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        block = 1024
        overlap = overlaps_launches()
        _gate_kernel[(triton.cdiv(out.numel(), block),)](
            gate_up,
            out,
            out.numel(),
            WIDTH=width,
            BLOCK=block,
            GELU=gelu,
            OVERLAP=overlap,
            num_warps=4,
            **launch_options(overlap),
        )
    return out
