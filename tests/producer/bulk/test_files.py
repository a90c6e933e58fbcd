"""What the store keeps on its disk, and what it does not."""

from __future__ import annotations

import io
import os
import time

import pytest

from openlora.errors import FileNotFound
from producer.bulk.records import result_file_id
from tests.producer.bulk.stepwise import lines

pytestmark = pytest.mark.services


def test_a_removed_result_file_is_gone_from_the_disk_and_the_other_stays(producer):
    batch_id = producer.submit(lines(3) + b"nonsense\n")
    producer.run()
    producer.answer(batch_id, producer.sender.bundles)
    producer.steward.advance(batch_id)
    producer.run()
    folder = producer.store.folder(batch_id)
    answers, errors = (
        producer.store.get(result_file_id(batch_id, part), "t") for part in ("answers", "errors")
    )
    before = b"".join(producer.store.content(errors))
    producer.store.remove(answers)
    assert [result["line"] for result in producer.results(batch_id)] == [4]
    assert b"".join(producer.store.content(errors)) == before
    with pytest.raises(FileNotFound):
        producer.store.get(answers.id, "t")
    producer.store.remove(errors)
    assert not folder.path.exists()


def test_a_removed_input_is_gone_from_the_disk(producer):
    file = producer.store.put(io.BytesIO(b"x"), "t", "in.jsonl", "batch")
    assert producer.store.path(file).read_bytes() == b"x"
    producer.store.remove(file)
    assert list((producer.store.root / "files").iterdir()) == []
    producer.store.remove(file)  # as one does whose answer was lost


def test_what_a_killed_gateway_left_half_copied_goes_after_a_day(producer):
    def put():
        return producer.store.put(io.BytesIO(b"x"), "t", "in.jsonl", "batch").id

    kept = {put()}
    folder = producer.store.root / "files"
    for name, age_s in ((".file-new", 80_000), (".file-old", 90_000)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age_s,) * 2)
    kept.add(put())
    assert {path.name for path in folder.iterdir()} == kept | {".file-new"}
