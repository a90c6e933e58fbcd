"""Stand-ins for flash-attn 2 and flash-attn-4: their calls and their checks, computed by torch.

Signatures and checks as of flash-attn 2.8 and flash-attn-4 4.0.0b36. Results that the libraries
leave to chance are NaN here, so that nothing may rely on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch


def install(folder: Path, distribution: str, version: str, body: str | None = None) -> None:
    """Put a package of this name into ``folder``, which is on ``sys.path``.

    ``body``: of its module; None: the stand-in.
    """
    name = "flash4" if distribution == "flash-attn-4" else "flash2"
    module = folder / "flash_attn"
    if name == "flash4":
        module /= "cute"
    module.mkdir(parents=True, exist_ok=True)
    if body is None:
        body = (
            f"from tests.engine.flash_libraries import {name} as _module\n"
            "globals().update(vars(_module))\n"
        )
    (module / "__init__.py").write_text(body)
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: torch.Tensor,
    rows: Sequence[tuple[int, int, int]],
    scale: float,
    window: tuple[int, int],
    soft_cap: float,
) -> torch.Tensor:
    """``rows``: (first token, end, context) of each; the last query sees all of the context."""
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    group = q.shape[1] // k.shape[2]
    for table, (first, end, context) in zip(tables, rows, strict=True):
        if not context:
            continue
        blocks = table[: -(-context // k.shape[1])].long()
        keys, values = (
            x[blocks].flatten(0, 1)[:context].float().repeat_interleave(group, 1) for x in (k, v)
        )
        scores = torch.einsum("thd,nhd->htn", q[first:end].float(), keys) * scale
        if soft_cap:
            scores = soft_cap * (scores / soft_cap).tanh()
        distance = torch.arange(context - (end - first), context)[:, None] - torch.arange(context)
        left, right = window
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if right >= 0:
            hidden |= distance < -right
        if left >= 0:
            hidden |= distance > left
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[first:end] = torch.einsum("htn,nhd->thd", weights, values).to(q.dtype)
    return out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: torch.Tensor) -> None:
    assert k.shape == v.shape
    assert k.shape[3] == q.shape[-1]
    assert q.shape[-2] % k.shape[2] == 0
    assert q.dtype == k.dtype == v.dtype
    assert tables.dtype == torch.int32
    assert tables.stride(-1) == 1
    for x in (q, k, v):
        # Other strides would be copied, the cache with each call.
        assert x.stride(-1) == 1
        assert all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])


def _flash4_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    seqused_k: torch.Tensor,
    page_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
) -> tuple[torch.Tensor, None]:
    _check(q, k, v, page_table)
    left = -1 if window_size[0] is None else window_size[0]
    assert causal
    assert seqused_k.dtype == torch.int32
    assert seqused_k.is_contiguous()
    if cu_seqlens_q is None:
        batch, per_row = q.shape[:2]
        starts = [row * per_row for row in range(batch + 1)]
    else:
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q.is_contiguous()
        starts = cu_seqlens_q.tolist()
        assert max_seqlen_q is not None
        assert max(b - a for a, b in itertools.pairwise(starts)) <= max_seqlen_q
    assert page_table.shape[0] == len(starts) - 1 == seqused_k.shape[0]
    rows = list(zip(starts, starts[1:], seqused_k.tolist(), strict=False))
    flat = q.reshape(-1, *q.shape[-2:])
    out = _attend(flat, k, v, page_table, rows, softmax_scale, (left, 0), softcap)
    return out.view(q.shape), None


def _flash2_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    block_table: torch.Tensor,
) -> torch.Tensor:
    _check(q, k, v, block_table)
    assert causal
    for starts in (cu_seqlens_q, cu_seqlens_k):
        assert starts.dtype == torch.int32
        assert starts.is_contiguous()
        assert starts.shape == (block_table.shape[0] + 1,)
    counts, lens = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    # Of one query a row the library rearranges q, from its very first token on.
    assert max(counts) == max_seqlen_q > 1
    assert max(lens) <= max_seqlen_k
    starts = cu_seqlens_q.tolist()
    rows = list(zip(starts, starts[1:], lens, strict=False))
    return _attend(q, k, v, block_table, rows, softmax_scale, (window_size[0], 0), softcap)


def _flash2_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    _check(q, k_cache, v_cache, block_table)
    assert causal
    assert q.shape[1] == 1
    assert cache_seqlens.dtype == torch.int32
    assert cache_seqlens.shape == (q.shape[0],) == block_table.shape[:1]
    rows = [(row, row + 1, length) for row, length in enumerate(cache_seqlens.tolist())]
    window = (window_size[0], 0)
    out = _attend(q.squeeze(1), k_cache, v_cache, block_table, rows, softmax_scale, window, softcap)
    return out.unsqueeze(1)


flash4 = SimpleNamespace(flash_attn_varlen_func=_flash4_varlen)
flash2 = SimpleNamespace(
    flash_attn_varlen_func=_flash2_varlen, flash_attn_with_kvcache=_flash2_with_kvcache
)
