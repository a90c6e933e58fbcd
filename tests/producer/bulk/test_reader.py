import io

from hypothesis import given
from hypothesis import strategies as st

from producer.bulk import reader
from producer.bulk.reader import MAX_LINE_BYTES, RawLine, read_piece


def read_all(file, max_lines=100, max_bytes=1 << 20):
    lines, offset, number, pieces = [], 0, 1, 0
    while True:
        piece = read_piece(file, offset, number, max_lines=max_lines, max_bytes=max_bytes)
        lines += piece.lines
        offset, number, pieces = piece.offset, piece.line, pieces + 1
        if piece.at_end:
            return lines, number, pieces


@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\n\r\ufeff"), max_size=20),
        max_size=30,
    ),
    ends=st.booleans(),
    max_lines=st.integers(1, 5),
    max_bytes=st.integers(1, 40),
)
def test_pieces_together_are_the_lines_of_the_file(texts, ends, max_lines, max_bytes):
    data = "\n".join(texts).encode() + (b"\n" if ends else b"")
    lines, _, _ = read_all(io.BytesIO(data), max_lines, max_bytes)
    expected = [
        (number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()
    ]
    assert [(line.number, line.data) for line in lines] == expected


def test_a_cut_off_last_line_counts():
    lines, next_number, _ = read_all(io.BytesIO(b'{"a":1}\r\n\r\n{"a"'))
    assert [(line.number, line.data) for line in lines] == [(1, b'{"a":1}'), (3, b'{"a"')]
    assert next_number == 4


def test_the_mark_with_which_editors_begin_a_file_is_no_part_of_its_first_line():
    mark = "\ufeff".encode()
    lines, _, _ = read_all(io.BytesIO(mark + b'{"a":1}\n' + mark + b"{}\n"), max_lines=1)
    assert [line.data for line in lines] == [b'{"a":1}', mark + b"{}"]
    assert read_all(io.BytesIO(mark + b"\n{}"))[0] == [RawLine(2, b"{}", 2)]


def test_a_piece_has_its_end_where_nothing_but_blank_lines_come():
    piece = read_piece(io.BytesIO(b"\n" * 1000), 0, 1, max_lines=100, max_bytes=300)
    assert (piece.lines, piece.offset, piece.line, piece.at_end) == ((), 300, 301, False)


class Endless(io.BytesIO):
    """Says how much of it was asked for at once."""

    most = 0

    def readline(self, size=-1):
        line = super().readline(size)
        self.most = max(self.most, len(line))
        return line


def test_a_line_over_the_limit_is_passed_over_without_being_held(monkeypatch):
    monkeypatch.setattr(reader, "_SKIP_BYTES", 1 << 16)
    long = b"x" * (10 * MAX_LINE_BYTES)
    file = Endless(b"1\n" + long + b"\n" + b"y" * MAX_LINE_BYTES + b"\n4\n" + long)
    lines, _, _ = read_all(file)
    assert lines == [
        RawLine(1, b"1", 2),
        RawLine(2, None, len(long) + 1),
        RawLine(3, b"y" * MAX_LINE_BYTES, MAX_LINE_BYTES + 1),
        RawLine(4, b"4", 2),
        RawLine(5, None, len(long)),
    ]
    assert file.most <= MAX_LINE_BYTES + 2


def test_an_empty_file_is_one_piece_without_lines():
    assert read_all(io.BytesIO(b"")) == ([], 1, 1)
