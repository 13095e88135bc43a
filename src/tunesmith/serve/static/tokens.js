// Tokens shaded by probability, with their alternatives on hover and on tap.

import { el, find, put, visible } from "./dom.js";
import { t, short } from "./texts.js";

const LEVELS = [0.9, 0.7, 0.5, 0.3, 0.1, 0.03];  // probabilities below which a token has a stronger shade

export function level(probability) {
  return LEVELS.filter((limit) => probability < limit).length;
}

// A token of a reply's logprobs as {shown, text, p, others: [{text, p}]}. A character that several tokens make up is shown
// with the last of them; `decoder` (a TextDecoder) holds its beginning.
export function readToken(token, decoder) {
  const shown = token.bytes ? decoder.decode(new Uint8Array(token.bytes), { stream: true }) : token.token;
  return { shown: shown || "·", ...readOne(token), others: (token.top_logprobs ?? []).map(readOne) };
}

function readOne({ token, bytes, logprob }) {
  const isPart = token.includes("\ufffd") && bytes?.length;  // part of a character
  const text = isPart ? `⟨${bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}⟩` : token;
  return { text, p: Math.exp(logprob) };
}

export function renderTokens(tokens) {
  const root = el("div", { class: "tokens" });
  appendTokens(root, tokens, 0);
  return root;
}

export function appendTokens(root, tokens, from) {
  for (let at = from; at < tokens.length; at += 1) {
    const { shown, p } = tokens[at];
    const span = el("span", { class: "p" + level(p) }, visible(shown));
    span.token = { ...tokens[at], number: at + 1 };
    root.append(span);
  }
}

// A space or line feed that could not be seen otherwise.
const spelled = (text) => visible(text).replaceAll("\n", "⏎").replace(/^ | $/g, "␣") || "∅";
const percent = (p) => (p >= 0.0005 ? short(100 * p, 3) + " %" : "< 0.05 %");

function show(span) {
  const tip = find("tip");
  const { text, p, others, number } = span.token;
  const isAmong = others.some((one) => one.text === text);
  const rows = isAmong ? others : [{ text, p }, ...others];
  const rest = 1 - rows.reduce((sum, one) => sum + one.p, 0);
  put(tip,
    el("b", {}, t("tokenOf", { number })),
    ...rows.map((one) => bar(spelled(one.text), one.p, one.text === text)),
    others.length && rest > 0.0005 ? bar(t("otherTokens"), rest, false, true) : null,
  );
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - size.width / 2), innerWidth - size.width - 8);
  const top = box.top - size.height - 6 > 8 ? box.top - size.height - 6 : box.bottom + 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
  document.querySelector(".tokens .here")?.classList.remove("here");
  span.classList.add("here");
}

function bar(text, p, isChosen, isRest = false) {
  const meter = el("i");
  meter.style.width = `${Math.max(1, 100 * p)}%`;
  return el("div", { class: `alternative${isChosen ? " chosen" : ""}${isRest ? " rest" : ""}` },
    el("span", { title: isChosen ? t("chosen") : null }, text), el("span", { class: "meter" }, meter), el("span", {}, percent(p)));
}

export function hideTip() {
  find("tip").hidden = true;
  document.querySelector(".tokens .here")?.classList.remove("here");
}

export function watchTokens() {
  const tokenOf = (event) => (event.target.token ? event.target : null);
  document.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "mouse") return;
    if (tokenOf(event)) show(tokenOf(event));
    else if (!find("tip").hidden) hideTip();
  });
  document.addEventListener("click", (event) => (tokenOf(event) ? show(tokenOf(event)) : hideTip()));
  document.addEventListener("scroll", hideTip, { capture: true, passive: true });
}
