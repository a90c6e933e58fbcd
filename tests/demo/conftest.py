"""A tiny GGUF file of the real one's kind, in a package of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.demo.tiny_gguf import write_tiny_gguf


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
