// Markdown to DOM, while it is being written. Text becomes text nodes and elements of a fixed set, never HTML: what looks
// like a tag, an image or a link with another scheme than these is shown as the characters it is made of.

const SCHEMES = ["http:", "https:", "mailto:"];
const DEEPEST = 12; // quotes and lists in each other; below that, what looks like one is text
const PART = 64; // blocks in a part, at least
const MOST_OPEN = 16; // marks of emphasis and brackets that may wait for their ends at once

/** Shows a text that grows. Blocks that are over are not touched again, so that what is selected in them stays so. */
export class Live {
  constructor(root) {
    this.root = root;
    this.settled = 0; // characters of the text that are shown for good
    this.begin();
  }

  /** Blocks stand together in parts: then a browser need not look at all of them when one is added. */
  begin() {
    this.part = document.createElement("div");
    this.kept = 0; // nodes in it that are there for good
    this.root.append(this.part);
  }

  /** `text` is all of it; it begins with what was shown before. */
  show(text) {
    const lines = text.slice(this.settled).split("\n");
    const blocks = parse(lines.map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line)), 0);
    patch(this.part, this.part.childNodes[this.kept] ?? null, blocks.map((block) => block.node));
    const last = blocks.at(-1);
    // two whole lines say what a block is, and with it that the one before has ended
    if (blocks.length > 1 && last.line + 2 < lines.length) {
      for (let i = 0; i < last.line; i++) this.settled += lines[i].length + 1;
      this.kept += blocks.length - 1;
      if (this.kept >= PART) {
        const open = this.part.lastChild;
        this.begin();
        this.part.append(open);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- nodes

/** An element to be; a text is a string. Attributes are ours, never names out of the text. */
function h(tag, attributes, kids) {
  return { tag, attributes, kids };
}

/** Make the children of `parent` from `child` on be `nodes`, changing no more than what differs. */
function patch(parent, child, nodes) {
  for (const node of nodes) child = fit(parent, child, node).nextSibling;
  while (child) {
    const next = child.nextSibling;
    child.remove();
    child = next;
  }
}

function fit(parent, child, node) {
  if (typeof node === "string") {
    if (child?.nodeType !== Node.TEXT_NODE) return put(parent, child, document.createTextNode(node));
    if (node.startsWith(child.data)) child.appendData(node.slice(child.data.length));
    else child.data = node;
    return child;
  }
  if (child?.localName !== node.tag) child = put(parent, child, document.createElement(node.tag));
  for (const name of child.getAttributeNames()) if (!(name in node.attributes)) child.removeAttribute(name);
  for (const [name, value] of Object.entries(node.attributes)) {
    if (child.getAttribute(name) !== value) child.setAttribute(name, value);
  }
  patch(child, child.firstChild, node.kids);
  return child;
}

function put(parent, old, made) {
  if (old) parent.replaceChild(made, old);
  else parent.append(made);
  return made;
}

// --------------------------------------------------------------------------------------------------------------- blocks

// Each reads a block that begins at a line: [its node, the line after it], or null where it is none.
const READERS = [fence, heading, rule, quote, list, table];

/** The blocks of some lines, each with the line where it begins. */
function parse(lines, depth) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [node, next] = read(lines, at, depth) ?? paragraph(lines, at, depth);
    found.push({ node, line: at });
    at = next;
  }
  return found;
}

function read(lines, at, depth) {
  for (const reader of READERS) {
    const block = reader(lines, at, depth);
    if (block) return block;
  }
  return null;
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end, depth)) end++;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [h("p", {}, inline(text)), end];
}

/** Whether a line ends the paragraph before it. */
function interrupts(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at)) return true;
  if (depth >= DEEPEST) return false;
  const item = ITEM.exec(line);
  return QUOTE.test(line) || (item !== null && Boolean(item[4]) && !/^(?!1[.)])\d/.test(item[2]));
}

const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)$/;

function fence(lines, at) {
  const opening = FENCE.exec(lines[at]);
  if (!opening) return null;
  const [, marks, info] = opening;
  const indent = width(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end].trim(), marks)) end++;
  const body = lines.slice(at + 1, end).map((line) => dedent(line, indent)).join("\n");
  return [code(info.trim().split(/[\s{]/, 1)[0], body), end + 1];
}

function closes(line, marks) {
  return line.length >= marks.length && line === marks[0].repeat(line.length);
}

function code(language, text) {
  const copy = h("button", { type: "button", class: "copy-code" }, ["Copy code"]);
  const bar = h("div", { class: "bar" }, [h("span", {}, [language || "text"]), copy]);
  return h("div", { class: "code" }, [bar, h("pre", { tabindex: "0" }, [h("code", {}, [text])])]);
}

const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/;

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  let text = (found[2] ?? "").trim();
  let end = text.length;
  while (text[end - 1] === "#") end--;
  if (end === 0 || " \t".includes(text[end - 1])) text = text.slice(0, end).trimEnd();
  const level = Math.min(found[1].length + 2, 6); // below the page's own and those of the turns
  return [h(`h${level}`, {}, inline(text)), at + 1];
}

const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;

function rule(lines, at) {
  return RULE.test(lines[at]) ? [h("hr", {}, []), at + 1] : null;
}

const QUOTE = /^ {0,3}> ?/;

function quote(lines, at, depth) {
  let end = at;
  while (depth < DEEPEST && end < lines.length && QUOTE.test(lines[end])) end++;
  if (end === at) return null;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [h("blockquote", {}, parse(inner, depth + 1).map((block) => block.node)), end];
}

const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;

function list(lines, at, depth) {
  const first = depth < DEEPEST ? ITEM.exec(lines[at]) : null;
  if (!first) return null;
  const isOrdered = first[2].length > 1;
  const items = [];
  for (let found = first; found && found[2].length > 1 === isOrdered && !RULE.test(lines[at]); ) {
    const end = endOfItem(lines, at, found, depth);
    items.push(item(lines.slice(at, end), found, depth));
    at = end;
    while (at < lines.length && !lines[at].trim()) at++;
    found = at < lines.length ? ITEM.exec(lines[at]) : null;
  }
  const attributes = isOrdered ? { start: String(parseInt(first[2], 10)) } : {};
  return [h(isOrdered ? "ol" : "ul", attributes, items), at];
}

/** The line after an item: what is indented belongs to it, and so does text that just goes on. */
function endOfItem(lines, at, found, depth) {
  const inner = width(lines[at]) + 2;
  let end = at + 1;
  for (let i = at + 1; i < lines.length; i++) {
    if (!lines[i].trim()) continue;
    const goesOn = i === end && !ITEM.test(lines[i]) && !interrupts(lines, i, depth);
    if (width(lines[i]) < inner && !goesOn) break;
    end = i + 1;
  }
  return end;
}

function item(lines, found, depth) {
  const gap = found[3] && width(found[3]) <= 4 ? width(found[3]) : 1;
  const column = width(found[1]) + found[2].length + gap;
  const inner = [found[4] ?? "", ...lines.slice(1).map((line) => dedent(line, column))];
  const nodes = parse(inner, depth + 1).map((block) => block.node);
  return h("li", {}, nodes[0]?.tag === "p" ? [...nodes[0].kids, ...nodes.slice(1)] : nodes);
}

function table(lines, at) {
  if (!isTable(lines, at)) return null;
  const sides = cells(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "centre" : "right") : ""));
  const row = (tag, line) =>
    h("tr", {}, cells(line).slice(0, sides.length).map((cell, i) => h(tag, sides[i] ? { class: sides[i] } : {}, inline(cell))));
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) rows.push(row("td", lines[end++]));
  const kids = [h("thead", {}, [row("th", lines[at])]), h("tbody", {}, rows)];
  const frame = { class: "table", tabindex: "0", role: "region", "aria-label": "Table" };
  return [h("div", frame, [h("table", {}, kids)]), end];
}

/** Whether a row of names and a row of dashes follow each other. */
function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !/^[\s|:-]+$/.test(lines[at + 1])) return false;
  const dashes = cells(lines[at + 1]);
  const isRow = dashes.length > 0 && dashes.every((cell) => /^:?-+:?$/.test(cell));
  return isRow && dashes.length === cells(lines[at]).length;
}

function cells(line) {
  const found = [""];
  for (const [part] of line.trim().matchAll(/\\\||\||[^|\\]+|\\/g)) {
    if (part === "|") found.push("");
    else found[found.length - 1] += part === "\\|" ? "|" : part;
  }
  if (!found[0].trim()) found.shift();
  if (found.length && !found.at(-1).trim()) found.pop();
  return found.map((cell) => cell.trim());
}

/** Columns of white space that a line begins with. */
function width(line) {
  let columns = 0;
  for (const character of line) {
    if (character !== " " && character !== "\t") break;
    columns += character === " " ? 1 : 4;
  }
  return columns;
}

/** The line without its first columns, as far as they are white. */
function dedent(line, columns) {
  let at = 0;
  while (columns > 0 && (line[at] === " " || line[at] === "\t")) columns -= line[at++] === " " ? 1 : 4;
  return line.slice(at);
}

// --------------------------------------------------------------------------------------------------------------- inline

// \( and \[ are how models write formulas, and stay as they are
const MARKS =
  /\\(?:[()[\]]|([!-'*-/:-@^-`{-~]))|(`+)|(\*+|_+|~+)|(!?\[)|(\])|<((?:https?:\/\/|mailto:)[^\s<>]+)>|(https?:\/\/[^\s<>"'`*[\]]+)/g;
const TARGET = /\(\s*<?((?:[^\s<>()]|\([^\s<>()]*\)){1,2000})>?(?:\s+"[^"\n]{0,2000}")?\s*\)/y;

/** The nodes of a text without blocks, in one pass: each mark is opened, closed or left as text once. */
function inline(text) {
  return new Inline(text).nodes();
}

class Inline {
  constructor(text) {
    this.text = text;
    this.out = []; // strings, nodes, and marks {char, count} that may still open something
    this.open = { "*": [], _: [], "~": [], "[": [] }; // places in `out`
    this.ticks = null; // length of a run of backticks -> where such runs begin
  }

  nodes() {
    const { text } = this;
    let at = 0;
    MARKS.lastIndex = 0;
    for (let found; (found = MARKS.exec(text)); MARKS.lastIndex = at) {
      this.out.push(text.slice(at, found.index));
      at = this.mark(found, found.index, MARKS.lastIndex);
    }
    this.out.push(text.slice(at));
    return joined(this.out);
  }

  /** What a mark makes; returns where the text goes on. */
  mark([whole, escaped, ticks, run, bracket, end, angle, bare], start, next) {
    if (escaped) this.out.push(escaped);
    else if (ticks) return this.codeSpan(ticks.length, start, next);
    else if (run) this.emphasis(run, start, next);
    else if (bracket) this.push("[", bracket);
    else if (end) return this.link(next);
    else if (angle) this.out.push(anchor(angle, [angle]) ?? whole);
    else if (bare) return this.bareLink(bare, start);
    else this.out.push(whole);
    return next;
  }

  push(kind, char, count = 1) {
    if (this.open[kind].length < MOST_OPEN) this.open[kind].push(this.out.length);
    this.out.push({ char, count });
  }

  /** Marks from a place on can open nothing any more. */
  drop(place) {
    for (const places of Object.values(this.open)) while (places.at(-1) >= place) places.pop();
  }

  codeSpan(length, start, next) {
    if (!this.ticks) {
      this.ticks = new Map();
      for (const run of this.text.matchAll(/`+/g)) {
        if (!this.ticks.has(run[0].length)) this.ticks.set(run[0].length, []);
        this.ticks.get(run[0].length).push(run.index);
      }
      for (const places of this.ticks.values()) places.reverse();
    }
    const places = this.ticks.get(length) ?? []; // an escaped backtick before makes a run that is none
    while (places.length && places.at(-1) <= start) places.pop();
    if (!places.length) {
      this.out.push("`".repeat(length));
      return next;
    }
    const end = places.pop();
    let inner = this.text.slice(next, end).replaceAll("\n", " ");
    if (inner.startsWith(" ") && inner.endsWith(" ") && inner.trim()) inner = inner.slice(1, -1);
    this.out.push(h("code", {}, [inner]));
    return end + length;
  }

  emphasis(run, start, next) {
    const char = run[0];
    const before = this.text[start - 1] ?? " ";
    const after = this.text[next] ?? " ";
    const isMark = char === "~" ? run.length === 2 : run.length <= 3;
    const isWithin = char === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after);
    let left = run.length;
    if (isMark && !isWithin && !/\s/.test(before)) left = this.close(char, left);
    if (left && isMark && !isWithin && !/\s/.test(after)) this.push(char, char, left);
    else if (left) this.out.push(char.repeat(left));
  }

  /** Wrap what stands since the marks that open; returns how many of `count` are left. */
  close(char, count) {
    while (count && this.open[char].length) {
      const place = this.open[char].at(-1);
      const opener = this.out[place];
      const used = opener.count >= 2 && count >= 2 ? 2 : 1;
      this.drop(place + 1);
      const kids = joined(this.out.splice(place + 1));
      if (!kids.length) return count;
      this.out.push(h(char === "~" ? "del" : used === 2 ? "strong" : "em", {}, kids));
      opener.count -= used;
      count -= used;
      if (!opener.count) this.open[char].pop();
    }
    return count;
  }

  link(next) {
    const place = this.open["["].at(-1);
    TARGET.lastIndex = next;
    const target = place === undefined ? null : TARGET.exec(this.text);
    const kids = target && this.out[place].char === "[" ? joined(this.out.slice(place + 1)) : [];
    const made = kids.length ? anchor(target[1], kids.map(unlinked)) : null;
    if (!made) {
      this.open["["].pop();
      this.out.push("]");
      return next;
    }
    this.drop(place);
    this.open["["] = []; // no link in a link
    this.out.splice(place, Infinity, made);
    return TARGET.lastIndex;
  }

  bareLink(found, start) {
    let end = found.length;
    while (".,;:!?)]|_~".includes(found[end - 1]) && !(found[end - 1] === ")" && found.includes("("))) end--;
    const url = found.slice(0, end);
    this.out.push(anchor(url, [url]) ?? url);
    return start + end;
  }
}

function anchor(target, kids) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (!SCHEMES.includes(url.protocol)) return null;
  return h("a", { href: url.href, rel: "noopener noreferrer", target: "_blank" }, kids);
}

/** The node with links in it as plain text. */
function unlinked(node) {
  if (typeof node === "string") return node;
  return h(node.tag === "a" ? "span" : node.tag, node.tag === "a" ? {} : node.attributes, node.kids.map(unlinked));
}

/** Marks that opened nothing are text; texts in a row are one. */
function joined(parts) {
  const nodes = [];
  for (const part of parts) {
    if (part.tag) nodes.push(part);
    else {
      const text = typeof part === "string" ? part : part.char.repeat(part.count);
      if (typeof nodes.at(-1) === "string") nodes[nodes.length - 1] += text;
      else if (text) nodes.push(text);
    }
  }
  return nodes;
}
