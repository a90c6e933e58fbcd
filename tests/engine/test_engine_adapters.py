"""Adapters of an engine on the fake device: loads, failures, replacement, who waits for whom."""

from __future__ import annotations

import threading
import time

import pytest

from openlora.engine.residency import ResidentAdapters
from openlora.errors import AdapterFailed, UnknownAdapter
from tests.engine.fake_device import expected_tokens, fake_engine, load_fake
from tests.engine.requests import drain, drain_one, ids, register_all, request


def test_prefix_cache_goes_by_content_not_by_name():
    engine, device = fake_engine()
    prompt = list(range(20))
    engine.register_adapter("one", "/adapters/rose-1-1-1-1")
    engine.register_adapter("two", "/elsewhere/rose-1-1-1-1")
    engine.register_adapter("other", "/adapters/fern-1-1-1-1")
    for name, start in (("one", 0), ("two", 16), ("other", 0)):
        device.launches.clear()
        drain_one(engine, request(prompt, n=1, **{name: 1.0}))
        assert device.launches[0][0].start == start, name
    device.launches.clear()
    drain_one(engine, request(prompt, n=1, one=0.5))
    assert device.launches[0][0].start == 0, "another weight is another content"


def test_a_failed_load_ends_its_requests_alone():
    engine, _ = fake_engine()
    engine.register_adapter("bad", "/adapters/broken-1-1-1-1")
    engine.register_adapter("rose", "/adapters/rose-1-1-1-1")
    bad = [engine.add(request([1], bad=1.0)), engine.add(request([2], bad=0.5, rose=1.0))]
    good = [engine.add(request([1], rose=1.0)), engine.add(request([1]))]
    outputs = drain(engine)
    for request_id in bad:
        assert [type(token.error) for token in outputs[request_id]] == [AdapterFailed]
    assert ids(outputs[good[0]]) == expected_tokens([1], (("rose", 1.0),), 7, 8)
    assert ids(outputs[good[1]]) == expected_tokens([1], (), 7, 8)


def test_an_adapter_too_large_for_the_pool_fails_with_the_numbers():
    engine, _ = fake_engine()
    engine.register_adapter("huge", "/adapters/huge-1-9-1-1")
    request_id = engine.add(request([1], huge=1.0))
    (token,) = drain(engine)[request_id]
    assert isinstance(token.error, AdapterFailed)
    assert "o: 9 of 4" in token.error.message
    register_all(engine)
    both = engine.add(request([1], reed=1.0, rose=1.0))
    (token,) = drain(engine)[both]
    assert isinstance(token.error, AdapterFailed)
    with pytest.raises(AdapterFailed, match="'reed' \\+ 'rose'"):
        engine.add(request([1], reed=1.0, rose=1.0))


def test_load_adapter_waits_until_it_is_resident_and_raises_what_is_wrong():
    engine, _ = fake_engine()
    engine.load_adapter("rose", "/adapters/rose-1-1-1-1")
    assert engine.stats().resident_adapters == ("rose",)
    with pytest.raises(AdapterFailed, match="tensor missing"):
        engine.load_adapter("bad", "/adapters/broken-1")
    with pytest.raises(UnknownAdapter):
        engine.add(request([1], bad=1.0))
    engine.unload_adapter("rose")
    assert engine.stats().resident_adapters == ()
    with pytest.raises(UnknownAdapter):
        engine.unload_adapter("rose")


def test_load_adapter_does_not_wait_for_a_staging_area_that_only_steps_can_empty():
    engine, _ = fake_engine(num_pages=(1, 1, 1, 1))
    engine.load_adapter("first", "/adapters/first-1-1-1-1")
    running = engine.add(request([1], n=50, first=1.0))
    engine.step()
    waiting = []
    for number in range(12):
        engine.register_adapter(f"n{number}", f"/adapters/n{number}-1-1-1-1")
        waiting.append(engine.add(request([1], n=1, **{f"n{number}": 1.0})))
    engine.load_adapter("late", "/adapters/late-1-1-1-1")
    assert engine.stats().resident_adapters == ("first",)
    outputs = drain(engine)
    assert len(outputs[running]) + 1 == 50
    assert all(len(outputs[i]) == 1 for i in waiting)


def test_waiting_for_adapters_does_not_hold_up_what_can_run():
    engine, _ = fake_engine(max_num_batched_tokens=4, max_num_seqs=1)
    engine.register_adapter("rose", "/adapters/rose-1-1-1-1")
    engine.add(request([1] * 60, n=1))
    engine.add(request([1], rose=1.0))
    assert engine.step() == []
    start = time.monotonic()
    engine.wait_for_adapters(30)
    assert time.monotonic() - start < 5
    assert not engine.only_waits_for_adapters()
    drain(engine)
    assert not engine.only_waits_for_adapters()


def test_an_engine_that_only_waits_for_an_adapter_says_so(monkeypatch):
    gate = threading.Event()

    def slow_load(path):
        assert gate.wait(30)
        return load_fake(path)

    monkeypatch.setattr("tests.engine.fake_device.load_fake", slow_load)
    engine, _ = fake_engine()
    engine.register_adapter("rose", "/adapters/rose-1-1-1-1")
    engine.add(request([1], rose=1.0))
    assert engine.step() == []
    assert engine.only_waits_for_adapters()
    gate.set()
    engine.wait_for_adapters(30)
    assert not engine.only_waits_for_adapters()
    drain(engine)


def test_an_unloaded_or_replaced_adapter_serves_the_requests_that_have_it():
    engine, _ = fake_engine()
    engine.register_adapter("a", "/adapters/rose-1-1-1-1")
    old = engine.add(request([1], a=1.0))
    engine.register_adapter("a", "/adapters/fern-1-1-1-1")
    new = engine.add(request([1], a=1.0))
    engine.unload_adapter("a")
    outputs = drain(engine)
    assert ids(outputs[old]) == expected_tokens([1], (("rose", 1.0),), 7, 8)
    assert ids(outputs[new]) == expected_tokens([1], (("fern", 1.0),), 7, 8)
    assert engine.stats().resident_adapters == ()


def test_weight_zero_is_the_base_model():
    engine, _ = fake_engine()
    register_all(engine)
    assert drain_one(engine, request([1], rose=0.0)) == expected_tokens([1], (), 7, 8)


def test_a_page_handed_out_while_a_launched_step_names_it_would_be_noticed(monkeypatch):
    def unpin_at_once(self, step, keys):
        for key in keys:
            self.unpin(key)
        self.room_epoch += 1
        return list(keys)

    def run() -> list[int]:
        engine, _ = fake_engine(num_pages=(1, 1, 1, 1), steps_ahead=1)
        for name in ("lily", "rose"):
            engine.load_adapter(name, f"/adapters/{name}-1-1-1-1")
        first = engine.add(request([1, 2], n=100, rose=1.0))
        while not engine.stats().output_tokens:
            engine.step()
        second = engine.add(request([3, 4], lily=1.0))
        # Until it waits for pages alone, which a step under way still names.
        while not engine._adapters._supply.staged:
            engine._take_loads(5)
        engine.abort(first)
        outputs = drain(engine)
        engine.close()
        return ids(outputs[second])

    assert run() == expected_tokens([3, 4], (("lily", 1.0),), 7, 8)
    monkeypatch.setattr(ResidentAdapters, "unpin_after", unpin_at_once)
    with pytest.raises(AssertionError, match="handed out again"):
        run()
