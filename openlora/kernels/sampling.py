"""Sampling of next tokens from logits: the torch reference, on any device.

Order: penalties, temperature, top-k, top-p over what top-k left, min-p, then the Gumbel-max trick:
``argmax(logit/T + g)`` with independent Gumbel noise g is a draw from ``softmax(logit/T)``.

The noise of a token is a pure function of (seed, output index, token ID): no generator state, so a
draw depends neither on what shares the batch nor on the device's threads, and a resumed request
goes on with its own noise. It is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom
Number Generators, OOPSLA 2014) used as a counter-based generator:

    mix(z):  z = (z ^ z>>30)·0xBF58476D1CE4E5B9;  z = (z ^ z>>27)·0x94D049BB133111EB;  z ^ z>>31
    key      = mix(seed + mix(index + φ))                       φ = 0x9E3779B97F4A7C15
    bits[t]  = mix(key + t·φ)                                   all modulo 2⁶⁴
    u[t]     = (bits[t] >> 11)·2⁻⁵³ in float32, kept within [2⁻⁵⁴, 1 − 2⁻²⁴]
    g[t]     = −log(−log1p(−u[t]))

The draw's winner has a small −log1p(−u), where float32 is finest: rare tokens keep their odds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_NUCLEUS_SIZES = (256, 8192)
"""Tokens sorted for top-p, one after the other; only a flatter distribution is sorted whole."""

_GOLDEN = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15
"""The constants above as signed 64-bit integers, which is what torch multiplies."""


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """What a batch of rows needs beside its logits; all tensors on the logits' device.

    Attributes:
        drawn_rows: int64 [D], rows with temperature > 0; the other rows are greedy.
        temperature, top_p, min_p: float32 [D]; top_k: int64 [D], 0 is off. For ``drawn_rows``.
        seed, output_index: int64 [D], the keys of the noise.
        is_filtered: whether any of the drawn rows uses top-k, top-p or min-p.
        penalty_rows, penalty_tokens: int64 [P], each (row, token) pair at most once.
        penalty_factor: float32 [P], repetition penalty of the pair (1: none).
        penalty_offset: float32 [P], presence + frequency penalty, subtracted.
        logprob_rows: int64 [L], rows that report log-probabilities.
        num_top: alternatives reported for each of them, 0 or more.
    """

    drawn_rows: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    output_index: Tensor
    is_filtered: bool
    penalty_rows: Tensor
    penalty_tokens: Tensor
    penalty_factor: Tensor
    penalty_offset: Tensor
    logprob_rows: Tensor
    num_top: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Drawn tokens, on the logits' device.

    Attributes:
        token_ids: int64 [rows]; −1 where the row held a NaN or no finite logit at its top.
        logprobs: float32 [L], log-probability of the token drawn, unfiltered, unpenalised.
        top_ids: int64 [L, num_top], most likely first.
        top_logprobs: float32 [L, num_top].
    """

    token_ids: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def greedy(logits: Tensor) -> Tensor:
    """The token of the largest logit, ties to the smallest ID; −1 where a row is not finite there.

    Args:
        logits: float [rows, vocab].

    Returns:
        int64 [rows].
    """
    token_ids = logits.argmax(dim=-1)
    # argmax takes a NaN for the largest, so this one look per row finds every NaN.
    best = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return torch.where(best.isfinite(), token_ids, -1)


def sample(logits: Tensor, inputs: SamplingInputs, *, fixed_order: bool = False) -> Samples:
    """Draw one token per row.

    Args:
        logits: float [rows, vocab]; left as it is.
        inputs: how each row is drawn.
        fixed_order: sums over the vocabulary run in one order, and of equal log-probabilities the
            smallest ID is reported first, whatever rows there are; torch's kernels go by the
            shape. Takes more launches.
    """
    logits = logits.float()
    scores = _penalise(logits, inputs) if inputs.penalty_rows.numel() else logits
    token_ids = greedy(scores)
    if inputs.drawn_rows.numel():
        rows = inputs.drawn_rows
        is_good = token_ids[rows] >= 0
        drawn = _draw(scores[rows], inputs, fixed_order)
        token_ids[rows] = torch.where(is_good, drawn, -1)
    return _with_logprobs(logits, token_ids, inputs, fixed_order)


def gumbel_noise(seed: Tensor, output_index: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token, as the module's formulas say.

    Args:
        seed, output_index: int64 [rows].

    Returns:
        float32 [rows, vocab_size].
    """
    key = _mix(seed + _mix(output_index + _GOLDEN))
    counter = torch.arange(vocab_size, device=seed.device, dtype=torch.int64).mul_(_GOLDEN)
    bits = _mix(key.unsqueeze(1) + counter)
    uniform = bits.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1).float().mul_(2.0**-53)
    uniform.clamp_(2.0**-54, 1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(z: Tensor) -> Tensor:
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        # torch shifts arithmetically; the mask makes it the logical shift of the definition.
        high = z.bitwise_right_shift(shift).bitwise_and_((1 << (64 - shift)) - 1)
        z = high.bitwise_xor_(z)
        if factor != 1:
            z = z.mul_(factor)
    return z


def _penalise(logits: Tensor, inputs: SamplingInputs) -> Tensor:
    pairs = (inputs.penalty_rows, inputs.penalty_tokens)
    values, factor = logits[pairs], inputs.penalty_factor
    values = torch.where(values > 0, values / factor, values * factor) - inputs.penalty_offset
    return logits.index_put(pairs, values)


def _draw(scores: Tensor, inputs: SamplingInputs, fixed_order: bool) -> Tensor:
    # Less the maximum first: a tiny temperature then gives −inf below it, never inf − inf.
    scaled = (scores - scores.amax(-1, keepdim=True)) / inputs.temperature.unsqueeze(1)
    if inputs.is_filtered:
        threshold = _threshold(scaled, inputs, fixed_order)
        scaled = scaled.masked_fill(scaled < threshold.unsqueeze(1), -math.inf)
    noise = gumbel_noise(inputs.seed, inputs.output_index, scores.shape[1])
    return (scaled + noise).argmax(dim=-1)


def _threshold(scaled: Tensor, inputs: SamplingInputs, fixed_order: bool) -> Tensor:
    """The smallest value kept in each row; tokens that tie with it are kept too. float32 [D]."""
    # min-p compares with the largest probability, which sits at 0 here.
    threshold = inputs.min_p.log()
    max_top_k = int(inputs.top_k.max())
    if max_top_k:
        values = scaled.topk(max_top_k).values
        last = (inputs.top_k.clamp(min=1) - 1).unsqueeze(1)
        kth = torch.where(inputs.top_k > 0, values.gather(1, last).squeeze(1), -math.inf)
        threshold = torch.maximum(threshold, kth)
        scaled = scaled.masked_fill(scaled < kth.unsqueeze(1), -math.inf)
    rows = (inputs.top_p < 1).nonzero().squeeze(1)
    if rows.numel():
        edge = _nucleus_edge(scaled[rows], inputs.top_p[rows], fixed_order)
        threshold[rows] = torch.maximum(threshold[rows], edge)
    return threshold


def _nucleus_edge(scaled: Tensor, top_p: Tensor, fixed_order: bool) -> Tensor:
    """The logit of the token that takes the probability mass from the top to ``top_p``."""
    if fixed_order:
        # The maximum is 0: nothing overflows.
        total = _tree_sum(scaled.exp()).log_().unsqueeze(1)
    else:
        total = scaled.logsumexp(-1, keepdim=True)
    vocab_size = scaled.shape[1]
    for num_sorted in (*_NUCLEUS_SIZES, vocab_size):
        values = scaled.topk(min(num_sorted, vocab_size)).values
        mass = (values - total).exp_()
        mass = _tree_cumsum(mass) if fixed_order else mass.cumsum_(-1)
        if bool((mass[:, -1] >= top_p).all()):
            break
    # Rounding may leave the whole mass below top_p: then the last token is the edge.
    size = (mass < top_p.unsqueeze(1)).sum(-1).clamp_(max=values.shape[1] - 1)
    return values.gather(1, size.unsqueeze(1)).squeeze(1)


def _with_logprobs(
    logits: Tensor, token_ids: Tensor, inputs: SamplingInputs, fixed_order: bool
) -> Samples:
    logprobs = logits[inputs.logprob_rows]
    num_top = min(inputs.num_top, logits.shape[1])
    if fixed_order:
        logprobs = logprobs - logprobs.amax(-1, keepdim=True)
        logprobs = logprobs - _tree_sum(logprobs.exp()).log_().unsqueeze(1)
        top_ids = _first_of_largest(logprobs, num_top)
        top_logprobs = logprobs.gather(1, top_ids)
    else:
        logprobs = logprobs.log_softmax(-1)
        top_logprobs, top_ids = logprobs.topk(num_top)
    chosen = token_ids[inputs.logprob_rows].clamp(min=0).unsqueeze(1)
    return Samples(token_ids, logprobs.gather(1, chosen).squeeze(1), top_ids, top_logprobs)


def _tree_sum(x: Tensor) -> Tensor:
    """The sum over the last axis; halves are added to each other until one number is left."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = F.pad(x, (0, size - x.shape[-1]))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x.squeeze(-1)


def _tree_cumsum(x: Tensor) -> Tensor:
    """Cumulative sums of positive numbers over the last axis; those in front are the same
    whatever there is behind, and never fall."""
    distance = 1
    while distance < x.shape[-1]:
        x = torch.cat((x[..., :distance], x[..., distance:] + x[..., :-distance]), -1)
        distance *= 2
    return x.cummax(-1).values


def _first_of_largest(x: Tensor, count: int) -> Tensor:
    """Places of the largest numbers of each row, of equal ones the first; x: float32."""
    bits = x.contiguous().view(torch.int32)
    # Integers in the order of the floats, and behind them the places, so that no two are equal.
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = x.shape[-1] - 1
    keys = rising * (1 << 32) + (last - torch.arange(last + 1, device=x.device))
    return last - keys.topk(count).values.bitwise_and(0xFFFFFFFF)
