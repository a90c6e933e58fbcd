"""What a request may hold, whichever door it comes through: a client's frame or a batch's line."""

from __future__ import annotations

import msgspec

MAX_ADAPTERS = 8
MAX_MESSAGES = 1024
MAX_WEIGHT = 100.0
ROLES = ("system", "developer", "user", "assistant", "tool")


class AdapterChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter by ID, or by ``id@version``, as it is named in a request."""

    id: str
    weight: float = 1.0
