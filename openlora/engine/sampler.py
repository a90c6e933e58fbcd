"""From a step's rows to sampled tokens: builds the kernel's tensors and reads its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from openlora.engine.step import RowSampling, SampledToken
from openlora.kernels.sampling import Samples, SamplingInputs, greedy, sample
from openlora.sampling_params import SamplingParams


def sample_rows(logits: Tensor, rows: Sequence[RowSampling]) -> list[SampledToken]:
    """Draw one token per row of ``logits`` (float [rows, vocab]); waits for the device."""
    if all(is_plain(row.params) for row in rows):
        return [SampledToken(token_id) for token_id in greedy(logits).tolist()]
    return read_samples(sample(logits, sampling_inputs(rows, logits)), rows)


def sampling_inputs(rows: Sequence[RowSampling], logits: Tensor) -> SamplingInputs:
    """The tensors of ``rows`` on the device of ``logits``; token IDs lie within its vocabulary."""
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    params = [rows[i].params for i in drawn]
    vocab_size, device = logits.shape[1], logits.device

    def int64(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def float32(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    pairs = [pair for i, row in enumerate(rows) for pair in _penalties(i, row)]
    reported = _reported(rows)
    return SamplingInputs(
        drawn_rows=int64(drawn),
        temperature=float32([p.temperature for p in params]),
        top_k=int64([min(p.top_k, vocab_size) for p in params]),
        top_p=float32([p.top_p for p in params]),
        min_p=float32([p.min_p for p in params]),
        seed=int64([rows[i].seed for i in drawn]),
        output_index=int64([rows[i].output_index for i in drawn]),
        is_filtered=any(p.top_k or p.top_p < 1 or p.min_p for p in params),
        penalty_rows=int64([pair[0] for pair in pairs]),
        penalty_tokens=int64([pair[1] for pair in pairs]),
        penalty_factor=float32([pair[2] for pair in pairs]),
        penalty_offset=float32([pair[3] for pair in pairs]),
        logprob_rows=int64(reported),
        num_top=max((rows[i].params.logprobs for i in reported), default=0),
    )


def is_plain(params: SamplingParams) -> bool:
    """Whether ``greedy`` alone serves these settings."""
    return params.temperature == 0 and not params.logprobs and not params.has_penalties


def _reported(rows: Sequence[RowSampling]) -> list[int]:
    return [i for i, row in enumerate(rows) if row.params.logprobs]


def _penalties(row_index: int, row: RowSampling) -> list[tuple[int, int, float, float]]:
    """(row, token, factor, offset) of every token that the row's penalties touch."""
    params = row.params
    if not params.has_penalties:
        return []
    counts = Counter(row.output_token_ids)
    # Only the repetition penalty looks at the prompt.
    tokens = set(row.prompt_token_ids) if params.repetition_penalty != 1 else set()
    presence, frequency = params.presence_penalty, params.frequency_penalty
    return [
        (
            row_index,
            token,
            params.repetition_penalty,
            presence + frequency * counts[token] if token in counts else 0.0,
        )
        for token in sorted(tokens | counts.keys())
    ]


def read_samples(samples: Samples, rows: Sequence[RowSampling]) -> list[SampledToken]:
    """The tokens of ``rows``; waits for the device that ``samples`` lie on."""
    token_ids = samples.token_ids.tolist()
    tokens = [SampledToken(token_id) for token_id in token_ids]
    lines = zip(
        _reported(rows),
        samples.logprobs.tolist(),
        samples.top_ids.tolist(),
        samples.top_logprobs.tolist(),
        strict=True,
    )
    for i, logprob, top_ids, top_logprobs in lines:
        if token_ids[i] >= 0:
            top = tuple(zip(top_ids, top_logprobs, strict=True))[: rows[i].params.logprobs]
            tokens[i] = SampledToken(token_ids[i], logprob, top)
    return tokens
