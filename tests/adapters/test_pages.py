"""The page pool as a state machine: no page is ever in two hands, or lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from openlora.adapters.lora_set import LoRASet
from openlora.adapters.pages import PagePool, join_lora_set

SIZES = (5, 3, 4, 2)
COUNTS = st.tuples(*(st.integers(0, 3) for _ in SIZES))


class PoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = PagePool(SIZES)
        self.held = {}
        self.pins = {}
        self.counter = 0

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.held)))

    @rule(counts=COUNTS)
    def allocate(self, counts):
        free = self.pool.num_free
        fits = all(want <= have for want, have in zip(counts, free, strict=True))
        owner = f"a{self.counter}"
        self.counter += 1
        pages = self.pool.allocate(owner, counts)
        assert (pages is not None) == fits
        if pages is None:
            assert self.pool.num_free == free
            return
        assert tuple(map(len, pages)) == counts
        for site, ids in enumerate(pages):
            taken = {page for other in self.held.values() for page in other[site]}
            assert not taken & set(ids)
        self.held[owner], self.pins[owner] = pages, 0

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def allocate_again_is_refused(self, data):
        with pytest.raises(ValueError, match="holds pages already"):
            self.pool.allocate(self.pick(data), (0, 0, 0, 0))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def pin(self, data):
        owner = self.pick(data)
        self.pool.pin(owner)
        self.pins[owner] += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unpin(self, data):
        owner = self.pick(data)
        if self.pins[owner]:
            self.pool.unpin(owner)
            self.pins[owner] -= 1
        else:
            with pytest.raises(ValueError, match="not pinned"):
                self.pool.unpin(owner)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        owner = self.pick(data)
        if self.pins[owner]:
            with pytest.raises(ValueError, match="in use by"):
                self.pool.free(owner)
        else:
            self.pool.free(owner)
            del self.held[owner], self.pins[owner]

    @invariant()
    def is_whole(self):
        self.pool.check_integrity()
        assert set(self.pool.owners()) == set(self.held)
        for owner, pages in self.held.items():
            assert self.pool.pages(owner) == pages
            assert self.pool.pins(owner) == self.pins[owner]


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_pool = PoolMachine.TestCase


def test_fits_asks_an_empty_pool():
    pool = PagePool(SIZES)
    pool.allocate("a", SIZES)
    assert pool.num_free == (0, 0, 0, 0)
    assert pool.fits(SIZES)
    assert not pool.fits((6, 0, 0, 0))


@pytest.mark.parametrize("sizes", [(1, 2, 3), (1, 1, 1, -1), ()])
def test_sizes_that_make_no_sense(sizes):
    with pytest.raises(ValueError, match="num_pages is"):
        PagePool(sizes)


def test_integrity_notices_a_page_in_two_hands():
    pool = PagePool(SIZES)
    pool.allocate("a", (1, 0, 0, 0))
    pool._free[0].append(0)
    with pytest.raises(AssertionError, match="site qkv"):
        pool.check_integrity()


def test_an_unknown_owner():
    pool = PagePool(SIZES)
    for method in (pool.pages, pool.pin, pool.unpin, pool.pins, pool.free):
        with pytest.raises(KeyError):
            method("nobody")


def test_joined_sets():
    one, other = ((0,), (), (1, 2), ()), ((3,), (4,), (), ())
    joined = join_lora_set([(one, 0.6), (other, 0.4)], "k")
    assert joined.pages == (
        ((0, 0.6), (3, 0.4)),
        ((4, 0.4),),
        ((1, 0.6), (2, 0.6)),
        (),
    )
    assert joined.key == "k"
    assert join_lora_set([(one, 0.0)], "k").is_empty
    assert join_lora_set([], "").pages == LoRASet.EMPTY.pages
