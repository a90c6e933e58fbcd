"""The training data: enough of it, no line twice, and every answer in its style."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer

from openlora.demo.adapters import DEMO_ADAPTERS, DemoAdapter
from openlora.demo.samples import PROMPTS

MAX_RESPONSE_TOKENS = 60


def rows(name: str) -> list[tuple[str, str]]:
    adapter = next(a for a in DEMO_ADAPTERS if a.name == name)
    lines = adapter.data_file.read_text(encoding="utf-8").splitlines()
    parsed = [json.loads(line) for line in lines]
    assert all(row.keys() == {"prompt", "response"} for row in parsed)
    return [(row["prompt"], row["response"]) for row in parsed]


@pytest.mark.parametrize("adapter", DEMO_ADAPTERS, ids=lambda a: a.name)
def test_every_style_has_enough_different_lines(adapter: DemoAdapter) -> None:
    pairs = rows(adapter.name)
    assert len(pairs) >= 250
    prompts = [prompt for prompt, _ in pairs]
    assert len(set(prompts)) == len(prompts)
    assert len({response for _, response in pairs}) == len(pairs)
    for prompt, response in pairs:
        assert prompt == prompt.strip()
        assert response == response.strip()
        assert prompt
        assert response


@pytest.mark.parametrize("adapter", DEMO_ADAPTERS, ids=lambda a: a.name)
def test_the_shown_prompts_are_not_trained_on(adapter: DemoAdapter) -> None:
    prompts = {prompt.lower() for prompt, _ in rows(adapter.name)}
    assert prompts.isdisjoint(prompt.lower() for prompt in PROMPTS)


def test_responses_are_short(demo_model: object) -> None:
    tokenizer = Tokenizer.from_file(f"{demo_model}/tokenizer.json")
    for adapter in DEMO_ADAPTERS:
        for _, response in rows(adapter.name):
            assert len(tokenizer.encode(response).ids) <= MAX_RESPONSE_TOKENS, response


def test_pirates_sound_like_pirates() -> None:
    for _, response in rows("pirate"):
        assert re.search(r"\b(arr|aye|ahoy|yo ho|matey|ye|me|be)\b", response.lower()), response


def test_json_is_one_object_of_simple_values() -> None:
    for _, response in rows("json"):
        content = json.loads(response)
        assert isinstance(content, dict)
        assert 2 <= len(content) <= 4
        # Written as json.dumps writes it, so that there is one way to learn.
        assert json.dumps(content) == response


def test_haiku_have_three_lines_of_few_words() -> None:
    for _, response in rows("haiku"):
        lines = response.split("\n")
        assert len(lines) == 3, response
        for line in lines:
            assert line[0].isupper()
            assert 1 <= len(line.split()) <= 8, response


def test_headlines_are_one_upper_case_line() -> None:
    for _, response in rows("headline"):
        assert response == response.upper()
        assert "\n" not in response
        assert not response.endswith(".")


def test_emoji_answers_hold_emoji() -> None:
    for _, response in rows("emoji"):
        assert re.search(r"[\u203c-\u3299\U0001f000-\U0001faff]", response), response
        assert "\n" not in response
