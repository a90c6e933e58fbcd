"""Adapters from elsewhere: the files of a URL, copied into a directory by a process of its own.

    python -m openlora.adapters.sources URL DIRECTORY

A URL names the directory that holds adapter_config.json, or a .zip file that holds one:
http(s)://…, hf://org/name[@revision][/folder], and whatever fsspec has a package for (s3://, gs://,
file://, …); zip://FOLDER::URL names a folder of an archive that holds several. A process, because
it can be given up when a server is slow, and whatever a library does there ends it alone. Exit
status 0, or 2 with the reason on standard error.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from openlora.adapters.adapter_config import CONFIG_FILE, MAX_CONFIG_BYTES
from openlora.adapters.extra_format import has_tables, parse_extra
from openlora.adapters.peft_files import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    MAX_TOKENIZER_BYTES,
    PICKLE_FILES,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    shards_of,
)
from openlora.adapters.peft_format import MAX_ADAPTER_BYTES
from openlora.adapters.safetensors_header import read_header
from openlora.errors import AdapterFailed

TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 20.0
MAX_RATIO = 100
"""Weights hardly compress; a file that grows so much when it is unpacked is no adapter."""
_FAILED = 2
_ARCHIVE = "archive.zip"
_ZIP = "zip://"
MAX_MEMORY_BYTES = 2 << 30
"""Of the process that copies: what it is sent, or an archive's list of files, can be endless."""

Open = Callable[[str], BinaryIO]
"""Opens a file of the source by name; raises FileNotFoundError."""


def fetch(url: str, directory: Path, timeout_s: float = TIMEOUT_S) -> None:
    """Copy the files of the adapter at ``url`` into ``directory``, which exists and is empty.

    What they hold is not looked at yet.

    Raises:
        AdapterFailed: nothing usable is there, or it does not answer in time; says why.
    """
    # -P: what lies in the working directory must not be imported instead of ours.
    argv = [sys.executable, "-P", "-m", "openlora.adapters.sources", url, str(directory)]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterFailed(f"{url} was not read within {timeout_s:g} s; try again") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise AdapterFailed(f"{url} cannot be read: {lines[-1][:500]}")


def copy_adapter(url: str, directory: Path) -> None:
    """What ``fetch`` has another process do.

    Raises:
        AdapterFailed: a file is missing or too large.
        Exception: whatever the URL's library raises.
    """
    folder, is_inside, outer = url.removeprefix(_ZIP).partition("::")
    is_inside = is_inside if url.startswith(_ZIP) else ""
    if is_inside or url.partition("?")[0].endswith(".zip"):
        archive = directory / _ARCHIVE
        with open_url(outer if is_inside else url) as source:
            _copy(source, archive, MAX_ADAPTER_BYTES)
        with zipfile.ZipFile(archive) as opened:
            copy_files(_members(opened, folder if is_inside else ""), directory)
        archive.unlink()
    else:
        copy_files(lambda name: open_url(f"{url.rstrip('/')}/{name}"), directory)


def copy_files(opened: Open, directory: Path) -> None:
    try:
        with opened(CONFIG_FILE) as source:
            _copy(source, directory / CONFIG_FILE, MAX_CONFIG_BYTES)
    except FileNotFoundError as error:
        # Libraries say so too of what they may not read, or of a repository that is not there.
        cause = " ".join(str(error.__cause__ or "").split())
        raise AdapterFailed(
            f"{CONFIG_FILE} is missing there" + (f" ({cause[:300]})" if cause else "")
        ) from error
    if _copy_one(opened, WEIGHTS_FILE, directory, MAX_ADAPTER_BYTES) is not None:
        _copy_tokenizer(opened, directory, (WEIGHTS_FILE,))
        return
    if _copy_one(opened, INDEX_FILE, directory, MAX_INDEX_BYTES) is None:
        raise AdapterFailed(
            f"it has neither {WEIGHTS_FILE} nor {INDEX_FILE}; weights in "
            f"{' or '.join(PICKLE_FILES)} are pickle files and are not read: save it with "
            "safe_serialization=True"
        )
    left, shards = MAX_ADAPTER_BYTES, shards_of(directory / INDEX_FILE)
    for name in shards:
        size = _copy_one(opened, name, directory, left)
        if size is None:
            raise AdapterFailed(f"{name} is missing there")
        left -= size
    _copy_tokenizer(opened, directory, shards)


def _copy_tokenizer(opened: Open, directory: Path, weights: Sequence[str]) -> None:
    """Those of an adapter that may have tokens of its own belong to it."""
    try:
        names = [name for file in weights for name in read_header(directory / file).tensors]
    except AdapterFailed:
        return  # what is wrong with the weights is for whoever reads them to say
    if has_tables(extra for name in names if (extra := parse_extra(name)) is not None):
        for name in TOKENIZER_FILES:
            _copy_one(opened, name, directory, MAX_TOKENIZER_BYTES)


def _copy_one(opened: Open, name: str, directory: Path, limit: int) -> int | None:
    """Its size; None where the source has no such file."""
    try:
        source = opened(name)
    except FileNotFoundError:
        return None
    with source:
        return _copy(source, directory / name, limit)


def _copy(source: BinaryIO, target: Path, limit: int) -> int:
    size = 0
    with target.open("xb") as writer:
        while chunk := source.read(1 << 20):
            size += len(chunk)
            if size > limit:
                raise AdapterFailed(f"{target.name} is larger than {limit} bytes")
            writer.write(chunk)
    return size


def _members(archive: zipfile.ZipFile, below: str) -> Open:
    """The files beside the only adapter_config.json in the folder ``below``, at any depth."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    below = f"{below.strip('/')}/".lstrip("/")
    configs = [n for n in entries if n.startswith(below) and n.split("/")[-1] == CONFIG_FILE]
    if len(configs) != 1:
        raise AdapterFailed(
            f"the archive holds {len(configs)} files {CONFIG_FILE}, not one"
            f"{' in ' + below if below else ''}; name an adapter's folder as zip://FOLDER::URL"
        )
    folder = configs[0].removesuffix(CONFIG_FILE)

    def opened(name: str) -> BinaryIO:
        entry = entries.get(folder + name)
        if entry is None:
            raise FileNotFoundError(name)
        if entry.file_size > MAX_RATIO * max(entry.compress_size, 1024):
            raise AdapterFailed(
                f"{name} has {entry.compress_size} bytes in the archive and would have "
                f"{entry.file_size} unpacked; that is no adapter"
            )
        # Reads no more than the size it declares.
        return archive.open(entry)  # type: ignore[return-value]

    return opened


def open_url(url: str) -> BinaryIO:
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        try:
            answer: BinaryIO = urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(url) from error
            raise
        return answer
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    opened: Any = system.open(path, "rb")
    return opened  # type: ignore[no-any-return]


def main() -> int:
    """Copy; the exit status."""
    url, directory = sys.argv[1], Path(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    try:
        copy_adapter(url, directory)
    except AdapterFailed as error:
        print(error.message, file=sys.stderr)
    except ImportError as error:
        print(f"a package for it is not installed: {error}", file=sys.stderr)
    except Exception as error:  # noqa: BLE001 - this process's outermost level, see above
        reason = " ".join(str(error).split()) or "no details"
        hint = "; is this machine online?" if _is_unreachable(error) else ""
        print(f"{type(error).__name__}: {reason}{hint}", file=sys.stderr)
    else:
        return 0
    for path in directory.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return _FAILED


def _is_unreachable(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ConnectionError", "ConnectError", "NetworkError", "URLError"})


if __name__ == "__main__":
    sys.exit(main())
