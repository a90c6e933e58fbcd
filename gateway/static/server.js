// The server as the page sees it: HTTP with the API key, the websocket's state, and notices.

import { Link } from "./link.js";

const READY_CHECK_MS = 3000;
const KEY_STORAGE = "openlora.key";

const $ = (selector) => document.querySelector(selector);

export class Server {
  constructor() {
    this.key = sessionStorage.getItem(KEY_STORAGE) ?? "";
    this.link = null;
    this.needsKey = false;
  }

  async get(path) {
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    const response = await fetch(path, { headers });
    this.needsKey = response.status === 401;
    if (this.needsKey) throw new Error("unauthorized");
    if (!response.ok) throw new Error((await response.json()).error?.message ?? response.statusText);
    return response.json();
  }

  // The registered adapters; asks for a key where the server wants one. null: not to be had.
  async adapters() {
    try {
      const adapters = await this.get("v1/adapters");
      hideNotice();
      return adapters;
    } catch (error) {
      if (error.message !== "unauthorized") {
        showNotice(`Adapters could not be listed: ${error.message}`);
      } else if (await this.askKey("This server asks for an API key.")) {
        return this.adapters();
      } else {
        showNotice("An API key is needed. Enter it under Settings.");
      }
      return null;
    }
  }

  async askKey(reason) {
    const dialog = $("#key-dialog");
    $("#key-hint").textContent = `${reason} It is kept in this tab until you close it.`;
    $("#key").value = this.key;
    dialog.returnValue = "";
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (dialog.returnValue !== "use") return false;
    this.key = $("#key").value.trim();
    sessionStorage.setItem(KEY_STORAGE, this.key);
    this.connect();
    return true;
  }

  // Streams of an earlier connection go on over the new one.
  connect() {
    const streams = this.link?.streams ?? new Map();
    this.link?.close();
    this.link = new Link({
      key: this.key,
      onState: (state) => this.showState(state),
      onNotice: (error) => showNotice(error.message),
    });
    this.link.streams = streams;
    this.link.connect();
  }

  showState(state) {
    const text = { connecting: "Connecting", open: "Connected", waiting: "Offline, trying again" };
    showStatus(state, text[state]);
    if (state === "open") this.checkReady();
  }

  async checkReady() {
    let missing;
    try {
      missing = (await (await fetch("readyz")).json()).waiting_for;
    } catch {
      return; // the websocket notices as well, and reconnects
    }
    if (!this.link.isOpen()) return;
    if (missing.length === 0) return showStatus("open", "Connected");
    showStatus("connecting", `Waiting for ${missing.join(", ")}`);
    setTimeout(() => this.checkReady(), READY_CHECK_MS);
  }
}

function showStatus(state, text) {
  $("#status").dataset.state = state;
  $("#status-text").textContent = text;
}

export function showNotice(text) {
  $("#notice").textContent = text;
  $("#notice").hidden = false;
}

export function hideNotice() {
  $("#notice").hidden = true;
}
