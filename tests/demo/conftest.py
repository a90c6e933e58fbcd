"""The real demo model, converted once per run, and a tiny GGUF file of the same kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from openlora.demo.model import ensure_demo_model, find_gguf
from openlora.errors import SetupError
from tests.demo.tiny_gguf import write_tiny_gguf
from tests.services import skip_or_fail


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted SmolLM2-135M-Instruct; without its package: skip, in CI fail."""
    try:
        find_gguf()
    except SetupError as error:
        skip_or_fail(error.message)
    return ensure_demo_model(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that holds a tiny GGUF file under the real one's name."""
    package = tmp_path / "site" / "tiny_demo_package"
    package.mkdir(parents=True)
    # Found without being imported: an import would fail.
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    write_tiny_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr("openlora.demo.model.PACKAGE", package.name)
    return package
