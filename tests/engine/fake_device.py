"""A device without arithmetic: it keeps what was written where, and draws tokens from it.

The next token is a hash of the context that a row's block table really leads to, and of the
contents of the pages that its LoRA set really names. A wrong block, a page reused too early, a
prefix shared between two adapters: each changes the tokens. A page handed out again while a step
that names it has not run fails at once, whatever it holds.

A launched step runs only when it is waited for, while page writes happen at once: the opposite of
what a real device would be kind enough to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openlora.adapters.pages import PagePool, SitePages
from openlora.engine.build import EngineParts
from openlora.engine.config import EngineConfig
from openlora.engine.engine import Engine
from openlora.engine.stats import ModelInfo
from openlora.engine.step import PENDING_TOKEN, SampledToken, StepRow
from openlora.errors import AdapterFailed

VOCAB_SIZE = 500
EOS = 499
NAN_TOKEN = 498
"""A prompt that ends with it has logits that are not finite."""

Content = tuple[tuple[str, float], ...]


def next_token(tokens: Sequence[int], content: Content, seed: int, index: int) -> int:
    """The token that follows ``tokens`` under ``content``: any of 0..VOCAB_SIZE-3, at random."""
    digest = hashlib.sha256(repr((list(tokens), content, seed, index)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % (VOCAB_SIZE - 2)


def expected_tokens(
    prompt: Sequence[int], content: Content, seed: int, count: int, output: Sequence[int] = ()
) -> list[int]:
    """What a request alone on the device gives, ``output`` included."""
    tokens = [*prompt, *output]
    for index in range(len(output), count):
        tokens.append(next_token(tokens, content, seed, index))
    return tokens[len(prompt) :]


@dataclass(frozen=True)
class FakeInfo:
    hash: str


@dataclass(frozen=True)
class FakeAdapter:
    info: FakeInfo
    page_counts: tuple[int, ...]
    extras: None = None


def load_fake(path: Path) -> FakeAdapter:
    """An adapter whose directory's name is its content and its page counts: ``rose-1-1-0-2``."""
    if path.name.startswith("broken"):
        raise AdapterFailed(f"{path.name}: tensor missing")
    content, *counts = path.name.split("-")
    return FakeAdapter(FakeInfo(content), tuple(map(int, counts)))


@dataclass
class _Pending:
    device: FakeDevice
    rows: list[StepRow]
    generations: dict[tuple[int, int], int]
    tokens: list[SampledToken | None] | None = None

    def wait(self) -> list[SampledToken | None]:
        while self.tokens is None:
            step = self.device.queue.pop(0)
            assert step.generations == self.device.generations_of(step.rows), (
                "a page was handed out again while a launched step named it"
            )
            step.tokens = [self.device.run_row(row) for row in step.rows]
        return self.tokens

    def is_done(self) -> bool:
        return self.tokens is not None


@dataclass
class FakeDevice:
    """Runner, KV cache and pages in one."""

    num_blocks: int
    block_size: int
    num_pages: tuple[int, int, int, int] = (4, 4, 4, 4)
    queue: list[_Pending] = field(default_factory=list)
    kv: dict[int, tuple[int, Content]] = field(default_factory=dict)
    pages: dict[tuple[int, int], str] = field(default_factory=dict)
    last_tokens: dict[int, int] = field(default_factory=dict)
    launches: list[list[StepRow]] = field(default_factory=list)
    num_lent: dict[str, int] = field(default_factory=dict)
    pool: PagePool | None = None

    def generations_of(self, rows: Sequence[StepRow]) -> dict[tuple[int, int], int]:
        """How often each page that the rows name was handed out."""
        return {
            (site, page): self.pool.generation(site, page) if self.pool is not None else 0
            for row in rows
            for site, entries in enumerate(row.lora_set.pages)
            for page, _ in entries
        }

    def launch(self, rows: Sequence[StepRow]) -> _Pending:
        step = _Pending(self, list(rows), self.generations_of(rows))
        self.queue.append(step)
        self.launches.append(step.rows)
        return step

    def write(self, pages: SitePages, adapter: FakeAdapter) -> None:
        for site, ids in enumerate(pages):
            assert len(ids) == adapter.page_counts[site]
            for page in ids:
                self.pages[site, page] = adapter.info.hash

    def run_row(self, row: StepRow) -> SampledToken | None:
        content = self._content(row)
        for position, token in enumerate(row.token_ids, row.start):
            known = self.last_tokens[row.sequence_id] if token == PENDING_TOKEN else token
            self.kv[self._slot(row, position)] = (known, content)
        if row.sampling is None:
            return None
        end = row.start + len(row.token_ids)
        context = [self.kv[self._slot(row, position)] for position in range(end)]
        assert all(written == content for _, written in context), "KV of other weights"
        tokens = [token for token, _ in context]
        if tokens[-1] == NAN_TOKEN:
            return SampledToken(-1)
        sampling = row.sampling
        token_id = next_token(tokens, content, sampling.seed, sampling.output_index)
        self.last_tokens[row.sequence_id] = token_id
        return SampledToken(token_id)

    def _slot(self, row: StepRow, position: int) -> int:
        return row.block_table[position // self.block_size] * self.block_size + (
            position % self.block_size
        )

    def _content(self, row: StepRow) -> Content:
        """(content, weight) of the adapters whose pages the row names, checked site by site."""
        found: dict[tuple[str, float], None] = {}
        for site, entries in enumerate(row.lora_set.pages):
            for page, weight in entries:
                found[self.pages[site, page], weight] = None
        return tuple(sorted(found))


def fake_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    num_pages: tuple[int, int, int, int] = (4, 4, 4, 4),
    steps_ahead: int = 0,
    max_model_len: int = 128,
    **settings: object,
) -> tuple[Engine, FakeDevice]:
    """An engine on a ``FakeDevice``."""
    pool = PagePool(num_pages)
    device = FakeDevice(num_blocks, block_size, num_pages, pool=pool)
    info = ModelInfo(
        model="fake",
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        num_layers=1,
        max_model_len=min(max_model_len, num_blocks * block_size),
        max_lora_rank=16,
        eos_token_ids=(EOS,),
        dtype="float32",
        device="cpu",
        attention_backend="fake",
    )
    parts = EngineParts(
        runner=device,
        model_info=info,
        num_blocks=num_blocks,
        pool=pool,
        load_adapter=load_fake,
        write_adapter=device.write,
        steps_ahead=steps_ahead,
    )
    config = EngineConfig(**{"model": "fake", "block_size": block_size} | settings)
    return Engine(config, parts=parts), device
