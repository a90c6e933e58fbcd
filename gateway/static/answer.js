// One answer on the page: a voice's name, its text as it streams, and how it ended.

import { voiceLabel, nameOf } from "./voices.js";

const CODE_HINTS = {
  overloaded: "The system is busy or a part of it is away.",
  rate_limited: "This key has used up its rate for now.",
  unknown_adapter: "The adapter was removed. Choose another voice.",
  prompt_too_long: "Start a new conversation, or shorten the prompt.",
  deadline_exceeded: "It took longer than allowed.",
  job_not_found: "It ended too long ago, or the system lost it.",
  adapter_failed: "The adapter's files do not fit the model.",
};

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export class AnswerView {
  // onRetry(): the person asked for the same answer again
  constructor(answer, onRetry) {
    this.answer = answer;
    this.onRetry = onRetry;
    this.root = element("article", "answer");
    this.root.setAttribute("aria-label", `Answer of ${nameOf(answer.voice)}`);
    this.body = element("div", "answer-text");
    this.foot = element("footer", "answer-foot");
    const head = element("header", "answer-head");
    head.append(voiceLabel(answer.voice));
    this.root.append(head, this.body, this.foot);
    this.frame = 0;
    this.render();
  }

  // Tokens come faster than the screen is drawn: one update a frame is enough.
  changed() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.render();
    });
  }

  render() {
    const { answer } = this;
    const streaming = answer.state === "waiting" || answer.state === "streaming";
    this.body.textContent = answer.text;
    this.root.dataset.state = answer.state;
    // a screen reader reads the answer once, when it is whole
    this.root.setAttribute("aria-busy", String(streaming));
    this.foot.replaceChildren();
    if (answer.state === "error") this.foot.append(this.errorBox());
    else if (answer.state === "waiting") this.foot.append(element("span", "hint", "Waiting for a worker…"));
    else if (!streaming) this.foot.append(element("span", "hint", this.summary()), this.copyButton());
  }

  summary() {
    const { finish, usage, timings } = this.answer;
    const parts = [];
    if (finish === "cancelled") parts.push("Stopped");
    if (finish === "length") parts.push("Cut at the token limit");
    if (usage) parts.push(`${usage.completion_tokens} tokens`);
    if (timings?.total_ms > timings?.ttft_ms && usage?.completion_tokens > 1) {
      const rate = ((usage.completion_tokens - 1) * 1000) / (timings.total_ms - timings.ttft_ms);
      parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} per second`);
    }
    return parts.join(" · ");
  }

  copyButton() {
    const button = element("button", "quiet", "Copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      await navigator.clipboard?.writeText(this.answer.text);
      button.textContent = "Copied";
    });
    return button;
  }

  errorBox() {
    const { error } = this.answer;
    const box = element("div", "error");
    box.setAttribute("role", "alert");
    const hint = CODE_HINTS[error.code];
    if (hint) box.append(element("strong", "", hint));
    box.append(element("p", "", error.message));
    const row = element("p", "error-row");
    row.append(element("code", "", error.code));
    const retry = element("button", "secondary", "Try again");
    retry.type = "button";
    retry.addEventListener("click", () => this.onRetry());
    if (error.retriable) row.append(retry);
    const waitMs = error.retriable ? (error.retry_after_ms ?? 0) : 0;
    if (waitMs > 0) {
      retry.disabled = true;
      setTimeout(() => (retry.disabled = false), waitMs);
    }
    box.append(row);
    return box;
  }
}
