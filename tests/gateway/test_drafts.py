"""Drafts: what may be asked, what it becomes as a job."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.drafts import (
    GenerateRequest,
    JobDraft,
    Params,
    draft_of,
    job_of,
)
from openlora.errors import InvalidRequest
from openlora.protocol.jobs import MERGE_METHODS, AdapterRef, Merge, Message
from openlora.protocol.requests import MAX_ADAPTERS, MAX_MESSAGES, AdapterChoice
from openlora.sampling_params import SamplingParams


def request(**fields: Any) -> GenerateRequest:
    return msgspec.convert({"prompt": "x"} | fields, GenerateRequest)


def chat(*messages: tuple[str, str]) -> GenerateRequest:
    return GenerateRequest(messages=tuple(Message(*message) for message in messages))


def job(draft: JobDraft, **fields: Any) -> Any:
    known = {"job_id": "ab", "tenant": "t", "created_ms": 1000, "seed": 9, "adapters": ()}
    return job_of(draft, **(known | fields))


def test_the_wire_has_the_fields_and_defaults_of_sampling_params() -> None:
    ours = {field.name: field.default for field in msgspec.structs.fields(Params)}
    theirs = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert ours == theirs


def test_one_adapter_is_a_mix_of_one_with_weight_1() -> None:
    assert draft_of(request(adapter="pirate")).adapters == (AdapterChoice("pirate", 1.0),)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (GenerateRequest(), "neither of messages and prompt"),
        (GenerateRequest(prompt="x", messages=(Message("user", "y"),)), "both of messages"),
        (GenerateRequest(messages=()), "messages has 0 entries"),
        (GenerateRequest(messages=(Message("user", "y"),) * (MAX_MESSAGES + 1)), "1025 entries"),
        (GenerateRequest(prompt=""), "prompt is empty"),
        (chat(("user", "")), "messages[0].content is empty"),
        (chat(("user", "x"), ("wizard", "y")), "messages[1].role is 'wizard'"),
        (request(adapter="a", adapters=[{"id": "b"}]), "both of adapter and adapters"),
        (request(adapter="../etc"), "'../etc' is not valid"),
        (request(adapter=""), "'' is not valid"),
        (request(adapters=[{"id": "a" * 200}]), "is not valid"),
        (request(adapters=[{"id": f"a{i}"} for i in range(MAX_ADAPTERS + 1)]), "9 entries"),
        (request(adapters=[{"id": "a"}, {"id": "a"}]), "names 'a' twice"),
        (request(adapters=[{"id": "a", "weight": float("nan")}]), "adapters[0].weight is nan"),
        (request(adapters=[{"id": "a", "weight": float("inf")}]), "weight is inf"),
        (request(adapters=[{"id": "a", "weight": 1e9}]), "weight is 1000000000.0"),
        (request(adapter="a@0"), "'a@0' pins no version"),
        (request(adapters=[{"id": "a@new"}]), "'a@new' pins no version"),
        (request(merge={"method": "mean"}), "'mean'; use one of cat, linear"),
        (request(merge={"density": 0.5}), "density set, which 'cat' does not use"),
        (request(merge={"method": "svd", "seed": 1}), "seed set, which 'svd' does not use"),
        (request(merge={"method": "ties"}), "'ties' needs a density"),
        (request(merge={"method": "ties", "density": 0}), "density is 0"),
        (request(merge={"method": "ties", "density": float("nan")}), "density is nan"),
        (request(merge={"method": "ties", "density": 1, "seed": 3}), "seed set"),
        (request(merge={"majority_sign": "most"}), "majority_sign is 'most'"),
        (
            request(merge={"method": "dare_linear", "density": 1, "majority_sign": "frequency"}),
            "majority_sign set",
        ),
        (request(merge={"method": "dare_ties", "density": 1, "seed": -1}), "seed is -1"),
        (request(deadline_s=0), "deadline_s is 0"),
        (request(deadline_s=-1), "deadline_s is -1"),
        (request(idempotency_key=""), "idempotency_key has 0"),
        (request(idempotency_key="k" * 300), "idempotency_key has 300"),
        (request(params={"max_tokens": 0}), "max_tokens is 0"),
        (request(params={"temperature": -0.1}), "temperature is -0.1"),
        (request(params={"stop": [""]}), "stop string"),
        (request(params={"logprobs": 99}), "logprobs is 99"),
        (request(params={"seed": -1}), "seed is -1"),
        (request(params={"top_k": 10**30}), "top_k is 1000"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_field_and_value(
    wrong: GenerateRequest, words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        draft_of(wrong)
    assert words in caught.value.message


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_every_merge_has_settings_that_are_taken(method: str) -> None:
    merge: dict[str, Any] = {"method": method}
    if any(word in method for word in ("ties", "dare", "prune")):
        merge["density"] = 0.5
    if "ties" in method:
        merge["majority_sign"] = "frequency"
    if "dare" in method:
        merge["seed"] = 7
    asked = request(adapters=[{"id": "a@3"}, {"id": "b", "weight": -1}], merge=merge)
    draft = draft_of(asked)
    assert draft.merge == Merge(**merge)
    assert draft.adapters[0] == AdapterChoice("a@3")


def test_an_assistant_that_answered_nothing_may_be_sent_back() -> None:
    draft = draft_of(chat(("user", "x"), ("assistant", ""), ("user", "y")))
    assert draft.messages is not None
    assert len(draft.messages) == 3


def test_a_job_has_an_absolute_deadline_and_always_a_seed() -> None:
    made = job(draft_of(request(deadline_s=1.5)))
    assert made.deadline_ms == 2500
    assert made.params.seed == 9
    assert job(draft_of(request(params={"seed": 4}))).params.seed == 4
    assert job(draft_of(request())).deadline_ms is None


def test_only_interactive_jobs_need_somebody_who_watches() -> None:
    assert job(draft_of(request())).leased
    assert not job(draft_of(request(priority="batch"))).leased


def test_a_job_carries_what_was_resolved() -> None:
    refs = (AdapterRef("a", 3, "f" * 64, 0.5),)
    made = job(draft_of(request(adapters=[{"id": "a", "weight": 0.5}])), adapters=refs)
    assert made.adapters == refs
    assert made.merge == Merge()


@given(
    st.fixed_dictionaries(
        {
            "prompt": st.text(min_size=1),
            "priority": st.sampled_from(["interactive", "batch"]),
            "deadline_s": st.none() | st.floats(0.1, 100),
            "params": st.fixed_dictionaries(
                {"max_tokens": st.integers(1, 99), "seed": st.none() | st.integers(0, 9)}
            ),
        }
    )
)
def test_the_digest_tells_bodies_apart_and_ignores_the_key(body: dict[str, Any]) -> None:
    plain = draft_of(request(**body))
    assert draft_of(request(**body, idempotency_key="k")).digest == plain.digest
    other = draft_of(request(**(body | {"prompt": body["prompt"] + "!"})))
    assert other.digest != plain.digest
