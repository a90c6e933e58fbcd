"""The inference engine: continuous batching of requests of different adapters on one base model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openlora.engine.config import EngineConfig
    from openlora.engine.engine import Engine
    from openlora.engine.request import Completion, Request, TokenOutput
    from openlora.sampling_params import SamplingParams

__all__ = ["Completion", "Engine", "EngineConfig", "Request", "SamplingParams", "TokenOutput"]

_HOMES = {
    "Completion": "openlora.engine.request",
    "Engine": "openlora.engine.engine",
    "EngineConfig": "openlora.engine.config",
    "Request": "openlora.engine.request",
    "SamplingParams": "openlora.sampling_params",
    "TokenOutput": "openlora.engine.request",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that a process that needs a StopChecker or a Request does not pay for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
