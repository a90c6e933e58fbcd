"""The hash of a directory's content is that of its bytes, in whatever pieces they are read."""

from __future__ import annotations

import hashlib

import pytest

from openlora.adapters import peft_format
from openlora.adapters.peft_format import inspect_adapter
from tests.adapters.peft_dirs import write_adapter


@pytest.mark.parametrize("chunk_bytes", [1, 7, 4096, peft_format._CHUNK_BYTES])
def test_the_hash_does_not_depend_on_the_pieces(tmp_path, monkeypatch, chunk_bytes):
    adapter = write_adapter(tmp_path / "a")
    digest = hashlib.sha256()
    for path in sorted(adapter.iterdir()):
        data = path.read_bytes()
        digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    monkeypatch.setattr(peft_format, "_CHUNK_BYTES", chunk_bytes)
    assert inspect_adapter(adapter).hash == digest.hexdigest()
