"""Flags win over the environment; bad values are one clear line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from openlora.errors import SetupError
from workers.config import ENVIRONMENT, add_arguments, config_from


def parse(*argv, **environ):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return config_from(parser.parse_args(argv), environ)


def test_flags_win_over_environment():
    config = parse(
        "--model", "m", "--kafka", "a:1", OPENLORA_KAFKA="b:2", OPENLORA_REDIS="redis://r"
    )
    assert (config.model, config.kafka, config.redis) == ("m", "a:1", "redis://r")
    assert config.device == "auto"
    assert config.worker_id


def test_every_variable_is_read():
    values = {
        "OPENLORA_MODEL": "m",
        "OPENLORA_KAFKA": "k:1",
        "OPENLORA_REDIS": "redis://r",
        "OPENLORA_STORE": "/s",
        "OPENLORA_ADAPTER_CACHE": "/c",
        "OPENLORA_ADAPTER_CACHE_BYTES": "1000",
        "OPENLORA_DEVICE": "cpu",
        "OPENLORA_DTYPE": "float16",
        "OPENLORA_ATTENTION_BACKEND": "flash-attn-4",
        "OPENLORA_ENGINE": "dummy",
        "OPENLORA_DETERMINISTIC": "1",
        "OPENLORA_MAX_GRAPH_TOKENS": "512",
        "OPENLORA_DRAIN_TIMEOUT_S": "2.5",
        "OPENLORA_KEEP_ENDED_S": "60",
        "OPENLORA_QUARANTINE_S": "90",
        "OPENLORA_LOG_LEVEL": "info",
    }
    assert set(values) == set(ENVIRONMENT)
    config = parse(**values)
    assert config.store == Path("/s")
    assert (config.adapter_cache, config.adapter_cache_bytes) == (Path("/c"), 1000)
    assert (config.device, config.dtype, config.log_level) == ("cpu", "float16", "info")
    assert (config.engine, config.attention_backend) == ("dummy", "flash-attn-4")
    assert config.deterministic
    assert config.max_graph_tokens == 512
    seconds = (config.drain_timeout_s, config.keep_ended_s, config.quarantine_s)
    assert seconds == (2.5, 60, 90)


def test_deterministic_is_a_switch():
    assert parse("--model", "m", "--deterministic", OPENLORA_DETERMINISTIC="0").deterministic
    for value in ("", "0"):
        assert not parse("--model", "m", OPENLORA_DETERMINISTIC=value).deterministic
    with pytest.raises(SetupError, match="OPENLORA_DETERMINISTIC is 'yes'; it must be 1 or 0"):
        parse("--model", "m", OPENLORA_DETERMINISTIC="yes")


def test_a_redis_password_is_never_shown():
    assert "secret" not in repr(parse("--model", "m", "--redis", "redis://:secret@r:6379"))


def test_the_store_is_in_the_cache_directory():
    assert parse("--model", "m", XDG_CACHE_HOME="/c").store == Path("/c/openlora/adapters")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no model given"),
        (["--model", "m", "--keep-ended-s", "29"], "keep-ended-s is '29'.*30 or more"),
        (["--model", "m", "--quarantine-s", "0"], "quarantine-s is '0'.*1 or more"),
        (["--model", "m", "--max-graph-tokens", "-1"], "max-graph-tokens is '-1'.*0 or more"),
        (["--model", "m", "--device", "tpu"], "device is 'tpu'"),
        (["--model", "m", "--dtype", "int8"], "dtype is 'int8'"),
        (["--model", "m", "--engine", "scripted:fast"], "engine is 'scripted:fast'"),
        (["--model", "m", "--engine", "model:3"], "engine is 'model:3'"),
        (["--model", "m", "--engine", "dummy:3"], "engine is 'dummy:3'"),
        (["--model", "m", "--batch-budget", "0"], "batch-budget is 0"),
        (["--model", "m", "--drain-timeout-s", "soon"], "drain-timeout-s is 'soon'"),
        (["--model", "m", "--log-level", "loud"], "log-level is 'loud'"),
    ],
)
def test_bad_values_are_named(argv, message):
    with pytest.raises(SetupError, match=message):
        parse(*argv)
