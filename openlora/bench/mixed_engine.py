"""The bare engine on the loads of ``bench mixed``: what the whole system is compared with."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING

from openlora.bench.mixed_load import Workload
from openlora.bench.mixed_subject import Subject

if TYPE_CHECKING:
    from openlora.engine import Engine, Request


@dataclass(frozen=True, slots=True)
class BareRates:
    """Tokens per second over a batch's lines and over the streams' requests, each known at once.
    ``prompt_tokens``: of one line, on the average."""

    batch_tok_s: float
    streams_tok_s: float
    prompt_tokens: float


def bare_rates(
    subject: Subject, device: str, warm: Workload, batch: Workload, streams: Workload
) -> BareRates:
    """Measured in a process of its own, so that its memory is free again.

    Args:
        warm: run first, and not counted: loads the adapters, and makes what is made once.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, subject, device, warm, batch, streams).result()


def _measure(
    subject: Subject, device: str, warm: Workload, batch: Workload, streams: Workload
) -> BareRates:
    from openlora.engine import Engine, EngineConfig
    from workers.tokenizer import PromptTokenizer

    engine = Engine(
        EngineConfig(model=str(subject.model), device=device, load_format=subject.load_format)
    )
    for path in subject.adapters:
        engine.load_adapter(path.name, str(path))
    tokenizer = PromptTokenizer(str(subject.model))
    _rate(engine, _requests(warm, tokenizer))
    lines = _requests(batch, tokenizer)
    batch_tok_s = _rate(engine, lines)
    streams_tok_s = _rate(engine, _requests(streams, tokenizer))
    engine.close()
    prompt_tokens = sum(len(line.prompt_token_ids) for line in lines) / len(lines)
    return BareRates(batch_tok_s, streams_tok_s, prompt_tokens)


def _requests(load: Workload, tokenizer: object) -> list[Request]:
    from openlora.engine import Request, SamplingParams

    params = SamplingParams(max_tokens=load.tokens, temperature=0, ignore_eos=True)
    found = []
    for number in range(load.lines):
        ids = tokenizer.backend.encode(load.prompt(number)).ids  # type: ignore[attr-defined]
        adapter = load.adapter(number)
        found.append(Request(ids, {adapter: 1.0} if adapter else {}, params))
    return found


def _rate(engine: Engine, requests: list[Request]) -> float:
    """Token IDs alone are made, as in the system: there another process turns them into text."""
    from openlora.bench.measure import run_batch

    if not requests:
        return 0.0
    seconds = run_batch(engine, requests).total_s
    return sum(request.params.max_tokens for request in requests) / seconds
