"""Where LoRA attaches in a decoder layer, and the page shapes of each place. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from openlora.adapters.lora_set import PAGE_RANK, SITES


class ModelShape(Protocol):
    """What adapters need to know of the base model; ``ModelConfig`` is one."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def fused_projections(self) -> bool: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def norm_offset(self) -> float: ...
    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SiteModule:
    """One linear of a site.

    Attributes:
        path: its name within the layer, as PEFT's tensor names have it.
        out_features: rows of its B.
        first_block: the first of its blocks in the site's output.
    """

    path: str
    out_features: int
    first_block: int


@dataclass(frozen=True, slots=True)
class SiteShape:
    """One site: modules that share their input, fused into one output of equal blocks.

    Attributes:
        name: an entry of ``SITES``.
        in_features: columns of every A.
        modules: one slice of A each, in order.
        block_out: size of a block; every module's output is a whole number of blocks.
        block_slices: for each block, the index of the module (slice) that feeds it.
    """

    name: str
    in_features: int
    modules: tuple[SiteModule, ...]
    block_out: int
    block_slices: tuple[int, ...]

    @property
    def page_elements_per_layer(self) -> int:
        """Elements of A and B of one page in one layer."""
        a = self.in_features * len(self.modules) * PAGE_RANK
        return a + len(self.block_slices) * PAGE_RANK * self.block_out


def _site(name: str, in_features: int, block_out: int, modules: dict[str, int]) -> SiteShape:
    members: list[SiteModule] = []
    block_slices: list[int] = []
    for index, (path, out_features) in enumerate(modules.items()):
        members.append(SiteModule(path, out_features, len(block_slices)))
        block_slices += [index] * (out_features // block_out)
    return SiteShape(name, in_features, tuple(members), block_out, tuple(block_slices))


def site_shapes(model: ModelShape) -> tuple[SiteShape, ...]:
    """The sites of ``model``, in the order of ``SITES``."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size = model.num_heads * model.head_dim
    kv_size = model.num_kv_heads * model.head_dim
    qkv = {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size}
    gate_up = {"mlp.gate_proj": inner, "mlp.up_proj": inner}
    if model.fused_projections:
        qkv = {"self_attn.qkv_proj": q_size + 2 * kv_size}
        gate_up = {"mlp.gate_up_proj": 2 * inner}
    shapes = (
        _site("qkv", hidden, kv_size, qkv),
        _site("o", q_size, hidden, {"self_attn.o_proj": hidden}),
        _site("gate_up", hidden, inner, gate_up),
        _site("down", inner, hidden, {"mlp.down_proj": hidden}),
    )
    assert tuple(shape.name for shape in shapes) == SITES
    return shapes
