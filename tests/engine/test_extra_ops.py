"""Which rows an operation puts right; what it computes there is compared in test_extras.py."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from openlora.adapters.extras import AdapterExtras, LinearExtra, TableExtra
from openlora.engine.extra_ops import ExtraRows, with_extras
from openlora.kernels.linear import Linear
from openlora.models.ops import GATE_UP, QKV

MODEL = SimpleNamespace(config=None, norm_names={})


class Doubling:
    """Operations whose results are easy to tell: everything is doubled."""

    def __init__(self):
        self.fused = 0

    def linear(self, linear, x):
        return linear(x) * 2

    def lora_linear(self, linear, x, layer, site):
        return linear(x) * 2

    def gated_linear(self, linear, x, layer, activation):
        self.fused += 1
        return linear(x).chunk(2, -1)[0]

    def silu_and_mul(self, gate_up):
        return gate_up.chunk(2, -1)[1]


def test_without_extras_nothing_is_wrapped():
    inner = Doubling()
    assert with_extras(inner, MODEL, [(3, None), (1, None)]) is inner


def test_neighbours_of_one_adapter_are_one_segment():
    one, two = AdapterExtras(), AdapterExtras()
    ops = with_extras(Doubling(), MODEL, [(2, None), (1, one), (3, one), (1, two), (1, None)])
    assert ops.segments == [ExtraRows(2, 6, one), ExtraRows(6, 7, two)]


def test_only_the_rows_of_the_adapter_change_and_only_in_its_layer():
    linear = Linear(torch.randn(5, 4), torch.randn(5))
    gain, bias = torch.randn(2, 5)
    extras = AdapterExtras(linears={(1, QKV): LinearExtra(gain, bias)})
    x = torch.randn(4, 4)
    ops = with_extras(Doubling(), MODEL, [(1, None), (2, extras), (1, None)])
    torch.testing.assert_close(ops.lora_linear(linear, x, 0, QKV), linear(x) * 2)
    want = linear(x) * 2
    want[1:3] += (linear(x[1:3]) - linear.bias) * gain + bias
    torch.testing.assert_close(ops.lora_linear(linear, x, 1, QKV), want)


def test_gate_and_up_stay_fused_where_no_row_needs_otherwise():
    linear = Linear(torch.randn(6, 4))
    extras = AdapterExtras(linears={(1, GATE_UP): LinearExtra(None, torch.ones(6))})
    inner = Doubling()
    ops = with_extras(inner, MODEL, [(2, extras)])
    x = torch.randn(2, 4)
    ops.gated_linear(linear, x, 0, "silu")
    assert inner.fused == 1
    out = ops.gated_linear(linear, x, 1, "silu")
    assert inner.fused == 1
    torch.testing.assert_close(out, (linear(x) * 2 + 1).chunk(2, -1)[1])


def test_a_head_of_its_own():
    linear = Linear(torch.randn(7, 4))
    head = TableExtra(torch.randn(7, 4), torch.randn(4, 2), torch.randn(2, 7))
    ops = with_extras(Doubling(), MODEL, [(1, None), (1, AdapterExtras(head=head))])
    x = torch.randn(2, 4)
    want = linear(x) * 2
    want[1] = x[1] @ head.weight.T + x[1] @ head.a @ head.b
    torch.testing.assert_close(ops.linear(linear, x), want)
