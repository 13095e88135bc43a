"""report.html: all texts of a run, its data and its model are escaped; charts show its metrics."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tunesmith.report.charts import Series, line_chart
from tunesmith.report.replies import SampleReply
from tunesmith.report.write import show_run

EVIL = "<script>alert('1')</script>&\"quoted\"\x1b[31m\u202e</pre></style>"
SHOWN = "<script>alert('1')</script>&\"quoted\"\\x1b[31m\\u202e</pre></style>"


class Page(HTMLParser):
    """The tags of a page and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.texts += [value for _, value in attrs if value]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def show(folder: Path, text: str, records: int = 5) -> Page:
    (folder / "config.yaml").write_text(f"model: {text}\n", encoding="utf-8")
    logged = [
        {"step": i, "epoch": i / 3, "loss": 3 / i, "lr": i, "supervised_tokens": 9} for i in range(1, records + 1)
    ]
    entry = {"rows": 1234, "used": 1233, "refused": {f"why {text}": [7]}, "truncated": [[1, 2]], "notes": {text: [5]}}
    ledger = {"train": {"files": {f"file {text}": entry}}, "eval": None}
    samples = [SampleReply(f"prompt {text}", f"reply {text}", f"wanted {text}")]
    return Page(show_run(folder, f"finished {text}", logged, ledger, samples, f"remark {text}"))


def test_every_text_is_escaped(tmp_path: Path) -> None:
    run = tmp_path / "run <i>&'"
    run.mkdir()
    page, plain = show(run, EVIL), show(run, "plain")
    assert page.tags == plain.tags
    shown = "\n".join(page.texts)
    for words in ("finished", "remark", "why", "file", "prompt", "reply", "wanted", "model:"):
        assert f"{words} {SHOWN}" in shown
    assert page.texts.count(run.name) == 2  # title and heading
    assert not set("\x1b\u202e") & set(shown)


def test_a_page_without_steps_and_replies(tmp_path: Path) -> None:
    page = show(tmp_path, "plain", records=0)
    assert "No step was logged." in page.texts
    assert "svg" not in page.tags
    assert "1,234" in page.texts


def test_charts_are_drawn_where_the_numbers_are() -> None:
    one = Series("loss <b>", [0, 10, 20], [2.0, 1.0, float("nan")])
    two = Series("eval", [0, 20], [2.0, 0.5])
    page = Page(line_chart("loss & more", [one, two]))
    assert page.tags.count("polyline") == 2
    assert {"loss & more", "loss <b>", "eval"} <= set(page.texts)
    paths = [re.findall(r"([\d.]+),([\d.]+)", text) for text in page.texts if re.fullmatch(r"[\d., ]+ [\d., ]+", text)]
    points = [[(float(x), float(y)) for x, y in path] for path in paths if path]
    assert [len(path) for path in points] == [2, 2]  # what is not finite is left out
    (left, top), (middle, lower) = points[0]
    assert points[1][0] == (left, top)
    assert points[1][1][0] - left == pytest.approx(2 * (middle - left), abs=0.2)
    assert points[1][1][1] > lower > top
    assert line_chart("empty", [Series("loss", [1], [float("inf")])]) == ""
