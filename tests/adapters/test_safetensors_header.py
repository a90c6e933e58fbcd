"""Headers that lie about their file."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from openlora.adapters.safetensors_header import MAX_HEADER_BYTES, TensorEntry, read_header
from openlora.errors import AdapterFailed


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_reads_what_safetensors_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}
    raw = save(tensors, metadata={"format": "pt"})
    path.write_bytes(raw)
    size = len(raw)
    assert read_header(path).tensors == {
        "a": TensorEntry("F32", (2, 3), path.name, size - 34, size - 10),
        "b": TensorEntry("BF16", (5,), path.name, size - 10, size),
    }


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"{", b"", "no JSON"),
        (b"[" * 200_000, b"", "no JSON"),
        (b"[]", b"", "no JSON object"),
        ({"a": 3}, b"", "described wrongly"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "described wrongly"),
        ({"a": entry(0, 8, dtype="Q4")}, bytes(8), "described wrongly"),
        ({"a": entry(0, 8, shape=(-2,))}, bytes(8), "described wrongly"),
        ({"a": entry(0, 8, shape=(True,))}, bytes(8), "described wrongly"),
        ({"a": entry(0, 4)}, bytes(4), "bytes do not match"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "overlap or leave gaps"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), "overlap or leave gaps"),
        ({"a": entry(0, 8)}, bytes(4), "holds 4 bytes of data; its header describes 8"),
        ({"a": entry(0, 8)}, bytes(9), "holds 9 bytes"),
    ],
)
def test_headers_that_lie(tmp_path, header, data, says):
    with pytest.raises(AdapterFailed, match=says):
        read_header(write(tmp_path / "x", header, data))


def test_lengths_that_lie(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"123")
    with pytest.raises(AdapterFailed, match="cut short"):
        read_header(path)
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterFailed, match="cut short"):
        read_header(path)
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(AdapterFailed, match="at most"):
        read_header(path)


@given(content=st.binary(max_size=200))
def test_any_bytes_give_tensors_or_adapter_failed(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with contextlib.suppress(AdapterFailed):
        read_header(path)


def test_equal_headers_are_parsed_once_and_others_apart(tmp_path):
    one, other = (
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
    )
    for name, tensors in (("p", one), ("q", one), ("r", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(save(tensors))
    first = read_header(tmp_path / "p/x")
    assert read_header(tmp_path / "q/x") is first
    assert read_header(tmp_path / "r/x").tensors["a"].shape == (3, 2)
    # The same header over fewer bytes is still a lie.
    cut = (tmp_path / "q/x").read_bytes()[:-4]
    (tmp_path / "q/x").write_bytes(cut)
    with pytest.raises(AdapterFailed, match="its header describes"):
        read_header(tmp_path / "q/x")
