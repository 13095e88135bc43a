// The page: its views, its header, its keyboard, and the key that the server may ask for.

import { ApiError, getJson, onKeyNeeded } from "./api.js";
import { clearChat, drawChat, drawThread, isBusy, send, setModels, stopAll } from "./chat.js";
import { conversation, exportable, trainingRow } from "./conversation.js";
import { copyText, download, el, find, icon, store, stored, toast, visible } from "./dom.js";
import { leaveData, showData } from "./data.js";
import { leaveRuns, showRuns } from "./runs.js";
import { drawSettings, onSettings, settings, showSettings, tools } from "./settings.js";
import { currentLanguage, switchLanguage, t } from "./texts.js";
import { hideTip, watchTokens } from "./tokens.js";

const THEMES = ["auto", "light", "dark"];
const VIEWS = { chat: async () => drawChat(), runs: showRuns, data: showData };
let theme = THEMES.includes(stored("localStorage", "theme", "auto")) ? stored("localStorage", "theme", "auto") : "auto";

// ---- views ----

async function show() {
  const [asked, ...rest] = location.hash.slice(1).split("/");
  const name = Object.hasOwn(VIEWS, asked) ? asked : "chat";
  leaveRuns();
  leaveData();
  hideTip();
  for (const view of Object.keys(VIEWS)) find(view).hidden = view !== name;
  for (const link of document.querySelectorAll("#tabs a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  try {
    await VIEWS[name](...rest.map(decode));
  } catch (error) {
    find(name).querySelector(".pulse, .problem")?.remove();
    if (name !== "chat") find(name).replaceChildren(el("p", { class: "problem page" }, explain(error)));
  }
}

// What the server said, or that it said nothing.
function explain(error) {
  return error instanceof ApiError ? visible(error.message) : t("unreachable", { message: visible(error.message) });
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function drawTexts() {
  document.documentElement.lang = currentLanguage() === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  find("language").textContent = t("language");
  find("language").title = t("languageTitle");
  name(find("export"), t("export"), "export");
  name(find("new-chat"), t("newChat"), "add");
  name(find("open-settings"), t("settings"), "settings");
  drawTheme();
  drawSettings();
}

function name(button, label, glyph) {
  button.title = label;
  button.setAttribute("aria-label", label);
  button.replaceChildren(icon(glyph));
}

function drawTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  name(find("theme"), t("theme", { theme: t("theme" + theme[0].toUpperCase() + theme.slice(1)) }), theme);
}

// ---- composer ----

function growInput() {
  const input = find("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
}

function submit(event) {
  event.preventDefault();
  const input = find("input");
  if (isBusy()) {
    stopAll();
    return;
  }
  if (send(input.value)) {
    input.value = "";
    growInput();
  }
}

function typed(event) {
  // an input method uses Enter to accept a word; 229 is what some browsers send then
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!isBusy()) find("composer").requestSubmit();
}

// ---- dialogs ----

function dialog(...children) {
  const box = find("dialog");
  box.replaceChildren(...children.filter(Boolean));
  if (!box.open) box.showModal();
  return box;
}

function askForKey(isWrong) {
  return new Promise((resolve) => {
    const input = el("input", { type: "password", autocomplete: "off", "aria-label": t("key"), required: true });
    const box = dialog(el("form", { method: "dialog" }, el("h2", {}, t("key")), el("p", {}, t("keyAsk")),
      isWrong ? el("p", { class: "bad", role: "alert" }, t("keyWrong")) : null, input,
      el("div", { class: "actions" }, el("button", { class: "main", value: "given" }, t("continue_")))));
    box.returnValue = "";
    box.addEventListener("close", () => resolve(box.returnValue === "given" ? input.value.trim() : ""), { once: true });
    input.focus();
  });
}

let asking = null;  // several requests may be refused at once
onKeyNeeded((isWrong) => (asking ??= askForKey(isWrong).finally(() => (asking = null))));

const keptRows = () => {
  const rows = stored("localStorage", "rows", []);
  return Array.isArray(rows) ? rows : [];
};

function drawExport(chosen) {
  const models = exportable();
  const model = models.includes(chosen) ? chosen : models[0];
  const close = el("button", { type: "button", class: "quiet icon", title: t("close"), "aria-label": t("close"), onclick: () => find("dialog").close() }, icon("close"));
  const head = el("header", {}, el("h2", {}, t("exportTitle")), close);
  if (model === undefined) return dialog(head, el("p", {}, t("exportNothing")), kept(model));
  let given;
  try {
    given = tools();
  } catch {  // the panel says what is wrong with them
  }
  const row = trainingRow(model, settings.system, given);
  const line = JSON.stringify(row);
  const select = el("select", { onchange: () => drawExport(select.value) }, ...models.map((one) => el("option", { value: one }, visible(one))));
  select.value = model;
  return dialog(head, el("p", { class: "muted" }, t("exportHint")),
    models.length > 1 ? el("label", { class: "field line" }, el("span", {}, t("exportOf")), select) : null,
    el("pre", { class: "preview" }, visible(JSON.stringify(row, null, 2))),
    el("div", { class: "actions" },
      el("button", { type: "button", onclick: async () => toast((await copyText(line + "\n")) ? t("copied") : t("notCopied")) }, t("exportCopy")),
      el("button", { type: "button", class: "main", onclick: () => keepRow(line, model) }, t("exportKeep"))),
    kept(model));
}

function keepRow(line, model) {
  const rows = [...keptRows(), line];
  if (!store("localStorage", "rows", rows)) toast(t("exportFull"));
  else toast(t("exportAdded", { count: rows.length }));
  drawExport(model);
}

function kept(model) {
  const rows = keptRows();
  if (!rows.length) return null;
  const clear = () => {
    if (!confirm(t("exportClearAsk", { count: rows.length }))) return;
    store("localStorage", "rows", []);
    drawExport(model);
  };
  return el("div", { class: "kept" }, el("p", { class: "muted" }, t("exportKept", { count: rows.length })),
    el("div", { class: "actions" },
      el("button", { type: "button", onclick: clear }, t("exportClear")),
      el("button", { type: "button", onclick: () => download("chats.jsonl", rows.map((row) => row + "\n").join("")) }, t("exportDownload", { count: rows.length }))));
}

// ---- start ----

async function loadModels() {
  try {
    const found = await getJson("v1/models");
    setModels(found.data.map((model) => String(model.id)));
    drawChat();
  } catch (error) {
    setModels([]);
    drawChat();
    find("thread").replaceChildren(el("div", { class: "greeting" }, el("p", { class: "problem", role: "alert" }, explain(error)),
      el("button", { type: "button", onclick: loadModels }, t("tryAgain"))));
  }
}

find("language").addEventListener("click", () => {
  switchLanguage();
  drawTexts();
  show();
});
find("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  store("localStorage", "theme", theme);
  drawTheme();
});
find("open-settings").addEventListener("click", () => showSettings(find("settings").hidden));
find("export").addEventListener("click", () => drawExport());
find("new-chat").addEventListener("click", () => {
  if (!conversation.turns.length || confirm(t("newChatAsk"))) clearChat();
  find("input").focus();
});
find("composer").addEventListener("submit", submit);
find("input").addEventListener("keydown", typed);
find("input").addEventListener("input", growInput);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || find("dialog").open) return;
  hideTip();
  if (isBusy()) stopAll();
});
addEventListener("hashchange", show);
let wasShown = settings.showTokens;
onSettings(() => {
  if (wasShown !== settings.showTokens) drawThread();
  wasShown = settings.showTokens;
}, () => {
  store("sessionStorage", "key", "");
  location.reload();
});
watchTokens();
drawTexts();
show();
loadModels().then(() => matchMedia("(hover: hover)").matches && find("input").focus());
