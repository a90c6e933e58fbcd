"""Requests to an engine on the fake device, and what comes of them."""

from __future__ import annotations

from openlora.engine import Engine, Request, SamplingParams, TokenOutput

ADAPTERS = ("rose-1-1-1-1", "fern-2-1-0-0", "moss-1-0-0-2", "reed-4-4-4-4", "iris-0-0-2-2")


def request(prompt, *, n=8, seed=7, priority="interactive", output=(), **adapters):
    params = SamplingParams(max_tokens=n, seed=seed)
    return Request(prompt, adapters, params, output, priority)


def drain(engine: Engine) -> dict[int, list[TokenOutput]]:
    outputs: dict[int, list[TokenOutput]] = {}
    for _ in range(5000):
        if not engine.has_work():
            return outputs
        step = engine.step()
        engine.check_integrity()
        if not step:
            engine.wait_for_adapters(5)
        for token in step:
            outputs.setdefault(token.request_id, []).append(token)
    raise AssertionError("the engine does not come to an end")


def drain_one(engine: Engine, one: Request) -> list[int]:
    request_id = engine.add(one)
    return ids(drain(engine)[request_id])


def ids(tokens: list[TokenOutput]) -> list[int]:
    return [token.token_id for token in tokens if token.token_id is not None]


def register_all(engine: Engine) -> None:
    for directory in ADAPTERS:
        engine.register_adapter(directory.split("-")[0], f"/adapters/{directory}")
