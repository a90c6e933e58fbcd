"""``EngineConfig``: the settings of one engine, checked when made. Reads no environment."""

from __future__ import annotations

from dataclasses import dataclass

from openlora.errors import SetupError

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
ATTENTION_BACKENDS = ("auto", "triton", "flash-attn-4", "flash-attn-2")
USUAL_BLOCK_SIZE = 16
CPU_KERNELS = ("auto", "native", "torch")
DISK_BYTES = 32 << 30
"""Of adapters that a remote store holds: about 400 of a large model."""
MAX_GRAPH_TOKENS = 1024
"""The usual ``max_graph_tokens``: with more, computing takes longer than launching (8B, H200)."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine is built.

    Attributes:
        model: directory, .gguf file or hub ID; "8b" or "1b" with ``load_format="dummy"``.
        device: "auto" takes CUDA where there is a device.
        dtype: of weights, KV and adapters; "auto" takes the model's own on CUDA, float32 on CPU.
        block_size: positions in one KV block.
        kv_cache_bytes: memory of the KV cache; None: what weights and adapters leave, on CPU at
            most 512 MiB.
        num_kv_blocks: exact number of blocks instead of ``kv_cache_bytes``.
        memory_fraction: share of the device's memory that weights, adapters and KV may fill; on
            CPU, of what is free at the start, a container's limits counted.
        adapter_cache_bytes: memory of the adapter pages; None: a fifth of what the weights leave,
            on CPU at most 256 MiB.
        adapter_pages: exact number of pages of each site (qkv, o, gate_up, down) instead.
        adapter_host_bytes: host memory that keeps loaded adapters for when they are wanted again,
            pinned for CUDA; None: an eighth of what is free, at most 8 GiB (on CPU 1 GiB).
        adapter_store: URL of a store; adapters whose paths are in ``adapter_disk_dir`` are fetched
            from it when they are first wanted. None: all paths are local.
        adapter_disk_dir: directory of this cache of the store.
        adapter_disk_bytes: its budget.
        merge_dir: directory that keeps merged adapters; None: a temporary one.
        max_num_seqs: most requests that run in one step.
        max_num_batched_tokens: most tokens of one step.
        max_graph_tokens: on a GPU, steps with parts of prompts run as CUDA graphs where they have
            at most so many tokens, and short contexts: launching one by one takes the host longer
            than the GPU needs for so many. 0: only steps without prompts are graphs.
        max_model_len: longest prompt and output together; None: the model's own limit.
        enable_prefix_caching: keep the KV of past prompts for requests that begin the same.
        load_format: "dummy" makes random weights of the right shape.
        cpu_kernels: what computes on a CPU. "native": C kernels, compiled on first use; "torch":
            torch alone; "auto": native where there is a C compiler, else torch.
        attention_backend: what computes attention on a GPU. "triton": this project's kernels;
            "flash-attn-4", "flash-attn-2": a library, which has to be installed and to cope with
            the model and the block size; "auto": the fastest there is.
        deterministic: a request's logits do not depend on what else runs, bit for bit (CUDA only):
            neither on the others of its steps, nor on how its prompt was cut into chunks, found in
            the prefix cache or computed again after a preemption. On the same kind of GPU, with
            the same versions. Slower.

    Raises:
        SetupError: naming the setting, its value and what is allowed.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    block_size: int = USUAL_BLOCK_SIZE
    kv_cache_bytes: int | None = None
    num_kv_blocks: int | None = None
    memory_fraction: float = 0.9
    adapter_cache_bytes: int | None = None
    adapter_pages: tuple[int, int, int, int] | None = None
    adapter_host_bytes: int | None = None
    adapter_store: str | None = None
    adapter_disk_dir: str | None = None
    adapter_disk_bytes: int = DISK_BYTES
    merge_dir: str | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_graph_tokens: int = MAX_GRAPH_TOKENS
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    load_format: str = "auto"
    cpu_kernels: str = "auto"
    attention_backend: str = "auto"
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise SetupError("model is empty; give a directory, a .gguf file or a hub ID")
        _check_choice("device", self.device, DEVICES)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("cpu_kernels", self.cpu_kernels, CPU_KERNELS)
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        if self.deterministic and self.attention_backend not in ("auto", "triton"):
            raise SetupError(
                f"deterministic is set, and attention_backend is {self.attention_backend!r}: only "
                "the project's own kernels keep requests apart to the last bit; set it to 'auto'"
            )
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("max_graph_tokens", self.max_graph_tokens, 0)
        for name in ("kv_cache_bytes", "num_kv_blocks"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("adapter_cache_bytes", self.adapter_cache_bytes, 0)
        _check_at_least("adapter_host_bytes", self.adapter_host_bytes, 0)
        _check_at_least("adapter_disk_bytes", self.adapter_disk_bytes, 1)
        if self.adapter_store is not None and self.adapter_disk_dir is None:
            raise SetupError("adapter_store needs adapter_disk_dir, a directory to keep copies in")
        _check_at_least("max_model_len", self.max_model_len, 2)
        if self.adapter_pages is not None and len(self.adapter_pages) != 4:
            raise SetupError(
                f"adapter_pages is {self.adapter_pages}; it must hold four counts: "
                "qkv, o, gate_up, down"
            )
        for pages in self.adapter_pages or ():
            _check_at_least("adapter_pages", pages, 0)
        if not 0 < self.memory_fraction <= 1:
            raise SetupError(f"memory_fraction is {self.memory_fraction}; it must be in (0, 1]")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise SetupError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs "
                f"({self.max_num_seqs}); every running request needs one token a step, so raise it"
            )


def block_size_for(attention_backend: str) -> int:
    """Positions of a KV block that suit a backend: flash-attn 2 takes no less than 256."""
    return 256 if attention_backend == "flash-attn-2" else USUAL_BLOCK_SIZE


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SetupError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _check_at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise SetupError(f"{name} is {value}; it must be at least {low}")
