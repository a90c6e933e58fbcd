"""Compiles the C kernels on first use, and finds what was compiled before.

A compiled file is named by what it was made from (sources, flags, compiler, processor) and by its
own content, which is checked before it is loaded: a file that a full disk cut short would bring
the process down. It is written under another name and renamed, so that processes that start
together each find a whole one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 180
_FLAGS = ("-std=gnu11", "-O2", "-fno-math-errno", "-fPIC", "-fopenmp")


class NativeUnavailable(Exception):
    """The kernels cannot be compiled or loaded here; says why and what to do."""


def default_cache() -> Path:
    """Where compiled kernels of this user are kept."""
    return Path.home() / ".cache" / "openlora" / "native"


def load(cache: Path | None = None) -> ctypes.CDLL:
    """The compiled kernels, from the cache or compiled now (a few seconds).

    Args:
        cache: directory of compiled files; None: ``default_cache()``. Where it cannot be written,
            or others could write it, a file is compiled for this process alone.

    Raises:
        NativeUnavailable: no compiler, it fails, or what it made cannot be loaded.
    """
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise NativeUnavailable(f"no C compiler ({', '.join(_COMPILERS)}) in PATH; install gcc")
    key = _key(compiler)
    try:
        directory = _private_directory(cache or default_cache())
    except OSError:
        with tempfile.TemporaryDirectory(prefix="openlora-native-") as folder:
            # The mapping outlives the file.
            return _open(_compile(compiler, Path(folder), key))
    for path in sorted(directory.glob(f"{key}-*.so")):
        if _digest(path) == path.stem.removeprefix(f"{key}-"):
            return _open(path)
        path.unlink(missing_ok=True)
    return _open(_compile(compiler, directory, key))


def _key(compiler: str) -> str:
    hashed = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes())
    for text in (*_FLAGS, _target_flag(), _version(compiler), _processor()):
        hashed.update(text.encode() + b"\0")
    return hashed.hexdigest()[:32]


def _target_flag() -> str:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return "-march=native" if is_x86 else "-mcpu=native"


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _processor() -> str:
    """Model and features of this processor: a home directory may serve unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _private_directory(path: Path) -> Path:
    """``path``, made where it is missing. OSError where others could put a file into it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or not os.access(path, os.W_OK):
        raise OSError(f"{path} is not this user's alone")
    return path


def _compile(compiler: str, directory: Path, key: str) -> Path:
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=directory) as folder:
        unit, library = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        source = str(SOURCES / "kernels.c")
        _run([compiler, *_FLAGS, _target_flag(), "-c", source, "-o", str(unit)])
        # Linked without OpenMP: a runtime of its own beside torch's would double the threads.
        _run([compiler, "-shared", str(unit), "-o", str(library), *_link_flags()])
        path = directory / f"{key}-{_digest(library)}.so"
        os.replace(library, path)
    return path


def _link_flags() -> tuple[str, ...]:
    if platform.system() == "Darwin":
        return ("-undefined", "dynamic_lookup")
    return ("-lm",)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    except OSError:
        return ""


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"the compiled kernels cannot be loaded: {error}") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"the C compiler cannot be run: {error}") from error
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise NativeUnavailable(
            f"the C compiler failed ({' '.join(command[:2])} …): {reason[0] if reason else '?'}"
        )
    return done.stdout
