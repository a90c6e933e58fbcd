// The chat page: state, events, and what is shown where. Parts: link.js (websocket), history.js,
// voices.js (adapters and mixes), answer.js (one answer), server.js (HTTP, key, status).

import { AnswerView } from "./answer.js";
import { History, messagesOf } from "./history.js";
import { Server, hideNotice } from "./server.js";
import { VoicePicker, voiceLabel } from "./voices.js";

const EXAMPLES = [
  { prompt: "Tell me about the sea.", compare: true },
  { prompt: "What should I have for breakfast?" },
  { prompt: "Describe a bicycle to someone who has never seen one." },
  { prompt: "Give me a headline for a cat that learned to sail." },
];
const NEAR_BOTTOM_PX = 80;

const $ = (selector) => document.querySelector(selector);
const server = new Server();
const history = new History();
const picker = new VoicePicker($("#voice-dialog"));
const voices = [[], []];
let adapters = [];
let conversation = null;
let live = []; // streams of the newest turn that have not ended

// ---- asking

async function loadAdapters() {
  adapters = (await server.adapters()) ?? adapters;
}

function params() {
  const seed = $("#seed").value;
  return {
    max_tokens: Number($("#max-tokens").value),
    temperature: Number($("#temperature").value),
    ...(seed === "" ? {} : { seed: Number(seed) }),
  };
}

function ask(prompt) {
  hideNotice();
  conversation ??= history.create(prompt);
  const lanes = $("#compare").checked ? voices : voices.slice(0, 1);
  const turn = { prompt, answers: [] };
  for (const [lane, voice] of lanes.entries()) {
    turn.answers.push({
      voice,
      text: "",
      state: "waiting",
      request: { messages: messagesOf(conversation, lane, prompt), adapters: voice, params: params() },
    });
  }
  conversation.turns.push(turn);
  conversation.updated = Date.now();
  const views = showTurn(turn);
  for (const view of views) start(view);
  history.save();
  showHistory();
  scrollToEnd(true);
}

function start(view) {
  const { answer } = view;
  Object.assign(answer, { text: "", state: "waiting", error: null, jobId: null });
  view.changed();
  follow(view, (handler) => server.link.generate(answer.request, handler));
}

function follow(view, open) {
  const { answer } = view;
  const ended = () => {
    live = live.filter((stream) => stream !== current);
    history.save();
    showStop();
    view.changed();
  };
  const current = open({
    accepted(frame) {
      answer.jobId = frame.job_id;
      history.save();
    },
    token(frame) {
      answer.state = "streaming";
      answer.text += frame.text;
      view.changed();
      scrollToEnd(false);
    },
    restarted() {
      answer.text = "";
      view.changed();
    },
    done(frame) {
      answer.state = "done";
      answer.text += frame.text;
      answer.finish = frame.finish_reason;
      answer.usage = frame.usage;
      answer.timings = frame.timings;
      ended();
    },
    error(frame) {
      answer.state = "error";
      answer.error = frame;
      ended();
    },
  });
  live.push(current);
  showStop();
}

// ---- showing

function showStop() {
  const streaming = live.length > 0;
  const hadFocus = document.activeElement === $("#stop") || document.activeElement === $("#send");
  $("#send").hidden = streaming;
  $("#stop").hidden = !streaming;
  if (hadFocus) (streaming ? $("#stop") : $("#prompt")).focus();
}

function showTurn(turn) {
  $("#empty").hidden = true;
  const section = document.createElement("section");
  section.className = "turn";
  const prompt = document.createElement("h3");
  prompt.className = "prompt";
  prompt.textContent = turn.prompt;
  const answers = document.createElement("div");
  answers.className = "answers";
  const views = turn.answers.map((answer) => {
    const view = new AnswerView(answer, () => start(view));
    return view;
  });
  answers.append(...views.map((view) => view.root));
  section.append(prompt, answers);
  $("#turns").append(section);
  return views;
}

function openConversation(chosen) {
  for (const stream of live) server.link.streams.delete(stream.requestId);
  live = [];
  conversation = chosen;
  $("#turns").replaceChildren();
  $("#empty").hidden = Boolean(chosen);
  for (const turn of chosen?.turns ?? []) {
    for (const view of showTurn(turn)) takeUp(view);
  }
  showStop();
  showHistory();
  scrollToEnd(true);
}

// An answer that was under way when the page was left goes on, if its job still lives.
function takeUp(view) {
  const { answer } = view;
  if (answer.state !== "waiting" && answer.state !== "streaming") return;
  if (!answer.jobId) return start(view);
  answer.text = "";
  follow(view, (handler) => server.link.resume(answer.jobId, handler));
}

function showHistory() {
  const items = history.conversations.map((item) => {
    const row = document.createElement("li");
    const open = document.createElement("button");
    open.type = "button";
    open.className = "history-open";
    open.textContent = item.title;
    if (item === conversation) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => {
      openConversation(item);
      toggleHistory(false);
    });
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "history-remove";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Delete “${item.title}”`);
    remove.addEventListener("click", () => {
      history.remove(item.id);
      if (item === conversation) openConversation(null);
      else showHistory();
    });
    row.append(open, remove);
    return row;
  });
  $("#history-list").replaceChildren(...items);
  $("#history-empty").hidden = items.length > 0;
}

function toggleHistory(open = !document.body.classList.contains("with-history")) {
  document.body.classList.toggle("with-history", open);
  $("#history-toggle").setAttribute("aria-expanded", String(open));
}

function showVoices() {
  const comparing = $("#compare").checked;
  for (const button of document.querySelectorAll(".voice-button")) {
    const lane = Number(button.dataset.lane);
    button.hidden = lane === 1 && !comparing;
    button.querySelector(".lane").hidden = !comparing;
    button.querySelector("[data-label]").replaceChildren(voiceLabel(voices[lane]));
  }
}

function scrollToEnd(always) {
  const turns = $("#turns");
  const away = turns.scrollHeight - turns.scrollTop - turns.clientHeight;
  if (always || away < NEAR_BOTTOM_PX) requestAnimationFrame(() => (turns.scrollTop = turns.scrollHeight));
}

function fitPrompt() {
  const prompt = $("#prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function showExamples() {
  const items = EXAMPLES.map(({ prompt, compare }) => {
    const row = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    if (compare) {
      const hint = document.createElement("span");
      hint.className = "hint";
      hint.textContent = "Two voices side by side";
      button.append(hint);
    }
    button.addEventListener("click", () => {
      if (compare) {
        $("#compare").checked = true;
        if (adapters.length > 0) voices[1] = [{ id: adapters[0].id, weight: 1 }];
        showVoices();
      }
      ask(prompt);
    });
    row.append(button);
    return row;
  });
  $("#examples").replaceChildren(...items);
}

// ---- events

$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("#prompt").value.trim();
  if (prompt === "" || live.length > 0) return;
  $("#prompt").value = "";
  fitPrompt();
  ask(prompt);
});
$("#prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("#composer").requestSubmit();
});
$("#prompt").addEventListener("input", fitPrompt);
$("#stop").addEventListener("click", () => live.forEach((stream) => server.link.cancel(stream)));
$("#new-chat").addEventListener("click", () => {
  openConversation(null);
  toggleHistory(false);
  $("#prompt").focus();
});
$("#compare").addEventListener("change", showVoices);
$("#history-toggle").addEventListener("click", () => toggleHistory());
$("#change-key").addEventListener("click", async () => {
  if (await server.askKey("Requests carry this key.")) await loadAdapters();
});
for (const button of document.querySelectorAll(".voice-button")) {
  button.addEventListener("click", async () => {
    await loadAdapters();
    const lane = Number(button.dataset.lane);
    const title = $("#compare").checked ? `Voice ${"AB"[lane]}` : "Voice";
    picker.choose(title, voices[lane], adapters, (voice) => {
      voices[lane] = voice;
      showVoices();
    });
  });
}
for (const button of document.querySelectorAll("[data-cancel]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
document.addEventListener("keydown", (event) => event.key === "Escape" && toggleHistory(false));
window.addEventListener("online", () => server.link?.reconnectNow());

showExamples();
showVoices();
showHistory();
loadAdapters().then(() => {
  if (!server.needsKey) server.connect();
  const newest = history.conversations[0];
  const unfinished = newest?.turns.at(-1)?.answers.some((a) => a.state === "waiting" || a.state === "streaming");
  if (unfinished) openConversation(newest);
  $("#prompt").focus();
});
