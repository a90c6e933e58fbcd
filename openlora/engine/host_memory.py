"""How much memory this process and its children may still take. Stdlib only."""

from __future__ import annotations

import os
from pathlib import Path

_UNLIMITED = 1 << 60
"""Version 1 says "no limit" with a number about this large."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes: what the machine has free, or less where a container's limit leaves less.

    ``root``: of the file system that holds /proc and /sys.
    """
    return min([_machine_room(root), *cgroup_rooms(root)])


def _machine_room(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    # No Linux: what the machine has, for nothing in the standard library says what is free.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroup_rooms(root: Path) -> list[int]:
    """What each limit over this process leaves, from its own cgroup up to the topmost.

    Page cache that the kernel gives back when asked (``inactive_file``) counts as free, as it does
    for the whole machine.
    """
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = base / path.lstrip("/")
        # Inside a container its own cgroup is often mounted as the top one, whatever it is called.
        for level in (folder, *folder.parents):
            room = _room(level, *names)
            if room is not None:
                found.append(room)
            if level == base:
                break
    return found


def _room(folder: Path, limit_name: str, usage_name: str) -> int | None:
    limit, usage = _number(folder / limit_name), _number(folder / usage_name)
    if limit is None or usage is None or limit >= _UNLIMITED:
        return None
    return max(0, limit - usage + _inactive_file(folder))


def _inactive_file(folder: Path) -> int:
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
