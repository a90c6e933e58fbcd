import msgspec
from hypothesis import given
from hypothesis import strategies as st

from producer.bulk.records import (
    STALL_MS,
    WINDOW_LINES,
    BatchRecord,
    BatchState,
    Change,
    Step,
    next_move,
)

RECORD = BatchRecord("batch_1", "t", "file-1", "hash", 100, 1, created_ms=0, expires_ms=1_000_000)


def state(**fields):
    return BatchState(record=RECORD, **fields)


def move(now_ms=1000, *, idle=False, **fields):
    return next_move(state(**fields), now_ms, nothing_pending=idle)


def running(**fields):
    return {"phase": "running", "total": 10_000, "units": 5, **fields}


def test_what_a_running_batch_needs():
    assert move(**running()) == Step("publish", 0)
    assert move(**running(unit=2, published=WINDOW_LINES, answered=0)) is None
    assert move(**running(unit=2, published=WINDOW_LINES, answered=9000)) == Step("publish", 2)
    assert move(**running(unit=5, published=10_000, answered=5)) is None
    assert move(**running(unit=5, done=10_000)).fields["phase"] == "assembling"
    assert move(**running(ending="cancelled")) == Change({"phase": "closing"})


def test_a_batch_expires_where_it_still_has_to_be_run():
    for phase in ("reading", "planning", "running"):
        assert not state(phase=phase).is_expired(999_999)
        assert state(phase=phase).is_expired(1_000_000)
        assert not state(phase=phase, ending="cancelled").is_expired(1_000_000)
    for phase in ("closing", "assembling", "over"):
        assert not state(phase=phase).is_expired(1_000_000)


def test_long_lines_narrow_the_window():
    fields = running(unit=1, published=1000, published_bytes=900_000_000, answered=900)
    assert move(**fields) is None
    assert move(**(fields | {"answered": 1000})) == Step("publish", 1)


def test_lines_that_nobody_has_are_published_again():
    fields = running(unit=3, units=3, published=10_000, answered=4, last_ms=5)
    assert move(STALL_MS, idle=True, **fields) is None
    assert move(STALL_MS + 6, idle=False, **fields) is None
    assert move(STALL_MS + 6, idle=True, **fields).fields["again"] == 0
    assert move(**(fields | {"again": 1})) == Step("publish", 1)
    assert move(**(fields | {"again": -1})) is None
    set_back = fields | {"last_ms": 10 * STALL_MS}
    assert move(5, idle=True, **set_back).fields["again"] == 0


def test_statuses_are_openais():
    assert state().status == "validating"
    assert state(ending="cancelled").status == "cancelling"
    assert state(phase="running").status == "in_progress"
    assert state(phase="closing", ending="expired").status == "finalizing"
    assert state(phase="assembling").status == "finalizing"
    assert state(phase="over").status == "completed"
    assert state(phase="over", ending="failed").status == "failed"


@given(
    chunks=st.integers(1, 4),
    units=st.integers(1, 4),
    lines=st.integers(1, 20_000),
    end_at=st.integers(0, 40),
    answers=st.lists(st.integers(1, 9000), max_size=40),
)
def test_every_batch_comes_to_its_end(chunks, units, lines, end_at, answers):
    """A simulation: whatever is answered when, and whenever it is cancelled."""
    now = state()
    answers = list(answers)
    for turn in range(200):
        if now.phase == "over":
            break
        if turn == end_at and now.phase in ("reading", "planning", "running"):
            now = msgspec.structs.replace(now, ending="cancelled")
        match next_move(now, 1000 + turn, nothing_pending=False):
            case Change(fields):
                now = msgspec.structs.replace(now, **fields)
            case Step("read", number):
                phase = "planning" if number + 1 == chunks else "reading"
                now = msgspec.structs.replace(
                    now, chunks=number + 1, phase=phase, total=lines, line=lines + 1
                )
            case Step("plan", _):
                now = msgspec.structs.replace(now, phase="running", units=units)
            case Step("publish", number):
                assert now.ending is None
                assert now.outstanding <= WINDOW_LINES
                more = lines // units if number + 1 < units else lines - now.published
                now = msgspec.structs.replace(now, unit=number + 1, published=now.published + more)
            case Step("close", number):
                now = msgspec.structs.replace(now, closed=number + 1)
            case Step("assemble", number):
                now = msgspec.structs.replace(now, part=number + 1)
            case Step("finish", _):
                assert now.part * 4096 >= now.line - 1
                assert now.ending is not None or now.done == lines
                now = msgspec.structs.replace(now, phase="over")
            case None:
                assert now.phase == "running"
                share = min(answers.pop() if answers else 20_000, now.outstanding)
                now = msgspec.structs.replace(
                    now, answered=now.answered + share, done=now.done + share
                )
    assert now.phase == "over"
