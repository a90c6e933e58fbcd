"""Whether adapters can be resident together, and add up exactly; else why not. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from openlora.adapters.lora_set import SITES
from openlora.engine.adapter_entry import PIN, Adapter
from openlora.engine.residency import ResidentAdapters
from openlora.engine.sequence import Sequence as TokenSequence
from openlora.errors import AdapterFailed, InvalidRequest

MOST_OVER = 2.25
"""Times the pages that adapters may be wanted for and still take turns in them."""
TURN_SHARE = 8


def check_fit(adapters: Collection[Adapter], resident: ResidentAdapters) -> AdapterFailed | None:
    """Why these can never be in pages at the same time; None where they can."""
    names = " + ".join(repr(adapter.name) for adapter in adapters)
    extras_bytes = sum(adapter.extras_bytes for adapter in adapters)
    keys = [adapter.key for adapter in adapters]
    extras_room = resident.extras_room_for(keys)
    if extras_bytes > extras_room:
        beside = " beside pinned adapters" if extras_room < resident.extras_bytes else ""
        return AdapterFailed(
            f"weights of adapter {names} that are no low-rank pairs take {extras_bytes} bytes; at "
            f"most {extras_room} are kept{beside}"
        )
    counts = tuple(map(sum, zip(*(a.page_counts for a in adapters), strict=True)))
    room = resident.room_for(keys)
    if all(count <= have for count, have in zip(counts, room, strict=False)):
        return None
    is_pinned = tuple(room) != tuple(resident.num_pages)
    needs = ", ".join(
        f"{site}: {count} of {have}" for site, count, have in zip(SITES, counts, room, strict=True)
    )
    return AdapterFailed(
        f"adapter {names} takes more pages than the pool has"
        f"{' beside pinned adapters' if is_pinned else ''} ({needs}); give the engine a larger "
        f"adapter budget{', unpin some' if is_pinned else ''} or use a smaller rank"
    )


def fits(adapters: Collection[Adapter], resident: ResidentAdapters) -> bool | None:
    """Whether these could be in pages at the same time, if no others were in use; None where one
    of them has never been loaded."""
    if not all(adapter.page_counts for adapter in adapters):
        return None
    return check_fit(adapters, resident) is None


def misfit(
    sequence: TokenSequence,
    adapters: Sequence[tuple[Adapter, float]],
    resident: ResidentAdapters,
    vocab_size: int,
) -> AdapterFailed | InvalidRequest | None:
    """Why the sequence can never run with these adapters, all loaded before; None where it can."""
    fit = check_fit([adapter for adapter, _ in adapters], resident)
    return fit or check_exact(adapters) or check_tokens(sequence, adapters, vocab_size)


def turn_s(
    adapters: Sequence[Adapter], resident: ResidentAdapters, max_staged: int
) -> float | None:
    """Seconds in which no more than a ``TURN_SHARE``-th goes by with loads, where all that are in
    pages change places; None where all wanted ones together are more than ``MOST_OVER`` times the
    pages, or not in host memory beside each other.

    ``max_staged``: adapters of one page a site that it has room for.
    """
    known = [adapter.page_counts for adapter in adapters if adapter.page_counts]
    if not known:
        return None
    # Those that were never loaded count as the others do.
    counts = [sum(site) * len(adapters) / len(known) for site in zip(*known, strict=True)]
    room = [MOST_OVER * have for have in resident.num_pages]
    if max(counts) > max_staged or any(c > r for c, r in zip(counts, room, strict=True)):
        return None
    return TURN_SHARE * len(resident.keys) * resident.load_s


def any_misfit(adapters: Iterable[Adapter], resident: ResidentAdapters) -> bool:
    """Whether requests have adapters, of those that were loaded before, that can never be in pages
    at the same time."""
    by_user: dict[int, list[Adapter]] = {}
    for adapter in adapters:
        if adapter.page_counts:
            for user in adapter.users - {PIN}:
                by_user.setdefault(user, []).append(adapter)
    return any(check_fit(found, resident) is not None for found in by_user.values())


def check_exact(adapters: Sequence[tuple[Adapter, float]]) -> AdapterFailed | None:
    """Why these cannot be weighted and added up as they are; None where they can."""
    if [weight for _, weight in adapters] == [1.0]:
        return None
    for adapter, _ in adapters:
        if adapter.inexact:
            return AdapterFailed(
                f"adapter {adapter.name!r} has {adapter.inexact}, of which there is no exact "
                "weighted sum: it cannot be weighted or combined with others; use it alone, with "
                "weight 1"
            )
    return None


def check_tokens(
    sequence: TokenSequence, adapters: Sequence[tuple[Adapter, float]], vocab_size: int
) -> InvalidRequest | None:
    """Why its tokens are none of these adapters' vocabulary; None where they are.

    Only an adapter that is alone has tokens beyond the base model's ``vocab_size``.
    """
    num_known = vocab_size + max((adapter.num_added for adapter, _ in adapters), default=0)
    largest = max(sequence.token_ids)
    if largest < num_known:
        return None
    return InvalidRequest(
        f"token ID {largest} is not in the vocabulary: the base model and the request's adapters "
        f"have {num_known} tokens"
    )
