"""The loss of each step equals TRL's on the same rows, order and weights; TRL's losses are in golden/trl_losses.json.

`bench/parity_trl/run.sh --write-golden` regenerates that file (it installs TRL in a separate environment). The weights
are generated integers times a power of two, so they have the same bytes on every machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "parity_trl"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl_losses.json").read_text(encoding="utf-8"))
LIMIT = 1e-4


@pytest.mark.parametrize("mode", ["none", "alpaca"])
def test_losses_equal_those_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    ours = __import__("ours").run(tmp_path, mode)
    for name in ("inputs", "ours"):
        sys.modules.pop(name)
    golden = GOLDEN["modes"][mode]
    # the inputs differ from those that TRL had, so its losses do not apply. Run bench/parity_trl/run.sh --write-golden.
    assert ours["sha256"] == golden["sha256"]
    assert len(ours["losses"]) == len(golden["losses"]) == 50
    differences = [abs(a - b) for a, b in zip(ours["losses"], golden["losses"], strict=True)]
    assert max(differences) < LIMIT, f"step {differences.index(max(differences)) + 1}: {max(differences):.2e}"
