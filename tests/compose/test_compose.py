"""compose.yml and docker/ against the Compose schema and against the code they start."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gateway import config as gateway_config
from openlora.cli import build_parser
from openlora.commands import config as command_config
from producer.bulk import config as producer_config
from workers import config as worker_config

ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "compose.yml"
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::-([^}]*))?\}")
CONFIGS = {"gateway": gateway_config, "worker": worker_config, "producer": producer_config}
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def interpolated(text: str) -> str:
    """``text`` as Compose reads it in an empty environment."""
    return VARIABLE.sub(lambda match: match[2] or "", text)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(interpolated(COMPOSE_FILE.read_text(encoding="utf-8")))


def own_services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The services that run this project's command."""
    return {name: s for name, s in compose["services"].items() if "build" in s}


def test_follows_the_compose_schema(compose):
    schema_file = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    schema = json.loads(schema_file.read_text(encoding="utf-8"))
    jsonschema.validate(compose, schema)


def test_every_service_has_a_health_check_and_keeps_running(compose):
    for name, service in compose["services"].items():
        assert service["healthcheck"]["test"], name
        assert service["restart"] == "unless-stopped", name


def test_state_lies_on_declared_volumes(compose):
    mounted = {
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service["volumes"]
        if not volume.startswith(".")
    }
    assert mounted == set(compose["volumes"])


def test_gateway_and_workers_share_the_adapter_store(compose):
    for name, service in own_services(compose).items():
        if name != "producer":
            assert "store:/data/store" in service["volumes"]
            assert service["environment"]["OPENLORA_STORE"] == "/data/store"


def test_gateway_and_producer_share_the_files_of_batches(compose):
    for name in ("gateway", "producer"):
        service = compose["services"][name]
        assert "batches:/data/batches" in service["volumes"]
        assert service["environment"]["OPENLORA_BATCHES"] == "/data/batches"


def test_every_command_parses_and_every_setting_is_valid(compose):
    services = own_services(compose)
    assert set(services) == {"gateway", "producer", "worker-cpu", "worker-nvidia"}
    for service in services.values():
        command = service["command"]
        environ = {name: str(value) for name, value in service["environment"].items()}
        args = build_parser(command[0]).parse_args(command)
        config = CONFIGS[command[0]].config_from(args, environ)
        assert config.kafka == "kafka:9092"
        assert config.redis == "redis://redis:6379/0"


def test_every_variable_is_one_the_code_reads(compose):
    known = (
        set(gateway_config.ENVIRONMENT)
        | set(worker_config.ENVIRONMENT)
        | set(command_config.ENVIRONMENT)
    )
    used = set(re.findall(r"\bOPENLORA_[A-Z_]+", COMPOSE_FILE.read_text(encoding="utf-8")))
    assert used <= known
    for service in own_services(compose).values():
        read = set(CONFIGS[service["command"][0]].ENVIRONMENT)
        given = {name for name in service["environment"] if name.startswith("OPENLORA_")}
        assert given <= read


def test_a_stop_leaves_time_to_drain(compose):
    for service in own_services(compose).values():
        grace_s = int(service["stop_grace_period"].removesuffix("s"))
        # a producer ends between two steps, which are short
        assert grace_s > float(service["environment"].get("OPENLORA_DRAIN_TIMEOUT_S", 10))


def test_every_dockerfile_is_used(compose):
    used = {service["build"]["dockerfile"] for service in own_services(compose).values()}
    assert used == {str(path.relative_to(ROOT)) for path in DOCKERFILES}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_a_dockerfile_copies_exists_and_is_not_ignored(dockerfile):
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignore[0] == "*"
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copies = re.findall(r"^COPY (.+) \S+$", dockerfile.read_text(encoding="utf-8"), re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert source in kept


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_requirements_that_a_dockerfile_reads_exist(dockerfile):
    """The Python one-liner that lists the packages runs here as it would in the image."""
    program = re.search(r'python -c "([^"]+)"', dockerfile.read_text(encoding="utf-8"))
    assert program is not None
    listed = subprocess.run(
        [sys.executable, "-c", program[1]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    assert any(line.startswith("msgspec") for line in listed)
    assert any(line.startswith("torch") for line in listed) == ("worker" in dockerfile.name)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_default_command_of_an_image_parses(dockerfile):
    command = re.findall(r"^CMD (\[.*\])$", dockerfile.read_text(encoding="utf-8"), re.MULTILINE)
    args = build_parser(json.loads(command[0])[0]).parse_args(json.loads(command[0]))
    assert isinstance(args, argparse.Namespace)


@pytest.mark.services
def test_worker_health_is_bad_without_a_worker(redis_url):
    checked = subprocess.run(
        [sys.executable, "docker/worker_health.py"],
        cwd=ROOT,
        env={**os.environ, "OPENLORA_REDIS": redis_url, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 1
    assert "no ready worker of host" in checked.stderr
