// What the browser keeps: conversations, what is half written, and settings. The key of the server is kept for as long as
// the tab is open, and nowhere else.

/** A storage of the browser; where it has none to give, or no room, this goes on in memory. */
class Kept {
  constructor(name) {
    this.memory = new Map();
    try {
      this.area = window[name];
    } catch {
      this.area = null; // forbidden by the browser's settings
    }
  }

  get(key) {
    return this.memory.get(key) ?? this.area?.getItem(key) ?? null;
  }

  /** Whether it is there after a reload, too. */
  set(key, value) {
    try {
      this.area.setItem(key, value);
      this.memory.delete(key);
      return true;
    } catch {
      this.memory.set(key, value);
      return false;
    }
  }

  remove(key) {
    this.memory.delete(key);
    this.area?.removeItem(key);
  }

  keys() {
    return new Set([...this.memory.keys(), ...Object.keys(this.area ?? {})]);
  }
}

export const kept = new Kept("localStorage");
export const tab = new Kept("sessionStorage");

/** A value that was kept as JSON; null where there is none that can be read. */
export function recall(key) {
  try {
    return JSON.parse(kept.get(key));
  } catch {
    return null;
  }
}

// -------------------------------------------------------------------------------------------------------- conversations

const CHAT = "litgpt.chat."; // each has an entry of its own, so that two tabs do not undo each other's work

export function newChat() {
  const id = Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
  return { id, title: "", changed: Date.now(), messages: [] };
}

/** All conversations, the last one first. What is no conversation is passed over. */
export function chats() {
  const keys = [...kept.keys()].filter((key) => key.startsWith(CHAT));
  return keys.map(recall).filter(isChat).sort((a, b) => b.changed - a.changed);
}

export function chat(id) {
  const found = recall(CHAT + id);
  return isChat(found) ? found : null;
}

function isChat(value) {
  const isMessage = (m) => (m?.role === "user" || m?.role === "assistant") && typeof m.content === "string";
  return typeof value?.id === "string" && typeof value.title === "string" && Array.isArray(value.messages) && value.messages.every(isMessage);
}

export function save({ id, title, changed, messages }) {
  return kept.set(CHAT + id, JSON.stringify({ id, title, changed, messages }));
}

export function remove(chat) {
  kept.remove(CHAT + chat.id);
  keepDraft(chat, "");
}

export function isChatKey(key) {
  return key === null || key.startsWith(CHAT);
}

/** What is half written. A conversation that has not begun shares it with all such, in whatever tab. */
export function draft(chat) {
  return kept.get(draftKey(chat)) ?? "";
}

export function keepDraft(chat, text) {
  if (text) kept.set(draftKey(chat), text);
  else kept.remove(draftKey(chat));
}

function draftKey(chat) {
  return `litgpt.draft.${chat.messages.length ? chat.id : "new"}`;
}

// ------------------------------------------------------------------------------------------------------------- settings

// What a request may say: its name in the page, what is taken, and how that is told.
export const FIELDS = {
  temperature: { name: "Temperature", words: "a number from 0 to 100, such as 0.7", least: 0, most: 100 },
  top_p: { name: "Top p", words: "a number from 0 to 1, such as 0.9", least: 0, most: 1 },
  top_k: { name: "Top k", words: "a whole number from 1 on, such as 50", least: 1, isWhole: true },
  max_tokens: { name: "Max tokens", words: "a whole number from 1 on, such as 500", least: 1, isWhole: true },
  seed: { name: "Seed", words: "a whole number from 0 on, such as 7", least: 0, isWhole: true },
};

/** What is wrong with what was typed for a field; empty where nothing is. */
export function wrong(field, text) {
  const { name, words, least, most = Number.MAX_SAFE_INTEGER, isWhole } = FIELDS[field];
  const pattern = isWhole ? /^\d+$/ : /^\d*\.?\d+$/;
  if (!text || (pattern.test(text) && Number(text) >= least && Number(text) <= most)) return "";
  return `${name} cannot be “${text.slice(0, 40)}”: give ${words}, or nothing.`;
}

/** As they were typed; what cannot be sent is left out. */
export function settings() {
  const found = recall("litgpt.settings") ?? {};
  const taken = { system: typeof found.system === "string" ? found.system : "" };
  for (const field of Object.keys(FIELDS)) {
    const text = String(found[field] ?? "");
    taken[field] = wrong(field, text) ? "" : text;
  }
  return taken;
}

export function keepSettings(given) {
  kept.set("litgpt.settings", JSON.stringify(given));
}

/** The request that goes on with these messages. */
export function request(model, messages) {
  const { system, ...given } = settings();
  const numbers = Object.entries(given).filter(([, text]) => text).map(([field, text]) => [field, Number(text)]);
  const said = messages.map(({ role, content }) => ({ role, content }));
  return { model, messages: system ? [{ role: "system", content: system }, ...said] : said, ...Object.fromEntries(numbers) };
}
