"""Every merge equals PEFT's add_weighted_adapter, module by module."""

from __future__ import annotations

import os

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from openlora.adapters.loader import FileTensors
from openlora.adapters.merge_cache import materialize, recipe, trim
from openlora.adapters.merge_spec import METHODS, MergeSpec
from openlora.adapters.peft_format import read_layout
from openlora.errors import AdapterFailed, InvalidRequest
from tests.engine.tiny_model import make_adapters, make_tiny_model

PRUNING = [method for method in METHODS if any(w in method for w in ("ties", "dare", "prune"))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_tiny_model(root / "model")
    paths = make_adapters(root / "model", root / "adapters")
    base = LlamaForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    names = ["r8", "r4", "r16", "rs"]
    model = PeftModel.from_pretrained(base, paths["r8"], adapter_name="r8")
    for name in names[1:]:
        model.load_adapter(paths[name], adapter_name=name)
    return model, paths


def peft_deltas(model, mix, spec, monkeypatch):
    """Module name → ΔW of PEFT's merge, whose draws begin behind ``torch.manual_seed``."""
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    generator = torch.Generator().manual_seed(spec.seed)
    # PEFT draws from torch's global generator, and the weights it initialises before do so too.
    draw = torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda p: draw(p, generator=generator))
    model.add_weighted_adapter(
        [*mix],
        [*mix.values()],
        "merged",
        combination_type=spec.method,
        density=spec.density,
        majority_sign_method=spec.majority_sign,
    )
    monkeypatch.undo()
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("merged")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "merged" in module.lora_A
    }


def deltas(directory):
    layout = read_layout(directory)
    tensors = FileTensors(directory, layout)
    return {
        module.name: tensors.get(module.b) @ tensors.get(module.a) * module.scale
        for module in layout.modules
    }


def merged(tmp_path, paths, mix, spec):
    directory = recipe(tmp_path, [(paths[name], weight) for name, weight in mix.items()], spec)
    materialize(directory)
    return directory


def specs(method):
    if method not in PRUNING:
        return [MergeSpec(method)]
    made = [MergeSpec(method, density, seed=5) for density in (0.3, 1.0)]
    if "ties" in method:
        made.append(MergeSpec(method, 0.6, "frequency", seed=9))
    return made


@pytest.mark.parametrize("method", [method for method in METHODS if method != "cat"])
def test_each_method_equals_peft(tiny, tmp_path, method, monkeypatch):
    model, paths = tiny
    # Of one rank and other targets; with rsLoRA, which PEFT would scale twice, not in front.
    mix = {"r8": 0.7, "rs": -1.3}
    if method.endswith("svd"):
        mix = {"r8": 0.7, "r4": 1.5, "r16": -0.4, "rs": 0.2}
    for spec in specs(method):
        want = peft_deltas(model, mix, spec, monkeypatch)
        got = deltas(merged(tmp_path, paths, mix, spec))
        assert got.keys() == want.keys()
        for name, delta in want.items():
            torch.testing.assert_close(got[name], delta, atol=2e-5, rtol=1e-4)
            assert delta.abs().max() > 0.01


def test_the_seed_is_what_is_drawn_from(tiny, tmp_path):
    _, paths = tiny
    mix = {"r8": 1.0, "rs": 1.0}
    found = [merged(tmp_path, paths, mix, MergeSpec("dare_linear", 0.5, seed=s)) for s in (1, 2, 1)]
    assert found[0] == found[2] != found[1]
    name = "model.layers.0.self_attn.k_proj"
    assert not torch.equal(deltas(found[0])[name], deltas(found[1])[name])


def test_the_same_merge_is_made_once_and_named_by_content(tiny, tmp_path):
    _, paths = tiny
    spec = MergeSpec("svd")
    first = merged(tmp_path, paths, {"r8": 1.0, "r16": 0.5}, spec)
    made_at = (first / "adapter_model.safetensors").stat().st_mtime_ns
    assert merged(tmp_path, paths, {"r8": 1.0, "r16": 0.5}, spec) == first
    assert (first / "adapter_model.safetensors").stat().st_mtime_ns == made_at
    others = [
        merged(tmp_path, paths, {"r8": 1.0, "r16": 0.6}, spec),
        merged(tmp_path, paths, {"r16": 0.5, "r8": 1.0}, spec),
        merged(tmp_path, paths, {"r8": 1.0, "r16": 0.5}, MergeSpec("ties_svd", 0.5)),
    ]
    assert len({first, *others}) == 4
    assert sorted(path.name for path in first.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.json",
    ]


def test_merges_unused_for_longest_go_and_can_be_made_again(tiny, tmp_path):
    _, paths = tiny
    made = [merged(tmp_path, paths, {"r8": w, "rs": 1.0}, MergeSpec("linear")) for w in (1, 2, 3)]
    before = deltas(made[0])
    size = (made[0] / "adapter_model.safetensors").stat().st_size
    trim(tmp_path, 2 * size)
    assert all((path / "adapter_config.json").exists() for path in made)
    materialize(made[0])
    trim(tmp_path, 2 * size, kept_s=0)
    assert [(path / "adapter_config.json").exists() for path in made] == [True, False, True]
    trim(tmp_path, 0, kept_s=0)
    materialize(made[0])
    after = deltas(made[0])
    assert all(torch.equal(after[name], delta) for name, delta in before.items())


def test_recipes_that_nobody_asks_for_go_in_the_end(tmp_path):
    def written(weight: float):
        return recipe(tmp_path, [(tmp_path / "a", weight), (tmp_path / "b", 1.0)], MergeSpec("svd"))

    old, asked_again, new = map(written, (1.0, 2.0, 3.0))
    for path in (old, asked_again):
        os.utime(path, (0, 0))
    assert written(2.0) == asked_again
    trim(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([asked_again, new])
    assert written(1.0) == old
    assert (old / "recipe.json").exists()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "cat" and not m.endswith("svd")])
def test_other_ranks_are_refused_where_factors_are_merged(tiny, tmp_path, method):
    _, paths = tiny
    spec = specs(method)[0]
    with pytest.raises(AdapterFailed, match=r"needs adapters of one rank; these have 8, 16"):
        merged(tmp_path, paths, {"r8": 1.0, "r16": 1.0}, spec)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (MergeSpec("mean"), "merge method is 'mean'"),
        (MergeSpec("ties"), "density is None"),
        (MergeSpec("dare_ties", 1.5), "density is 1.5"),
        (MergeSpec("magnitude_prune", float("nan")), "density is nan"),
        (MergeSpec("ties", 0.5, "most"), "majority_sign is 'most'"),
    ],
)
def test_settings_that_there_are_not(spec, says):
    with pytest.raises(InvalidRequest, match=says):
        spec.check()
