// A line chart as SVG: axes, lines, smoothed lines over faint ones, and the values under the pointer.

import { el, svg } from "./dom.js";
import { count, short, t } from "./texts.js";

const WIDTH = 360;  // about that of a phone, so that texts keep their size there
const HEIGHT = 220;
const [RIGHT, TOP, BOTTOM] = [12, 12, 26];
const MAX_POINTS = 500;
const SMOOTHED_FROM = 20;  // points
const LOG_FROM = 50;  // times the smallest value

// series: [{name, points: [[step, value], ...], isMarked, isSmoothed}]; null where there is nothing to draw
export function lineChart(title, series, canBeLog = false) {
  const lines = series.flatMap(linesOf);
  if (!lines.length) return null;
  const all = lines.flatMap((line) => line.points);
  const x = stepScale(all.map((point) => point[0]));
  const y = scale(all.map((point) => point[1]), 5, canBeLog);
  const labels = y.ticks.map((tick) => short(tick));
  const left = 10 + 6.6 * Math.max(...labels.map((label) => label.length));
  const across = (value) => left + x.place(value) * (WIDTH - left - RIGHT);
  const down = (value) => HEIGHT - BOTTOM - y.place(value) * (HEIGHT - TOP - BOTTOM);
  const here = svg("line", { class: "here", y1: TOP, y2: HEIGHT - BOTTOM });
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title },
    ...y.ticks.flatMap((tick, at) => [
      svg("line", { class: "axis", x1: left, x2: WIDTH - RIGHT, y1: down(tick), y2: down(tick) }),
      svg("text", { x: left - 6, y: down(tick) + 4, "text-anchor": "end" }, labels[at]),
    ]),
    ...x.ticks.map((tick) => svg("text", { x: across(tick), y: HEIGHT - 8, "text-anchor": "middle" }, short(tick, 6))),
    ...lines.flatMap((line) => drawLine(line, across, down)), here);
  const values = el("output");
  const shown = lines.filter((line) => line.css !== "faint");
  const last = shown.flatMap((line) => [el("span", { class: "s" + line.index }, (shown.length > 1 ? line.name + " " : "") + short(line.points.at(-1)[1])), " "]);
  watch(picture, here, values, lines, across);
  return el("figure", { class: "chart" }, el("figcaption", {}, el("b", {}, title), y.isLog ? ` (${t("logarithmic")})` : "", " ", ...last), picture, values);
}

function linesOf({ name, points, isMarked, isSmoothed }, index) {
  if (!points.length) return [];
  if (!isSmoothed || points.length < SMOOTHED_FROM) return [{ name, index, points: thin(points), css: "", isMarked }];
  return [
    { name, index, points: thin(points), css: "faint" },
    { name, label: t("smoothed", { name }), index, points: thin(smooth(points)), css: "strong" },
  ];
}

// Running means over as many neighbours on one side as on the other.
export function smooth(points) {
  const width = Math.max(5, Math.floor(points.length / 12) | 1);
  const totals = [0];
  for (const [, y] of points) totals.push(totals.at(-1) + y);
  return points.map(([step], at) => {
    const reach = Math.min(width >> 1, at, points.length - 1 - at);
    return [step, (totals[at + reach + 1] - totals[at - reach]) / (2 * reach + 1)];
  });
}

// The lowest and the highest of each stretch, so that no peak is lost.
export function thin(points) {
  if (points.length <= MAX_POINTS) return points;
  const size = Math.ceil((2 * points.length) / MAX_POINTS);
  const kept = [];
  for (let start = 0; start < points.length; start += size) {
    const stretch = points.slice(start, start + size);
    const low = stretch.reduce((a, b) => (b[1] < a[1] ? b : a));
    const high = stretch.reduce((a, b) => (b[1] > a[1] ? b : a));
    kept.push(...(low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low]));
  }
  if (kept.at(-1) !== points.at(-1)) kept.push(points.at(-1));
  return kept;
}

const lowest = (values) => values.reduce((a, b) => Math.min(a, b));
const highest = (values) => values.reduce((a, b) => Math.max(a, b));

// From the first step to the last.
function stepScale(values) {
  const [low, high] = [lowest(values), highest(values)];
  const ticks = low === high ? [low] : niceTicks(low, high, 4).filter((tick) => tick >= low && tick <= high && Number.isInteger(tick));
  return { ticks, place: (value) => (low === high ? 0.5 : (value - low) / (high - low)) };
}

function scale(values, wanted, canBeLog) {
  let low = lowest(values);
  let high = highest(values);
  const isLog = canBeLog && low > 0 && high / low > LOG_FROM;
  let ticks;
  if (isLog) {
    ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      ticks.push(...[1, 2, 5].map((factor) => factor * 10 ** power).filter((tick) => tick >= low && tick <= high));
    }
    if (ticks.length > wanted + 2) ticks = ticks.filter((tick) => Number.isInteger(Math.round(1e6 * Math.log10(tick)) / 1e6));
    while (ticks.length > wanted + 1) ticks = ticks.filter((_, at) => at % 2 === 0);
  } else {
    ticks = niceTicks(low, high, wanted);
    low = Math.min(low, ticks[0]);
    high = Math.max(high, ticks.at(-1));
  }
  const [from, to] = isLog ? [Math.log(low), Math.log(high)] : [low, high];
  return { ticks, isLog, place: (value) => ((isLog ? Math.log(value) : value) - from) / (to - from || 1) };
}

export function niceTicks(low, high, wanted) {
  if (low === high) [low, high] = low === 0 ? [-1, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const ticks = [];
  for (let number = Math.floor(low / step); number <= Math.ceil(high / step) && ticks.length < 30; number += 1) ticks.push(Number((number * step).toPrecision(12)));
  return ticks;
}

function drawLine(line, across, down) {
  const places = line.points.map(([x, y]) => `${across(x).toFixed(1)},${down(y).toFixed(1)}`).join(" ");
  const css = `s${line.index} ${line.isMarked ? "thin" : line.css}`;
  const dots = line.css === "faint" ? [] : line.isMarked ? line.points : line.points.slice(-1);
  return [svg("polyline", { class: css, points: places }),
    ...dots.map(([x, y]) => svg("circle", { class: "s" + line.index, cx: across(x), cy: down(y), r: 3 }))];
}

function watch(picture, here, output, lines, across) {
  const show = (event) => {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const nearest = lines.map((line) => nearestPoint(line.points, at, across));
    const step = nearest.reduce((a, b) => (Math.abs(across(b[0]) - at) < Math.abs(across(a[0]) - at) ? b : a))[0];
    here.setAttribute("x1", across(step));
    here.setAttribute("x2", across(step));
    here.classList.add("shown");
    const texts = lines.map((line) => {
      const [x, y] = nearestPoint(line.points, across(step), across);
      return Math.abs(across(x) - across(step)) < 2 ? `${line.label ?? line.name} ${short(y)}` : "";
    });
    output.textContent = `${t("step", { step: count(step) })}: ${texts.filter(Boolean).join(", ")}`;
  };
  picture.addEventListener("pointermove", show);
  picture.addEventListener("pointerdown", show);
  picture.addEventListener("pointerleave", () => {
    here.classList.remove("shown");
    output.textContent = "";
  });
}

function nearestPoint(points, at, across) {
  let [low, high] = [0, points.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (across(points[middle][0]) < at) low = middle + 1;
    else high = middle;
  }
  return low > 0 && at - across(points[low - 1][0]) < across(points[low][0]) - at ? points[low - 1] : points[low];
}
