"""Tokens drawn on a GPU: kept there to feed the next step, copied to the host beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from openlora.engine.sampler import is_plain, read_samples, sampling_inputs
from openlora.engine.step import RowSampling, SampledToken
from openlora.kernels.sampling import Samples, SamplingInputs, greedy, sample


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """A launched step's tokens on their way to the host.

    Attributes:
        samples: pinned copies, valid once ``arrived``; without log-probabilities of no length.
        arrived: the event behind the copies.
        sampling: how each was drawn.
        places: index of each in the caller's rows.
        num_rows: of the caller.
    """

    samples: Samples
    arrived: torch.cuda.Event
    sampling: Sequence[RowSampling]
    places: Sequence[int]
    num_rows: int

    def wait(self) -> list[SampledToken | None]:
        """Blocks until this step, not a later one, has run; see ``PendingStep``."""
        self.arrived.synchronize()
        tokens: list[SampledToken | None] = [None] * self.num_rows
        for place, token in zip(
            self.places, read_samples(self.samples, self.sampling), strict=True
        ):
            tokens[place] = token
        return tokens

    def is_done(self) -> bool:
        """Whether this step has run."""
        return bool(self.arrived.query())  # type: ignore[no-untyped-call]


class DrawnTokens:
    """The tokens of the last step on the device, and who they belong to.

    Args:
        max_rows: most of a step.
        device: of the logits.
        fixed_order: as ``sample`` takes it.

    Attributes:
        tokens: int64 [max_rows] on the device.
        at: sequence ID → index in ``tokens``.
    """

    def __init__(self, max_rows: int, device: torch.device, *, fixed_order: bool = False) -> None:
        self._fixed_order = fixed_order
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.at: dict[int, int] = {}

    def draw(self, logits: torch.Tensor, sampling: Sequence[RowSampling]) -> Samples:
        """Draw one token per row of ``logits``; returns tensors on the device, without waiting.

        Only top-k and top-p wait for the device: how much they sort depends on the logits.
        """
        if all(is_plain(row.params) for row in sampling):
            return self.plain(greedy(logits))
        # Built on the host and moved asynchronously: a copy from plain memory would wait.
        shape = torch.empty(1, 1).expand(logits.shape)
        inputs = sampling_inputs(sampling, shape)
        return sample(logits, _moved(inputs, logits.device), fixed_order=self._fixed_order)

    def plain(self, token_ids: torch.Tensor) -> Samples:
        """Samples of tokens alone: greedy ones, drawn already."""
        none = torch.empty(0, device=token_ids.device)
        return Samples(token_ids, none, none.view(0, 0).long(), none.view(0, 0))

    def keep(self, samples: Samples, sequence_ids: Sequence[int]) -> None:
        """Make ``samples`` the tokens that feed the next step."""
        self.tokens[: len(sequence_ids)].copy_(samples.token_ids)
        self.at = {sequence_id: index for index, sequence_id in enumerate(sequence_ids)}

    def send(
        self,
        samples: Samples,
        sampling: Sequence[RowSampling],
        places: Sequence[int],
        num_rows: int,
    ) -> PendingTokens:
        """Start the copy of ``samples`` to the host."""
        copies = {field.name: _to_host(getattr(samples, field.name)) for field in fields(samples)}
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return PendingTokens(Samples(**copies), arrived, sampling, places, num_rows)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    # torch keeps a pinned block from reuse until the stream has passed the copy.
    return tensor.to("cpu", non_blocking=True)


def _moved(inputs: SamplingInputs, device: torch.device) -> SamplingInputs:
    moved: dict[str, Any] = {
        field.name: value.pin_memory().to(device, non_blocking=True)
        for field in fields(inputs)
        if isinstance(value := getattr(inputs, field.name), torch.Tensor)
    }
    return replace(inputs, **moved)
