"""NaN and infinities are found by their bits, and nothing else is taken for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from openlora.adapters.finite import check_finite, is_finite
from openlora.adapters.safetensors_header import read_header
from openlora.errors import AdapterFailed

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {"F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}


def bytes_of(tensor):
    return bytes(tensor.contiguous().view(torch.uint8).tolist())


@pytest.mark.parametrize("name", DTYPES)
@given(data=st.data())
def test_it_agrees_with_torch_on_any_bits(name, data):
    low, high = (-(2**31), 2**31 - 1) if name == "F32" else (-(2**15), 2**15 - 1)
    bits = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=20))
    tensor = torch.tensor(bits, dtype=BITS[name]).view(DTYPES[name])
    assert is_finite(bytes_of(tensor), name) == bool(tensor.isfinite().all())


@pytest.mark.parametrize("name", DTYPES)
def test_every_half_precision_value_and_the_edges_of_fp32(name):
    if name == "F32":
        edges = [3.4028234e38, -3.4028234e38, 1.7014118e38, 1e-45, 0.0, -0.0]
        assert is_finite(bytes_of(torch.tensor(edges)), name)
        for bad in (float("nan"), float("inf"), float("-inf")):
            assert not is_finite(bytes_of(torch.tensor([*edges, bad])), name)
        return
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[name])
    assert is_finite(bytes_of(every[every.isfinite()]), name)
    for bad in every[~every.isfinite()][::37]:
        assert not is_finite(bytes_of(bad.view(1)), name)


@pytest.mark.parametrize("where", [0, 12345, -1])
def test_the_tensor_is_named(tmp_path, where):
    tensors = {f"t{i}": torch.ones(700_000, dtype=torch.bfloat16) for i in range(3)}
    tensors["t1"][where] = float("nan")
    save_file(tensors, tmp_path / "x")
    with pytest.raises(AdapterFailed, match=r"tensor t1 holds values that are not finite"):
        check_finite(tmp_path / "x", read_header(tmp_path / "x").tensors)


def test_a_file_that_lost_its_end(tmp_path):
    save_file({"t": torch.ones(100)}, tmp_path / "x")
    entries = read_header(tmp_path / "x").tensors
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-4])
    with pytest.raises(AdapterFailed, match="cut short"):
        check_finite(tmp_path / "x", entries)
