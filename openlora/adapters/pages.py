"""Which adapter holds which LoRA pages. Pure bookkeeping; the tensors are in page_tensors.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openlora.adapters.lora_set import SITES, LoRASet

if TYPE_CHECKING:
    from openlora.adapters.extras import AdapterExtras

SitePages = tuple[tuple[int, ...], ...]
"""Page IDs of one adapter, one tuple per entry of ``SITES``."""

PageCounts = tuple[int, ...]
"""Number of pages, one per entry of ``SITES``."""


@dataclass(slots=True)
class _Holding:
    pages: SitePages
    pins: int = 0


class PagePool:
    """Pages of each site, handed out to adapters and taken back.

    A page belongs to one owner at a time. An owner is pinned once per request (or launched step)
    that names its pages, and a pinned owner cannot be freed: a page is never handed to another
    adapter while an old step's metadata still points at it.

    Args:
        num_pages: pages of each site, in the order of ``SITES``.
    """

    def __init__(self, num_pages: Sequence[int]) -> None:
        if len(num_pages) != len(SITES) or min(num_pages) < 0:
            raise ValueError(f"num_pages is {num_pages}; it must hold {len(SITES)} counts ≥ 0")
        self.num_pages: PageCounts = tuple(num_pages)
        # Lowest IDs first, so that a lightly used pool touches little memory.
        self._free = [list(range(count - 1, -1, -1)) for count in num_pages]
        self._generations = [[0] * count for count in num_pages]
        self._holdings: dict[str, _Holding] = {}

    @property
    def num_free(self) -> PageCounts:
        """Free pages of each site."""
        return tuple(len(free) for free in self._free)

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether ``counts`` pages would fit if nobody held any."""
        return all(want <= have for want, have in zip(counts, self.num_pages, strict=True))

    def allocate(self, owner: str, counts: Sequence[int]) -> SitePages | None:
        """Give ``owner`` its pages, all or none; None where a site has too few free.

        Raises:
            ValueError: ``owner`` holds pages already.
        """
        if owner in self._holdings:
            raise ValueError(f"{owner!r} holds pages already; free them first")
        if any(want > len(free) for want, free in zip(counts, self._free, strict=True)):
            return None
        pages = tuple(
            tuple(free.pop() for _ in range(want))
            for want, free in zip(counts, self._free, strict=True)
        )
        for site, ids in enumerate(pages):
            for page in ids:
                self._generations[site][page] += 1
        self._holdings[owner] = _Holding(pages)
        return pages

    def pages(self, owner: str) -> SitePages:
        """The pages of ``owner``; KeyError if it holds none."""
        return self._holdings[owner].pages

    def generation(self, site: int, page: int) -> int:
        """How often the page has been handed out: while a launched step names it, it must not
        change."""
        return self._generations[site][page]

    def owners(self) -> tuple[str, ...]:
        """All owners, oldest first."""
        return tuple(self._holdings)

    def pin(self, owner: str) -> None:
        """Count one more user of ``owner``'s pages; KeyError if it holds none."""
        self._holdings[owner].pins += 1

    def unpin(self, owner: str) -> None:
        """Take back one ``pin``.

        Raises:
            ValueError: there is none to take back.
        """
        holding = self._holdings[owner]
        if holding.pins == 0:
            raise ValueError(f"{owner!r} is not pinned")
        holding.pins -= 1

    def pins(self, owner: str) -> int:
        """Users of ``owner``'s pages."""
        return self._holdings[owner].pins

    def free(self, owner: str) -> None:
        """Take back all pages of ``owner``; KeyError if it holds none.

        Raises:
            ValueError: ``owner`` is pinned.
        """
        holding = self._holdings[owner]
        if holding.pins:
            raise ValueError(f"{owner!r} is in use by {holding.pins}; its pages cannot be freed")
        del self._holdings[owner]
        for free, pages in zip(self._free, holding.pages, strict=True):
            free.extend(reversed(pages))

    def check_integrity(self) -> None:
        """AssertionError unless every page is free or held, exactly once."""
        for site, name in enumerate(SITES):
            held = [page for h in self._holdings.values() for page in h.pages[site]]
            seen = sorted(held + self._free[site])
            assert seen == list(range(self.num_pages[site])), (
                f"site {name}: pages free or held are {seen}, "
                f"expected each of {self.num_pages[site]} once"
            )
        assert all(holding.pins >= 0 for holding in self._holdings.values())


def join_lora_set(
    parts: Sequence[tuple[SitePages, float]], key: str, extras: AdapterExtras | None = None
) -> LoRASet:
    """The LoRA set Σ weight · ΔW of adapters given by their pages.

    Args:
        parts: (pages, weight) of each adapter; weight 0 parts add nothing and are left out.
        key: names the content, see ``LoRASet.key``.
        extras: see ``LoRASet.extras``.
    """
    return LoRASet(
        pages=tuple(
            tuple((page, weight) for pages, weight in parts if weight for page in pages[site])
            for site in range(len(SITES))
        ),
        key=key,
        extras=extras,
    )
