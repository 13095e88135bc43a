"""docs/quickstart.ipynb and the row in docs/architecture.md equal the output of their scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS))
    import quickstart

    return quickstart


def test_the_notebook_holds_the_cells(quickstart: Any) -> None:
    cells = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert ["".join(cell["source"]) for cell in cells] == [cell.strip() for cell in quickstart.CELLS]


def test_the_cells_run(quickstart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = quickstart.run_cells()
    pairs = zip(quickstart.CELLS, outputs, strict=True)
    shown = {cell: out for cell, out in pairs if not quickstart.is_text(cell)}

    def value(start: str) -> str:
        (out,) = [out for cell, out in shown.items() if start in cell and out]
        return "".join(out[-1]["data"]["text/plain"] if "data" in out[-1] else out[-1]["text"])

    assert value('model.reply("What colour is snow?"') == "'white'"
    assert value("model.batch(") == "['green', 'blue', 'white', 'black', 'yellow', 'red']"
    assert value("tunesmith.load(merged)") == "'black'"
    assert value("model.stream(") == "green|"
    assert "\nrows       18: 18 used" in value("tunesmith.check(")
    assert "⟦green<|im_end|>⟧" in value("tunesmith.preview(")
    assert all(not line.startswith("note") for line in value("run.ledger").splitlines())


def test_the_row_of_the_architecture_page_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import one_row

    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for title, what, values in one_row.stages():
        assert f"**{title}**: {what}" in page
        exact = (
            values.splitlines() if title not in ("the loss", "the gradient") else []
        )  # floats differ in their last digits
        assert all(line in page for line in exact), title
