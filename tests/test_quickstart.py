"""docs/quickstart.ipynb holds the cells of docs/quickstart.py, and they run from top to bottom."""

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
    shown = {cell.strip(): out for cell, out in zip(quickstart.CELLS, outputs, strict=True)}

    def value(start: str) -> str:
        (out,) = [out for cell, out in shown.items() if start in cell and not quickstart.is_text(cell) and out]
        return "".join(out[-1]["data"]["text/plain"] if "data" in out[-1] else out[-1]["text"])

    assert value('model.reply("What colour is snow?"') == "'white'"
    assert value("model.batch(") == "['green', 'blue', 'white', 'black', 'yellow', 'red']"
    assert value("tunesmith.load(merged)") == "'black'"
    assert all(not line.startswith("note") for line in value("run.ledger").splitlines())
