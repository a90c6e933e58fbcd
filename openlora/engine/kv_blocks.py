"""KV block bookkeeping: block tables, the prefix cache, and who may reuse what. Pure.

A block is in one of three states: *used* (its reference count is positive), *cached* (unused, but
its content is known by hash and may be taken up again) or *free*. A full block is named by a hash
chain: SHA-256 over the hash before it and its token IDs, the first one over the base model and the
LoRA set's content. KV is thus shared only between equal prefixes under equal weights.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Tokens

from openlora.engine.sequence import Sequence


class BlockManager:
    """Hands out the blocks of one KV cache.

    Args:
        num_blocks: blocks of the cache, IDs 0..num_blocks-1.
        block_size: positions in a block.
        root: names the base model; part of every hash chain.
        enable_prefix_caching: False keeps no content, all unused blocks are free.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        root: str = "",
        *,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.hit_tokens = 0
        self.queried_tokens = 0
        self._root = root
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Popped from the end: the smallest IDs go out first, which keeps runs reproducible.
        self._free = list(range(num_blocks - 1, -1, -1))
        # Oldest first: the first one is the next to lose its content.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return len(self._free) + len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` positions take."""
        return -(-num_tokens // self.block_size)

    def admit(self, sequence: Sequence, num_reserved: int = 0) -> bool:
        """Give a sequence without blocks room for all its tokens, prefix cache first.

        Sets ``num_computed_tokens`` to what the cache holds (at most all tokens but the last, for
        the last one's logits are needed). False, with nothing changed, where fewer than
        ``num_reserved`` blocks would be left.
        """
        assert not sequence.block_table
        hits = self._lookup(sequence)
        num_new = self.num_blocks_for(sequence.num_tokens) - len(hits)
        num_revived = sum(1 for block in hits if not self._ref_counts[block])
        if num_new + num_revived + num_reserved > self.num_free_blocks:
            return False
        for block in hits:
            self._take(block)
        sequence.block_table = hits + [self._new_block() for _ in range(num_new)]
        sequence.num_hashed_blocks = len(hits)
        sequence.num_cached_tokens = len(hits) * self.block_size
        sequence.num_computed_tokens = sequence.num_cached_tokens
        self.queried_tokens += sequence.num_tokens
        self.hit_tokens += sequence.num_cached_tokens
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Extend a block table to hold all tokens; False, with nothing changed, without a block."""
        num_new = self.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        if num_new > self.num_free_blocks:
            return False
        for _ in range(num_new):
            sequence.block_table.append(self._new_block())
        return True

    def cache_full_blocks(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Make the sequence's full blocks among its first ``num_computed_tokens`` findable.

        Call it only once the step that wrote them is done: a block is never found before its KV
        is known to be good.
        """
        if not self.enable_prefix_caching:
            return
        num_full = min(num_computed_tokens, len(sequence.token_ids)) // self.block_size
        if num_full <= sequence.num_hashed_blocks:
            return
        self._extend_hashes(sequence, num_full)
        for i in range(sequence.num_hashed_blocks, num_full):
            block, block_hash = sequence.block_table[i], sequence.block_hashes[i]
            # An equal block that came first stays the known one; this one is freed as unknown.
            if block_hash not in self._block_of and self._hash_of[block] is None:
                self._block_of[block_hash] = block
                self._hash_of[block] = block_hash
        sequence.num_hashed_blocks = num_full

    def release(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take all blocks from a sequence; ``forget`` also drops their content (it is bad)."""
        # Back to front: the tail of a prefix is of least use to others, so it is reused first.
        for block in reversed(sequence.block_table):
            if forget:
                self._forget(block)
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        sequence.block_table = []
        sequence.num_hashed_blocks = 0
        sequence.num_computed_tokens = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that every block is used, cached or free, once, and counts match ``sequences``.

        Args:
            sequences: all that hold blocks.
        """
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._ref_counts) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block is lost"
        assert free | cached | used == set(range(self.num_blocks)), "a block is in two states"
        assert all(self._ref_counts[block] == held[block] for block in range(self.num_blocks))
        named = {b: h for b, h in enumerate(self._hash_of) if h is not None}
        assert {h: b for b, h in named.items()} == self._block_of, "hashes and blocks disagree"
        assert cached <= named.keys(), "a cached block has no hash"
        assert not free & named.keys(), "a free block has a hash"

    def _lookup(self, sequence: Sequence) -> list[int]:
        if not self.enable_prefix_caching:
            return []
        num_usable = (len(sequence.token_ids) - 1) // self.block_size
        self._extend_hashes(sequence, num_usable)
        hits: list[int] = []
        for block_hash in sequence.block_hashes[:num_usable]:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def _extend_hashes(self, sequence: Sequence, num_full: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) < num_full:
            parent = hashes[-1] if hashes else self._root_hash(sequence.lora_set.key)
            start = len(hashes) * size
            hashes.append(_block_hash(parent, sequence.token_ids[start : start + size]))

    def _root_hash(self, lora_key: str) -> bytes:
        return hashlib.sha256(f"{len(self._root)}:{self._root}{lora_key}".encode()).digest()

    def _take(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def _new_block(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._ref_counts[block] = 1
        return block

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None


def _block_hash(parent: bytes, token_ids: Tokens[int]) -> bytes:
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()
