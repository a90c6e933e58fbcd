"""A run's text, resume and end, token by token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openlora.bench.pipeline_model import write_tokenizer
from openlora.protocol.events import Chunk
from tests.workers.running import a_job
from workers.messages import Output
from workers.offsets import Position
from workers.run import Run

POSITION = Position(("openlora.jobs", 0), 0, 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer

    directory = write_tokenizer(tmp_path_factory.mktemp("model"))
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def a_run(tokenizer, eos=(), **fields):
    return Run(a_job(**fields), 1, 1, POSITION, tokenizer, eos)


def feed(run, token_ids):
    """Feed until the run says why it is finished; what it said, with None for each before."""
    reasons = []
    for token_id in token_ids:
        reasons.append(run.take(Output(1, len(run.tokens), token_id)))
        if reasons[-1] is not None:
            break
    return reasons


def whole_text(run):
    return "".join(token.text for token in run.tokens) + run.end.text


@settings(deadline=None)
@given(
    text=st.text(min_size=1, max_size=30), cut=st.integers(0, 60), stop=st.text("ab€", max_size=2)
)
def test_a_resumed_run_says_what_an_undisturbed_one_says(tokenizer, text, cut, stop):
    token_ids = tokenizer.encode(text).ids
    fields = {"max_tokens": len(token_ids), "params": {"stop": (stop,) if stop else ()}}
    whole = a_run(tokenizer, **fields)
    reasons = feed(whole, token_ids)
    whole.finish(reasons[-1])
    said = whole.tokens[: cut % len(whole.tokens)]
    resumed = a_run(tokenizer, **fields)
    assert resumed.resume([Chunk("x", 1, 0, tuple(said))]) is None
    resumed_reasons = feed(resumed, [token.token_id for token in whole.tokens[len(said) :]])
    resumed.finish(resumed_reasons[-1])
    assert resumed.tokens == whole.tokens
    assert (resumed.end.text, resumed_reasons[-1]) == (whole.end.text, reasons[-1])
    if not stop:
        assert whole_text(whole) == text


def test_a_character_cut_off_at_the_end_is_shown_as_the_tokenizer_shows_it(tokenizer):
    token_ids = tokenizer.encode("a€").ids[:-1]
    run = a_run(tokenizer, max_tokens=len(token_ids))
    run.finish(feed(run, token_ids)[-1])
    assert [token.text for token in run.tokens] == ["a", "", ""]
    assert whole_text(run) == tokenizer.decode(token_ids)


def test_eos_has_no_text_and_counts(tokenizer):
    run = a_run(tokenizer, eos=(300,), max_tokens=9)
    assert feed(run, [400, 300]) == [None, "stop"]
    run.finish("stop")
    assert [token.text for token in run.tokens] == [" w400", ""]
    assert run.end.completion_tokens == 2


def test_chunks_hold_what_the_log_lacks(tokenizer):
    run = a_run(tokenizer, max_tokens=9)
    feed(run, [400, 401])
    assert [token.token_id for token in run.chunk().tokens] == [400, 401]
    run.logged = 2
    assert run.chunk() == Chunk(run.job.job_id, 1, 2)
    feed(run, [402])
    assert (run.chunk().first_index, len(run.chunk().tokens)) == (2, 1)


def test_logprobs_come_with_the_text_of_their_candidates(tokenizer):
    run = a_run(tokenizer, max_tokens=9)
    run.take(Output(1, 0, 400, logprob=-0.5, top_logprobs=((400, -0.5), (401, -2.0))))
    (token,) = run.tokens
    assert token.logprob == -0.5
    assert [(c.token_id, c.text) for c in token.top_logprobs] == [(400, " w400"), (401, " w401")]
