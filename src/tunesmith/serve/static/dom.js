// Build DOM nodes. Text becomes text nodes only: no string is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

// el("button", {class: "x", onclick: f, disabled: true}, "text", node, ...)
export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Replace what a node holds; children may be missing, as for el.
export function put(node, ...children) {
  node.replaceChildren();
  fill(node, {}, children);
}

export const find = (id) => document.getElementById(id);

const ICONS = {
  settings: "M4 7h9M19 7h1M4 17h1M11 17h9M16 4.500v5M8 14.500v5",
  light: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2.500v2M12 19.500v2M2.5 12h2M19.5 12h2M5.3 5.300l1.4 1.400M17.3 17.300l1.4 1.400M5.3 18.700l1.4-1.400M17.3 6.700l1.4-1.4",
  dark: "M20 14.500A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5",
  auto: "M12 3.500a8.5 8.5 0 1 0 0 17zM12 3.500a8.5 8.5 0 0 1 0 17",
  send: "M12 19V5M5.5 11.5 12 5l6.5 6.5",
  stop: "M7.5 7.500h9v9h-9z",
  add: "M12 5v14M5 12h14",
  export: "M12 15V4M7.5 8.5 12 4l4.5 4.500M5 14v5.500h14V14",
  copy: "M9 9h10.500v10.500H9zM5.5 15H4.500V4.500H15v1",
  again: "M19 12a7 7 0 1 1-2.1-5M19 3.500V8h-4.5",
  edit: "M4.5 19.5 5.5 15 16 4.500l3.5 3.500L9 18.500z",
  remove: "M5 7h14M10 7V4.500h4V7M7 7l.800 12.500h8.400L17 7",
  close: "M6 6l12 12M18 6 6 18",
  left: "M14.5 5.5 8 12l6.5 6.5",
  right: "M9.5 5.5 16 12l-6.5 6.5",
};

export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: "glyph", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

export function iconButton(name, label, onclick) {
  return el("button", { type: "button", class: "quiet icon", title: label, "aria-label": label, onclick }, icon(name));
}

// Control characters and marks that reorder text, written out: a reply must not display as other words than it has.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069]/g;

export function visible(text) {
  return text.replace(/\r\n/g, "\n").replace(HIDDEN, (found) => "\\u" + found.charCodeAt(0).toString(16).padStart(4, "0"));
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {  // without a secure context, as over plain HTTP from another machine
    const area = el("textarea", { class: "offscreen" });
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area);  // what is behind a dialog cannot be selected
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

let hiding = 0;
export function toast(text) {
  const node = find("toast");
  node.textContent = text;
  node.classList.add("shown");
  clearTimeout(hiding);
  hiding = setTimeout(() => node.classList.remove("shown"), 2600);
}

// JSON values kept in the browser; a browser may forbid storage, and a value may be of an older version.
export function stored(storage, key, fallback) {
  try {
    const text = globalThis[storage].getItem("tunesmith." + key);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

export function store(storage, key, value) {
  try {
    globalThis[storage].setItem("tunesmith." + key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
