// Rows of a run as the model saw them: whose turn each token is in, and which tokens were trained; and refused rows.

import { getJson } from "./api.js";
import { el, find, icon } from "./dom.js";
import { emptyRuns, loadRuns, picker } from "./runs.js";
import { count, t } from "./texts.js";

let visit = 0;

const linkTo = (run, part, kind, start) => `#data/${encodeURIComponent(run)}/${part}/${kind}/${start}`;

export function leaveData() {
  visit += 1;
}

export async function showData(name, part = "train", kind = "used", start = "0") {
  const own = (visit += 1);
  const view = find("data");
  if (!view.childElementCount) view.replaceChildren(el("p", { class: "muted pulse" }, t("loading")));
  const runs = await loadRuns();
  if (own !== visit) return;
  const run = runs.find((one) => one.name === name) ?? runs[0];
  if (!run) {
    view.replaceChildren(emptyRuns());
    return;
  }
  const first = Math.max(0, Math.floor(Number(start)) || 0);
  const wanted = { part: run.parts.includes(part) ? part : "train", kind: kind === "refused" ? "refused" : "used" };
  const page = await getJson(`ui/runs/${encodeURIComponent(run.name)}/rows?part=${wanted.part}&kind=${wanted.kind}&start=${first}`);
  if (own !== visit) return;
  const link = (values) => {
    const all = { ...wanted, start: 0, ...values };
    return linkTo(run.name, all.part, all.kind, all.start);
  };
  const turnPages = pager(page, first, link);
  view.replaceChildren(el("div", { class: "page" },
    picker(runs.map((one) => one.name), run.name, (other) => linkTo(other, "train", "used", 0)),
    el("div", { class: "filters" },
      run.parts.length > 1 ? choices(run.parts.map((one) => [one, t(one)]), wanted.part, (value) => link({ part: value })) : null,
      choices([["used", `${t("kindUsed")} ${count(page.counts.used)}`], ["refused", `${t("kindRefused")} ${count(page.counts.refused)}`]], wanted.kind, (value) => link({ kind: value }))),
    wanted.kind === "used" ? el("p", { class: "muted" }, el("mark", {}, t("marked")), " ", t("markedHint"), " ", t("stopToken"), " ", el("code", {}, page.stop)) : null,
    page.rows.length ? page.rows.map(wanted.kind === "used" ? drawSample : drawRefused) : el("p", {}, t("noRows")),
    turnPages));
  scrollTo(0, 0);
  find("data").scrollTop = 0;
}

function choices(options, chosen, link) {
  return el("nav", { class: "choices" }, ...options.map(([value, text]) =>
    el("a", { href: link(value), "aria-current": value === chosen ? "page" : null }, text)));
}

function pager(page, first, link) {
  const last = first + page.rows.length;
  if (first === 0 && last >= page.total) return null;
  const step = (label, glyph, start, isOn) => (isOn ? el("a", { class: "button icon", href: link({ start }), title: label, "aria-label": label }, icon(glyph)) : el("span", { class: "button icon off" }, icon(glyph)));
  return el("nav", { class: "pager" },
    step(t("previous"), "left", Math.max(0, first - page.size), first > 0),
    el("span", {}, t("pageOf", { first: count(first + 1), last: count(last), count: count(page.total) })),
    step(t("next"), "right", last, last < page.total));
}

function drawSample(row) {
  const facts = [t("sampleFacts", { tokens: count(row.tokens), trained: count(row.trained) })];
  if (row.tokens_lost) facts.push(t("truncated", { tokens: count(row.tokens_lost) }));
  return el("section", { class: "row" }, el("h2", {}, row.name), el("p", { class: "muted" }, [...facts, ...row.notes].join(" · ")),
    el("div", { class: "sample" }, ...row.turns.map(drawTurn),
      row.not_shown ? el("p", { class: "muted" }, t("longText", { count: count(row.not_shown) })) : null));
}

function drawTurn({ role, runs }) {
  return el("div", { class: "turn-of " + role }, el("b", {}, t("role_" + role)),
    el("pre", {}, ...runs.map(([text, isTrained]) => (isTrained ? el("mark", {}, text) : text))));
}

function drawRefused(row) {
  return el("section", { class: "row" }, el("h2", {}, row.name), el("p", { class: "bad" }, `${t("refused")}: ${row.reason}`));
}
