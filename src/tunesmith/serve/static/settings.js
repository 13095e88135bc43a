// The settings panel: the conversation's system prompt and tools, sampling, and what is displayed. Kept in the browser.

import { el, icon, find, put, store, stored } from "./dom.js";
import { t } from "./texts.js";

const SAMPLING = [  // name in a request, smallest, largest, step, what an empty field means
  ["temperature", 0, 2, 0.05, "ofModel"],
  ["top_p", 0.01, 1, 0.01, "ofModel"],
  ["top_k", 0, 200, 1, "ofModel"],
  ["min_p", 0, 1, 0.01, "ofModel"],
  ["repetition_penalty", 1, 2, 0.01, "ofModel"],
  ["max_tokens", 1, 4096, 1, "ofServer"],
  ["seed", 0, 2 ** 31 - 1, 1, "random"],
];

const EXAMPLE = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "Current weather of a city",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
}];

export const settings = { system: "", tools: "", history: "", thinking: "", sampling: {}, showTokens: false };
for (const [name, value] of Object.entries(stored("localStorage", "settings", null) ?? {})) {
  if (Object.hasOwn(settings, name) && value !== null && typeof value === typeof settings[name]) settings[name] = value;
}

let changed = () => {};
let forgetKey = () => {};

export function onSettings(whenChanged, whenKeyForgotten) {
  changed = whenChanged;
  forgetKey = whenKeyForgotten;
}

function set(name, value) {
  settings[name] = value;
  store("localStorage", "settings", settings);
  changed();
}

// The fields of a request that the settings give; a random seed is drawn, so that a reply can be repeated.
export function samplingFields() {
  const fields = {};
  for (const [name] of SAMPLING) {
    const value = settings.sampling[name];
    if (typeof value === "number" && Number.isFinite(value)) fields[name] = value;
  }
  fields.seed ??= Math.floor(Math.random() * 2 ** 31);
  if (settings.showTokens) Object.assign(fields, { logprobs: true, top_logprobs: 5 });
  if (settings.thinking) fields.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  return fields;
}

export function historyTurns() {
  return settings.history === "" ? Infinity : Number(settings.history);
}

// The tools of a request, or undefined. Throws where the text is no JSON list.
export function tools() {
  if (!settings.tools.trim()) return undefined;
  const found = JSON.parse(settings.tools);
  if (!Array.isArray(found) || !found.every((tool) => tool && typeof tool === "object")) throw new Error("[{…}]");
  return found.length ? found : undefined;
}

export function drawSettings() {
  const panel = find("settings");
  panel.setAttribute("aria-label", t("settings"));
  const close = el("button", { type: "button", class: "quiet icon", "aria-label": t("close"), title: t("close"), onclick: () => showSettings(false) }, icon("close"));
  put(panel,
    el("header", {}, el("h2", {}, t("settings")), close),
    el("h3", {}, t("conversation")),
    area("system", t("system"), t("systemHint"), 3),
    toolsField(),
    historyField(),
    choice("thinking", t("thinking"), [["", t("thinkingDefault")], ["on", t("thinkingOn")], ["off", t("thinkingOff")]]),
    el("h3", {}, t("sampling"), el("button", { type: "button", class: "quiet small", onclick: resetSampling }, t("reset"))),
    el("p", { class: "muted" }, t("samplingHint")),
    ...SAMPLING.map((one) => number(...one)),
    el("h3", {}, t("display")),
    toggle("showTokens", t("showTokens")),
    el("p", { class: "muted" }, t("showTokensHint")),
    stored("sessionStorage", "key", "") ? el("button", { type: "button", onclick: () => forgetKey() }, t("keyForget")) : null,
  );
}

export function showSettings(isShown) {
  find("settings").hidden = !isShown;
  find("open-settings").setAttribute("aria-expanded", String(isShown));
  document.body.classList.toggle("with-settings", isShown);
}

function field(label, control, ...more) {
  return el("label", { class: "field" }, el("span", {}, label), control, ...more);
}

function area(name, label, hint, rows) {
  const control = el("textarea", { rows, "data-setting": name, oninput: () => set(name, control.value) });
  control.value = settings[name];
  return field(label, control, el("small", {}, hint));
}

function toolsField() {
  const problem = el("small", { class: "bad" });
  const check = () => {
    try {
      tools();
      problem.textContent = "";
    } catch (error) {
      problem.textContent = t("toolsBad", { why: error.message });
    }
  };
  const control = el("textarea", { rows: 3, class: "mono", spellcheck: "false", "data-setting": "tools", oninput: () => { set("tools", control.value); check(); } });
  control.value = settings.tools;
  check();
  const example = el("button", { type: "button", class: "quiet small", onclick: () => {
    control.value = JSON.stringify(EXAMPLE, null, 2);
    set("tools", control.value);
    check();
  } }, t("toolsExample"));
  return el("div", { class: "field" }, el("label", {}, el("span", {}, t("tools_")), control), problem, el("small", {}, t("toolsHint")), example);
}

function historyField() {
  const control = el("input", { type: "number", min: 0, max: 1000, step: 1, placeholder: t("historyAll"), inputmode: "numeric",
    oninput: () => set("history", control.value !== "" && control.validity.valid ? control.value : "") });
  control.value = settings.history;
  return el("label", { class: "field line" }, el("span", {}, t("history")), control);
}

function choice(name, label, options) {
  const control = el("select", { onchange: () => set(name, control.value) },
    ...options.map(([value, text]) => el("option", { value }, text)));
  control.value = settings[name];
  return el("label", { class: "field line" }, el("span", {}, label), control);
}

function toggle(name, label) {
  const control = el("input", { type: "checkbox", role: "switch", "data-setting": name, onchange: () => set(name, control.checked) });
  control.checked = settings[name];
  return el("label", { class: "field switch" }, el("span", {}, label), control);
}

function number(name, low, high, step, empty) {
  const isWhole = step === 1;
  const input = el("input", { type: "number", min: low, max: high, step: isWhole ? 1 : "any", placeholder: t(empty),
    inputmode: isWhole ? "numeric" : "decimal", "data-setting": name });
  const slider = name === "seed" ? null : el("input", { type: "range", min: low, max: high, step, "aria-label": t(name), tabindex: -1 });
  const keep = (text) => {
    const value = text.trim() === "" ? undefined : Number(text);
    const isRight = value === undefined || input.validity.valid;
    const sampling = { ...settings.sampling };
    if (value === undefined || !isRight) delete sampling[name];
    else sampling[name] = value;
    slider?.classList.toggle("unset", value === undefined);
    set("sampling", sampling);
  };
  input.addEventListener("input", () => {
    if (slider && input.value !== "") slider.value = input.value;
    keep(input.value);
  });
  slider?.addEventListener("input", () => {
    input.value = slider.value;
    keep(slider.value);
  });
  const now = settings.sampling[name];
  input.value = now ?? "";
  if (slider) slider.value = now ?? (name === "max_tokens" ? 512 : name.startsWith("t") && name !== "top_k" ? 1 : low);
  slider?.classList.toggle("unset", now === undefined);
  return el("div", { class: "field number" }, el("label", {}, el("span", {}, t(name)), input), slider);
}

function resetSampling() {
  set("sampling", {});
  drawSettings();
}
