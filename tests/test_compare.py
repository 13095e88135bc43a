"""bench/compare.py runs in its smallest form. What it measures decides nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_compare_writes_table_and_numbers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "compare.py"), "--smallest", "--stages", "steps", "--only", "full", "--engines", "ours",
         "--threads", "1", "--docs", str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    ours = found["steps"]["smallest full"]["engines"]["ours"]
    assert ours["tokens_per_s"]["median"] > 0
    assert ours["peak_mb"] > 0
    assert 0 < ours["share_of_limit"]["median"] < 1
    assert "tunesmith" in (tmp_path / "benchmark.md").read_text(encoding="utf-8")
