"""Round numbers for the axes of a chart, and numbers written as people write them: 0.001, 1e-5, 2k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high, which may both be the same."""
    if not high > low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = math.floor(math.log10(raw))
    factor = next(m for m in ("1", "2", "2.5", "5", "10") if float(m) * 10.0**power >= raw * (1 - 1e-9))
    step = Decimal(factor).scaleb(power)  # exact: 3 * 0.1 is 0.3
    first = math.ceil(low / float(step) - 1e-9)
    last = math.floor(high / float(step) + 1e-9)
    return [float(step * number) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten from low to high, with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(Decimal(factor).scaleb(power)) for power in range(first, last + 1) for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= count:
            return ticks
    step = math.ceil((last - first) / count)
    return [float(Decimal(1).scaleb(power)) for power in range(first, last + 1, step) if low <= 10.0**power <= high]


def format_ticks(ticks: Sequence[float]) -> list[str]:
    """The ticks of one axis: with units (2k) where that is short for all of them."""
    short = [_with_unit(tick) for tick in ticks]
    has_units = all(text or abs(tick) < 1e3 for text, tick in zip(short, ticks, strict=True))
    return [text if text and has_units else _whole(tick) for text, tick in zip(short, ticks, strict=True)]


def format_tick(value: float) -> str:
    """2000 -> "2k", 0.001 -> "0.001", 0.00001 -> "1e-5"."""
    return _with_unit(value) or _whole(value)


def _with_unit(value: float) -> str:
    """2500 -> "2.5k"; "" where that takes more than four digits."""
    size = abs(value)
    for unit, name in _UNITS:
        if size >= unit:
            short = f"{value / unit:.6g}"
            return short + name if "e" not in short and len(short.lstrip("-").replace(".", "")) <= 4 else ""
    return ""


def _whole(value: float) -> str:
    return _plain(f"{value:,.10g}" if 1e3 <= abs(value) < 1e15 else f"{value:.10g}")


def format_value(value: float, digits: int = 4) -> str:
    """A measured value: four significant digits, whole numbers whole."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if 10 ** (digits - 1) <= size < 1e15:
        return f"{value:,.0f}"
    return _plain(f"{value:.{digits}g}")


def _plain(text: str) -> str:
    """1e-05 -> 1e-5."""
    number, e, exponent = text.partition("e")
    return f"{number}e{int(exponent)}" if e else number
