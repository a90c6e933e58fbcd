"""A few wrong copies are kept, the newest ones."""

from __future__ import annotations

import os

from openlora.adapters.quarantine import MAX_KEPT, keep_aside


def copy_of(tmp_path, text: str):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "file").write_text(text)
    return copy


def test_the_newest_are_kept(tmp_path):
    places = []
    for number in range(MAX_KEPT + 2):
        copy = copy_of(tmp_path, str(number))
        os.utime(copy, (number, number))
        places.append(keep_aside(copy, tmp_path / "aside", f"name{number}"))
    assert [place.exists() for place in places] == [False] * 2 + [True] * MAX_KEPT
    assert (places[-1] / "file").read_text() == str(MAX_KEPT + 1)


def test_the_last_copy_of_a_name_stays(tmp_path):
    for text in ("first", "second"):
        place = keep_aside(copy_of(tmp_path, text), tmp_path / "aside", "name")
    assert (place / "file").read_text() == "second"


def test_a_place_that_cannot_be_had_ends_nothing(tmp_path):
    (tmp_path / "aside").write_text("a file")
    copy = copy_of(tmp_path, "x")
    assert not keep_aside(copy, tmp_path / "aside", "name").exists()
    assert copy.exists()
