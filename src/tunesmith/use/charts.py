"""Line charts as SVG text: no script, no network, readable in light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 30
_MAX_POINTS = 600
CHART_CSS = """
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif }
svg text { fill: var(--muted) } svg .axis { stroke: var(--line); stroke-width: 1 }
svg .s0 { stroke: var(--one) } svg .s1 { stroke: var(--two) }
svg polyline { fill: none; stroke-width: 1.6 } svg circle.s0 { fill: var(--one) } svg circle.s1 { fill: var(--two) }
svg text.s0 { fill: var(--one); stroke: none } svg text.s1 { fill: var(--two); stroke: none }
"""


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


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> str:
    """A <figure> with one chart; empty text where there is nothing to draw."""
    lines = [(s.name, s.points()) for s in series if s.points()]
    everything = [point for _, points in lines for point in points]
    if not everything:
        return ""
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs), 6), nice_ticks(min(ys), max(ys))
    x_low, x_high = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    y_low, y_high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{tick:,.6g}</text>')
    for index, (name, points) in enumerate(lines):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        x, y = place(*points[-1])
        parts.append(f'<polyline class="s{index}" points="{path}"/>')
        parts.append(f'<circle class="s{index}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        if len(lines) > 1:
            right, top = _WIDTH - _RIGHT - 4, _TOP + 12 + 15 * index
            label = f'<text class="s{index}" x="{right}" y="{top}" text-anchor="end">'
            parts.append(f"{label}{html.escape(name)}</text>")
    last = "; ".join(f"{name} {points[-1][1]:.4g}" for name, points in lines)
    caption = f"{html.escape(title)} <span>(by {x_label}; last {html.escape(last)})</span>"
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"
