"""The bulk benchmark's judgement: a line that is lost, doubled, changed or failed is told."""

from __future__ import annotations

import json

import pytest

from openlora.bench.bulk_lines import Expected, Lines
from openlora.bench.pipeline_model import write_tokenizer

LINES = Lines(count=7, adapters=3, tokens=4)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return Expected(LINES, write_tokenizer(tmp_path_factory.mktemp("model")))


@pytest.fixture
def results(expected):
    return [expected.result(line) for line in range(1, 8)]


def test_the_input_names_what_is_expected(expected, tmp_path):
    lines = [json.loads(line) for line in LINES.write(tmp_path / "in").read_bytes().splitlines()]
    assert len(lines) == 7
    for number, line in enumerate(lines, start=1):
        result = json.loads(expected.result(number))
        assert result["adapter"] == line["adapter"]
        assert result["usage"]["completion_tokens"] == line["max_tokens"]


def test_complete_results_are_clean(expected, results):
    verdict = expected.check(results)
    assert verdict.is_clean
    assert verdict.results == 7


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda r: r.pop(3), "lost"),
        (lambda r: r.append(r[2]), "doubled"),
        (lambda r: r.__setitem__(0, r[0].replace(b"w", b"v")), "changed"),
        (lambda r: r.insert(0, r.pop()), "changed"),
        (lambda r: r.__setitem__(4, b'{"line":5,"error":{"code":"internal"}}'), "failed"),
    ],
)
def test_what_is_wrong_is_counted_and_shown(expected, results, spoil, kind):
    spoil(results)
    verdict = expected.check(results)
    assert not verdict.is_clean
    assert getattr(verdict, kind) >= 1
    assert verdict.wrong[0].startswith(kind)
