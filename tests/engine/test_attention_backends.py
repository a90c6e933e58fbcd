"""Which attention is chosen, and what is said of a library that is not."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch

from openlora.engine import attention_backends
from openlora.engine.attention_backends import (
    PREFERRED,
    Order,
    attention_for,
    choose_attention,
)
from openlora.engine.attention_libraries import LIBRARIES, AttentionNeeds
from openlora.engine.config import ATTENTION_BACKENDS, EngineConfig, block_size_for
from openlora.errors import SetupError
from openlora.kernels.flash_attention import FlashAttention2, FlashAttention4
from openlora.models.dummy import DUMMY_CONFIGS
from tests.engine.flash_libraries import install

HOPPER = AttentionNeeds((9, 0), torch.bfloat16, head_dim=128, block_size=16)
FLASH_FIRST = Order(
    prefill=("flash-attn-4", "flash-attn-2", "triton"), decode=("triton", "flash-attn-4")
)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder of packages, the only one with flash-attn in it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    for library in LIBRARIES:
        if library.version() is not None:
            pytest.skip(f"{library.distribution} is installed here")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def prefers_flash(monkeypatch):
    monkeypatch.setattr(attention_backends, "PREFERRED", {(9, 128): FLASH_FIRST})


def test_every_setting_is_triton_auto_or_a_library():
    assert ("auto", "triton", *(library.name for library in LIBRARIES)) == ATTENTION_BACKENDS


@pytest.mark.parametrize("setting", ["auto", "triton"])
def test_triton_where_nothing_is_installed(site, setting):
    choice = choose_attention(setting, HOPPER)
    assert (choice.prefill, choice.decode, choice.remarks) == (None, None, ())
    assert choice.name == "triton"


def test_a_library_by_name_computes_both_phases(site):
    install(site, "flash-attn-4", "4.0.0b36")
    choice = choose_attention("flash-attn-4", HOPPER)
    assert isinstance(choice.prefill, FlashAttention4)
    assert choice.prefill is choice.decode
    assert choice.name == "flash-attn-4"


def test_flash_attn_2_by_name_has_its_own_block_size(site):
    install(site, "flash-attn", "2.8.3")
    needs = replace(HOPPER, block_size=block_size_for("flash-attn-2"))
    assert isinstance(choose_attention("flash-attn-2", needs).decode, FlashAttention2)
    assert block_size_for("auto") == block_size_for("triton") == HOPPER.block_size


def test_auto_takes_what_was_measured_to_be_faster_in_each_phase(site, prefers_flash):
    install(site, "flash-attn-4", "4.0.0b36")
    choice = choose_attention("auto", HOPPER)
    assert choice.name == "prefill flash-attn-4, decode triton"
    assert choice.remarks == ()


def test_auto_on_hopper_takes_flash_attn_4_for_long_prompts(site):
    install(site, "flash-attn-4", "4.0.0b36")
    choice = choose_attention("auto", HOPPER)
    assert choice.name == "prefill flash-attn-4 for long prompts, triton otherwise; decode triton"
    assert choice.decode is None
    assert 64 * 128 * 128 < choice.library_from < 8192 * 8192


@pytest.mark.parametrize(
    "unmeasured", [{"capability": (10, 0)}, {"head_dim": 64}, {"soft_cap": True}]
)
def test_auto_keeps_to_triton_where_nothing_was_measured_and_says_so(
    site, prefers_flash, unmeasured
):
    install(site, "flash-attn-4", "4.0.0b36")
    needs = replace(HOPPER, **unmeasured)
    choice = choose_attention("auto", needs)
    assert choice.name == "triton"
    (remark,) = choice.remarks
    assert "flash-attn-4 4.0.0b36 found, not used" in remark
    major, minor = needs.capability
    assert f"not measured to be faster on compute {major}.{minor} for such a model" in remark
    assert "flash_attn" not in sys.modules  # what is not used is not imported


def test_auto_passes_over_what_cannot_be_used_and_says_why(site, prefers_flash):
    install(site, "flash-attn", "2.8.3")
    choice = choose_attention("auto", HOPPER)
    assert choice.name == "triton"
    assert choice.remarks == (
        "flash-attn-2 2.8.3 found, not used: its paged cache needs blocks of 256, and block_size "
        "is 16; set block_size to 256",
    )


def test_auto_passes_over_a_broken_install_in_one_line(site, prefers_flash):
    body = "raise OSError('undefined symbol: _ZN3c10\\nand a long dump')\n"
    install(site, "flash-attn-4", "4.0.0b36", body)
    choice = choose_attention("auto", HOPPER)
    assert choice.name == "triton"
    (remark,) = choice.remarks
    assert "does not import (undefined symbol: _ZN3c10)" in remark
    assert "\n" not in remark


def test_a_broken_install_that_was_asked_for_ends_the_start(site):
    install(site, "flash-attn-4", "4.0.0b36", "import no_such_dsl\n")
    with pytest.raises(SetupError, match=r"No module named 'no_such_dsl'.*reinstall flash-attn-4"):
        choose_attention("flash-attn-4", HOPPER)


def test_another_version_without_the_call_is_broken(site):
    install(site, "flash-attn-4", "9.0", "")
    with pytest.raises(SetupError, match="flash_attn_varlen_func"):
        choose_attention("flash-attn-4", HOPPER)


@pytest.mark.parametrize("setting", ["flash-attn-4", "flash-attn-2"])
def test_a_library_that_is_not_there_is_named_with_what_to_do(site, setting):
    with pytest.raises(SetupError, match=r"attention_backend is .* not installed.*pip install"):
        choose_attention(setting, HOPPER)


@pytest.mark.parametrize(
    ("distribution", "version", "needs", "message"),
    [
        ("flash-attn-4", "4.0", {"block_size": 64}, "block_size is 64; set block_size to 16 or 32"),
        ("flash-attn-4", "4.0", {"capability": (8, 0)}, "needs compute capability 9 or 10"),
        ("flash-attn-4", "4.0", {"capability": (12, 0)}, "this GPU has 12.0"),
        ("flash-attn-4", "4.0", {"head_dim": 24}, "heads of 16, 32, … 256.* have 24"),
        (
            "flash-attn-4",
            "4.0",
            {"head_dim": 256, "capability": (10, 0)},
            "heads of 16, 32, … 128.* have 256",
        ),
        ("flash-attn-4", "4.0", {"dtype": torch.float32}, "not in float32; set dtype"),
        ("flash-attn", "2.8.3", {}, "blocks of 256, and block_size is 16"),
        ("flash-attn", "2.8.3", {"block_size": 256, "capability": (7, 5)}, "this GPU has 7.5"),
        ("flash-attn", "2.8.3", {"block_size": 256, "head_dim": 260}, "model's have 260"),
        ("flash-attn", "2.8.3", {"block_size": 256, "dtype": torch.float32}, "not in float32"),
        ("flash-attn", "2.5.9", {"block_size": 256, "soft_cap": True}, "soft caps need 2.6"),
    ],
)
def test_needs_that_a_library_does_not_meet(site, distribution, version, needs, message):
    install(site, distribution, version)
    setting = "flash-attn-4" if distribution == "flash-attn-4" else "flash-attn-2"
    with pytest.raises(SetupError, match=message) as failed:
        choose_attention(setting, replace(HOPPER, **needs))
    assert "set attention_backend to 'auto'" in failed.value.message


def test_orders_name_backends_that_exist():
    for order in PREFERRED.values():
        for names in (order.prefill, order.decode):
            assert names[-1] == "triton"
            assert set(names) <= set(ATTENTION_BACKENDS) - {"auto"}


@pytest.mark.parametrize("setting", ["auto", "triton"])
def test_a_deterministic_engine_keeps_to_its_own_kernels(setting):
    config = EngineConfig("m", deterministic=True, attention_backend=setting)
    assert attention_for(config, DUMMY_CONFIGS["1b"], torch.bfloat16).name == "triton"
