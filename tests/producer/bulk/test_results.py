import json

import pytest

from openlora.errors import InvalidRequest
from openlora.protocol.bulk import BulkAnswer, BulkAnswers, BulkGroup
from openlora.protocol.events import Candidate, Failure, Token
from openlora.protocol.jobs import AdapterRef
from producer.bulk import results
from producer.bulk.files import is_failed
from producer.bulk.records import RANGE_LINES
from producer.bulk.results import Result, SegmentReader, answered, refused, write_segment


def bundle(shape, *answers):
    group = BulkGroup(shape, "m", (AdapterRef("a", 1, "h"),))
    return BulkAnswers("batch_1", "hash", group, answers)


def test_failures_are_told_from_answers_whatever_they_say():
    tricky = '"error":{"code":"x"} and "error":null'
    for shape in ("plain", "chat", "text"):
        good = BulkAnswer(1, text=tricky, finish_reason="stop")
        bad = BulkAnswer(2, custom_id=tricky, failure=Failure("internal", tricky * 100))
        first, second = answered(bundle(shape, good, bad), 5)
        assert not is_failed(first.data + b"\n")
        assert is_failed(second.data + b"\n")
        json.loads(first.data)
    assert is_failed(refused("b", "h", 3, "chat", None, InvalidRequest("no")).data)


def test_openai_results_have_openais_shape():
    answer = BulkAnswer(4, "c", "hi", "length", 3, 2)
    [result] = answered(bundle("chat", answer), 5)
    fields = json.loads(result.data)
    assert (fields["custom_id"], fields["error"], fields["response"]["status_code"]) == (
        "c",
        None,
        200,
    )
    body = fields["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hi"}
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    [other] = answered(BulkAnswers("batch_2", "hash", BulkGroup("chat"), (answer,)), 5)
    assert json.loads(other.data)["id"] != fields["id"]


def test_logprobs_have_the_shape_of_their_api():
    tokens = (
        Token(5, " hé", -0.5, (Candidate(5, " hé", -0.5), Candidate(6, "\ufffd", -1.5))),
        Token(7, "y", -0.25),
    )
    answer = BulkAnswer(4, "c", " héy", "stop", 3, 2, tokens=tokens)

    def told(shape):
        [result] = answered(bundle(shape, answer), 5)
        fields = json.loads(result.data)
        return fields["response"]["body"]["choices"][0]["logprobs"] if shape != "plain" else fields

    first, second = told("chat")["content"]
    assert first["bytes"] == [32, 104, 195, 169]
    assert [(other["token"], other["bytes"]) for other in first["top_logprobs"]] == [
        (" hé", [32, 104, 195, 169]),
        ("\ufffd", None),
    ]
    assert (second["token"], second["logprob"], second["top_logprobs"]) == ("y", -0.25, [])
    assert told("text") == {
        "tokens": [" hé", "y"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{" hé": -0.5, "\ufffd": -1.5}, {}],
        "text_offset": [0, 3],
    }
    assert told("plain")["logprobs"][1] == {
        "token_id": 7,
        "text": "y",
        "logprob": -0.25,
        "top_logprobs": [],
    }


@pytest.mark.parametrize("held_bytes", [results.HELD_BYTES, 0])
def test_segments_give_each_line_once_in_order(tmp_path, monkeypatch, held_bytes):
    monkeypatch.setattr(results, "HELD_BYTES", held_bytes)

    def write(name, *lines):
        write_segment(tmp_path, name, [Result(n, f"{name} {n}".encode()) for n in lines])

    write("unfinished-0", 1, 2, 3, RANGE_LINES + 1)
    write("answers-001", 3, 1, RANGE_LINES)
    write("answers-002", 1)
    write("refused-0", RANGE_LINES + 2)
    write("refused-1", 2 * RANGE_LINES)
    write("answers-003")
    reader = SegmentReader(tmp_path, 0, 2)
    assert list(reader.range(0)) == [b"answers-001 1\n", b"unfinished-0 2\n", b"answers-001 3\n"]
    assert [line.split()[1] for line in reader.range(1)] == [
        b"%d" % (RANGE_LINES + n) for n in range(3)
    ]
    assert list(reader.range(2)) == []
    assert (reader.holds(1), reader.holds(2)) == (True, False)  # not of those asked for
    assert len(list(SegmentReader(tmp_path, 2, 3).range(2))) == 1
    with pytest.raises(FileNotFoundError):
        SegmentReader(tmp_path / "none", 0, 2)


def test_equal_names_with_other_content_stand_beside_each_other(tmp_path):
    write_segment(tmp_path, "answers-0", [Result(1, b"a")])
    write_segment(tmp_path, "answers-0", [Result(1, b"a")])
    write_segment(tmp_path, "answers-0", [Result(2, b"b")])
    assert len(list(tmp_path.iterdir())) == 2
