// The chat: turns with the replies of one model, or of several side by side.

import { ApiError, streamChat } from "./api.js";
import { conversation, keepConversation, messagesFor, newReplies, newReply, newStep } from "./conversation.js";
import { copyText, el, find, icon, iconButton, put, toast, visible } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { historyTurns, samplingFields, settings, tools } from "./settings.js";
import { currentLanguage, short, t } from "./texts.js";
import { appendTokens, readToken, renderTokens } from "./tokens.js";

let names = null;  // models of the server, once they are known
let running = new Map();  // reply -> AbortController
let editing = null;  // turn or reply that is being edited
const cards = new Map();  // reply -> its element
const decoders = new WeakMap();  // step -> TextDecoder of its tokens

export function setModels(found) {
  names = found;
  const chosen = conversation.models.filter((name) => names.includes(name));
  conversation.models = chosen.length ? chosen : names.slice(0, 1);
}

export const isBusy = () => running.size > 0;

// ---- sending ----

export function send(text) {
  if (isBusy() || !text.trim() || !conversation.models.length || !toolsAreRight()) return false;
  conversation.turns.push({ text, replies: newReplies() });
  answer(conversation.turns.length - 1, conversation.models);
  return true;
}

function toolsAreRight() {
  try {
    tools();
    return true;
  } catch (error) {
    toast(t("toolsBad", { why: error.message }));
    return false;
  }
}

// Ask models for their reply to a turn, all at once and with the same seed.
function answer(index, models) {
  const turn = conversation.turns[index];
  const fields = samplingFields();
  for (const model of models) turn.replies[model] = newReply(fields.seed);
  drawThread();
  scrollDown();
  for (const model of models) run(index, model, fields);
  keepConversation();
}

async function run(index, model, fields) {
  const reply = conversation.turns[index].replies[model];
  const controller = new AbortController();
  running.set(reply, controller);
  drawComposer();
  const body = { model, messages: messagesFor(model, index, settings.system, historyTurns()), stream: true,
    stream_options: { include_usage: true }, ...fields };
  const given = tools();
  if (given) body.tools = given;
  const start = performance.now();
  try {
    for await (const chunk of streamChat(body, controller.signal)) {
      take(chunk, reply);
      redraw(reply);
    }
    reply.state = "done";
  } catch (error) {
    if (controller.signal.aborted) reply.state = "stopped";
    else {
      reply.state = "failed";
      reply.problem = error instanceof ApiError && error.status === 429 ? t("busy", { message: error.message })
        : error instanceof ApiError && error.status !== 0 ? error.message : t("lost");
    }
  }
  reply.seconds += (performance.now() - start) / 1000;
  running.delete(reply);
  redraw(reply);
  drawComposer();
  keepConversation();
}

function take(chunk, reply) {
  if (chunk.usage) reply.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const step = reply.steps.at(-1);
  const delta = choice.delta ?? {};
  reply.state = "streaming";
  step.text += delta.content ?? "";
  step.reasoning += delta.reasoning_content ?? "";
  for (const part of delta.tool_calls ?? []) {
    const call = (step.calls[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
    call.id = part.id ?? call.id;
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  if (!decoders.has(step)) decoders.set(step, new TextDecoder());
  for (const token of choice.logprobs?.content ?? []) step.tokens.push(readToken(token, decoders.get(step)));
  if (choice.finish_reason) reply.finish = choice.finish_reason;
}

export function stopAll() {
  for (const controller of running.values()) controller.abort();
}

export function clearChat() {
  stopAll();
  conversation.turns = [];
  editing = null;
  keepConversation();
  drawThread();
}

// ---- drawing ----

export function drawChat() {
  drawModels();
  drawThread();
  drawComposer();
}

function drawModels() {
  const group = find("models");
  group.setAttribute("aria-label", t("models"));
  group.title = t("models");
  group.replaceChildren(...(names ?? []).map((name) => {
    const isChosen = conversation.models.includes(name);
    return el("button", { type: "button", class: "chip", "aria-pressed": String(isChosen), "data-model": name, onclick: () => toggleModel(name) },
      el("span", {}, visible(name)));
  }));
}

function toggleModel(name) {
  const chosen = conversation.models.includes(name)
    ? conversation.models.filter((one) => one !== name)
    : names.filter((one) => one === name || conversation.models.includes(one));
  conversation.models = chosen.length ? chosen : [name];
  keepConversation();
  drawModels();
  if (!conversation.turns.length) drawThread();
}

export function drawComposer() {
  const button = find("send");
  button.replaceChildren(icon(isBusy() ? "stop" : "send"));
  button.classList.toggle("busy", isBusy());
  button.title = isBusy() ? t("stop") : t("send");
  button.setAttribute("aria-label", button.title);
  find("input").placeholder = t("placeholder");
  find("input").setAttribute("aria-label", t("placeholder"));
  find("hint").textContent = isBusy() ? t("hintBusy") : t("hint");
  for (const node of document.querySelectorAll("#thread .needs-idle")) node.disabled = isBusy();
}

export function drawThread() {
  const thread = find("thread");
  cards.clear();
  thread.replaceChildren(...(conversation.turns.length ? conversation.turns.map(drawTurn) : [greeting()]));
  drawComposer();
}

function greeting() {
  if (names === null) return el("div", { class: "greeting" }, el("p", { class: "muted pulse" }, t("loading")));
  const chosen = conversation.models;
  const how = !names.length ? t("noModels") : chosen.length > 1 ? t("helloSeveral", { count: chosen.length }) : t("helloOne", { model: visible(chosen[0]) });
  const examples = [1, 2, 3].map((number) => t("example" + number));
  return el("div", { class: "greeting" },
    el("h1", {}, t("hello")),
    el("p", { class: "muted" }, how, chosen.length === 1 && names.length > 1 ? " " + t("helloMore") : ""),
    el("div", { class: "examples" }, ...examples.map((text) => el("button", { type: "button", onclick: () => send(text) }, text))));
}

function drawTurn(turn, index) {
  const models = Object.keys(turn.replies);
  const said = editing === turn ? editTurn(turn, index) : el("div", { class: "said" },
    el("div", { class: "bubble" }, visible(turn.text)),
    el("div", { class: "actions" },
      needsIdle(iconButton("edit", t("edit"), () => edit(turn))),
      iconButton("copy", t("copy"), () => copy(turn.text)),
      needsIdle(iconButton("remove", t("remove"), () => removeFrom(index)))));
  return el("article", { class: "turn", "data-turn": index }, said,
    el("div", { class: `replies n${Math.min(models.length, 4)}` }, ...models.map((model) => drawCard(turn, index, model))));
}

const needsIdle = (button) => (button.classList.add("needs-idle"), button);

function editTurn(turn, index) {
  const area = el("textarea", { class: "edit", rows: Math.min(12, turn.text.split("\n").length + 1), "aria-label": t("edit"), onkeydown: (event) => {
    if (event.key === "Escape") edit(null);
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      resend();
    }
  } });
  area.value = turn.text;
  const resend = () => {
    if (!area.value.trim() || isBusy() || !toolsAreRight()) return;
    turn.text = area.value;
    conversation.turns.length = index + 1;
    turn.replies = newReplies();
    editing = null;
    answer(index, conversation.models);
  };
  const isLast = index === conversation.turns.length - 1;
  return el("div", { class: "said editing" }, area, isLast ? null : el("p", { class: "muted" }, t("editHint")),
    el("div", { class: "actions" }, el("button", { type: "button", onclick: () => edit(null) }, t("cancel")),
      el("button", { type: "button", class: "main", onclick: resend }, t("resend"))));
}

function edit(what) {
  editing = what;
  drawThread();
  document.querySelector("#thread textarea.edit")?.focus();
}

function removeFrom(index) {
  conversation.turns.length = index;
  editing = null;
  keepConversation();
  drawThread();
}

async function copy(text) {
  toast((await copyText(text)) ? t("copied") : t("notCopied"));
}

function drawCard(turn, index, model) {
  const reply = turn.replies[model];
  const card = el("section", { class: "card", "data-model": model }, el("header", {}, el("b", {}, visible(model)), el("span", { class: "state" })),
    el("div", { class: "steps" }), el("footer"));
  card.draw = () => fillCard(card, turn, index, model);
  cards.set(reply, card);
  card.draw();
  return card;
}

// Streamed text is drawn once a frame, however many pieces came.
const waiting = new Set();
function redraw(reply) {
  if (!waiting.size) requestAnimationFrame(drawWaiting);
  waiting.add(reply);
}

function drawWaiting() {
  const isAtEnd = isScrolledDown();
  for (const reply of waiting) cards.get(reply)?.draw();
  waiting.clear();
  if (isAtEnd) scrollDown();
}

function fillCard(card, turn, index, model) {
  const reply = turn.replies[model];
  const isRunning = reply.state === "waiting" || reply.state === "streaming";
  card.classList.toggle("running", isRunning);
  card.setAttribute("aria-busy", String(isRunning));
  const steps = card.querySelector(".steps");
  if (editing === reply) {
    steps.replaceChildren(editReply(reply));
    card.querySelector("footer").replaceChildren();
    return;
  }
  const key = `${currentLanguage()} ${settings.showTokens}`;
  if (steps.key !== key) steps.replaceChildren();
  steps.key = key;
  reply.steps.forEach((step, at) => {
    const isLast = at === reply.steps.length - 1;
    if (steps.children[at] && !isLast) return;
    const drawn = drawStep(step, steps.children[at], { reply, index, model, isRunning: isRunning && isLast, isLast });
    if (steps.children[at] !== drawn) steps.children[at] ? steps.children[at].replaceWith(drawn) : steps.append(drawn);
  });
  card.querySelector(".state").textContent = isRunning ? "" : reply.edited ? t("edited") : "";
  put(card.querySelector("footer"), ...footer(turn, index, model, isRunning));
}

function drawStep(step, before, { reply, index, model, isRunning, isLast }) {
  const hasTokens = settings.showTokens && step.tokens.length > 0;
  const shown = before?.querySelector(":scope > .tokens");
  if (hasTokens && shown && isRunning) {  // only what is new
    appendTokens(shown, step.tokens, shown.childElementCount);
    return before;
  }
  const node = el("div", { class: "step" });
  if (step.reasoning) {
    const isOpen = before?.querySelector("details")?.open ?? false;
    const label = isRunning && !step.text && !step.calls.length ? t("reasoningNow") : t("reasoning");
    node.append(el("details", { class: "reasoning", open: isOpen }, el("summary", {}, label), el("div", {}, visible(step.reasoning))));
  }
  if (hasTokens) node.append(renderTokens(step.tokens));
  else if (step.text) node.append(renderMarkdown(step.text, t("copy"), copy));
  step.calls.forEach((call) => node.append(drawCall(call)));
  if (step.results) step.results.forEach((text, at) => node.append(el("div", { class: "result" }, el("b", {}, t("toolResult", { name: visible(step.calls[at].name) })), el("pre", {}, visible(text)))));
  else if (step.calls.length && isLast && reply.state === "done") node.append(resultForm(step, reply, index, model));
  if (!node.childElementCount && reply.state === "waiting") node.append(el("p", { class: "muted pulse" }, t("waiting")));
  else if (!node.childElementCount && isLast && (reply.state === "done" || reply.state === "stopped")) node.append(el("p", { class: "muted" }, t("emptyReply")));
  return node;
}

function drawCall(call) {
  let text = call.arguments;
  let isRight = true;
  try {
    text = JSON.stringify(JSON.parse(call.arguments), null, 2);
  } catch {
    isRight = false;
  }
  return el("div", { class: "call" }, el("b", {}, t("toolCall")), " ", el("code", {}, visible(call.name)), el("pre", {}, visible(text)),
    isRight ? null : el("small", { class: "bad" }, t("badArguments")));
}

// Fields for the results of a model's calls; sent back, the reply goes on.
function resultForm(step, reply, index, model) {
  const areas = step.calls.map((call) => el("textarea", { rows: 2, class: "mono", "aria-label": t("toolResult", { name: call.name }), placeholder: t("toolResult", { name: call.name }) }));
  return el("form", { class: "results", onsubmit: (event) => {
    event.preventDefault();
    if (isBusy() || !toolsAreRight()) return;
    step.results = areas.map((area) => area.value);
    reply.steps.push(newStep());
    Object.assign(reply, { state: "waiting", finish: null });
    const fields = samplingFields();
    reply.seed = fields.seed;
    drawThread();
    run(index, model, fields);
  } }, ...areas, needsIdle(el("button", { class: "main" }, t("sendResults"))));
}

function footer(turn, index, model, isRunning) {
  const reply = turn.replies[model];
  const notes = [];
  if (reply.state === "stopped") notes.push(el("span", { class: "note" }, t("stopped")));
  if (reply.finish === "length") notes.push(el("span", { class: "note" }, t("cutLength")));
  else if (reply.finish && !["stop", "tool_calls"].includes(reply.finish)) notes.push(el("span", { class: "note" }, t("filtered", { reason: visible(reply.finish) })));
  if (settings.showTokens && !isRunning && reply.steps.every((step) => !step.tokens.length) && reply.state === "done") notes.push(el("span", { class: "muted" }, t("noTokens")));
  if (reply.state === "failed") {
    const again = needsIdle(el("button", { type: "button", onclick: () => regenerate(index, model) }, t("retry")));
    return [el("p", { class: "problem", role: "alert" }, visible(reply.problem ?? "")), again];
  }
  if (isRunning) return notes;
  const tokens = reply.usage?.completion_tokens;
  const speed = tokens > 1 && reply.steps.length === 1 && reply.seconds > 0 ? short(tokens / reply.seconds, 3) : null;
  const text = reply.steps.map((step) => step.text).filter(Boolean).join("\n\n");
  const stats = tokens === undefined || reply.edited ? null
    : t(speed ? "stats" : "statsShort", { tokens: short(tokens, 6), speed, seed: reply.seed });
  return [
    el("div", { class: "actions" },
      text ? iconButton("copy", t("copy"), () => copy(text)) : null,
      needsIdle(iconButton("again", t("regenerate"), () => regenerate(index, model))),
      needsIdle(iconButton("edit", t("editReply"), () => edit(reply)))),
    ...notes,
    stats && el("span", { class: "stats" }, stats),
  ];
}

// A new reply to this turn; the turns after it would no longer follow from it.
function regenerate(index, model) {
  if (isBusy() || !toolsAreRight()) return;
  conversation.turns.length = index + 1;
  answer(index, [model]);
}

function editReply(reply) {
  const step = reply.steps.at(-1);
  const area = el("textarea", { class: "edit", rows: Math.min(20, step.text.split("\n").length + 2), "aria-label": t("editReply") });
  area.value = step.text;
  const save = () => {
    if (area.value !== step.text) Object.assign(step, { text: area.value, tokens: [] });
    Object.assign(reply, { edited: true, state: "done", finish: null });
    keepConversation();
    edit(null);
  };
  return el("div", {}, area, el("div", { class: "actions" },
    el("button", { type: "button", onclick: () => edit(null) }, t("cancel")), el("button", { type: "button", class: "main", onclick: save }, t("save"))));
}

function isScrolledDown() {
  const thread = find("thread");
  return thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
}

function scrollDown() {
  const thread = find("thread");
  thread.scrollTop = thread.scrollHeight;
}
