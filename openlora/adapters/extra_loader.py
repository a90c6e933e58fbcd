"""Makes an adapter's extras of its files; the tensors' names and meaning are in extra_format.py.

DoRA follows Liu et al. 2024 and ``peft.tuners.lora.dora``:
y = g · (W x + s · B A x), g = magnitude / ‖W + s · B A‖ of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from openlora.adapters.extra_format import EMBEDDING, HEAD, MAX_ADDED_TOKENS, ExtraTensor, words
from openlora.adapters.extras import AdapterExtras, LinearExtra, TableExtra
from openlora.adapters.peft_format import AdapterLayout, LoRAModule
from openlora.adapters.site_shapes import ModelShape, SiteShape
from openlora.errors import AdapterFailed

BaseWeight = Callable[[str], torch.Tensor]
"""The base model's tensor of this name, in the model's dtype."""

GetTensor = Callable[[str], torch.Tensor]
"""The adapter's tensor of this name."""


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
                f"it has {words(layout.extras)}, which needs a base model in safetensors files"
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
        extras = AdapterExtras(linears, norms, *self._tables())
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

    def _tables(self) -> tuple[TableExtra | None, TableExtra | None]:
        """Of embedding and head."""
        embedding, head = self._table(EMBEDDING), self._table(HEAD)
        added = None if embedding is None else embedding.added
        if added is not None and head is None and self._model.tie_word_embeddings:
            # As in PEFT, where both are one weight: rows that are loaded into one are in both.
            assert embedding is not None
            head = TableExtra(embedding.weight, added=added)
        counts = [
            0 if table is None or table.added is None else len(table.added)
            for table in (embedding, head)
        ]
        if counts[1] not in (0, counts[0]):
            raise AdapterFailed(
                f"lm_head has {counts[1]} added tokens and embed_tokens {counts[0]}; save both of "
                "one resized model"
            )
        return embedding, head

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
        rows = self._rows(module, parts)
        weight = added = None
        if "weight" in parts:
            whole = self._read(parts["weight"], (rows, hidden)).to(self._dtype)
            weight, added = whole[:vocab], whole[vocab:].clone() if rows > vocab else None
            if torch.equal(weight, self._base(f"{self._base_name(module)}.weight")):
                weight = None  # PEFT saves the layer that a LoRA is on along with it
            elif rows > vocab:
                weight = weight.clone()
        if "a" not in parts:
            return None if weight is added is None else TableExtra(weight, added=added)
        config = self._layout.config
        rank, scale = config.rank(module), config.scale(module)
        shapes = (
            ((rank, rows), (hidden, rank))
            if module == EMBEDDING
            else ((rank, hidden), (rows, rank))
        )
        a = self._read(parts["a"], shapes[0]).T
        b = self._read(parts["b"], shapes[1]).T.float() * scale
        return TableExtra(
            weight, a.to(self._dtype).contiguous(), b.to(self._dtype).contiguous(), added
        )

    def _rows(self, module: str, parts: Mapping[str, ExtraTensor]) -> int:
        """Tokens of a table: the base's vocabulary, or more, which the adapter then has to hold."""
        grown = parts.get("weight") or (parts["a"] if module == EMBEDDING else parts["b"])
        shape = self._layout.tensors[grown.tensor].shape
        rows = shape[-1] if grown.kind == "a" else shape[0]
        vocab = self._model.vocab_size
        is_held = rows == vocab or "weight" in parts
        if not vocab <= rows <= vocab + MAX_ADDED_TOKENS or not is_held:
            raise AdapterFailed(
                f"tensor {grown.tensor} has shape {list(shape)}; this base model needs {vocab} "
                f"tokens, to which an adapter may add up to {MAX_ADDED_TOKENS} if it holds their "
                "embeddings (PEFT: save_pretrained(…, save_embedding_layers=True))"
            )
        return rows

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
