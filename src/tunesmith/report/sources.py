"""The sources of a mix in the report: the loss of each, and what was asked of it and what it got."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tunesmith.report.charts import Series, line_chart
from tunesmith.report.records import Record

_DRAWN = 6  # lines that a chart has colours for
_NAME = 28  # characters of a name in a chart


def draw_sources(records: Sequence[Record], key: str, what: str, is_marked: bool = False) -> Markup:
    """A chart of a number of each source; of many sources, those with the most tokens. Empty without a mix.

    Args:
        key: of the records.
        what: the number, in words.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in _numbers_of(record, key).items():
            points.setdefault(name, []).append((record["step"], value))
    tokens = _last_tokens(records)
    chosen = sorted(points, key=lambda name: -tokens.get(name, 0))[:_DRAWN]
    series = [
        Series(_short(name), [x for x, _ in points[name]], [y for _, y in points[name]], is_marked, not is_marked)
        for name in points
        if name in chosen
    ]
    title = f"{what} of each source" if len(chosen) == len(points) else f"{what} of the {_DRAWN} largest sources"
    return line_chart(title, series) if series else Markup()


def list_sources(ledger: Mapping[str, Any], records: Sequence[Record]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Name and figures of each source: rows and tokens, the share that was asked and the one so far, and passes."""
    tokens = _last_tokens(records)
    trained = sum(tokens.values())
    mix = ledger.get("mix")
    for source in mix if isinstance(mix, list) else ():
        name, count, own = str(source.get("name")), tokens.get(str(source.get("name")), 0), source.get("tokens") or 0
        yield (
            name,
            [
                ("rows", f"{source.get('rows', 0):,}"),
                ("tokens", f"{own:,}"),
                ("share asked", f"{source.get('share', 0):.1%}"),
                ("share trained", f"{count / trained:.1%}" if trained else "-"),
                ("passes", f"{count / own:.2f}" if own else "-"),
            ],
        )


def _last_tokens(records: Sequence[Record]) -> dict[str, float]:
    return next((found for record in reversed(records) if (found := _numbers_of(record, "source_tokens"))), {})


def _numbers_of(record: Record, key: str) -> dict[str, float]:
    """Names and finite numbers of a record; a damaged one has none."""
    found = record.get(key)
    numbers = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in numbers if isinstance(value, (int, float)) and math.isfinite(value)}


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 3]}..."
