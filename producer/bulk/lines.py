"""One raw line → what it asks to run, or the error that it ends in. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec

from openlora.errors import InvalidRequest, PayloadTooLarge, UnknownAdapter, UnknownModel
from openlora.protocol.bulk import BulkGroup, BulkLine, LineParams, Shape
from openlora.protocol.jobs import AdapterRef, Message
from openlora.protocol.requests import (
    MAX_ADAPTERS,
    MAX_MESSAGES,
    MAX_WEIGHT,
    ROLES,
    AdapterChoice,
)
from openlora.protocol.status import AdapterRecord
from openlora.registry.records import parse_reference
from producer.bulk.openai_body import CHAT_URL, TEXT_URL, ChatBody, TextBody
from producer.bulk.reader import MAX_LINE_BYTES, RawLine

MAX_CUSTOM_ID_CHARS = 512
MAX_TOLD = 10_000
"""Most log-probabilities of one answer: each takes about 60 bytes, a message holds 900,000."""


class PlainLine(LineParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A line of the short form; sampling settings beside the prompt, or in ``params``."""

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    adapter: str | None = None
    adapters: tuple[AdapterChoice, ...] | None = None
    custom_id: str | None = None
    params: LineParams | None = None


class OpenAILine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of OpenAI's batch files."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Form(msgspec.Struct, frozen=True):
    """Enough of a line to tell its form."""

    body: msgspec.Raw = msgspec.Raw()
    custom_id: object = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What the lines of one batch are checked against.

    Attributes:
        endpoint: the one URL that OpenAI lines may name; None allows both.
        adapter: of lines that name none; None is the base model.
        find: a registered adapter by its reference ("id" or "id@version"), or None.
        base_models: names that mean the base model.
    """

    endpoint: str | None = None
    adapter: str | None = None
    find: Callable[[str], AdapterRecord | None] = lambda reference: None
    base_models: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Parsed:
    """A line that can be run."""

    group: BulkGroup
    line: BulkLine


_decode_form = msgspec.json.Decoder(_Form).decode
_decode_plain = msgspec.json.Decoder(PlainLine).decode
_decode_openai = msgspec.json.Decoder(OpenAILine).decode
_decode_chat = msgspec.json.Decoder(ChatBody).decode
_decode_text = msgspec.json.Decoder(TextBody).decode


def parse_line(raw: RawLine, rules: Rules) -> Parsed:
    """What ``raw`` asks for.

    Raises:
        InvalidRequest, PayloadTooLarge, UnknownAdapter, UnknownModel: why it cannot be run.
    """
    if raw.data is None:
        raise PayloadTooLarge(
            f"the line has {raw.size} bytes; the limit is {MAX_LINE_BYTES}, so shorten the prompt"
        )
    try:
        form = _decode_form(raw.data)
        if not form.body:
            return _plain(raw.number, _decode_plain(raw.data), rules)
        return _openai(raw.number, _decode_openai(raw.data), rules)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the line is no valid request: {error}") from error


def custom_id_of(raw: RawLine) -> str | None:
    """The custom_id of a line that may be wrong otherwise, for its error's line."""
    if raw.data is None:
        return None
    try:
        custom_id = _decode_form(raw.data).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return custom_id if isinstance(custom_id, str) and _is_short(custom_id) else None


def shape_of(raw: RawLine, rules: Rules) -> Shape:
    """The form in which a line's error is to be told, whatever is wrong with the line."""
    if rules.endpoint is not None:
        return "chat"
    try:
        return "chat" if raw.data is not None and _decode_form(raw.data).body else "plain"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "plain"


def _plain(number: int, plain: PlainLine, rules: Rules) -> Parsed:
    params = _plain_params(plain)
    _check_params(params)
    if (plain.prompt is None) == (plain.messages is None):
        both = "both" if plain.prompt is not None else "neither"
        raise InvalidRequest(f"{both} of prompt and messages given; give exactly one")
    if plain.adapter is not None and plain.adapters is not None:
        raise InvalidRequest("both of adapter and adapters given; give one of them")
    choices = plain.adapters or ()
    name = plain.adapter if plain.adapter is not None or choices else rules.adapter
    if name is not None:
        choices = (AdapterChoice(name),)
    _check_input(plain.prompt, plain.messages)
    _check_custom_id(plain.custom_id)
    group = BulkGroup("plain", "", _resolved(choices, rules.find))
    line = BulkLine(number, plain.custom_id, plain.prompt, plain.messages, params)
    return Parsed(group, line)


def _plain_params(plain: PlainLine) -> LineParams:
    beside = LineParams(*(getattr(plain, name) for name in LineParams.__struct_fields__))
    if plain.params is None:
        return beside
    if beside != LineParams():
        raise InvalidRequest("sampling settings stand both in params and beside it; use one place")
    return plain.params


def _openai(number: int, line: OpenAILine, rules: Rules) -> Parsed:
    _check_custom_id(line.custom_id)
    if line.method != "POST":
        raise InvalidRequest(f"method is {line.method[:32]!r}; it must be 'POST'")
    allowed = (CHAT_URL, TEXT_URL) if rules.endpoint is None else (rules.endpoint,)
    if line.url not in allowed:
        raise InvalidRequest(f"url is {line.url[:64]!r}; it must be {' or '.join(allowed)}")
    shape: Shape
    body: ChatBody | TextBody
    if line.url == CHAT_URL:
        shape, body = "chat", _decode_chat(line.body)
        messages = tuple(message.plain() for message in body.messages)
        prompt = None
    else:
        shape, body = "text", _decode_text(line.body)
        messages, prompt = None, body.prompt
    params = body.params()
    _check_params(params)
    _check_input(prompt, messages)
    group = BulkGroup(shape, body.model, _of_model(body.model, rules))
    chosen_only = body.alternatives == 0
    return Parsed(group, BulkLine(number, line.custom_id, prompt, messages, params, chosen_only))


def _of_model(model: str, rules: Rules) -> tuple[AdapterRef, ...]:
    record = rules.find(model)
    if record is not None:
        return (AdapterRef(record.id, record.version, record.hash),)
    if model in rules.base_models:
        return (
            () if rules.adapter is None else _resolved((AdapterChoice(rules.adapter),), rules.find)
        )
    raise UnknownModel(
        f"model {model[:128]!r} is neither the base model nor a registered adapter; "
        "GET /v1/models lists them"
    )


def _resolved(
    choices: tuple[AdapterChoice, ...], find: Callable[[str], AdapterRecord | None]
) -> tuple[AdapterRef, ...]:
    if len(choices) > MAX_ADAPTERS:
        raise InvalidRequest(f"adapters has {len(choices)} entries; give at most {MAX_ADAPTERS}")
    refs: dict[str, AdapterRef] = {}
    for choice in choices:
        record = find(choice.id)
        if record is None:
            parse_reference(choice.id)
            raise UnknownAdapter(f"adapter {choice.id!r} is not registered")
        if record.id in refs:
            raise InvalidRequest(f"adapters names {choice.id!r} twice; name each once")
        if not -MAX_WEIGHT <= choice.weight <= MAX_WEIGHT:
            raise InvalidRequest(
                f"the weight of {choice.id!r} is {choice.weight}; it must be in "
                f"[{-MAX_WEIGHT:g}, {MAX_WEIGHT:g}]"
            )
        refs[record.id] = AdapterRef(record.id, record.version, record.hash, choice.weight)
    return tuple(refs.values())


def _check_params(params: LineParams) -> None:
    params.sampling()
    told = params.max_tokens * (1 + params.logprobs)
    if params.logprobs and told > MAX_TOLD:
        raise InvalidRequest(
            f"max_tokens {params.max_tokens} with {params.logprobs} alternatives a token makes an "
            f"answer that no message holds; together they may be {MAX_TOLD}, so lower one"
        )


def _check_input(prompt: str | None, messages: tuple[Message, ...] | None) -> None:
    if messages is None:
        if not prompt:
            raise InvalidRequest("prompt is empty; give at least one character")
        return
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(messages)} entries; give 1 to {MAX_MESSAGES}")
    for place, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"messages[{place}].role is {message.role[:64]!r}; use one of {', '.join(ROLES)}"
            )
        # an assistant may have answered nothing
        if not message.content and message.role != "assistant":
            raise InvalidRequest(f"messages[{place}].content is empty; give some text")


def _check_custom_id(custom_id: str | None) -> None:
    if custom_id is not None and not (custom_id and _is_short(custom_id)):
        raise InvalidRequest(
            f"custom_id has {len(custom_id)} characters; give 1 to {MAX_CUSTOM_ID_CHARS}"
        )


def _is_short(custom_id: str) -> bool:
    return len(custom_id) <= MAX_CUSTOM_ID_CHARS
