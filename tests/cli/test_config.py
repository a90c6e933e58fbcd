"""Settings of the command line: flags before environment, and one clear line for a bad value."""

from __future__ import annotations

import argparse

import pytest

from openlora.commands.config import (
    ENVIRONMENT,
    ClientConfig,
    add_client_arguments,
    add_up_arguments,
    client_config,
    up_config,
)
from openlora.errors import SetupError


def up(*words, **environ):
    parser = argparse.ArgumentParser()
    add_up_arguments(parser)
    return up_config(parser.parse_args(words), environ)


def client(*words, **environ):
    parser = argparse.ArgumentParser()
    add_client_arguments(parser)
    return client_config(parser.parse_args(words), environ)


def test_defaults_are_the_demo_on_port_8000_with_embedded_servers():
    config = up()
    assert (config.model, config.adapters, config.kafka, config.redis) == (None, None, None, None)
    assert (config.host, config.port, config.workers) == ("127.0.0.1", 8000, 1)
    assert (config.device, config.dtype) == ("auto", "auto")
    assert (config.deterministic, up("--deterministic").deterministic) == (False, True)


def test_a_url_in_the_environment_is_the_adapter_store_and_no_folder():
    assert up(OPENLORA_ADAPTERS="s3://bucket/adapters").adapters is None
    with pytest.raises(SetupError, match="must be an existing folder"):
        up("--adapters", "s3://bucket/adapters")


def test_flags_go_before_the_environment():
    config = up("--port", "9000", OPENLORA_PORT="9001", OPENLORA_WORKERS="3")
    assert (config.port, config.workers) == (9000, 3)


def test_an_empty_variable_is_no_setting():
    assert up(OPENLORA_KAFKA="", OPENLORA_PORT="").port == 8000


def test_folders_follow_the_xdg_variables(tmp_path):
    config = up(XDG_CACHE_HOME=str(tmp_path / "c"), XDG_STATE_HOME=str(tmp_path / "s"))
    assert config.cache_dir == tmp_path / "c/openlora"
    assert config.state_dir == tmp_path / "s/openlora"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "0"], "port is '0'; it must be a whole number from 1 to 65535"),
        (["--port", "http"], "port is 'http'"),
        (["--workers", "0"], "workers is '0'; it must be a whole number from 1"),
        (["--device", "tpu"], "device is 'tpu'; it must be one of auto, cpu, cuda"),
        (["--dtype", "int4"], "dtype is 'int4'; it must be one of auto, float32"),
        (["--adapters", "/no/such"], "adapters is '/no/such'; it must be an existing folder"),
        (["--model", "./no-such"], "model is './no-such'; there is no such file or folder"),
        (["--kafka", "localhost"], "kafka is 'localhost'; it must be host:port"),
        (["--redis", "localhost:6379"], "redis must be a URL"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(words, message):
    with pytest.raises(SetupError) as raised:
        up(*words)
    assert message in raised.value.message


def test_a_redis_password_is_never_shown():
    with pytest.raises(SetupError) as raised:
        up("--redis", "http://:secret@redis:6379")
    assert "secret" not in raised.value.message
    assert "secret" not in repr(up("--redis", "redis://:secret@redis:6379"))
    assert "secret" not in repr(client(OPENLORA_API_KEY="secret"))


def test_a_hub_id_passes_and_a_path_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    assert up("--model", "owner/name").model == "owner/name"
    assert up("--model", "llama").model == str(tmp_path / "llama")


def test_the_client_finds_the_system_by_flag_variable_default():
    assert client().url == "http://127.0.0.1:8000"
    assert client(OPENLORA_URL="http://a:1/").url == "http://a:1"
    assert client("--url", "http://b:2", OPENLORA_URL="http://a:1").url == "http://b:2"
    with pytest.raises(SetupError, match="the URL is 'b:2'"):
        client("--url", "b:2")


def test_the_client_sends_its_key_and_keeps_the_scheme():
    config = client(OPENLORA_API_KEY="k", OPENLORA_URL="https://a")
    assert config.headers == {"Authorization": "Bearer k"}
    assert config.websocket_url == "wss://a/v1/ws"
    assert ClientConfig("http://a:1", None).websocket_url == "ws://a:1/v1/ws"
    assert ClientConfig("http://a:1", None).headers == {}


def test_every_setting_of_up_has_its_variable():
    parser = argparse.ArgumentParser()
    add_up_arguments(parser)
    flags = {action.dest for action in parser._actions} - {"help", "verbose"}
    assert {f"OPENLORA_{flag.upper()}" for flag in flags} <= set(ENVIRONMENT)
