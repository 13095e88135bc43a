// Runs: how they went, and their curves, which grow while a run goes on.

import { getJson } from "./api.js";
import { lineChart } from "./chart.js";
import { el, find, visible } from "./dom.js";
import { count, has, t } from "./texts.js";

const POLL_MS = 2000;
const IDLE_MS = 15000;  // of a run that has ended: it may be resumed
const ABOUT_MS = 10000;  // between two readings of the verdict, which is made of all records
const CHARTS = [  // title, names of series, whether the axis may be logarithmic
  ["loss", ["loss", "eval_loss"], false],
  ["lr", ["lr"], false],
  ["grad_norm", ["grad_norm"], true],
  ["tokens_per_s", ["tokens_per_s"], false],
  ["eval_perplexity", ["eval_perplexity"], true],
  ["eval_token_accuracy", ["eval_token_accuracy"], false],
  ["router_loss", ["router_loss"], false],
];

let runs = null;
let current = null;  // {name, records, offset, mark}
let about = null;  // facts of the current run
let toldAt = 0;
let polling = 0;
let visit = 0;  // raised whenever the view changes, so that late answers are dropped

export async function loadRuns() {
  runs ??= (await getJson("ui/runs")).runs;
  return runs;
}

export function picker(names, chosen, link) {
  if (names.length < 2) return el("h1", {}, visible(chosen));
  return el("nav", { class: "picker", "aria-label": t("run") }, ...names.map((name) =>
    el("a", { class: "chip", href: link(name), "aria-current": name === chosen ? "page" : null }, el("span", {}, visible(name)))));
}

export const emptyRuns = () => el("div", { class: "empty" }, el("h1", {}, t("noRuns")), el("p", { class: "muted" }, t("noRunsHint")));

export async function showRuns(name) {
  leaveRuns();
  const own = visit;
  const view = find("runs");
  if (!view.childElementCount) view.replaceChildren(el("p", { class: "muted pulse" }, t("loading")));
  const names = (await loadRuns()).map((run) => run.name);
  if (own !== visit) return;
  const chosen = names.includes(name) ? name : names[0];
  if (chosen === undefined) {
    view.replaceChildren(emptyRuns());
    return;
  }
  if (current?.name !== chosen) current = { name: chosen, records: [], offset: 0, mark: "" };
  await readAbout(own);
  await readMore();
  if (own !== visit) return;
  draw(names);
  plan(names, own);
}

export function leaveRuns() {
  visit += 1;
  clearTimeout(polling);
}

function plan(names, own) {
  polling = setTimeout(async () => {
    if (own !== visit) return;
    try {
      const hasMore = !document.hidden && (await readMore());
      if (hasMore && performance.now() - toldAt > ABOUT_MS) await readAbout(own);
      if (own === visit && hasMore) draw(names);
    } catch {  // the server may be back at the next try
    }
    if (own === visit) plan(names, own);
  }, about.is_live ? POLL_MS : IDLE_MS);
}

async function readAbout(own) {
  const found = await getJson("ui/runs/" + encodeURIComponent(current.name));
  if (own !== visit) return;
  about = found;
  toldAt = performance.now();
}

// Read the records that were logged since; whether there are any.
async function readMore() {
  const run = current;  // the view may change meanwhile
  let isChanged = false;
  for (;;) {
    const query = `?offset=${run.offset}&mark=${encodeURIComponent(run.mark)}`;
    const part = await getJson(`ui/runs/${encodeURIComponent(run.name)}/metrics${query}`);
    if (part.is_new) run.records = [];  // the file was written anew
    run.records.push(...part.records);
    isChanged ||= part.is_new || part.records.length > 0;
    Object.assign(run, { offset: part.offset, mark: part.mark });
    if (!part.has_more) return isChanged;
  }
}

function pointsOf(name) {
  return current.records.filter((record) => Number.isFinite(record[name])).map((record) => [record.step, record[name]]);
}

function draw(names) {
  const charts = CHARTS.map(([title, series, canBeLog]) => lineChart(t(title), series.map((name) => (
    { name, points: pointsOf(name), isMarked: name.startsWith("eval_"), isSmoothed: !name.startsWith("eval_") && name !== "lr" })), canBeLog));
  const drawn = charts.filter(Boolean);
  find("runs").replaceChildren(el("div", { class: "page" },
    picker(names, current.name, (name) => "#runs/" + encodeURIComponent(name)),
    el("p", { class: "muted" }, about.is_live ? el("span", { class: "live" }, t("live")) : null, about.is_live ? t("step", { step: count(current.records.at(-1)?.step ?? 0) }) : about.is_finished ? t("finished") : about.outcome),
    verdict(),
    el("dl", {}, ...about.facts.flatMap(([name, value]) => [el("dt", {}, has(factKey(name)) ? t(factKey(name)) : name), el("dd", {}, value)])),
    drawn.length ? el("div", { class: "charts" }, ...drawn) : el("p", {}, t("noSteps")),
    el("h2", {}, t("rowsOfData")), files(), problems()));
}

const factKey = (name) => "fact_" + name.replaceAll(" ", "_");

function verdict() {
  const findings = about.findings.map(({ what, advice }) => el("li", {}, el("b", {}, what), " ", advice));
  return about.summary ? el("div", { class: "verdict" }, el("p", {}, about.summary), findings.length ? el("ul", {}, ...findings) : null) : null;
}

function files() {
  const columns = ["fileRows", "fileUsed", "fileRefused", "fileTruncated"];
  const rows = about.files.map((file) => el("tr", {}, el("td", {}, t(file.part)), el("td", {}, file.name),
    ...[file.rows, file.used, file.refused, file.truncated].map((value) => el("td", { class: "right" }, count(value)))));
  const head = el("tr", {}, el("th"), el("th"), ...columns.map((name) => el("th", { class: "right" }, t(name))));
  return el("div", { class: "table" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}

function problems() {
  if (!about.problems.length) return null;
  return el("div", {}, el("h2", {}, t("problems")), el("ul", { class: "problems" }, ...about.problems.map((problem) => {
    const rest = problem.count - problem.rows.length;
    const places = [problem.rows.join(", "), rest > 0 ? t("andMore", { count: count(rest) }) : ""].filter(Boolean).join(" ");
    return el("li", {}, el("span", { class: problem.level }, problem.what), el("small", {}, `${t("rowsTotal", { count: count(problem.count) })} (${places})`));
  })));
}
