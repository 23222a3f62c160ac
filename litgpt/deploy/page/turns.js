// What a turn of the conversation looks like: what the user wrote as it is, answers as Markdown.

import { Live } from "./markdown.js";

/** An element with attributes, properties and children. */
export function element(tag, { attributes = {}, ...properties } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

function action(name, words, label) {
  return element("button", { type: "button", className: "quiet", textContent: words, attributes: { "data-do": name, "aria-label": label } });
}

/** The view of a message; `update` shows what is new in it. */
export class Turn {
  constructor(message) {
    this.message = message;
    this.isAnswer = message.role === "assistant";
    this.text = element("div", { className: "text" });
    this.note = element("span", { className: "note" });
    const again = this.isAnswer
      ? action("again", "Answer again", "Answer again")
      : action("edit", "Edit", "Edit your message");
    const copy = action("copy", "Copy", this.isAnswer ? "Copy the answer" : "Copy your message");
    const heading = element("h2", { className: "unseen", textContent: this.isAnswer ? (message.model ?? "The model") : "You" });
    const foot = element("div", { className: "foot" }, this.note, copy, again);
    this.element = element("article", { className: this.isAnswer ? "answer" : "user" }, heading, this.text, foot);
    this.live = this.isAnswer ? new Live(this.text) : null;
    this.shown = 0; // characters
    this.update(false);
  }

  update(isRunning) {
    const { content } = this.message;
    if (!this.live) this.text.textContent = content;
    else if (content.length > this.shown) this.live.show(content);
    this.shown = content.length;
    this.element.classList.toggle("running", isRunning);
    this.element.setAttribute("aria-busy", String(isRunning));
    this.note.textContent = this.isAnswer ? (isRunning ? running(this.message) : figures(this.message)) : "";
  }
}

function running(message) {
  return message.content ? "Writing…" : "Reading…";
}

const ENDS = { stopped: "stopped by you", length: "cut off at the limit", lost: "not whole" };

/** How an answer ended, and how quickly it came. */
function figures({ content, reason, usage, speed }) {
  const parts = [];
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (speed) parts.push(`${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s`);
  if (usage) parts.push(`prompt ${usage.prompt_tokens}`);
  if (ENDS[reason]) parts.push(ENDS[reason]);
  if (!content) parts.push("an empty answer");
  return parts.join(" · ");
}

/** Put a text on the clipboard; whether that worked. */
export async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedTheOldWay(text); // browsers hide the clipboard from pages that come neither by https nor from this machine
  }
}

function copiedTheOldWay(text) {
  const before = document.activeElement;
  const box = element("textarea", { value: text, className: "unseen" });
  document.body.append(box);
  box.select();
  const worked = document.execCommand("copy");
  box.remove();
  before?.focus();
  return worked;
}
