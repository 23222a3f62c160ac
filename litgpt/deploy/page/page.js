// The page: conversations on the left, turns in the middle, the message box below. What it shows is made in turns.js, what
// it remembers in chats.js, and what it asks in server.js.

import * as store from "./chats.js";
import * as server from "./server.js";
import { Turn, copied, element } from "./turns.js";

const $ = (id) => document.getElementById(id);
const KEY = "litgpt.key";
const NEAR = 48; // pixels from the end that count as being there
const SPOKEN = 1000; // characters of an answer that are read out when it is done

let current = store.newChat();
let turns = []; // views of the messages of `current`
let editing = null; // the place of the message that is being changed
let offline = null; // why the server does not say what it has
const runs = new Map(); // id of a conversation -> the answer that is being written in it

// -------------------------------------------------------------------------------------------------------- conversations

function list() {
  const known = store.chats();
  if (current.messages.length && !known.some((each) => each.id === current.id)) known.unshift(current);
  $("list").replaceChildren(...known.map(entry));
}

const PENCIL = "M12.5 4.5l3 3M4 16l.8-3.6L13.4 3.8a1.4 1.4 0 0 1 2 0l.8.8a1.4 1.4 0 0 1 0 2L7.6 15.2z";
const CROSS = "M5 5l10 10M15 5L5 15";

function entry(chat) {
  const name = chat.title || "Untitled";
  const isCurrent = chat.id === current.id;
  const open = element("button", { type: "button", className: "chat", textContent: name, title: name });
  if (isCurrent) open.setAttribute("aria-current", "true");
  open.onclick = () => visit(chat.id);
  const row = element("li", { className: isCurrent ? "current" : "" }, open);
  row.append(small(`Rename ${name}`, PENCIL, () => rename(chat)), small(`Delete ${name}`, CROSS, () => askToRemove(chat)));
  return row;
}

function small(label, path, onclick) {
  const made = element("button", { type: "button", className: "small", onclick, attributes: { "aria-label": label } });
  const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawing.setAttribute("viewBox", "0 0 20 20");
  drawing.setAttribute("aria-hidden", "true");
  drawing.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  drawing.firstChild.setAttribute("d", path);
  made.append(drawing);
  return made;
}

function visit(id) {
  if (id !== current.id) show(runs.get(id)?.chat ?? store.chat(id) ?? store.newChat());
  drawer(false);
  focusMessage();
}

function begin() {
  if (current.messages.length) show(store.newChat());
  drawer(false);
  focusMessage();
  say("New conversation.");
}

function rename(chat) {
  drawer(false);
  $("name").value = chat.title;
  opened("rename", () => {
    const own = chat.id === current.id ? current : (runs.get(chat.id)?.chat ?? chat);
    own.title = $("name").value.trim() || own.title;
    keep(own);
    list();
    title();
  });
  $("name").select();
}

function askToRemove(chat) {
  drawer(false);
  $("remove-what").textContent = chat.title;
  opened("remove", () => {
    abandon(chat);
    store.remove(chat);
    if (chat.id === current.id) show(store.newChat());
    else list();
    focusMessage();
    say("Deleted.");
  });
}

function abandon(chat) {
  const run = runs.get(chat.id);
  runs.delete(chat.id); // before the end is heard of: nothing is kept then
  clearTimeout(run?.timer);
  run?.controller.abort();
}

function keep(chat) {
  if (!store.save(chat)) say("This browser has no room left: delete a conversation, or this one is gone after a reload.");
}

/** Bring a conversation on the screen. */
function show(chat) {
  current = chat;
  store.tab.set("litgpt.current", chat.id);
  leaveEditing();
  $("message").value = store.draft(chat);
  turns = [];
  $("turns").replaceChildren();
  for (const message of chat.messages) add(message);
  list();
  settle();
  toEnd();
}

function title() {
  document.title = current.title ? `${current.title} – LitGPT` : "LitGPT";
}

// ---------------------------------------------------------------------------------------------------------------- turns

function add(message) {
  const turn = new Turn(message);
  turns.push(turn);
  $("turns").append(turn.element);
  return turn;
}

/** What hangs on how the conversation stands: buttons, the line of trouble, the name of the window. */
function settle() {
  const run = runs.get(current.id);
  const { messages } = current;
  const isUnanswered = messages.at(-1)?.role === "user";
  for (const turn of turns) turn.update(turn.message === run?.message);
  const lastUser = messages.findLastIndex((each) => each.role === "user");
  turns.forEach((turn, i) => {
    turn.element.querySelector("[data-do=edit]")?.toggleAttribute("hidden", i !== lastUser || Boolean(run));
    turn.element.querySelector("[data-do=again]")?.toggleAttribute("hidden", i !== messages.length - 1);
  });
  $("send").hidden = Boolean(run);
  $("stop").hidden = !run;
  $("empty").hidden = messages.length > 0 || Boolean(offline);
  tell(run ? null : (current.trouble ?? offline ?? (isUnanswered ? new server.Trouble("This message has no answer yet.") : null)));
  title();
}

/** The one line about what went wrong, with what helps. */
function tell(trouble) {
  $("trouble").hidden = !trouble;
  $("trouble").firstElementChild.textContent = trouble?.message ?? "";
  $("retry").textContent = trouble?.remedy === "key" ? "Enter the key" : "Try again";
}

function isAtEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
}

function toEnd() {
  $("log").scrollTop = $("log").scrollHeight;
}

/** For who listens instead of looking. */
function say(words) {
  $("status").textContent = "";
  setTimeout(() => ($("status").textContent = words), 50); // the same words twice are news, too
}

// -------------------------------------------------------------------------------------------------------------- answers

function send() {
  const text = $("message").value.trim();
  if (!text) return;
  if (runs.has(current.id)) {
    say("An answer is being written. Stop it first, or wait.");
    return;
  }
  if (editing !== null) {
    current.messages.length = editing;
    for (const turn of turns.splice(editing)) turn.element.remove();
    leaveEditing();
  }
  const message = { role: "user", content: text };
  store.keepDraft(current, "");
  current.messages.push(message);
  current.title ||= text.split("\n", 1)[0].slice(0, 60);
  $("message").value = "";
  add(message);
  toEnd();
  write(current);
}

/** Write the last answer anew; the old one comes back where there is no new one. */
function again() {
  if (runs.has(current.id) || !current.messages.length) return;
  let before = null;
  if (current.messages.at(-1).role === "assistant") {
    before = current.messages.pop();
    turns.pop().element.remove();
  }
  write(current, before);
}

async function write(chat, before = null) {
  const model = $("model").value || undefined;
  const message = { role: "assistant", content: "", model };
  const asked = store.request(model, chat.messages);
  const run = {
    chat,
    message,
    before, // the answer that this one takes the place of
    controller: new AbortController(),
    times: [], // of the first piece and the last
    saved: performance.now(),
    timer: 0,
    pause: 16,
    trouble: undefined,
  };
  runs.set(chat.id, run);
  chat.trouble = undefined;
  chat.changed = Date.now();
  keep(chat);
  chat.messages.push(message);
  list();
  add(message);
  settle();
  toEnd();
  say("The model writes.");
  try {
    for await (const piece of server.answer(asked, store.tab.get(KEY), run.controller.signal)) take(run, piece);
  } catch (error) {
    if (error.name === "AbortError") message.reason = "stopped";
    else run.trouble = error instanceof server.Trouble ? error : new server.Trouble(`The page made a mistake: ${error.message}`);
  }
  if (runs.get(chat.id) === run) finish(run);
}

function take(run, { text, reason, usage }) {
  const { message } = run;
  if (text) {
    message.content += text;
    run.times.push(performance.now());
    if (run.times.length > 2) run.times.splice(1, 1);
    run.timer ||= setTimeout(() => refresh(run), run.pause);
  }
  if (reason) message.reason = reason;
  if (usage) {
    const { prompt_tokens, completion_tokens } = usage;
    const seconds = (run.times.at(-1) - run.times[0]) / 1000;
    message.usage = { prompt_tokens, completion_tokens };
    message.speed = completion_tokens > 1 && seconds > 0 ? (completion_tokens - 1) / seconds : undefined;
  }
}

/** Show what is new. The more work that was, the longer until the next time: the page stays quick to use. */
function refresh(run) {
  const started = performance.now();
  run.timer = 0;
  if (run.chat === current) {
    const follows = isAtEnd();
    turnOf(run.message)?.update(true);
    if (follows) toEnd();
  }
  if (started - run.saved > 2000) {
    run.saved = started;
    store.save(run.chat);
  }
  run.pause = Math.max(16, 4 * (performance.now() - started));
}

function turnOf(message) {
  return turns.find((turn) => turn.message === message);
}

function finish(run) {
  const { chat, message, before, trouble } = run;
  const follows = isAtEnd();
  clearTimeout(run.timer);
  runs.delete(chat.id);
  chat.trouble = trouble;
  chat.changed = Date.now();
  if (trouble && message.content) message.reason = "lost";
  const isVain = !message.content && (trouble || message.reason === "stopped");
  if (isVain) chat.messages.splice(-1, 1, ...(before ? [before] : []));
  keep(chat);
  list();
  if (chat === current) {
    if (isVain) {
      turns.pop().element.remove();
      if (before) add(before);
    }
    const hadFocus = document.activeElement === $("stop");
    settle();
    if (hadFocus) $("message").focus();
    if (follows) toEnd();
  }
  if (!trouble) say(message.reason === "stopped" ? "Stopped." : spoken(chat === current ? turnOf(message) : null));
  else if (trouble.remedy === "key" && chat === current) askKey(trouble.message, again);
}

/** The page goes away in the middle of an answer. */
function leave({ chat, message, before }) {
  message.reason = "lost";
  const messages = message.content ? chat.messages : chat.messages.toSpliced(-1, 1, ...(before ? [before] : []));
  store.save({ ...chat, messages });
}

function spoken(turn) {
  if (!turn) return "An answer in another conversation is done.";
  const words = turn.text.textContent;
  return words.length <= SPOKEN ? `Answer: ${words}` : `The answer is done. It begins: ${words.slice(0, SPOKEN)}…`;
}

function stop() {
  runs.get(current.id)?.controller.abort();
}

/** What the button in the line of trouble does. */
function retry() {
  const trouble = current.trouble ?? offline;
  const isAboutAnswer = current.trouble || current.messages.at(-1)?.role === "user";
  const then = isAboutAnswer ? again : undefined;
  if (trouble?.remedy === "key") askKey(trouble.message, then);
  else if (offline) loadModels(then);
  else again();
}

// -------------------------------------------------------------------------------------------------------------- editing

function edit() {
  const place = current.messages.findLastIndex((each) => each.role === "user");
  if (place < 0 || runs.has(current.id)) return;
  if (editing === null) store.keepDraft(current, $("message").value); // it comes back
  editing = place;
  $("message").value = current.messages[place].content;
  $("editing").hidden = false;
  turns[place].element.scrollIntoView({ block: "nearest" });
  focusMessage();
}

function leaveEditing() {
  if (editing === null) return;
  editing = null;
  $("editing").hidden = true;
  $("message").value = store.draft(current);
}

function focusMessage() {
  const box = $("message");
  box.focus();
  box.setSelectionRange(box.value.length, box.value.length);
}

// -------------------------------------------------------------------------------------------------------------- dialogs

/** Open a dialog; `done` is called when it is sent, and returns false where it must stay open. */
function opened(id, done) {
  const dialog = $(id);
  if (dialog.open) return;
  dialog.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    if (done?.() !== false) dialog.close();
  };
  dialog.showModal();
}

function openSettings() {
  const given = store.settings();
  $("system").value = given.system;
  for (const field of Object.keys(store.FIELDS)) {
    $(`set-${field}`).value = given[field];
    check(field);
  }
  opened("settings", () => {
    const bad = Object.keys(store.FIELDS).filter((field) => !check(field));
    if (bad.length) {
      $(`set-${bad[0]}`).focus();
      return false;
    }
    const typed = Object.keys(store.FIELDS).map((field) => [field, $(`set-${field}`).value.trim()]);
    store.keepSettings({ system: $("system").value.trim(), ...Object.fromEntries(typed) });
    say("Settings saved.");
    return true;
  });
}

function makeFields() {
  for (const [field, { name }] of Object.entries(store.FIELDS)) {
    const id = `set-${field}`;
    const input = element("input", { id, type: "text", inputMode: "decimal", autocomplete: "off", placeholder: "as the server" });
    input.setAttribute("aria-describedby", `${id}-wrong`);
    input.onchange = () => check(field);
    const label = element("label", { htmlFor: id, textContent: name });
    const line = element("p", { id: `${id}-wrong`, className: "wrong", attributes: { "aria-live": "polite" } });
    document.querySelector(".fields").append(element("div", {}, label, input, line));
  }
}

/** Whether a setting can be sent; says why not. */
function check(field) {
  const input = $(`set-${field}`);
  const words = store.wrong(field, input.value.trim());
  input.setAttribute("aria-invalid", String(Boolean(words)));
  $(`set-${field}-wrong`).textContent = words;
  return !words;
}

function askKey(why, then) {
  $("key-why").textContent = why;
  $("key-text").value = "";
  $("key-wrong").textContent = "";
  opened("key", () => {
    const key = $("key-text").value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) {
      $("key-wrong").textContent = key ? "A key has letters, digits and signs, without spaces." : "Give the key, or cancel.";
      $("key-text").focus();
      return false;
    }
    store.tab.set(KEY, key);
    $("key-text").value = "";
    loadModels(then);
    return true;
  });
}

// ------------------------------------------------------------------------------------------------------- model and theme

/** Ask what the server has; `then` is called once it says so. */
async function loadModels(then) {
  try {
    const names = await server.models(store.tab.get(KEY));
    const chosen = $("model").value || store.kept.get("litgpt.model");
    $("model").replaceChildren(...names.map((name) => element("option", { textContent: name, value: name })));
    if (names.includes(chosen)) $("model").value = chosen;
    offline = null;
  } catch (error) {
    offline = error;
    if (error.remedy === "key") askKey(error.message, then);
  }
  settle();
  if (!offline) then?.();
}

const dark = window.matchMedia("(prefers-color-scheme: dark)");

function paint() {
  const chosen = store.kept.get("litgpt.theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
  $("theme").setAttribute("aria-pressed", String(isDark()));
}

function isDark() {
  return (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
}

function drawer(isOpen) {
  if (document.body.classList.contains("drawer") === isOpen) return;
  document.body.classList.toggle("drawer", isOpen);
  $("menu").setAttribute("aria-expanded", String(isOpen));
  $("shade").hidden = !isOpen;
  $("room").inert = isOpen;
  if (isOpen) $("new").focus();
  else $("menu").focus();
}

// ----------------------------------------------------------------------------------------------------------------- keys

const SHORTCUTS = { KeyN: begin, KeyI: focusMessage, KeyR: again, KeyO: openSettings, KeyK: () => opened("keys") };

function onKey(event) {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  const shortcut = event.altKey && !event.ctrlKey && !event.metaKey && !event.shiftKey ? SHORTCUTS[event.code] : null;
  if (shortcut) {
    event.preventDefault();
    shortcut();
  } else if (event.key === "Escape") {
    if (document.body.classList.contains("drawer")) drawer(false);
    else if (runs.has(current.id)) stop();
    else leaveEditing();
  }
}

function onMessageKey(event) {
  if (event.isComposing || event.keyCode === 229) return; // Enter chooses a word there; 229 is how Safari says so
  if (event.key === "Enter" && !event.shiftKey && !event.altKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !$("message").value) {
    event.preventDefault();
    edit();
  }
}

async function onTurnClick(event) {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.do === "edit") edit();
  else if (button.dataset.do === "again") again();
  else {
    const turn = turns.find((each) => each.element.contains(button));
    const block = button.closest(".code");
    const worked = await copied(block ? block.querySelector("pre").textContent : turn.message.content);
    say(worked ? "Copied." : "The browser does not let this page copy.");
    const before = block ? "Copy code" : "Copy";
    button.textContent = worked ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = before), 1500);
  }
}

// ---------------------------------------------------------------------------------------------------------------- begin

paint();
makeFields();
dark.addEventListener("change", paint);
window.matchMedia("(max-width: 48rem)").addEventListener("change", () => drawer(false)); // as in page.css
document.addEventListener("keydown", onKey);
$("message").addEventListener("keydown", onMessageKey);
$("message").addEventListener("input", () => editing === null && store.keepDraft(current, $("message").value));
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
  $("message").focus();
});
$("stop").onclick = stop;
$("cancel").onclick = () => {
  leaveEditing();
  focusMessage();
};
$("retry").onclick = retry;
$("new").onclick = begin;
$("turns").onclick = onTurnClick;
$("menu").onclick = () => drawer(true);
$("shade").onclick = () => drawer(false);
$("settings-button").onclick = openSettings;
$("keys-button").onclick = () => opened("keys");
$("theme").onclick = () => {
  store.kept.set("litgpt.theme", isDark() ? "light" : "dark");
  paint();
};
$("model").onchange = () => store.kept.set("litgpt.model", $("model").value);
$("log").onscroll = () => ($("latest").hidden = isAtEnd());
$("latest").onclick = toEnd;
for (const button of document.querySelectorAll("[data-close]")) button.onclick = () => button.closest("dialog").close();
window.addEventListener("pagehide", () => runs.forEach(leave));
window.addEventListener("storage", (event) => {
  if (!store.isChatKey(event.key)) return;
  const theirs = store.chat(current.id);
  if (theirs && !runs.has(current.id) && editing === null && theirs.changed !== current.changed) show(theirs);
  else list();
});
show(store.chat(store.tab.get("litgpt.current")) ?? store.newChat());
loadModels();
