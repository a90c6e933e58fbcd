"""Redis keys of batches. Those of one batch are in one slot."""

from __future__ import annotations

OPEN_KEY = "openlora:batches:open"
"""Set: IDs of batches that are not over."""


def batch_key(batch_id: str) -> str:
    """Hash: the fields of ``BatchState``."""
    return f"openlora:{{{batch_id}}}:batch"


def done_key(batch_id: str) -> str:
    """Bitmap: lines that have their result."""
    return f"openlora:{{{batch_id}}}:done"


def contents_key(batch_id: str) -> str:
    """Set: content hashes of the adapters that an open batch's lines name."""
    return f"openlora:{{{batch_id}}}:contents"


def progress_key(batch_id: str) -> str:
    """Hash: adapter ID → lines done."""
    return f"openlora:{{{batch_id}}}:adapters"


def errors_key(batch_id: str) -> str:
    """List: the first errors as JSON."""
    return f"openlora:{{{batch_id}}}:errors"


def tenant_key(tenant: str) -> str:
    """Sorted set: the tenant's batches (and some that are not known any more), by time made."""
    return f"openlora:batches:of:{tenant}"


def tenant_open_key(tenant: str) -> str:
    """Set: those that are not over."""
    return f"openlora:batches:open:{tenant}"
