// Conversations, kept in this browser only.

import { randomId } from "./link.js";

const STORAGE_KEY = "openlora.conversations";
const MOST_CONVERSATIONS = 40;
const TITLE_CHARS = 60;

export class History {
  constructor() {
    this.conversations = [];
    try {
      const stored = JSON.parse(localStorage.getItem(STORAGE_KEY) ?? "[]");
      if (Array.isArray(stored)) this.conversations = stored;
    } catch {
      // unreadable or forbidden storage: begin with an empty history
    }
  }

  save() {
    this.conversations.sort((a, b) => b.updated - a.updated);
    this.conversations.length = Math.min(this.conversations.length, MOST_CONVERSATIONS);
    try {
      localStorage.setItem(STORAGE_KEY, JSON.stringify(this.conversations));
    } catch {
      // storage is full or forbidden: the conversation lives as long as the page
    }
  }

  create(firstPrompt) {
    const conversation = {
      id: randomId(),
      title: firstPrompt.slice(0, TITLE_CHARS),
      updated: Date.now(),
      turns: [],
    };
    this.conversations.unshift(conversation);
    return conversation;
  }

  remove(id) {
    this.conversations = this.conversations.filter((conversation) => conversation.id !== id);
    this.save();
  }
}

// The messages of one lane: its own answers, or the first lane's where it had none yet.
export function messagesOf(conversation, lane, prompt) {
  const messages = [];
  for (const turn of conversation.turns) {
    const answer = turn.answers[lane] ?? turn.answers[0];
    if (!answer || answer.state === "error") continue;
    messages.push({ role: "user", content: turn.prompt });
    messages.push({ role: "assistant", content: answer.text });
  }
  messages.push({ role: "user", content: prompt });
  return messages;
}
