"""What tests of the chat page type, read and answer."""

from __future__ import annotations

from openlora.protocol.jobs import Job
from tests.browser import Page

CONNECTED = "document.querySelector('#status-text').textContent === 'Connected'"
DONE = "document.querySelectorAll('.answer[data-state=done]').length"


def script(job: Job) -> list[str]:
    """Says who speaks and the last thing said; "long" is answered at length, "endless" for as long
    as anybody listens."""
    who = "+".join(f"{ref.id}*{ref.weight:g}" for ref in job.adapters) or "base"
    last = (job.messages or ())[-1].content
    words = [f"{who}", " hears:"] + [f" {word}" for word in last.split()]
    count = 100_000 if "endless" in last else 400 if "long" in last else 0
    return words + [f" w{i}" for i in range(count)]


def ask(page: Page, prompt: str) -> None:
    page.click("#prompt")
    page.type(prompt)
    page.press("Enter")


def answers(page: Page) -> list[str]:
    texts: list[str] = page.js(
        "[...document.querySelectorAll('.answer-text')].map(e => e.textContent)"
    )
    return texts


# WCAG contrast of every visible text against what is painted behind it, where it is below AA.
CONTRAST = """
(() => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0.99) return c;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.matches(".skip, .sr, :disabled")) continue;
    const style = getComputedStyle(e);
    const [a, b] = [lum(rgb(style.color)), lum(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${e.className || e.tagName} ${ratio.toFixed(2)}`);
  }
  return low;
})()
"""
