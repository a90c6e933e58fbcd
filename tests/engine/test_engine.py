"""The engine on a device that remembers what was written where."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlora.engine import Engine, Request, SamplingParams
from openlora.errors import (
    AdapterFailed,
    InternalError,
    InvalidRequest,
    PromptTooLong,
    UnknownAdapter,
)
from tests.engine.fake_device import (
    EOS,
    NAN_TOKEN,
    VOCAB_SIZE,
    expected_tokens,
    fake_engine,
)
from tests.engine.requests import ADAPTERS, drain, drain_one, ids, register_all, request


@st.composite
def workloads(draw):
    names = [a.split("-")[0] for a in ADAPTERS]
    prefix = draw(st.lists(st.integers(0, 20), min_size=8, max_size=12))
    jobs = []
    for _ in range(draw(st.integers(1, 10))):
        shared = draw(st.integers(0, len(prefix)))
        prompt = prefix[:shared] + draw(st.lists(st.integers(0, 20), min_size=1, max_size=14))
        chosen = draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
        jobs.append(
            (
                prompt,
                {name: draw(st.sampled_from([1.0, 0.5, -2.0])) for name in chosen},
                draw(st.integers(1, 14)),
                draw(st.sampled_from(["interactive", "batch"])),
                draw(st.integers(0, 3)),  # output tokens made elsewhere
                draw(st.integers(0, 6)),  # step at which it comes
                draw(st.sampled_from([None, None, None, 3, 6])),  # step at which it is aborted
            )
        )
    return jobs


def run_workload(engine: Engine, jobs) -> None:
    register_all(engine)
    counts = {a.split("-")[0]: [int(c) for c in a.split("-")[1:]] for a in ADAPTERS}
    wanted: dict[int, list[int]] = {}
    got: dict[int, list[int]] = {}
    rejected: set[int] = set()
    aborted: set[int] = set()
    ids_of: dict[int, int] = {}
    step = 0
    while step < 8 or engine.has_work():
        for number, (prompt, adapters, n, priority, resumed, at, _) in enumerate(jobs):
            if at != step:
                continue
            content = tuple(sorted(adapters.items()))
            full = expected_tokens(prompt, content, number, n)
            output = full[: min(resumed, n - 1)]
            total = [sum(c) for c in zip(*(counts[a] for a in adapters), strict=True)]
            try:
                request_id = engine.add(
                    request(prompt, n=n, seed=number, priority=priority, output=output, **adapters)
                )
            except AdapterFailed:
                assert max(total) > 4
                continue
            ids_of[number] = request_id
            wanted[request_id], got[request_id] = full, list(output)
            if max(total, default=0) > 4:
                rejected.add(request_id)
        for number, job in enumerate(jobs):
            if job[6] == step and number in ids_of:
                engine.abort(ids_of[number])
                aborted.add(ids_of[number])
        outputs = engine.step()
        engine.check_integrity()
        assert len({o.request_id for o in outputs}) == len(outputs)
        if not outputs:
            engine.wait_for_adapters(0.2)
        for output in outputs:
            if output.error is not None:
                assert output.request_id in rejected
                assert isinstance(output.error, AdapterFailed)
                continue
            assert output.index == len(got[output.request_id])
            got[output.request_id].append(output.token_id)
        step += 1
        assert step < 5000
    for request_id, tokens in wanted.items():
        if request_id in aborted:
            assert got[request_id] == tokens[: len(got[request_id])]
        elif request_id not in rejected:
            assert got[request_id] == tokens
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_for_adapter) == (0, 0, 0)
    assert stats.free_blocks == stats.num_blocks


@pytest.mark.parametrize("steps_ahead", [0, 1])
@given(
    jobs=workloads(),
    num_blocks=st.integers(10, 40),
    max_num_seqs=st.integers(1, 6),
    num_batched=st.integers(6, 40),
    prefix_caching=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_request_gets_the_tokens_it_gets_alone(
    steps_ahead, jobs, num_blocks, max_num_seqs, num_batched, prefix_caching
):
    engine, _ = fake_engine(
        num_blocks=num_blocks,
        steps_ahead=steps_ahead,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=num_batched,
        enable_prefix_caching=prefix_caching,
    )
    run_workload(engine, jobs)
    engine.close()


def test_prefix_cache_serves_an_equal_prompt_and_a_resumed_request():
    engine, device = fake_engine()
    prompt = list(range(20))
    first = drain_one(engine, request(prompt, n=9))
    device.launches.clear()
    assert drain_one(engine, request(prompt, n=9)) == first
    assert device.launches[0][0].start == 16
    device.launches.clear()
    assert drain_one(engine, request(prompt, n=9, output=first[:5])) == first[5:]
    assert device.launches[0][0].start == 24
    assert engine.stats().cached_tokens == 16 + 24


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    engine, device = fake_engine(max_num_batched_tokens=8, max_num_seqs=4)
    short = engine.add(request([1, 2], n=12))
    engine.step()
    long = engine.add(request(list(range(30)), n=2))
    outputs = drain(engine)
    assert len(outputs[short]) == 11
    assert ids(outputs[long]) == expected_tokens(range(30), (), 7, 2)
    assert max(sum(len(row.token_ids) for row in rows) for rows in device.launches) <= 8
    both = [rows for rows in device.launches if len(rows) == 2]
    assert [len(rows[1].token_ids) for rows in both[:5]] == [7, 7, 7, 7, 2]


def test_preempted_requests_go_on_where_they_were():
    engine, _ = fake_engine(num_blocks=8, max_num_seqs=4, enable_prefix_caching=False)
    wanted = {}
    for seed in range(4):
        prompt = [seed, 1, 2, 3, 4]
        added = engine.add(request(prompt, n=16, seed=seed))
        wanted[added] = expected_tokens(prompt, (), seed, 16)
    outputs = drain(engine)
    assert {i: ids(tokens) for i, tokens in outputs.items()} == wanted
    assert engine.stats().preemptions > 0


def test_eos_ends_a_request_unless_it_is_ignored(monkeypatch):
    monkeypatch.setattr("tests.engine.fake_device.next_token", lambda *_: EOS)
    engine, _ = fake_engine()
    first = engine.add(request([1], n=5))
    second = engine.add(Request([1], params=SamplingParams(max_tokens=5, ignore_eos=True)))
    outputs = drain(engine)
    assert [token.finish_reason for token in outputs[first]] == ["stop"]
    assert [token.finish_reason for token in outputs[second]] == [None] * 4 + ["length"]


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_the_context_ends_a_request(steps_ahead):
    engine, _ = fake_engine(max_model_len=10, steps_ahead=steps_ahead)
    outputs = drain(engine) if engine.add(request(list(range(7)), n=99)) else {}
    assert [token.finish_reason for token in outputs[1]] == [None, None, "length"]


def test_logits_that_are_not_finite_fail_their_request_alone():
    engine, _ = fake_engine()
    bad = engine.add(request([1, 2, 3, 4, NAN_TOKEN]))
    good = engine.add(request([1, 2, 3, 4, 5]))
    outputs = drain(engine)
    assert [type(token.error) for token in outputs[bad]] == [InternalError]
    assert ids(outputs[good]) == expected_tokens([1, 2, 3, 4, 5], (), 7, 8)
    assert engine.stats().free_blocks == engine.stats().num_blocks


def test_a_request_resumed_after_its_last_token_only_ends():
    engine, device = fake_engine()
    full = engine.add(request([1], n=3, output=[5, 6, 7]))
    stopped = engine.add(request([1], n=9, output=[5, EOS]))
    outputs = drain(engine)
    assert [(t.token_id, t.finish_reason) for t in outputs[full]] == [(None, "length")]
    assert [(t.token_id, t.finish_reason) for t in outputs[stopped]] == [(None, "stop")]
    assert not device.launches


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_abort_at_any_moment_frees_everything(steps_ahead):
    for moment in range(6):
        engine, _ = fake_engine(steps_ahead=steps_ahead)
        register_all(engine)
        request_id = engine.add(request(list(range(9)), rose=1.0))
        for _ in range(moment):
            engine.step()
            engine.wait_for_adapters(1)
        engine.abort(request_id)
        engine.abort(request_id)
        assert not any(drain(engine).values())
        assert engine.stats().free_blocks == engine.stats().num_blocks
        engine.close()


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (Request([]), InvalidRequest, "empty"),
        (Request([1, VOCAB_SIZE]), InvalidRequest, r"prompt_token_ids\[1\] is 500"),
        (Request([-1]), InvalidRequest, "is -1"),
        (Request([1.5]), InvalidRequest, "is 1.5"),
        (Request([1], output_token_ids=[VOCAB_SIZE]), InvalidRequest, "output_token_ids"),
        (Request([1] * 128), PromptTooLong, "128 tokens"),
        (Request([1] * 100, output_token_ids=[1] * 29), InvalidRequest, r"100 \+ 29"),
        (Request([1], {"rose": math.nan}), InvalidRequest, "weight nan"),
        (Request([1], {"rose": math.inf}), InvalidRequest, "weight inf"),
        (Request([1], {"tulip": 1.0}), UnknownAdapter, "'tulip'"),
        (Request([1], priority="urgent"), InvalidRequest, "'urgent'"),
    ],
)
def test_bad_requests_are_refused_and_leave_no_trace(bad, error, words):
    engine, _ = fake_engine()
    register_all(engine)
    good = engine.add(request([1]))
    with pytest.raises(error, match=words):
        engine.add(bad)
    assert drain(engine).keys() == {good}


def test_generate_keeps_the_tokens_of_other_requests():
    engine, _ = fake_engine()
    other = engine.add(request([3], n=20))
    done = []
    completions = engine.generate(
        [request([1], n=4), request([2], n=6)], progress=lambda *at: done.append(at)
    )
    assert [list(c.token_ids) for c in completions] == [
        expected_tokens([1], (), 7, 4),
        expected_tokens([2], (), 7, 6),
    ]
    assert [c.finish_reason for c in completions] == ["length", "length"]
    assert done == [(1, 2), (2, 2)]
    assert ids(drain(engine)[other]) == expected_tokens([3], (), 7, 20)


def test_generate_reports_a_failed_request_beside_the_others():
    engine, _ = fake_engine()
    bad, good = engine.generate([request([1, NAN_TOKEN]), request([2])])
    assert isinstance(bad.error, InternalError)
    assert bad.finish_reason is None
    assert list(good.token_ids) == expected_tokens([2], (), 7, 8)


def test_generate_refuses_a_wrong_request_before_any_runs():
    engine, device = fake_engine()
    with pytest.raises(InvalidRequest):
        engine.generate([request([1]), request([])])
    with pytest.raises(InvalidRequest, match="tokenizer"):
        engine.generate([Request([1], params=SamplingParams(stop=("x",)))])
    assert not engine.has_work()
    assert not device.launches
