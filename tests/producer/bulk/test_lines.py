import json

import pytest

from openlora.errors import InvalidRequest, PayloadTooLarge, UnknownAdapter, UnknownModel
from openlora.protocol.bulk import LineParams
from openlora.protocol.jobs import AdapterRef, Message
from openlora.protocol.status import AdapterRecord
from producer.bulk.lines import Rules, custom_id_of, parse_line, shape_of
from producer.bulk.openai_body import CHAT_URL, TEXT_URL
from producer.bulk.reader import RawLine

RECORDS = {name: AdapterRecord(name, 3, name * 4, 8, (), "", 1, "", 1) for name in ("a", "b")}
RULES = Rules(find=RECORDS.get, base_models=("base",))


def raw(line, number=7):
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    return RawLine(number, data, len(data))


def chat(**body):
    messages = [{"role": "user", "content": "hi"}]
    return {
        "custom_id": "x",
        "method": "POST",
        "url": CHAT_URL,
        "body": {"model": "base", "messages": messages, **body},
    }


def text(**body):
    return {**chat(), "url": TEXT_URL, "body": {"model": "a", "prompt": "p", **body}}


def test_a_plain_line():
    parsed = parse_line(raw({"prompt": "p", "adapter": "a", "max_tokens": 5, "seed": 4}), RULES)
    assert parsed.group.adapters == (AdapterRef("a", 3, "aaaa"),)
    assert parsed.line.params == LineParams(max_tokens=5, seed=4)
    assert (parsed.line.line, parsed.line.prompt, parsed.group.shape) == (7, "p", "plain")


def test_a_plain_line_may_hold_its_settings_in_params_and_several_adapters():
    adapters = [{"id": "a", "weight": 0.5}, {"id": "b"}]
    line = {"messages": [{"role": "user", "content": "q"}], "adapters": adapters}
    parsed = parse_line(raw({**line, "params": {"temperature": 0}}), RULES)
    assert [(ref.id, ref.weight) for ref in parsed.group.adapters] == [("a", 0.5), ("b", 1.0)]
    assert parsed.line.params.temperature == 0
    assert parsed.line.messages == (Message("user", "q"),)


def test_the_batchs_adapter_is_for_lines_that_name_none():
    rules = Rules(adapter="b", find=RECORDS.get, base_models=("base",))
    assert parse_line(raw({"prompt": "p"}), rules).group.adapters[0].id == "b"
    assert parse_line(raw({"prompt": "p", "adapter": "a"}), rules).group.adapters[0].id == "a"
    assert parse_line(raw(chat()), rules).group.adapters[0].id == "b"
    assert parse_line(raw(chat(model="a")), rules).group.adapters[0].id == "a"


def test_openai_lines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(
        messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": None}],
        max_completion_tokens=9,
        stop="END",
        top_p=None,
        user="me",
    )
    parsed = parse_line(raw(body), RULES)
    assert parsed.line.messages == (Message("user", "ab"), Message("assistant", ""))
    assert parsed.line.params == LineParams(max_tokens=9, stop=("END",))
    assert (parsed.group.shape, parsed.group.model) == ("chat", "base")
    text = {"custom_id": "x", "method": "POST", "url": TEXT_URL}
    parsed = parse_line(raw({**text, "body": {"model": "a", "prompt": "p"}}), RULES)
    assert (parsed.group.shape, parsed.line.prompt, parsed.group.adapters[0].id) == (
        "text",
        "p",
        "a",
    )


@pytest.mark.parametrize(
    ("line", "logprobs", "chosen_only"),
    [
        ({"prompt": "p", "logprobs": 3}, 3, False),
        (chat(logprobs=True), 1, True),
        (chat(logprobs=True, top_logprobs=5), 5, False),
        (chat(logprobs=False), 0, False),
        (
            {**chat(), "url": TEXT_URL, "body": {"model": "a", "prompt": "p", "logprobs": 0}},
            1,
            True,
        ),
        (
            {**chat(), "url": TEXT_URL, "body": {"model": "a", "prompt": "p", "logprobs": 2}},
            2,
            False,
        ),
    ],
)
def test_logprobs(line, logprobs, chosen_only):
    found = parse_line(raw(line), RULES).line
    assert (found.params.logprobs, found.chosen_only) == (logprobs, chosen_only)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": ', "truncated"),
        (b"\xff\xfe", "no valid request"),
        (b"[" * 100_000, "no valid request"),
        (b"[]", "Expected `object`"),
        ({}, "neither of prompt and messages"),
        ({"prompt": "p", "messages": [{"role": "user", "content": "q"}]}, "both of prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "p", "color": 1}, "color"),
        ({"prompt": "p", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "p", "temperature": "hot"}, "temperature"),
        ({"prompt": "p", "max_tokens": 3, "params": {"seed": 1}}, "one place"),
        ({"prompt": "p", "adapter": "a", "adapters": [{"id": "b"}]}, "both of adapter"),
        ({"prompt": "p", "adapters": [{"id": "a"}, {"id": "a"}]}, "twice"),
        ({"prompt": "p", "adapters": [{"id": "a", "weight": 1e9}]}, "weight"),
        ({"prompt": "p", "custom_id": ""}, "custom_id"),
        ({"prompt": "p", "custom_id": "x" * 600}, "custom_id"),
        ({"messages": [{"role": "king", "content": "q"}]}, "role"),
        ({"messages": []}, "messages has 0"),
        (chat(n=2), "n is 2"),
        (chat(stream=True), "stream"),
        (chat(tools=[]), "tools"),
        (chat(max_tokens=1, max_completion_tokens=1), "both of max_tokens"),
        (chat(top_logprobs=2), "needs logprobs: true"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs is 21"),
        ({"prompt": "p", "logprobs": 20, "max_tokens": 4096}, "lower one"),
        ({**chat(), "method": "GET"}, "method"),
        ({**chat(), "url": "/v1/embeddings"}, "url"),
        ({**chat(), "extra": 1}, "extra"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line, words):
    with pytest.raises(InvalidRequest) as caught:
        parse_line(raw(line), RULES)
    assert words in caught.value.message


def test_unknown_names():
    with pytest.raises(UnknownAdapter):
        parse_line(raw({"prompt": "p", "adapter": "nobody"}), RULES)
    with pytest.raises(InvalidRequest):
        parse_line(raw({"prompt": "p", "adapter": "../x"}), RULES)
    with pytest.raises(UnknownModel):
        parse_line(raw(chat(model="nothing")), RULES)


def test_a_line_that_was_not_kept_is_too_large():
    with pytest.raises(PayloadTooLarge):
        parse_line(RawLine(3, None, 10**10), RULES)
    assert custom_id_of(RawLine(3, None, 10**10)) is None


def test_a_batch_of_one_endpoint_takes_its_lines_alone():
    rules = Rules(endpoint=TEXT_URL, find=RECORDS.get, base_models=("base",))
    with pytest.raises(InvalidRequest, match="url"):
        parse_line(raw(chat()), rules)


def test_the_form_of_a_wrong_line_is_found_where_it_can_be():
    assert shape_of(raw(chat(n=2)), RULES) == "chat"
    assert shape_of(raw({"prompt": 1}), RULES) == "plain"
    assert shape_of(raw(b"{"), RULES) == "plain"
    assert shape_of(raw(b"{"), Rules(endpoint=CHAT_URL)) == "chat"
    assert custom_id_of(raw(chat(n=2))) == "x"
    assert custom_id_of(raw(b"{")) is None
