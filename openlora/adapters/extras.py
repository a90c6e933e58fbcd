"""An adapter's extras as tensors: what its rows compute otherwise than by LoRA pages.

The tensors' names and meaning are in extra_format.py; DoRA follows Liu et al. 2024 and
``peft.tuners.lora.dora``: y = g · (W x + s · B A x), g = magnitude / ‖W + s · B A‖ of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from openlora.adapters.extra_format import EMBEDDING, HEAD, ExtraTensor, words
from openlora.adapters.peft_format import AdapterLayout, LoRAModule
from openlora.adapters.site_shapes import ModelShape, SiteShape
from openlora.errors import AdapterFailed

BaseWeight = Callable[[str], torch.Tensor]
"""The base model's tensor of this name, in the model's dtype."""

GetTensor = Callable[[str], torch.Tensor]
"""The adapter's tensor of this name."""


@dataclass(frozen=True, slots=True)
class LinearExtra:
    """Of one fused linear of a layer.

    Attributes:
        gain: [out] or None: what the base's output, its bias not counted, is multiplied with, less
            1 (DoRA; the adapter's pages have it already).
        bias: [out] or None: what is added.
    """

    gain: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class TableExtra:
    """Of the embedding, or of the head.

    Attributes:
        weight: [vocab, hidden] or None: it takes the place of the base's.
        a, b: [vocab, rank] and [rank, hidden] of the embedding, [hidden, rank] and [rank, vocab]
            of the head, scale in b; or None.
    """

    weight: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AdapterExtras:
    """What an adapter changes beside its pages, on the model's device and in its dtype.

    Attributes:
        linears: by (layer, site).
        norms: weights by their names in the checkpoint, the family's offset added.
        embedding, head: None: as the base's.
    """

    linears: Mapping[tuple[int, int], LinearExtra] = field(default_factory=dict)
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    embedding: TableExtra | None = None
    head: TableExtra | None = None

    @property
    def size_bytes(self) -> int:
        """Memory of all tensors."""
        tensors: list[torch.Tensor | None] = [*self.norms.values()]
        for linear in self.linears.values():
            tensors += [linear.gain, linear.bias]
        for table in (self.embedding, self.head):
            if table is not None:
                tensors += [table.weight, table.a, table.b]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class ExtraLoader:
    """Makes ``AdapterExtras`` of a directory's tensors, and DoRA's gain for the pages.

    Args:
        layout: of the directory.
        shapes: the model's sites.
        model: its shape.
        dtype: of the result.
        tensor: reads the adapter's tensors.
        base: reads the base model's; None: they cannot be had.

    Raises:
        AdapterFailed: ``base`` is None; a module that the base lacks; another shape than its.
    """

    def __init__(
        self,
        layout: AdapterLayout,
        shapes: Iterable[SiteShape],
        model: ModelShape,
        dtype: torch.dtype,
        tensor: GetTensor,
        base: BaseWeight | None,
    ) -> None:
        if base is None:
            raise AdapterFailed(
                f"it has {words(layout.extras)}, which needs device 'cpu' and a base model in "
                "safetensors files"
            )
        self._layout = layout
        self._shapes = tuple(shapes)
        self._model = model
        self._dtype = dtype
        self._tensor = tensor
        self._base = base
        self._found = {(extra.kind, extra.module): extra for extra in layout.extras}
        self._modules = {_name(module): module for module in layout.modules}
        self._gains: dict[str, torch.Tensor] = {}

    def gain(self, module: LoRAModule) -> torch.Tensor | None:
        """DoRA's g of a module, [out] in fp32; None: it has no magnitude."""
        name = _name(module)
        extra = self._found.get(("magnitude", name))
        if extra is None:
            return None
        # Both the pages and the extras need it, and it costs a product as large as the weight.
        if name not in self._gains:
            self._gains[name] = self._new_gain(module, extra)
        return self._gains[name]

    def load(self) -> AdapterExtras | None:
        """All extras but those that are folded into the pages; None where nothing is left."""
        linears = {}
        for layer in range(self._model.num_layers):
            for site, shape in enumerate(self._shapes):
                gain = self._joined(layer, shape, self._gain_of)
                bias = self._joined(layer, shape, self._bias_of)
                if gain is not None or bias is not None:
                    linears[layer, site] = LinearExtra(gain, bias)
        norms = {
            module: self._read(extra, self._base(f"{module}.weight").shape).float()
            + self._model.norm_offset
            for (kind, module), extra in self._found.items()
            if kind == "weight" and module not in (EMBEDDING, HEAD)
        }
        if not self._model.norm_offset:
            norms = {module: weight.to(self._dtype) for module, weight in norms.items()}
        extras = AdapterExtras(linears, norms, self._table(EMBEDDING), self._table(HEAD))
        return extras if extras.size_bytes else None

    def _new_gain(self, module: LoRAModule, extra: ExtraTensor) -> torch.Tensor:
        weight = self._base(f"{_name(module)}.weight").float()
        delta = self._tensor(module.b).float() @ self._tensor(module.a).float() * module.scale
        norm: torch.Tensor = torch.linalg.vector_norm(weight + delta, dim=1)
        return self._read(extra, norm.shape).float() / norm

    def _joined(
        self,
        layer: int,
        shape: SiteShape,
        part_of: Callable[[str], torch.Tensor | None],
    ) -> torch.Tensor | None:
        """A vector over the site's fused output: zeros where a module has none."""
        names = [f"model.layers.{layer}.{module.path}" for module in shape.modules]
        parts = [part_of(name) for name in names]
        if all(part is None for part in parts):
            return None
        return torch.cat(
            [
                torch.zeros(module.out_features) if part is None else part
                for part, module in zip(parts, shape.modules, strict=True)
            ]
        ).to(self._dtype)

    def _gain_of(self, name: str) -> torch.Tensor | None:
        module = self._modules.get(name)
        gain = None if module is None else self.gain(module)
        return None if gain is None else gain - 1

    def _bias_of(self, name: str) -> torch.Tensor | None:
        bias = None
        trained = self._found.get(("bias", name))
        if trained is not None:
            base = self._base(f"{name}.bias").float()
            bias = self._read(trained, base.shape).float() - base
        beside_b = self._found.get(("lora_bias", name))
        if beside_b is not None and name in self._modules:
            module = self._modules[name]
            shape = self._layout.tensors[module.b].shape[:1]
            added = self._read(beside_b, shape).float() * module.scale
            bias = added if bias is None else bias + added
        return bias

    def _table(self, module: str) -> TableExtra | None:
        """Whole weight and LoRA of the embedding or the head."""
        parts = {
            kind: self._found[kind, module]
            for kind in ("weight", "a", "b")
            if (kind, module) in self._found
        }
        if not parts:
            return None
        vocab, hidden = self._model.vocab_size, self._model.hidden_size
        weight = None
        if "weight" in parts:
            weight = self._read(parts["weight"], (vocab, hidden)).to(self._dtype)
            if torch.equal(weight, self._base(f"{self._base_name(module)}.weight")):
                weight = None  # PEFT saves the layer that a LoRA is on along with it
        if "a" not in parts:
            return None if weight is None else TableExtra(weight)
        config = self._layout.config
        rank, scale = config.rank(module), config.scale(module)
        columns, rows = (vocab, hidden) if module == EMBEDDING else (hidden, vocab)
        a = self._read(parts["a"], (rank, columns)).T
        b = self._read(parts["b"], (rows, rank)).T.float() * scale
        return TableExtra(weight, a.to(self._dtype).contiguous(), b.to(self._dtype).contiguous())

    def _base_name(self, module: str) -> str:
        return EMBEDDING if self._model.tie_word_embeddings else module

    def _read(self, extra: ExtraTensor, shape: Iterable[int]) -> torch.Tensor:
        tensor = self._tensor(extra.tensor)
        if tuple(tensor.shape) != tuple(shape):
            raise AdapterFailed(
                f"tensor {extra.tensor} has shape {list(tensor.shape)}; this base model needs "
                f"{list(shape)}"
            )
        if not tensor.isfinite().all():
            raise AdapterFailed(f"tensor {extra.tensor} holds values that are not finite")
        return tensor


def _name(module: LoRAModule) -> str:
    return f"model.layers.{module.layer}.{module.path}"
