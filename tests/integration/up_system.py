"""A tiny model with adapters on disk, and ``openlora up`` run on it as a user would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from websockets.sync.client import connect

from openlora.bench.pipeline_model import write_tokenizer
from openlora.local import free_port
from workers.scripted_engine import SCRIPTED_VOCAB_SIZE

READY_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 60.0
LAST_START_LINE = "Ctrl-C stops."


def write_model(directory: Path) -> Path:
    """A random Llama of two small layers, with a tokenizer and a chat template."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=SCRIPTED_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return write_tokenizer(directory)


def write_adapters(model: Path, root: Path) -> Path:
    """Two adapters that work, and one whose weights are no safetensors file."""
    for seed, name in enumerate(("pirate", "poet")):
        torch.manual_seed(seed)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        peft_model = get_peft_model(LlamaForCausalLM.from_pretrained(model), lora)
        for key, parameter in peft_model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.15)
        peft_model.save_pretrained(root / name)
    broken = root / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((root / "poet/adapter_config.json").read_text())
    (broken / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    return root


class UpSystem:
    """One ``openlora up``; ``environ`` holds its folders, so that a second one finds them."""

    def __init__(self, folder: Path, port: int, *flags: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.environ = {
            **os.environ,
            "XDG_STATE_HOME": str(folder / "state"),
            "OPENLORA_STORE": str(folder / "store"),
            "OPENLORA_URL": self.url,
        }
        self._log_path = folder / f"up-{free_port()}.log"
        with self._log_path.open("wb") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "openlora", "up", "--port", str(port), *flags],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        """All it has printed so far."""
        return self._log_path.read_text(encoding="utf-8")

    def wait_until_it_says(self, text: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Fails with the output where ``text`` does not come, or the process ends first."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def wait_ready(self) -> None:
        self.wait_until_it_says(LAST_START_LINE)

    def children(self) -> list[psutil.Process]:
        """All that it started, and what that started."""
        return self.process.children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send the signal, and return the exit status once no process is left."""
        started = self.children()
        self.process.send_signal(number)
        status = self.process.wait(EXIT_TIMEOUT_S)
        _, left = psutil.wait_procs(started, timeout=5)
        assert not left, f"left running: {left}"
        return status

    def command(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Another ``openlora`` command, as from the user's second terminal."""
        return subprocess.run(
            [sys.executable, "-m", "openlora", *words],
            env=self.environ,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def stream(self, requests: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """Run all requests at once on one websocket; → the frames of each, in order."""
        frames: dict[str, list[dict[str, Any]]] = {name: [] for name in requests}
        with connect(self.url.replace("http", "ws") + "/v1/ws", open_timeout=30) as socket:
            for name, fields in requests.items():
                socket.send(json.dumps({"type": "generate", "request_id": name, **fields}))
            running = set(requests)
            while running:
                frame = json.loads(socket.recv(timeout=120))
                frames[frame["request_id"]].append(frame)
                if frame["type"] in ("done", "error"):
                    running.discard(frame["request_id"])
        return frames
