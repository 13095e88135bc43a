// Markdown as DOM nodes, for text that nobody checked: no HTML, no images, links to http and https only.
// Half a text (while it is streamed) shows as far as it goes: an open code block runs to the end, an open ** stays text.
// Every pass is linear in the text, and nesting is bounded.

import { el, visible } from "./dom.js";

const MAX_DEPTH = 8;  // of quotes and lists
const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]+(.*)|$)/;
const QUOTE = /^ {0,3}>[ ]?(.*)$/;
const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

export function renderMarkdown(text, copyLabel = "copy", onCopy = null) {
  const root = el("div", { class: "markdown" });
  const context = { copyLabel, onCopy };
  root.append(...blocks(visible(text).split("\n"), 0, context));
  return root;
}

function blocks(lines, depth, context) {
  const nodes = [];
  for (let at = 0; at < lines.length;) {
    const line = lines[at];
    let found;
    if (line.trim() === "") at += 1;
    else if ((found = fenceOf(line))) at = code(lines, at, found, nodes, context);
    else if ((found = HEADING.exec(line))) {
      nodes.push(el("h" + Math.min(6, found[1].length + 1), {}, ...inline((found[2] ?? "").replace(/[ \t]#+[ \t]*$/, ""))));
      at += 1;
    } else if (RULE.test(line)) {
      nodes.push(el("hr"));
      at += 1;
    } else if (depth < MAX_DEPTH && QUOTE.test(line)) at = quote(lines, at, depth, nodes, context);
    else if (depth < MAX_DEPTH && ITEM.test(line)) at = list(lines, at, depth, nodes, context);
    else if (isTable(lines, at)) at = table(lines, at, nodes);
    else at = paragraph(lines, at, depth, nodes);
  }
  return nodes;
}

// The marks that open a code block, and the word behind them.
function fenceOf(line) {
  const marks = FENCE.exec(line)?.[1];
  const rest = marks ? line.trimStart().slice(marks.length).trim() : "";
  return !marks || (marks[0] === "`" && rest.includes("`")) ? null : { marks, language: rest.split(/\s/, 1)[0] };
}

function closesFence(line, marks) {
  const found = line.trim();
  return found.length >= marks.length && line.length - line.trimStart().length <= 3 && run(found, 0) === found.length &&
    found[0] === marks[0];
}

function code(lines, start, { marks, language }, nodes, context) {
  let end = start + 1;
  while (end < lines.length && !closesFence(lines[end], marks)) end += 1;
  const text = lines.slice(start + 1, end).join("\n");
  const copy = context.onCopy && el("button", { type: "button", class: "quiet", onclick: () => context.onCopy(text) }, context.copyLabel);
  nodes.push(el("figure", { class: "code" }, el("figcaption", {}, el("span", {}, language.slice(0, 30)), copy), el("pre", {}, el("code", {}, text))));
  return end + 1;
}

function quote(lines, start, depth, nodes, context) {
  const inside = [];
  let at = start;
  for (let found; at < lines.length && (found = QUOTE.exec(lines[at])); at += 1) inside.push(found[1]);
  nodes.push(el("blockquote", {}, ...blocks(inside, depth + 1, context)));
  return at;
}

function list(lines, start, depth, nodes, context) {
  const first = ITEM.exec(lines[start]);
  const isOrdered = /\d/.test(first[2]);
  const mark = first[2].at(-1);
  const items = [];
  let at = start;
  while (at < lines.length) {
    const found = ITEM.exec(lines[at]);
    if (!found || found[2].at(-1) !== mark || RULE.test(lines[at])) break;
    const indent = Math.min(found[1].length + found[2].length + 1, 6);
    const inside = [found[3] ?? ""];
    for (at += 1; at < lines.length; at += 1) {
      const line = lines[at];
      const spaces = line.length - line.trimStart().length;
      if (line.trim() === "") {
        const next = lines[at + 1];
        if (next === undefined || next.trim() === "" || next.length - next.trimStart().length < 2) break;
        inside.push("");
      } else if (spaces >= 2) inside.push(line.slice(Math.min(spaces, indent)));
      else if (ITEM.test(line) || HEADING.test(line) || fenceOf(line) || QUOTE.test(line) || RULE.test(line)) break;
      else if (inside.at(-1) === "") break;
      else inside.push(line);
    }
    items.push(el("li", {}, ...tight(blocks(inside, depth + 1, context))));
    if (at < lines.length && lines[at].trim() === "") {  // a blank line between two items
      const next = ITEM.exec(lines[at + 1] ?? "");
      if (!next || next[2].at(-1) !== mark) break;
      at += 1;
    }
  }
  const number = parseInt(first[2], 10);
  nodes.push(el(isOrdered ? "ol" : "ul", isOrdered && number !== 1 ? { start: number } : {}, ...items));
  return at;
}

// The paragraph that begins an item shows without a paragraph's margins.
function tight(nodes) {
  return nodes.flatMap((node, index) => (index === 0 && node.tagName === "P" ? [...node.childNodes] : [node]));
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") &&
    DIVIDER.test(lines[at + 1]) && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function cells(line) {
  const found = [];
  let cell = "";
  const text = line.trim().replace(/^\|/, "");
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\" && text[at + 1] === "|") cell += text[(at += 1)];
    else if (text[at] === "|") {
      found.push(cell.trim());
      cell = "";
    } else cell += text[at];
  }
  if (cell.trim() || !found.length) found.push(cell.trim());
  return found.slice(0, 60);
}

function table(lines, start, nodes) {
  const head = cells(lines[start]);
  const sides = cells(lines[start + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null);
  const row = (name, texts) =>
    el("tr", {}, ...head.map((_, index) => el(name, { class: sides[index] }, ...inline(texts[index] ?? ""))));
  const body = [];
  let at = start + 2;
  for (; at < lines.length && lines[at].includes("|"); at += 1) body.push(row("td", cells(lines[at])));
  nodes.push(el("div", { class: "table" }, el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, ...body))));
  return at;
}

function paragraph(lines, start, depth, nodes) {
  let end = start + 1;
  while (end < lines.length && !breaksParagraph(lines, end, depth)) end += 1;
  nodes.push(el("p", {}, ...inline(lines.slice(start, end).map((line) => line.trim()).join("\n"))));
  return end;
}

function breaksParagraph(lines, at, depth) {
  const line = lines[at];
  return line.trim() === "" || fenceOf(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at) ||
    (depth < MAX_DEPTH && (QUOTE.test(line) || /^ {0,3}(?:[-*+]|1[.)])[ \t]+\S/.test(line)));
}

// ---- inline ----

const SPECIAL = /[\\`*_~[\]!hH\n]/g;
const LINK = /\(\s*<?(https?:\/\/[^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)/iy;
const PLAIN_LINK = /https?:\/\/[^\s<>"'`|\u3000-\u303f\uff00-\uffef]{3,}/iy;
const PUNCTUATION = /[!-/:-@[-`{-~]/;

// Nodes of a line: openers wait on a stack until their closer comes; those left open stay text.
export function inline(text) {
  const nodes = [];
  const open = [];  // {mark, at: index in nodes}
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  let codeEnds = null;
  for (let at = 0; at < text.length;) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text);
    if (!next) {
      plain += text.slice(at);
      break;
    }
    plain += text.slice(at, next.index);
    at = next.index;
    const mark = text[at];
    if (mark === "\\") {
      const isEscape = PUNCTUATION.test(text[at + 1] ?? "");
      plain += isEscape ? text[at + 1] : mark;
      at += isEscape ? 2 : 1;
    } else if (mark === "\n") {
      flush();
      nodes.push(el("br"));
      at += 1;
    } else if (mark === "`") {
      codeEnds ??= findTicks(text);
      const size = run(text, at);
      const end = codeEnds.next(at + size, size);
      if (end < 0) plain += text.slice(at, at + size);
      else {
        flush();
        nodes.push(el("code", {}, unpad(text.slice(at + size, end))));
      }
      at = end < 0 ? at + size : end + size;
    } else if (mark === "h" || mark === "H") {
      PLAIN_LINK.lastIndex = at;
      const isInside = /\w/.test(text[at - 1] ?? "") || open.some((one) => one.mark === "[");
      const address = isInside ? null : trimAddress(PLAIN_LINK.exec(text)?.[0] ?? "");
      if (address) {
        flush();
        nodes.push(link(address, [document.createTextNode(address)]));
        at += address.length;
      } else {
        plain += mark;
        at += 1;
      }
    } else if (mark === "!") {  // an image shows as a link to it, and loads nothing
      plain += text[at + 1] === "[" ? "" : "!";
      at += 1;
    } else if (mark === "[") {
      flush();
      if (open.length < 200) open.push({ mark: "[", at: nodes.length });
      nodes.push(document.createTextNode("["));
      at += 1;
    } else if (mark === "]") {
      at = closeLink(text, at, nodes, open, flush) ?? ((plain += "]"), at + 1);
    } else {
      const size = Math.min(run(text, at), 3);
      if (mark === "~" && size !== 2) plain += text.slice(at, at + size);
      else {
        flush();
        emphasis(text, at, size, nodes, open);
      }
      at += size;
    }
  }
  flush();
  return nodes;
}

// `` ` `` is a backtick.
function unpad(text) {
  const line = text.replaceAll("\n", " ");
  return line.length > 2 && line.trim() && line.startsWith(" ") && line.endsWith(" ") ? line.slice(1, -1) : line;
}

function run(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

// Where runs of backticks of each length are, so that a search for the closing one never starts over.
function findTicks(text) {
  const places = new Map();
  for (const found of text.matchAll(/`+/g)) {
    const size = found[0].length;
    if (!places.has(size)) places.set(size, { list: [], at: 0 });
    places.get(size).list.push(found.index);
  }
  return {
    next(from, size) {
      const known = places.get(size);
      if (!known) return -1;
      while (known.at < known.list.length && known.list[known.at] < from) known.at += 1;
      return known.list[known.at] ?? -1;
    },
  };
}

function trimAddress(address) {
  let end = address.length;
  while (end && /[.,;:!?*_~\]]/.test(address[end - 1])) end -= 1;
  if (address[end - 1] === ")" && !address.slice(0, end).includes("(")) end -= 1;
  return address.slice(0, end);
}

function link(address, children) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return el("span", {}, ...children);
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") return el("span", {}, ...children);
  return el("a", { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

// The index behind a link that ends here, or null where none does.
function closeLink(text, at, nodes, open, flush) {
  const place = open.findLastIndex((one) => one.mark === "[");
  if (place < 0) return null;
  LINK.lastIndex = at + 1;
  const found = LINK.exec(text);
  const [opener] = open.splice(place);
  if (!found) return null;
  flush();
  const children = nodes.splice(opener.at);
  children.shift();  // its "["
  nodes.push(link(found[1], children.length ? children : [document.createTextNode(found[1])]));
  return LINK.lastIndex;
}

const WRAP = { 1: (nodes) => el("em", {}, ...nodes), 2: (nodes) => el("strong", {}, ...nodes),
  3: (nodes) => el("em", {}, el("strong", {}, ...nodes)) };

function emphasis(text, at, size, nodes, open) {
  const mark = text.slice(at, at + size);
  const before = text[at - 1] ?? " ";
  const after = text[at + size] ?? " ";
  const inWord = mark[0] === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after);
  const closes = !/\s/.test(before) && !inWord;
  const opens = !/\s/.test(after) && !inWord;
  const place = closes ? open.findLastIndex((one) => one.mark === mark) : -1;
  if (place >= 0) {
    const [opener] = open.splice(place);
    const children = nodes.splice(opener.at).slice(1);
    nodes.push(mark[0] === "~" ? el("del", {}, ...children) : WRAP[size](children));
    return;
  }
  if (opens && open.length < 200) open.push({ mark, at: nodes.length });
  nodes.push(document.createTextNode(mark));
}
