"""The chat page in a real headless browser, on a real gateway, with a scripted worker behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from openlora.joblog import redis_client
from openlora.local import ServerProcess
from openlora.protocol.status import AdapterRecord
from openlora.registry import AdapterRegistry
from tests.browser import Page, browser_page
from tests.conftest import Broker
from tests.gateway.running import RunningGateway, ScriptedWorker, running_gateway
from tests.integration.chat_page import CONNECTED, CONTRAST, DONE, answers, ask, script
from tests.workers.running import wait_until

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def redis_address(redis_server: ServerProcess) -> str:
    with redis_client(redis_server.address) as client:
        client.flushall()
        registry = AdapterRegistry(client)
        for name in ("haiku", "json", "pirate"):
            registry.put(AdapterRecord(name, 0, "ab" * 32, 8, ("q_proj",), "tiny", 1, "/x", 0))
    return redis_server.address


@pytest.fixture(scope="module")
def gateway(
    embedded_broker: Broker, redis_address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    with running_gateway(
        embedded_broker.bootstrap_servers, redis_address, tmp_path_factory.mktemp("gateway")
    ) as gateway:
        yield gateway


@pytest.fixture
def worker(redis_address: str) -> Iterator[ScriptedWorker]:
    with ScriptedWorker(redis_address, script=script, token_s=0.01) as worker:
        yield worker


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with browser_page() as page:
        yield page


@pytest.fixture
def page(browser: Page, gateway: RunningGateway, worker: ScriptedWorker) -> Iterator[Page]:
    """The page, freshly opened, with nothing remembered; it must cause no error of its own."""
    browser.open(gateway.url)
    browser.js("localStorage.clear(); sessionStorage.clear()")
    browser.problems.clear()
    browser.prefer(prefers_color_scheme="light")
    browser.open(gateway.url)
    browser.wait(CONNECTED)
    yield browser
    assert browser.problems == []


def test_an_example_is_answered_word_by_word(page: Page) -> None:
    assert page.js("document.querySelector('#empty').checkVisibility()")
    page.click("#examples li:nth-child(2) button")
    page.wait(f"{DONE} === 1")
    assert answers(page) == ["base hears: What should I have for breakfast?"]
    assert not page.js("document.querySelector('#empty').checkVisibility()")
    assert "8 tokens" in page.js("document.querySelector('.answer-foot').textContent")


def test_the_conversation_goes_along_and_is_kept(page: Page, worker: ScriptedWorker) -> None:
    ask(page, "first")
    page.wait(f"{DONE} === 1")
    ask(page, "second")
    page.wait(f"{DONE} === 2")
    messages = worker.jobs[-1].messages or ()
    assert [m.content for m in messages] == ["first", "base hears: first", "second"]
    page.call("Page.reload")
    page.wait(f"document.readyState === 'complete' && {CONNECTED}")
    page.click(".history-open")
    page.wait(f"{DONE} === 2")
    page.click(".history-remove")
    assert page.js("document.querySelectorAll('#history-list li').length") == 0
    assert page.js("document.querySelector('#empty').checkVisibility()")


def test_a_mix_is_put_together_with_the_keyboard_alone(page: Page, worker: ScriptedWorker) -> None:
    page.js("document.querySelector('.voice-button').focus()")
    page.press("Enter")
    page.wait("document.querySelector('#voice-dialog').open")
    page.wait("document.activeElement.type === 'checkbox'")
    page.press("Space")  # haiku
    page.press("Tab")  # its weight
    page.press("ArrowRight")
    page.press("Tab")
    page.press("Space")  # json
    preview = page.js("document.querySelector('[data-preview]').textContent")
    assert preview == "haiku 1.05 + json 1.00"
    page.js("document.querySelector('[data-use]').focus()")
    page.press("Enter")
    page.wait("!document.querySelector('#voice-dialog').open")
    assert page.js("document.activeElement.classList.contains('voice-button')")
    for _ in range(10):
        if page.js("document.activeElement.id") == "prompt":
            break
        page.press("Tab")
    page.type("hello")
    page.press("Enter", shift=True)
    page.type("there")
    page.press("Enter")
    page.wait(f"{DONE} === 1")
    assert answers(page) == ["haiku*1.05+json*1 hears: hello there"]
    assert page.js("document.activeElement.id") == "prompt"
    assert page.js("document.querySelector('.answer').getAttribute('aria-busy')") == "false"


def test_two_voices_answer_side_by_side(page: Page) -> None:
    page.click(".switch")
    page.click('.voice-button[data-lane="1"]')
    page.wait("document.querySelector('#voice-dialog').open")
    page.click(".adapter:nth-child(3) input[type=checkbox]")
    page.click("[data-use]")
    page.wait("!document.querySelector('#voice-dialog').open")
    ask(page, "tell me")
    page.wait(f"{DONE} === 2")
    assert answers(page) == ["base hears: tell me", "pirate*1 hears: tell me"]
    tops, lefts = page.js(
        "[[...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect().top),"
        " [...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect().left)]"
    )
    assert tops[0] == tops[1]
    assert lefts[0] < lefts[1]


def test_stop_ends_the_work(page: Page, worker: ScriptedWorker) -> None:
    ask(page, "an endless story")
    page.wait("document.querySelector('.answer-text').textContent.includes('w5')")
    page.click("#stop")
    page.wait(f"{DONE} === 1")
    assert "Stopped" in page.js("document.querySelector('.answer-foot').textContent")
    assert page.js("document.querySelector('#send').checkVisibility()")


def test_an_error_is_shown_with_its_reason(
    page: Page, gateway: RunningGateway, redis_address: str
) -> None:
    with redis_client(redis_address) as client:
        registry = AdapterRegistry(client)
        registry.put(AdapterRecord("fleeting", 0, "cd" * 32, 8, (), "tiny", 1, "/x", 0))
        page.click(".voice-button")
        page.wait("document.querySelector('#voice-dialog').open")
        page.click(".adapter:first-child input[type=checkbox]")
        assert "fleeting" in page.js("document.querySelector('[data-preview]').textContent")
        page.click("[data-use]")
        registry.remove("fleeting")
    # It learns of that within a second, and answers until then.
    wait_until(lambda: "fleeting" not in httpx.get(f"{gateway.url}/v1/adapters").text)
    ask(page, "anyone there?")
    page.wait("document.querySelector('.answer[data-state=error]') !== null")
    shown = page.js("document.querySelector('.error').innerText")
    assert "unknown_adapter" in shown
    assert "fleeting" in shown
    # not retriable: no button that could not help
    assert page.js("document.querySelector('.error button') === null")


def test_an_answer_goes_on_after_the_page_is_left(page: Page, worker: ScriptedWorker) -> None:
    ask(page, "long")
    page.wait("document.querySelector('.answer-text').textContent.includes('w20')")
    page.call("Page.reload")
    page.wait("document.querySelector('.answer-text')?.textContent.includes('w60')")
    text = answers(page)[0]
    assert text.startswith("base hears: long w0 w1 w2")
    page.click("#stop")
    page.wait(f"{DONE} === 1")
    assert len(worker.jobs) == 1


def test_a_restarted_gateway_costs_no_word(
    browser: Page,
    embedded_broker: Broker,
    redis_address: str,
    worker: ScriptedWorker,
    tmp_path: Path,
    port: int,
) -> None:
    settings = {"OPENLORA_PORT": str(port), "OPENLORA_DRAIN_TIMEOUT_S": "0"}
    servers = (embedded_broker.bootstrap_servers, redis_address, tmp_path)
    with running_gateway(*servers, **settings) as gateway:
        browser.open(gateway.url)
        browser.wait(CONNECTED)
        ask(browser, "long")
        browser.wait("document.querySelector('.answer-text').textContent.includes('w20')")
    browser.wait("document.querySelector('#status').dataset.state === 'waiting'")
    with running_gateway(*servers, **settings):
        browser.wait(f"{DONE} === 1", 60)
        expected = "base hears: long" + "".join(f" w{i}" for i in range(400))
        assert answers(browser) == [expected]
    browser.problems.clear()  # the refused connections in between


def test_a_phone_shows_everything_in_its_width(page: Page) -> None:
    page.resize(360, 740)
    page.click(".switch")
    ask(page, "x" * 200 + " and more")
    page.wait(f"{DONE} === 2")
    assert page.js("document.documentElement.scrollWidth") == 360
    wide = page.js(
        "[...document.querySelectorAll('button, textarea, .answer')].filter(e =>"
        " e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert wide == 0
    assert not page.js("document.querySelector('#history').checkVisibility()")
    page.click("#history-toggle")
    assert page.js("document.querySelector('#history').checkVisibility()")
    page.press("Escape")
    assert not page.js("document.querySelector('#history').checkVisibility()")
    page.resize(1280, 860)


def test_text_has_contrast_in_light_and_dark(page: Page) -> None:
    ask(page, "x")
    page.wait(f"{DONE} === 1")
    for scheme in ("light", "dark"):
        page.prefer(prefers_color_scheme=scheme)
        low = page.js(CONTRAST)
        assert low == []


def test_every_control_has_a_name(page: Page) -> None:
    page.click(".settings summary")
    page.click(".voice-button")
    page.wait("document.querySelector('#voice-dialog').open")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = ("button", "checkbox", "textbox", "slider", "spinbutton", "switch")
    unnamed = [
        node
        for node in nodes
        if not node.get("ignored")
        and node["role"]["value"] in controls
        and not node.get("name", {}).get("value")
    ]
    assert unnamed == []
    page.press("Escape")


def test_a_key_is_asked_for_and_used(
    browser: Page,
    embedded_broker: Broker,
    redis_address: str,
    worker: ScriptedWorker,
    tmp_path: Path,
) -> None:
    with running_gateway(
        embedded_broker.bootstrap_servers,
        redis_address,
        tmp_path,
        OPENLORA_API_KEYS="acme:s3cr(e)t/+=",
    ) as gateway:
        browser.open(gateway.url)
        browser.wait("document.querySelector('#key-dialog').open")
        browser.type("wrong")
        browser.press("Enter")
        browser.wait(
            "document.querySelector('#key-dialog').open &&"
            " document.querySelector('#key').value === 'wrong'"
        )
        browser.js("document.querySelector('#key').value = ''")
        browser.js("document.querySelector('#key').focus()")
        browser.type("s3cr(e)t/+=")
        browser.press("Enter")
        browser.wait(CONNECTED)
        ask(browser, "hello")
        browser.wait(f"{DONE} === 1")
    assert worker.jobs[-1].tenant == "acme"
    browser.problems.clear()  # the 401 answers
