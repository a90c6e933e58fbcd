"""Adapters from URLs: a real server, real archives, and what goes wrong with them."""

from __future__ import annotations

import http.server
import shutil
import socket
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest

from openlora.adapters.peft_format import inspect_adapter
from openlora.adapters.sources import fetch
from openlora.errors import AdapterFailed
from tests.adapters.peft_dirs import write_adapter
from tests.adapters.serving import serving

WEIGHTS = "adapter_model.safetensors"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Refuses what is below /secret, and sends half of what is below /cut."""

    def do_GET(self):
        if self.path.startswith("/secret"):
            self.send_error(403)
        elif self.path.startswith("/cut") and self.path.endswith(WEIGHTS):
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path):
    """A directory, and the URL that it is served at."""
    root = tmp_path / "site"
    root.mkdir()
    with serving(partial(Quiet, directory=str(root))) as url:
        yield root, url


@pytest.fixture
def into(tmp_path):
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def failed(url, into, says):
    with pytest.raises(AdapterFailed, match=says) as caught:
        fetch(url, into)
    assert url in str(caught.value)
    assert list(into.iterdir()) == []


def zipped(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def files_of(directory, folder=""):
    return {folder + path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_directory_behind_a_url(site, into, scheme):
    root, url = site
    write_adapter(root / "poet")
    fetch(f"{url}/poet" if scheme == "http" else f"file://{root}/poet", into)
    assert inspect_adapter(into).hash == inspect_adapter(root / "poet").hash


@pytest.mark.parametrize("folder", ["", "poet-main/"])
def test_an_archive_behind_a_url(site, into, tmp_path, folder):
    root, url = site
    source = write_adapter(tmp_path / "poet")
    zipped(root / "poet.zip", files_of(source, folder) | {"README.md": b"hello"})
    fetch(f"{url}/poet.zip", into)
    assert inspect_adapter(into).hash == inspect_adapter(source).hash
    assert len(list(into.iterdir())) == 2


def test_a_server_that_refuses_is_named(site, into):
    failed(f"{site[1]}/secret/poet", into, "403: Forbidden")


def test_an_answer_that_ends_too_soon_is_found_out(site, into):
    root, url = site
    write_adapter(root / "cut")
    fetch(f"{url}/cut", into)
    with pytest.raises(AdapterFailed, match=f"{WEIGHTS} (is cut short|holds .* bytes of data)"):
        inspect_adapter(into)


def test_an_archive_with_two_adapters_or_none(site, into, tmp_path):
    root, url = site
    files = files_of(write_adapter(tmp_path / "poet"), "a/")
    zipped(root / "two.zip", files | files_of(tmp_path / "poet", "b/"))
    zipped(root / "none.zip", {"x": b""})
    failed(f"{url}/two.zip", into, "holds 2 files adapter_config.json, not one")
    failed(f"{url}/none.zip", into, "holds 0 files")
    failed(f"zip://c::{url}/two.zip", into, "holds 0 files adapter_config.json, not one in c/")
    fetch(f"zip://b::{url}/two.zip", into)
    assert inspect_adapter(into).hash == inspect_adapter(tmp_path / "poet").hash
    shutil.rmtree(into)
    into.mkdir()
    (root / "no.zip").write_bytes(b"PK but no archive")
    failed(f"{url}/no.zip", into, "BadZipFile")


def test_an_archive_with_an_endless_list_of_files_ends_its_process_alone(into, tmp_path):
    poet = files_of(write_adapter(tmp_path / "poet"))
    zipped(tmp_path / "few.zip", poet)
    zipped(tmp_path / "many.zip", poet | {f"{number}": b"" for number in range(100_000)})
    code = "import openlora.adapters.sources as s; s.MAX_MEMORY_BYTES = {} << 20; exit(s.main())"
    for archive, status, says in (("few", 0, ""), ("many", 2, "MemoryError")):
        words = [code.format(64), (tmp_path / f"{archive}.zip").as_uri(), str(into)]
        done = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True)
        assert (done.returncode, done.stderr.partition(":")[0]) == (status, says)
        shutil.rmtree(into)
        into.mkdir()


def test_a_zip_bomb(site, into, tmp_path):
    root, url = site
    files = files_of(write_adapter(tmp_path / "poet"))
    zipped(root / "bomb.zip", files | {WEIGHTS: bytes(300 << 20)})
    assert (root / "bomb.zip").stat().st_size < 1 << 20
    failed(f"{url}/bomb.zip", into, "and would have 314572800 unpacked")


def test_names_in_an_archive_lead_nowhere(site, into, tmp_path):
    root, url = site
    source = write_adapter(tmp_path / "poet")
    zipped(root / "evil.zip", files_of(source, "../../") | {"/etc/passwd": b"x"})
    fetch(f"{url}/evil.zip", into)
    assert sorted(path.name for path in into.iterdir()) == ["adapter_config.json", WEIGHTS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into", "poet", "site"]


def test_what_is_missing_is_named(site, into):
    root, url = site
    failed(f"{url}/poet", into, "adapter_config.json is missing there")
    write_adapter(root / "poet")
    (root / "poet" / WEIGHTS).rename(root / "poet/adapter_model.bin")
    failed(f"{url}/poet", into, "are pickle files and are not read")


def test_shards_are_those_that_the_index_names(site, into):
    root, url = site
    write_adapter(root / "poet")
    index = root / "poet" / f"{WEIGHTS}.index.json"
    shutil.move(root / "poet" / WEIGHTS, root / "poet/adapter_model-00001-of-00001.safetensors")
    index.write_text('{"weight_map": {"x": "adapter_model-00001-of-00001.safetensors"}}')
    fetch(f"{url}/poet", into)
    assert len(list(into.iterdir())) == 3
    shutil.rmtree(into)
    into.mkdir()
    index.write_text('{"weight_map": {"x": "../../secret"}}')
    failed(f"{url}/poet", into, "names the file '../../secret'")


def test_a_server_that_is_not_there_or_never_answers(into):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(AdapterFailed, match=r"was not read within 1\.5 s"):
            fetch(f"http://127.0.0.1:{port}/poet", into, timeout_s=1.5)
    failed(f"http://127.0.0.1:{port}/poet", into, r"refused.*is this machine online\?")


def test_the_hub_from_a_machine_without_a_network(into, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    failed("hf://acme/poet@main", into, r"is this machine online\?")


@pytest.mark.parametrize("url", ["nowhere://x/y", "s3://"])
def test_schemes_without_a_library(into, url):
    failed(url, into, r"cannot be read: .+")
