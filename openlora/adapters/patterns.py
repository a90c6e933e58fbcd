"""Regular expressions out of adapter files: matched only where that is sure to be quick.

PEFT takes regular expressions in ``target_modules``, ``rank_pattern`` and ``alpha_pattern``. They
come from whoever made the adapter, and Python's ``re`` can be made to run for ever.
"""

from __future__ import annotations

import re

from openlora.errors import AdapterFailed

MAX_PATTERN_CHARS = 1000
MAX_REPEATS = 6
"""Unbounded repeats in one pattern; module names are short, so their product stays small."""

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[:=!]|[()|*+?]|\{\d*,?\d*\}|.", re.DOTALL)


def compile_pattern(pattern: str, field: str, before: str = "", after: str = "") -> re.Pattern[str]:
    """``pattern`` compiled, between what its field's meaning puts ``before`` and ``after`` it.

    Raises:
        AdapterFailed: it is too long, no regular expression, or could take exponential time: a
            repeated group that holds a repeat or alternatives, or many unbounded repeats.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise AdapterFailed(
            f"{field} has a pattern of {len(pattern)} characters; at most {MAX_PATTERN_CHARS}"
        )
    shown = pattern if len(pattern) <= 100 else pattern[:100] + "…"
    if not _is_quick(pattern):
        raise AdapterFailed(
            f"{field}: pattern {shown!r} could take very long to match; "
            "list the module names instead"
        )
    try:
        alone = re.compile(pattern)
        # Alone first: what is unbalanced must not be closed by what stands around it.
        return re.compile(f"{before}(?:{pattern}){after}") if before or after else alone
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterFailed(f"{field}: {shown!r} is no regular expression: {error}") from error


def _is_quick(pattern: str) -> bool:
    repeats = 0
    risky_groups = [False]  # per open group: does it hold a repeat or alternatives?
    closed_risky = False  # was the item just read a group that does?
    for token in _TOKEN.findall(pattern):
        if token.startswith("("):
            risky_groups.append(False)
            closed_risky = False
        elif token == ")":
            if len(risky_groups) == 1:
                return True  # unbalanced: compiling says so
            closed_risky = risky_groups.pop()
            risky_groups[-1] |= closed_risky
        elif token in ("*", "+") or (token.startswith("{") and len(token) > 1):
            if closed_risky:
                return False
            repeats += 1
            risky_groups[-1] = True
        else:
            closed_risky = closed_risky and token == "?"
            if token == "|":
                risky_groups[-1] = True
    return repeats <= MAX_REPEATS
