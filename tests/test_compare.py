"""bench/compare.py runs in its smallest form. What it measures decides nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def compare(docs: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "compare.py"), "--smallest", "--threads", "1", "--docs", str(docs), *words],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((docs / "benchmark.json").read_text(encoding="utf-8"))
    return found


def test_compare_writes_table_and_numbers(tmp_path: Path) -> None:
    """A peer that does not run is named in the table, and an earlier part is kept."""
    (tmp_path / "benchmark.json").write_text('{"sizes": [{"parameters": 1}]}', encoding="utf-8")
    words = ("--stages", "steps", "--only", "full", "--engines", "trl-packed", "--peers-python", sys.executable)
    found = compare(tmp_path, *words, "--budget", "0.01")
    case = found["steps"]["smallest full"]
    ours = case["engines"]["ours"]
    assert ours["tokens_per_s"]["median"] > 0
    assert ours["peak_mb"] > 0
    assert 0 < ours["share_of_limit"]["median"] < 1
    page = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "tunesmith" in page
    if "trl-packed" in case["failed"]:  # it may be installed here
        assert "failed: ModuleNotFoundError" in page
    assert found["sizes"] == [{"parameters": 1}]


def test_pages_of_numbers(tmp_path: Path) -> None:
    """Table, goals and plots, with an engine that failed, a point that it did not reach, and a part without numbers."""
    sys.path.insert(0, str(ROOT / "bench"))
    from compare_pages import summary_of, write_pages

    def measured(median: float, ratio: float) -> dict[str, Any]:
        one = {"median": median, "low": median, "high": median}
        return {
            "tokens_per_s": one, "ours_over_it": {**one, "median": ratio}, "share_of_limit": {**one, "median": 0.8},
            "peak_mb": median, "first_step_s": 1.0, "imports_s": 0.5, "tokens_per_step": 9, "targets_per_step": 4,
            "data": [1, 2, 3],
        }  # fmt: skip

    engines = {"ours": measured(100, 1), "trl-packed": measured(40, 2.5)}
    case = {"shape": "26m", "method": "full", "parameters": 1e6, "tokens": 9, "rounds": 1, "engines": engines,
            "gflops_per_s": {"median": 1}, "failed": {"trainer": "no <b>module | x"}}  # fmt: skip
    found: dict[str, Any] = {
        "machine": {"processor": "P", "cores": 1, "instructions": [], "threads": 1, "system": "S", "python": "3",
                    "versions": {}, "date": "D"},
        "steps": {"26m full": case}, "prepare": [{"workers": 1, "rows": 3}],
        "lengths": [{"length": 64, **engines}, {"length": 128, "ours": measured(90, 1)}],
        "sizes": [{"parameters": 1}], "failed": {"sizes": "RuntimeError: it <broke>"},
    }  # fmt: skip
    write_pages(tmp_path, found)
    page = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "failed: no &lt;b>module \\| x" in page
    assert "RuntimeError: it &lt;broke>" in page
    assert "2.50" in page
    assert "<polyline" in (tmp_path / "benchmark_lengths.svg").read_text(encoding="utf-8")
    assert not (tmp_path / "benchmark_sizes.svg").exists()
    assert any(line.startswith("goal: speed over TRL packed, all weights: 2.50") for line in summary_of(found))
