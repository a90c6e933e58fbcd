"""Blocks: none lost, none used twice, content found only where it is the same."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from openlora.engine.kv_blocks import BlockManager
from tests.engine.sequences import make_sequence

SIZE = 4


def admitted(blocks: BlockManager, number: int, tokens, key: str = ""):
    sequence = make_sequence(number, list(tokens), key=key)
    assert blocks.admit(sequence)
    return sequence


def computed(blocks: BlockManager, number: int, tokens, key: str = ""):
    sequence = admitted(blocks, number, tokens, key)
    blocks.cache_full_blocks(sequence, len(sequence.token_ids))
    return sequence


def test_a_table_covers_all_tokens():
    blocks = BlockManager(8, SIZE)
    for num_tokens, num_blocks in ((1, 1), (4, 1), (5, 2), (8, 2)):
        sequence = admitted(blocks, 1, [num_tokens] * num_tokens)
        assert len(sequence.block_table) == num_blocks
        blocks.release(sequence)


def test_a_block_is_found_only_after_it_was_computed():
    blocks = BlockManager(8, SIZE)
    admitted(blocks, 1, range(8))
    second = computed(blocks, 2, range(8))
    assert second.num_computed_tokens == 0
    assert admitted(blocks, 3, range(8)).block_table[0] == second.block_table[0]


def test_the_last_token_is_always_computed():
    blocks = BlockManager(16, SIZE)
    computed(blocks, 1, range(8))
    assert admitted(blocks, 2, range(8)).num_computed_tokens == 4
    assert admitted(blocks, 3, range(9)).num_computed_tokens == 8


def test_the_chain_starts_from_the_weights_and_the_model():
    blocks = BlockManager(32, SIZE, root="model")
    first = computed(blocks, 1, range(9), key="rose")
    assert admitted(blocks, 2, range(9), key="fern").num_computed_tokens == 0
    assert admitted(blocks, 3, range(9), key="rose").num_computed_tokens == 8
    other = BlockManager(32, SIZE, root="other")
    assert computed(other, 1, range(9), key="rose").block_hashes[0] != first.block_hashes[0]
    # The parts are told apart: "model" + "rose" is not "modelr" + "ose".
    shifted = BlockManager(32, SIZE, root="modelr")
    assert computed(shifted, 1, range(9), key="ose").block_hashes[0] != first.block_hashes[0]


def test_equal_blocks_behind_other_prefixes_are_not_shared():
    blocks = BlockManager(32, SIZE)
    computed(blocks, 1, [0, 0, 0, 0, 1, 2, 3, 4, 9])
    assert admitted(blocks, 2, [5, 5, 5, 5, 1, 2, 3, 4, 9]).num_computed_tokens == 0


def test_the_longest_unused_content_goes_first_and_its_tail_before_its_head():
    blocks = BlockManager(4, SIZE)
    old = computed(blocks, 1, [1] * 8)
    new = computed(blocks, 2, [2] * 8)
    blocks.release(old)
    blocks.release(new)
    taken = admitted(blocks, 3, [3] * 4)
    blocks.release(taken)
    assert admitted(blocks, 4, [1] * 9).num_computed_tokens == 4
    assert blocks.num_free_blocks == 1


def test_without_prefix_caching_nothing_is_found():
    blocks = BlockManager(8, SIZE, enable_prefix_caching=False)
    blocks.release(computed(blocks, 1, range(9)))
    assert admitted(blocks, 2, range(9)).num_computed_tokens == 0


def test_forgotten_content_is_not_found_even_while_others_hold_it():
    blocks = BlockManager(8, SIZE)
    first = computed(blocks, 1, range(9))
    second = admitted(blocks, 2, range(9))
    assert second.block_table[:2] == first.block_table[:2]
    blocks.release(first, forget=True)
    blocks.check_integrity([second])
    blocks.release(second)
    assert admitted(blocks, 3, range(9)).num_computed_tokens == 0


def test_admit_and_grow_change_nothing_where_blocks_are_short():
    blocks = BlockManager(3, SIZE)
    sequence = admitted(blocks, 1, range(8))
    other = make_sequence(2, list(range(8)))
    assert not blocks.admit(other)
    assert not blocks.admit(make_sequence(3, [1]), num_reserved=1)
    assert other.block_table == []
    sequence.token_ids += range(8)
    assert not blocks.grow(sequence)
    assert len(sequence.block_table) == 2
    blocks.check_integrity([sequence])


class BlockMachine(RuleBasedStateMachine):
    """Any order of admissions, growth, computing and releases."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(10, SIZE)
        self.sequences = []
        self.known = {}  # block → (weights, tokens up to its end) as computed

    @rule(
        target=held,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        key=st.sampled_from(["", "rose"]),
    )
    def admit(self, tokens, key):
        sequence = make_sequence(len(self.sequences), tokens, key=key)
        if self.blocks.admit(sequence):
            for i in range(sequence.num_cached_tokens // SIZE):
                expected = (key, tuple(tokens[: (i + 1) * SIZE]))
                assert self.known[sequence.block_table[i]] == expected
            self.write(sequence, sequence.num_cached_tokens)
            self.sequences.append(sequence)
        return sequence

    @rule(sequence=held, token=st.integers(0, 1))
    def grow(self, sequence, token):
        if not sequence.block_table:
            return
        sequence.token_ids.append(token)
        if self.blocks.grow(sequence):
            self.write(sequence, len(sequence.token_ids) - 1)
        else:
            sequence.token_ids.pop()

    @rule(sequence=held)
    def finish_step(self, sequence):
        if sequence.block_table:
            self.blocks.cache_full_blocks(sequence, sequence.num_computed_tokens)

    @rule(sequence=consumes(held), forget=st.booleans())
    def release(self, sequence, forget):
        if sequence.block_table:
            self.blocks.release(sequence, forget=forget)
            self.sequences.remove(sequence)

    def write(self, sequence, start):
        for position in range(start, len(sequence.token_ids)):
            block = sequence.block_table[position // SIZE]
            holders = [s for s in self.sequences if s is not sequence and block in s.block_table]
            assert not holders, "a shared block is written"
            written = tuple(sequence.token_ids[: position + 1])
            self.known[block] = (sequence.lora_set.key, written)
        sequence.num_computed_tokens = len(sequence.token_ids)

    @invariant()
    def integrity(self):
        self.blocks.check_integrity(self.sequences)


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
