"""The folder of one ``openlora up``: data of its embedded Redis server, logs of its processes.

It is named after the port and the model, so that a restart finds its adapters and unfinished
jobs again, and another model never meets them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from pathlib import Path

from openlora.errors import SetupError


class InstanceDir:
    """``path`` and an exclusive lock on it, held until the process ends, however it ends.

    Raises:
        SetupError: another process uses it, or it cannot be written.
    """

    def __init__(self, state_dir: Path, port: int, model: str) -> None:
        digest = hashlib.sha256(model.encode()).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(model).name)[:40]
        self.path = state_dir / f"{port}-{name}-{digest}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(
                f"another `openlora up` with this model and port {port} is running or stopping "
                f"(it holds {self.path}); stop it, or choose another --port"
            ) from error
        except OSError as error:
            raise SetupError(
                f"cannot write {self.path}: {error.strerror}; set XDG_STATE_HOME to a folder "
                "that can be written"
            ) from error

    @property
    def logs(self) -> Path:
        """Where the logs of its processes go."""
        return self.path / "logs"
