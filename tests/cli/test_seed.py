"""Adapters that a system starts with: good ones registered, bad ones left out with the reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from openlora.adapters.store import AdapterStore
from openlora.commands.seed import adapter_dirs, hidden_size_of, register_dirs
from openlora.errors import SetupError
from openlora.joblog import redis_client
from openlora.registry import AdapterRegistry

pytestmark = pytest.mark.services

HIDDEN = 32


def write_adapter(directory, hidden=HIDDEN):
    directory.mkdir(parents=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(4, hidden),
        f"{prefix}.lora_B.weight": torch.ones(hidden, 4),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def registry(redis_url):
    return AdapterRegistry(redis_client(redis_url))


def test_good_ones_are_registered_and_bad_ones_named(tmp_path, registry):
    folder = tmp_path / "adapters"
    write_adapter(folder / "poet")
    write_adapter(folder / "wide", hidden=2 * HIDDEN)
    write_adapter(folder / ".hidden")
    write_adapter(folder / "empty")
    (folder / "empty/adapter_model.safetensors").write_bytes(b"")
    (folder / "notes").mkdir()

    dirs = adapter_dirs(folder)
    assert [path.name for path in dirs] == [".hidden", "empty", "poet", "wide"]
    skipped = register_dirs(dirs, AdapterStore(tmp_path / "store"), registry, {HIDDEN})

    assert [record.id for record in registry.list()] == ["poet"]
    reasons = {bad.name: bad.reason for bad in skipped}
    assert set(reasons) == {".hidden", "empty", "wide"}
    assert "hidden size 64" in reasons["wide"]
    assert all("\n" not in reason for reason in reasons.values())


def test_the_same_content_again_is_no_new_version(tmp_path, registry):
    write_adapter(tmp_path / "adapters/poet")
    store = AdapterStore(tmp_path / "store")
    for _ in range(2):
        assert not register_dirs([tmp_path / "adapters/poet"], store, registry, set())
    assert registry.list()[0].version == 1


def test_a_store_that_cannot_be_written_ends_the_start(tmp_path, registry):
    write_adapter(tmp_path / "adapters/poet")
    (tmp_path / "store").write_bytes(b"a file")
    with pytest.raises(SetupError, match="adapter poet cannot be copied into the adapter store"):
        register_dirs(
            [tmp_path / "adapters/poet"], AdapterStore(tmp_path / "store"), registry, set()
        )


def test_the_hidden_size_comes_from_the_model_s_configuration(tmp_path):
    assert hidden_size_of("owner/name") == set()
    (tmp_path / "config.json").write_text('{"hidden_size": 576}')
    assert hidden_size_of(str(tmp_path)) == {576}
    (tmp_path / "config.json").write_text("[]")
    assert hidden_size_of(str(tmp_path)) == set()
