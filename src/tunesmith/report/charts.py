"""Draw line charts as SVG, readable on light and dark pages and on a phone, with and without scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tunesmith.report.ticks import format_tick, format_ticks, format_value, log_ticks, nice_ticks
from tunesmith.use.pages import render_page

# drawn at about the width of a phone, so that its texts keep their size there; a wider page has charts side by side
_WIDTH, _HEIGHT = 360, 230
_RIGHT, _TOP, _BOTTOM = 12, 12, 26
_CHARACTER = 6.6  # width of a digit at the font size of chart.css
_MAX_POINTS = 600
_LOG_FROM = 50.0  # times the smallest value that the largest one is, from which an axis is logarithmic
_SMOOTHED_FROM = 20  # points


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one line; a point that is not finite is left out.

    Attributes:
        is_marked: drawn as points with a thin line between them, for values that are measured now and then.
        is_smoothed: where there are many points, a strong line of running means over a faint one of the points.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    is_marked: bool = False
    is_smoothed: bool = False

    def points(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if math.isfinite(y)]


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis: a value to its place between 0 and 1."""

    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], count: int, can_be_log: bool = False) -> Scale:
        low, high = min(values), max(values)
        if can_be_log and low > 0 and high / low > _LOG_FROM:
            ticks = log_ticks(low, high, count)
            return cls(low, high, ticks, is_log=True)
        ticks = nice_ticks(low, high, count)
        return cls(min(low, *ticks), max(high, *ticks), ticks)

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / ((high - low) or 1.0)


def smooth(ys: Sequence[float], width: int) -> list[float]:
    """Running means over `width` neighbours, as many on one side as on the other; fewer at the ends."""
    totals = [0.0]
    for y in ys:
        totals.append(totals[-1] + y)
    half, last = width // 2, len(ys) - 1
    means = []
    for at in range(len(ys)):
        reach = min(half, at, last - at)
        means.append((totals[at + reach + 1] - totals[at - reach]) / (2 * reach + 1))
    return means


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MAX_POINTS`, with the lowest and the highest of each stretch, so that no peak is lost."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / (_MAX_POINTS - 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])
        kept += sorted(set(ends))
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    css: str
    points: list[tuple[float, float]]
    is_marked: bool = False


def _lines_of(series: Sequence[Series]) -> list[_Line]:
    lines = []
    for index, one in enumerate(series):
        points = one.points()
        if not points:
            continue
        if one.is_smoothed and len(points) >= _SMOOTHED_FROM:
            means = smooth([y for _, y in points], max(5, len(points) // 12) | 1)
            lines.append(_Line(one.name, f"s{index} faint", thin(points)))
            strong = [(x, mean) for (x, _), mean in zip(points, means, strict=True)]
            lines.append(_Line(f"{one.name} (smoothed)", f"s{index} strong", thin(strong)))
        else:
            lines.append(_Line(one.name, f"s{index}", thin(points), one.is_marked))
    return lines


def line_chart(title: str, series: Sequence[Series], x_label: str = "step", can_be_log: bool = False) -> Markup:
    """A <figure> with one chart; empty where no point is finite.

    Args:
        can_be_log: the axis is logarithmic where the values lie far apart.
    """
    lines = _lines_of(series)
    everything = [point for line in lines for point in line.points]
    if not everything:
        return Markup()
    x_scale = Scale.over([x for x, _ in everything], 4)
    y_scale = Scale.over([y for _, y in everything], 5, can_be_log)
    left = 10 + math.ceil(_CHARACTER * max(map(len, format_ticks(y_scale.ticks)), default=0))

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + x_scale.place(x) * (_WIDTH - left - _RIGHT)
        return across, _HEIGHT - _BOTTOM - y_scale.place(y) * (_HEIGHT - _TOP - _BOTTOM)

    page = render_page(
        "chart",
        title=title + (" (logarithmic)" if y_scale.is_log else ""),
        x_label=x_label,
        last=[(one.css, one.name, format_value(one.points[-1][1])) for one in lines if "faint" not in one.css],
        lines=[_draw(line, place) for line in lines],
        y_ticks=_ticks(y_scale, lambda tick: place(x_scale.low, tick)[1]),
        x_ticks=_ticks(x_scale, lambda tick: place(tick, y_scale.low)[0]),
        width=_WIDTH, height=_HEIGHT, left=left, right=_WIDTH - _RIGHT, top=_TOP, bottom=_HEIGHT - _BOTTOM,
        data=_hover_data(lines, place),
    )  # fmt: skip
    return Markup(page.rstrip("\n"))


def _ticks(scale: Scale, place: Callable[[float], float]) -> list[dict[str, str]]:
    return [
        {"at": f"{place(tick):.1f}", "text_at": f"{place(tick) + 4:.1f}", "text": text}
        for tick, text in zip(scale.ticks, format_ticks(scale.ticks), strict=True)
    ]


def _draw(line: _Line, place: Callable[[float, float], tuple[float, float]]) -> dict[str, Any]:
    placed = [(x, y, *place(x, y)) for x, y in line.points]
    path = " ".join(f"{across:.1f},{down:.1f}" for _, _, across, down in placed)
    shown = placed if line.is_marked else placed[-1:]
    dots = [
        {"x": f"{across:.1f}", "y": f"{down:.1f}", "title": f"{line.name} {format_value(y)} at {format_tick(x)}"}
        for x, y, across, down in shown
    ]
    return {
        "css": line.css,
        "path": path,
        "dots": [] if "faint" in line.css else dots,
        "is_marked": line.is_marked,
    }


def _hover_data(lines: Sequence[_Line], place: Callable[[float, float], tuple[float, float]]) -> str:
    """What the page's script shows under the pointer: each line's places, their x, and their values as text."""
    shown = [
        {
            "name": line.name,
            "at": [round(place(x, y)[0], 1) for x, y in line.points],
            "x": [format_value(x, 12) for x, _ in line.points],
            "y": [format_value(y) for _, y in line.points],
        }
        for line in lines
    ]
    return json.dumps(shown, separators=(",", ":"))
