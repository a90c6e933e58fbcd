"""transformers and PEFT as the decode benchmark runs them: ``generate``, greedy, in one batch."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from openlora.bench.measure import BatchTimes
from openlora.engine import Request


class Peers:
    """transformers for requests to the base model, PEFT on the same model for adapters.

    Args:
        model: its directory.
        adapters: PEFT directories; all are loaded before anything is timed.
        dtype: of the model and the adapters alike. PEFT would keep its matrices in fp32, which
            is slower beside a bf16 model: each product would convert its input and output.
        device: where they run.
    """

    def __init__(
        self, model: Path, adapters: Sequence[Path], dtype: torch.dtype, device: str
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
        base.eval()
        self._base: Any = base
        self._peft: Any = None
        self._device = device
        if adapters:
            # A copy: PEFT puts its layers into the model it is given.
            first, *rest = adapters
            self._peft = PeftModel.from_pretrained(copy.deepcopy(base), first, first.name)
            for path in rest:
                self._peft.load_adapter(path, adapter_name=path.name)
            self._peft.to(dtype).eval()

    def run(self, requests: Sequence[Request]) -> BatchTimes:
        """One ``generate`` over the requests, all with prompts and outputs of one length."""
        model, options = self._base, {}
        names = [next(iter(request.adapters), None) for request in requests]
        if names[0] is not None:
            model = self._peft
            # One adapter for all is PEFT's fast path; a mixed batch needs the names per row.
            model.set_adapter(names[0])
            if len(set(names)) > 1:
                options["adapter_names"] = names
        output = requests[0].params.max_tokens
        input_ids = torch.tensor([r.prompt_token_ids for r in requests], device=self._device)
        clock = _FirstTokenClock()
        started = time.perf_counter()
        with torch.inference_mode():
            generated = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                min_new_tokens=output,
                max_new_tokens=output,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
                **options,
            )
        ended = time.perf_counter()
        assert generated.shape[1] == input_ids.shape[1] + output
        return BatchTimes(clock.first - started, ended - started)


class _FirstTokenClock(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; notes when the first token is there."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
