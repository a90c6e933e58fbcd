"""Patterns out of adapter files: common ones pass, slow ones do not."""

from __future__ import annotations

import time

import pytest

from openlora.adapters.patterns import compile_pattern
from openlora.errors import AdapterFailed

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|o_proj)))"
)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r".*\.(q_proj|v_proj)$",
        r"model\.layers\.(1[0-9]|2\d)\..*_proj",
        r"layers\.[0-9]{1,2}\.mlp\.(?:up|down)_proj",
        r"[(*+]x",
        r"\(\)*",
        UNSLOTH,
    ],
)
def test_common_patterns_pass_and_are_quick(pattern):
    compiled = compile_pattern(pattern, "target_modules")
    start = time.perf_counter()
    for layer in range(40):
        compiled.fullmatch(f"model.layers.{layer}.self_attn.unknown_linear_name_of_some_length")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a*)*b",
        "(a|a)*b",
        "(.*a){20}",
        "((a+)b?)*c",
        "(?:(?:a|b)x)+",
        "((a+)?)*c",
        ".*a" * 7,
    ],
)
def test_patterns_that_could_take_for_ever_are_refused(pattern):
    with pytest.raises(AdapterFailed, match=r"rank_pattern: pattern .* very long"):
        compile_pattern(pattern, "rank_pattern")


@pytest.mark.parametrize("pattern", ["(", "[a", "a)", "*a", "(?P<x>a)(?P<x>b)", "a{5,2}"])
def test_what_is_no_pattern(pattern):
    with pytest.raises(AdapterFailed, match="no regular expression"):
        compile_pattern(pattern, "f")


def test_long_patterns_are_refused():
    with pytest.raises(AdapterFailed, match="1001 characters"):
        compile_pattern("a" * 1001, "f")
