"""Draw line charts as SVG without scripts, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tunesmith.use.pages import render_page

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 30
_MAX_POINTS = 600


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one line; a point that is not finite is left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]

    def points(self) -> list[tuple[float, float]]:
        points = [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if math.isfinite(y)]
        step = max(1, math.ceil(len(points) / _MAX_POINTS))
        return points[::step] + (points[-1:] if points and (len(points) - 1) % step else [])


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> Markup:
    """A <figure> with one chart; empty where no point is finite."""
    lines = [(s.name, s.points()) for s in series if s.points()]
    everything = [point for _, points in lines for point in points]
    if not everything:
        return Markup()
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs), 6), nice_ticks(min(ys), max(ys))
    x_low, x_high = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    y_low, y_high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def draw(name: str, points: Sequence[tuple[float, float]]) -> dict[str, str]:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        x, y = place(*points[-1])
        return {"name": name, "path": path, "end_x": f"{x:.1f}", "end_y": f"{y:.1f}"}

    heights = [(tick, place(x_low, tick)[1]) for tick in y_ticks]
    page = render_page(
        "chart",
        title=title,
        x_label=x_label,
        last="; ".join(f"{name} {points[-1][1]:.4g}" for name, points in lines),
        lines=[draw(name, points) for name, points in lines],
        y_ticks=[{"at": f"{y:.1f}", "text_at": f"{y + 4:.1f}", "text": f"{tick:.4g}"} for tick, y in heights],
        x_ticks=[{"at": f"{place(tick, y_low)[0]:.1f}", "text": f"{tick:,.6g}"} for tick in x_ticks],
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        top=_TOP,
    )
    return Markup(page.rstrip("\n"))
