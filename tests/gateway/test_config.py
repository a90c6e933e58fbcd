"""Settings: flags before environment before defaults; bad values are clear."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from gateway.config import ENVIRONMENT, GatewayConfig, add_arguments, config_from
from openlora.errors import SetupError


def config(*flags: str, **environ: str) -> GatewayConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return config_from(parser.parse_args(flags), environ)


def test_flags_come_before_the_environment_and_that_before_the_default() -> None:
    assert config().port == 8000
    assert config(OPENLORA_PORT="81").port == 81
    assert config("--port", "82", OPENLORA_PORT="81").port == 82
    assert config(OPENLORA_PORT="").port == 8000


def test_every_variable_is_read(tmp_path: Path) -> None:
    key_file = tmp_path / "keys.json"
    key_file.write_text(json.dumps([{"sha256": "0" * 64, "tenant": "acme"}]))
    values = {
        "OPENLORA_HOST": "0.0.0.0",
        "OPENLORA_PORT": "0",
        "OPENLORA_KAFKA": "a:1,b:2",
        "OPENLORA_REDIS": "rediss://h:1/2",
        "OPENLORA_PARTITIONS": "7",
        "OPENLORA_API_KEYS": "t:k",
        "OPENLORA_API_KEYS_FILE": str(key_file),
        "OPENLORA_ORIGINS": "https://Chat.example, http://localhost:3000",
        "OPENLORA_STORE": "/s",
        "OPENLORA_ADAPTER_CACHE": "/c",
        "OPENLORA_ADAPTER_SOURCES": "hf://acme/,s3://acme/loras/",
        "OPENLORA_REMOTE_ADAPTERS": "hf://acme/",
        "OPENLORA_DISCONNECT_GRACE_S": "2.5",
        "OPENLORA_DRAIN_TIMEOUT_S": "0",
        "OPENLORA_BATCHES": "/b",
        "OPENLORA_MAX_BATCHES": "3",
        "OPENLORA_MAX_TENANT_JOBS": "5",
        "OPENLORA_MAX_ADAPTER_JOBS": "4",
        "OPENLORA_MAX_WAIT_S": "9.5",
        "OPENLORA_LOG_LEVEL": "debug",
    }
    assert set(values) == set(ENVIRONMENT)
    made, default = config(**values), GatewayConfig()
    for name in GatewayConfig.__slots__:
        assert getattr(made, name) != getattr(default, name), name


def test_the_store_is_in_the_users_cache() -> None:
    assert config(XDG_CACHE_HOME="/c").store == Path("/c/openlora/adapters")
    assert config("--store", "~/x").store == Path.home() / "x"
    assert config(OPENLORA_ADAPTERS="s3://a/b").store == "s3://a/b"
    assert config(OPENLORA_ADAPTERS="/watched", XDG_CACHE_HOME="/c").store != Path("/watched")


def test_the_redis_password_is_not_shown() -> None:
    assert "hunter2" not in repr(config(OPENLORA_REDIS="redis://:hunter2@h:1/0"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OPENLORA_PORT", "http"),
        ("OPENLORA_PORT", "70000"),
        ("OPENLORA_PORT", "-1"),
        ("OPENLORA_PARTITIONS", "0"),
        ("OPENLORA_ADAPTER_SOURCES", "hf://acme"),
        ("OPENLORA_ADAPTER_SOURCES", "/loras/"),
        ("OPENLORA_ORIGINS", "chat.example"),
        ("OPENLORA_ORIGINS", "https://*.example"),
        ("OPENLORA_KAFKA", "broker"),
        ("OPENLORA_KAFKA", "a:1,,"),
        ("OPENLORA_DISCONNECT_GRACE_S", "soon"),
        ("OPENLORA_DISCONNECT_GRACE_S", "nan"),
        ("OPENLORA_DRAIN_TIMEOUT_S", "-1"),
        ("OPENLORA_LOG_LEVEL", "loud"),
    ],
)
def test_a_bad_value_is_named(variable: str, value: str) -> None:
    with pytest.raises(SetupError) as caught:
        config(**{variable: value})
    assert variable in caught.value.message
    assert repr(value) in caught.value.message


def test_a_bad_redis_url_is_named_without_its_value() -> None:
    with pytest.raises(SetupError) as caught:
        config(OPENLORA_REDIS="http://:hunter2@h")
    assert "OPENLORA_REDIS" in caught.value.message
    assert "hunter2" not in caught.value.message


def test_a_bad_flag_is_named_as_a_flag() -> None:
    with pytest.raises(SetupError, match="--port is 'x'"):
        config("--port", "x")
