"""What is sent for an input: JSON lines as they are, tables as lines, nothing held."""

import hashlib
import io
import json
import os

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from openlora.commands import batch_input
from openlora.commands.batch_input import open_input
from openlora.errors import InvalidRequest
from producer.bulk.lines import Rules, parse_line
from producer.bulk.reader import MAX_LINE_BYTES, RawLine


def sent(path, column="prompt"):
    with open_input(str(path), column) as source:
        data = source.read()
        assert source.sha256 == hashlib.sha256(data).hexdigest()
        return data


def lines(path, column="prompt"):
    return [json.loads(line) for line in sent(path, column).splitlines()]


def test_json_lines_are_sent_as_they_are(tmp_path):
    data = b'{"prompt":"a"}\r\nbroken\n\n' + b"x" * 1_000_000
    (tmp_path / "in.jsonl").write_bytes(data)
    assert sent(tmp_path / "in.jsonl") == data
    with open_input(str(tmp_path / "in.jsonl"), "prompt") as source:
        parts = list(iter(lambda: source.read(1000), b""))
    assert b"".join(parts) == data
    assert max(map(len, parts)) == 1000


def test_a_url_is_opened_by_fsspec():
    with fsspec.open("memory://dir/in.jsonl", "wb") as file:
        file.write(b'{"prompt":"a"}\n')
    assert sent("memory://dir/in.jsonl") == b'{"prompt":"a"}\n'
    with pytest.raises(InvalidRequest, match="cannot be read"):
        sent("nonsense://x/in.jsonl")


class Refused(Exception):
    """An error of a storage package's own kind."""


class Bucket(fsspec.AbstractFileSystem):
    """Storage that refuses where the path says."""

    protocol = "bucket"

    def _open(self, path, mode="rb", **options):
        if path.startswith("open"):
            raise Refused("no credentials")
        return Broken()


class Broken(io.BytesIO):
    def read(self, size=-1):
        raise Refused("no network")


@pytest.mark.parametrize(("at", "reason"), [("open", "no credentials"), ("read", "no network")])
def test_what_a_storage_package_says_is_told(at, reason):
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    with pytest.raises(InvalidRequest, match=f"cannot be read: Refused: {reason}"):
        sent(f"bucket://{at}/in.jsonl")


def test_a_table_is_read_by_column(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text(
        "\ufeffquestion,adapter,max_tokens,temperature,note\n"
        '"a, ""b""\nc",pirate,5,0.5,x\n'
        "d,,many,,\n"
        "e\n",
        encoding="utf-8",
    )
    assert lines(path, "question") == [
        {"prompt": 'a, "b"\nc', "adapter": "pirate", "max_tokens": 5, "temperature": 0.5},
        {"prompt": "d", "max_tokens": "many"},
        {"prompt": "e"},
    ]
    with pytest.raises(InvalidRequest, match="question, adapter"):
        sent(path)


def test_parquet_is_read_by_column(tmp_path):
    table = pyarrow.table({"prompt": ["a", None], "adapter": ["x", None], "seed": [3, None]})
    parquet.write_table(table, tmp_path / "in.parquet")
    assert lines(tmp_path / "in.parquet") == [
        {"prompt": "a", "adapter": "x", "seed": 3},
        {"prompt": None},
    ]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(InvalidRequest, match="Parquet"):
        sent(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    "long",
    [
        b"x" * 3_000_000,
        b'"' + b"x" * 3_000_000 + b'",b',
        b'"' + b"x, " * 1_000_000 + b'\n end",b',
        b"x" * 2_000_000 + b',"two\nlines"',
        b'"' + b'""' * 1_500_000 + b'"',
    ],
)
def test_a_row_that_is_too_long_is_cut_and_the_rest_goes_on(tmp_path, long):
    (tmp_path / "in.csv").write_bytes(b"prompt,adapter\nfirst,a\n" + long + b"\nlast,c\n")
    first, cut, last = sent(tmp_path / "in.csv").splitlines()
    assert json.loads(first) == {"prompt": "first", "adapter": "a"}
    assert MAX_LINE_BYTES < len(cut) < 2 * MAX_LINE_BYTES  # so the server says: too long
    assert json.loads(last) == {"prompt": "last", "adapter": "c"}


def test_a_row_that_is_no_utf8_is_sent_as_it_is(tmp_path):
    (tmp_path / "in.csv").write_bytes(b"prompt\nfirst\n\xff\xfe\nl\xc3\xa4st\n")
    _, bad, last = sent(tmp_path / "in.csv").splitlines()
    assert bad == b'{"prompt": "\xff\xfe"}'
    assert json.loads(last) == {"prompt": "läst"}
    with pytest.raises(InvalidRequest):
        parse_line(RawLine(2, bad, len(bad)), Rules())


def test_a_table_that_cannot_be_read_is_said_with_its_line(tmp_path):
    # a quote that nobody closes: where the row was to end, nobody knows
    (tmp_path / "in.csv").write_bytes(b'prompt\nok\n"' + b"x\n" * 1_000_000)
    with pytest.raises(InvalidRequest, match="line"):
        sent(tmp_path / "in.csv")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n' * 40_000)
    for change in (
        lambda: path.open("ab").write(b"more"),
        lambda: os.utime(path, ns=(1, 1)),
        lambda: os.replace(_copy(path), path),
    ):
        with open_input(str(path), "prompt") as source:
            source.read(10)
            change()
            with pytest.raises(
                InvalidRequest, match="changed while it was read, around line 40001"
            ):
                source.read()


def _copy(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    return other


def test_what_is_not_there_cannot_be_read(tmp_path):
    with pytest.raises(InvalidRequest, match="cannot be read"):
        sent(tmp_path / "none.jsonl")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        sent(tmp_path)


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "in.csv"
    path.write_text("prompt\n" + "a\n" * 1000)
    seen = []
    plain = batch_input._line
    monkeypatch.setattr(batch_input, "_line", lambda row, c: seen.append(1) or plain(row, c))
    with open_input(str(path), "prompt") as source:
        source.read(1)
        assert len(seen) == 1
