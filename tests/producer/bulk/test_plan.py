import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from openlora.protocol.bulk import BulkGroup, BulkLine
from openlora.protocol.jobs import AdapterRef
from producer.bulk import plan as planning
from producer.bulk.blocks import Block, Index, read_block, read_index
from producer.bulk.chunks import chunk_records, records_of, write_chunk, write_ids
from producer.bulk.lines import Parsed
from producer.bulk.plan import plan_units, read_plan, repeated_ids, write_plan


def parsed(line, adapter="a", prompt="p"):
    group = BulkGroup("plain", "", (AdapterRef(adapter, 1, "h"),))
    return Parsed(group, BulkLine(line, prompt=prompt))


def test_a_chunk_keeps_its_lines_by_group(tmp_path):
    lines = [parsed(n, f"adapter{n % 7}", f"tab\t and\nnew line {n}") for n in range(1, 50)]
    write_chunk(tmp_path / "0", lines)
    records = list(chunk_records(tmp_path / "0"))
    assert sorted(line for _, line, _ in records) == list(range(1, 50))
    for group, line, data in records:
        assert json.loads(group)["adapters"][0]["id"] == f"adapter{line % 7}"
        assert json.loads(data)["prompt"] == f"tab\t and\nnew line {line}"
    index, _ = read_index(tmp_path / "0")
    for bucket in index.blocks:
        groups = [group for group, _, _ in records_of(read_block(tmp_path / "0", bucket))]
        assert groups == sorted(groups)
    assert read_block(tmp_path / "0", 9999) == b""


@given(
    st.lists(
        st.dictionaries(st.integers(0, 9), st.integers(1, 60), max_size=6), min_size=0, max_size=8
    )
)
def test_units_hold_every_slice_once_and_stay_small(chunks):
    indexes = [
        Index({bucket: Block(0, lines * 10, lines) for bucket, lines in chunk.items()})
        for chunk in chunks
    ]
    before = planning.UNIT_LINES
    planning.UNIT_LINES = 40
    try:
        plan = plan_units(indexes)
    finally:
        planning.UNIT_LINES = before
    slices = [where for unit in plan.units for where in unit.slices]
    assert Counter(slices) == Counter(
        (number, bucket) for number, chunk in enumerate(chunks) for bucket in chunk
    )
    buckets = [bucket for _, bucket in slices]
    assert buckets == sorted(buckets)
    for unit in plan.units:
        counts = [chunks[chunk][bucket] for chunk, bucket in unit.slices]
        assert sum(counts[:-1]) < 40


def test_a_plan_is_read_as_written(tmp_path):
    plan = plan_units([Index({3: Block(0, 1, 1)})])
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=10), max_size=5))
def test_all_but_the_first_of_an_id_are_repeated(tmp_path_factory, pieces):
    folder = tmp_path_factory.mktemp("ids")
    number, seen, expected, paths = 0, {}, {}, []
    for place, piece in enumerate(pieces):
        entries = []
        for custom_id in piece:
            number += 1
            entries.append((custom_id, number))
            if custom_id in seen:
                expected[number] = seen[custom_id]
            seen.setdefault(custom_id, number)
        paths.append(folder / str(place))
        write_ids(paths[-1], entries)
    assert dict(repeated_ids(paths)) == expected


def test_ids_are_read_in_parts(tmp_path):
    write_ids(tmp_path / "0", [(f"id{n}", n) for n in range(1, 2000)])
    write_ids(tmp_path / "1", [(f"id{n}", n + 5000) for n in range(1990, 2010)])
    assert len(dict(repeated_ids([tmp_path / "0", tmp_path / "1"]))) == 10
