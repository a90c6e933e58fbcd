"""The steps that graphs are captured of, bound to buffers that stay where they are.

A step of few tokens: every token is a row, a decode's as well as one of a prefill chunk, which
sees the chunk's tokens before it since a layer writes all keys before it reads any. So the kernels
of decodes serve chunks too, each of whose tokens reads its whole context by itself: fine for short
ones, and the reason why steps of much reading run eagerly (``MixedSteps``).

Up to ``max_rows`` tokens all rows have logits. A larger step has them for ``max_rows`` rows, which
are picked on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch

from openlora.adapters.page_tensors import PageTensors
from openlora.engine.attention_backends import TRITON_ATTENTION, AttentionChoice
from openlora.engine.attention_binding import AttentionBinding, attention_scratch
from openlora.engine.cuda_ops import (
    CudaOps,
    LoRABinding,
    RotaryBinding,
    decode_tiles,
    scratch_elements,
)
from openlora.engine.kv_cache import KVCache
from openlora.engine.sgmv_plan import PlanLayout
from openlora.kernels.triton_sampling import GreedyScratch, greedy, take_tokens
from openlora.kernels.triton_sgmv import SGMVTables
from openlora.models.decoder import Decoder

PAGES_PER_ROW = 32
"""Room in the LoRA buffers: 8 adapters of rank 64 for each of ``max_rows`` rows."""
USUAL_PAGES_PER_ROW = 4
"""Pages a row that the launches have programs for: one adapter of rank 64. The buffers have room
for as many of each token of a chunk."""
TOKENS_APART = 128
"""Between the sizes of steps with chunks: rounding up a step that computes, not reads, costs."""
LoRAKind = Literal["none", "shared", "distinct"]
FIELDS = {
    "token": 0,
    "source": -1,
    "position": 0,
    "slot": -1,
    "context": 0,
    "owner": 0,
    "sampled": 0,
}
"""Of each token, as int32: ``StepInputs``' token_ids, sources, positions, slots; the positions that
it sees; the row that it is of; at place n, the n-th token whose logits are wanted. With the values
of a token that reads and writes nothing."""
_ALIGNED = 16
"""Ints: Triton tells addresses that are multiples of 16 bytes from others."""


def buckets(max_rows: int, max_tokens: int = 0) -> tuple[int, ...]:
    """Numbers of tokens that graphs are captured for.

    Those of up to ``max_rows``: rounding up costs a third at most. Beyond, for steps with chunks of
    up to ``max_tokens`` tokens, they are ``TOKENS_APART``.
    """
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    small = (*(size for size in sizes if size < max_rows), max_rows)
    if max_tokens <= max_rows:
        return small
    first = max_rows // TOKENS_APART * TOKENS_APART + TOKENS_APART
    return (*small, *range(first, max_tokens, TOKENS_APART), max_tokens)


class GraphSteps:
    """Operations of steps of each size, on shared buffers.

    Args:
        model, pages, kv_cache: what the steps compute with; tensors of any device.
        drawn: int64 [at least max_rows], the tokens that the last step drew.
        num_processors: of the device.
        max_rows: most sequences of a step.
        max_tokens: most tokens of a step with chunks; up to ``max_rows``: of any step.
        max_model_len: longest context.
        attention: what computes it.
        deterministic: see ``MixedSteps``; the kernels with LoRA are then cut in one way, and no
            step has chunks, whose tokens would be computed in one way here and another way there.

    Attributes:
        fields: int32 [FIELDS, at least max_tokens].
        block_tables: int32 [max_tokens, blocks of max_model_len].
        layout: where a plan's records lie.
        plan: int32 [sites, ints of a site].
        h_rows: rows of LoRA scratch; plans need no more.
    """

    def __init__(
        self,
        model: Decoder,
        pages: PageTensors,
        kv_cache: KVCache,
        drawn: torch.Tensor,
        *,
        num_processors: int,
        max_rows: int,
        max_tokens: int = 0,
        max_model_len: int,
        attention: AttentionChoice = TRITON_ATTENTION,
        deterministic: bool = False,
    ) -> None:
        self.max_rows = max_rows
        self.max_tokens = max_rows if deterministic else max(max_rows, max_tokens)
        self.buckets = buckets(max_rows, self.max_tokens)
        self._model = model
        self._kv_layers = kv_cache.layers
        self._drawn = drawn
        self._processors = num_processors
        self._max_model_len = max_model_len
        self._attention = attention
        self._deterministic = deterministic
        self._pages = [site.layers for site in pages.sites]
        self._has_pages = any(len(site.a) for site in pages.sites)
        cut = partial(decode_tiles, self._pages, num_processors, deterministic=deterministic)
        self._tiles = {
            "distinct": cut(rows_share=False),
            "shared": cut(rows_share=True),
            "chunks": cut(rows_share=True, has_chunks=True),
        }
        zeros = partial(torch.zeros, dtype=torch.int32, device=model.device)
        width = -(-self.max_tokens // _ALIGNED) * _ALIGNED
        self.fields = zeros((len(FIELDS), width))
        max_blocks = -(-max_model_len // kv_cache.block_size)
        self.block_tables = zeros((self.max_tokens, max_blocks))
        self.h_rows = max(max_rows * PAGES_PER_ROW, self.max_tokens * USUAL_PAGES_PER_ROW)
        self.layout = PlanLayout(self._most_chunks(self.max_tokens), self.h_rows)
        self.plan = zeros((len(pages.sites), self.layout.site_ints))
        elements = scratch_elements(self._pages, self._tiles["shared"], self.h_rows)
        self._h = torch.empty(elements, device=model.device)
        vocab = model.config.vocab_size
        self._logits = torch.empty(max_rows, vocab, dtype=model.dtype, device=model.device)

    @property
    def chunk_rows(self) -> int:
        """``chunk_rows`` of the plans."""
        return self._tiles["shared"][0].chunk_rows

    def field(self, name: str, count: int) -> torch.Tensor:
        """The first ``count`` of ``FIELDS``' ``name``."""
        return self.fields[list(FIELDS).index(name), :count]

    def sizes(self) -> Iterator[tuple[int, LoRAKind]]:
        """All that graphs are captured for, the largest first: all others then find room in what
        it has used."""
        for bucket in reversed(self.buckets):
            yield bucket, "none"
            if self._has_pages:
                yield from ((bucket, kind) for kind in self._lora_kinds(bucket))

    def nearest(self, num_tokens: int, kind: LoRAKind) -> tuple[int, LoRAKind]:
        """The one of ``sizes`` that serves such a step."""
        bucket = next(size for size in self.buckets if size >= num_tokens)
        kinds = self._lora_kinds(bucket)
        return bucket, kind if kind == "none" or kind in kinds else kinds[0]

    def _lora_kinds(self, bucket: int) -> tuple[LoRAKind, ...]:
        """Each kind serves every mix; one is faster where rows share adapters, as chunks' do."""
        if self._deterministic:
            return ("distinct",)
        return ("distinct", "shared") if bucket <= self.max_rows else ("shared",)

    def ops(self, bucket: int, kind: LoRAKind) -> CudaOps:
        """The operations of a step of ``bucket`` tokens. They keep what the kernels write."""
        scratch = attention_scratch(
            self._model.config,
            bucket,
            num_processors=self._processors,
            max_model_len=self._max_model_len,
            device=self._model.device,
            deterministic=self._deterministic,
        )
        return CudaOps(
            config=self._model.config,
            positions=self.field("position", bucket),
            slots=self.field("slot", bucket),
            rotary=RotaryBinding.of(self._model),
            kv_layers=self._kv_layers,
            attention_binding=AttentionBinding.of_decodes(
                num_decodes=bucket,
                block_tables=self.block_tables,
                context_lens=self.field("context", bucket),
                scratch=scratch,
                choice=self._attention,
            ),
            lora=None if kind == "none" else self._lora(bucket, kind),
            logits=self._logits,
        )

    def scratch(self, bucket: int) -> GreedyScratch:
        """For the draws of a step of ``bucket`` tokens."""
        rows = min(bucket, self.max_rows)
        return GreedyScratch(rows, self._processors, self._model.device)

    def forward(
        self, bucket: int, ops: CudaOps, scratch: GreedyScratch, num_layers: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch a step of ``bucket`` tokens.

        Args:
            num_layers: as ``Decoder.forward`` takes it.

        Returns:
            Logits [rows, vocab], which all sizes share, and greedy tokens [rows]: of all tokens, or
            of the first ``max_rows`` sampled ones where there are more.
        """
        tokens = take_tokens(self.field("token", bucket), self.field("source", bucket), self._drawn)
        hidden = self._model.forward(tokens, ops, num_layers)
        if bucket > self.max_rows:
            hidden = hidden.index_select(0, self.field("sampled", self.max_rows))
        logits = self._model.logits(hidden, ops)
        return logits, greedy(logits, scratch)

    def _most_chunks(self, num_tokens: int) -> int:
        """Chunks of a plan for so many tokens, of which each row leaves one that is not full."""
        return self.max_rows + (num_tokens - self.max_rows) // self.chunk_rows

    def _lora(self, bucket: int, kind: LoRAKind) -> LoRABinding:
        usual_chunks = min(bucket, self._most_chunks(max(bucket, self.max_rows)))
        return LoRABinding(
            plan=SGMVTables(
                self.plan,
                self.layout.items_at,
                self.layout.max_chunks,
                self.layout.max_items,
                usual_chunks=usual_chunks,
                usual_items=usual_chunks * USUAL_PAGES_PER_ROW,
            ),
            pages=self._pages,
            h=self._h,
            h_rows=self.h_rows,
            tiles=self._tiles[kind if bucket <= self.max_rows else "chunks"],
        )
