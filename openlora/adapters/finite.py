"""Whether weights on disk are numbers, told from the bits of their exponents. Stdlib only.

The gateway checks adapters and has no torch: a value is NaN or infinite where all bits of its
exponent are set. Those lie in the value's last byte, and for F32 and BF16 one more is the top bit
of the byte before it (values are little-endian). Slices and ``bytes.translate`` look at a megabyte
in half a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from openlora.adapters.safetensors_header import ITEM_BYTES, TensorEntry
from openlora.errors import AdapterFailed

_CHUNK_BYTES = 1 << 20

_NOT_FULL_F16 = bytes(byte for byte in range(256) if byte & 0x7C != 0x7C)
_IS_FULL = bytes(byte & 0x7F == 0x7F for byte in range(256))
_TOP_BIT = bytes(byte >> 7 for byte in range(256))


def check_finite(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Read all tensors of one file. ``tensors``: name → entry of that file.

    Raises:
        AdapterFailed: names the first tensor that holds NaN or an infinity, or the file where it
            is shorter than its header says.
    """
    in_order = sorted(tensors.items(), key=lambda item: item[1].start)
    with path.open("rb") as file:
        for name, entry in in_order:
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                data = file.read(min(left, _CHUNK_BYTES))
                if len(data) < min(left, _CHUNK_BYTES):
                    raise AdapterFailed(f"{path.name} is cut short")
                if not is_finite(data, entry.dtype):
                    raise AdapterFailed(
                        f"tensor {name[:200]} holds values that are not finite (NaN or infinity)"
                    )
                left -= len(data)


def is_finite(data: bytes, dtype: str) -> bool:
    """Whether no value of ``data`` is NaN or infinite. ``dtype``: "F32", "F16" or "BF16"."""
    size = ITEM_BYTES[dtype]
    last = data[size - 1 :: size]
    if dtype == "F16":
        return not last.translate(None, _NOT_FULL_F16)
    if b"\x7f" not in last and b"\xff" not in last:
        return True
    # Values of 1.7e38 and more are numbers still where the exponent's lowest bit is 0.
    before = data[size - 2 :: size]
    full = int.from_bytes(last.translate(_IS_FULL), "little")
    return not full & int.from_bytes(before.translate(_TOP_BIT), "little")
