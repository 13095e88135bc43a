"""bench/fuzz.py in short: damaged inputs end in one message, and commands that report success have succeeded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parents[1] / "bench" / "fuzz.py"
CASES = 3000 if os.environ.get("TUNESMITH_LONG") else 100


def test_damaged_inputs_never_crash_hang_or_pass_for_done(tmp_path: Path) -> None:
    command = [sys.executable, FUZZ, "--cases", str(CASES), "--seed", "0", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20 * CASES)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{CASES} cases of seed 0" in done.stdout
