"""Importing the large libraries: the garbage collector rests meanwhile, and works afterwards."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.importing import import_libraries

CHILD = """
import gc, sys
passes = []
gc.callbacks.append(lambda phase, info: passes.append("torch" in sys.modules))
{before}
from tunesmith.importing import import_libraries
passes.clear()
import_libraries()
print(gc.isenabled(), gc.get_freeze_count() > 100_000, any(passes), "transformers.modeling_utils" in sys.modules)
"""


def child(before: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(before=before)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_collector_rests_and_works_afterwards() -> None:
    assert child() == "True True False True"


def test_a_collector_that_is_off_stays_off() -> None:
    assert child("gc.disable()") == "False False False False"


def test_a_process_that_has_torch_keeps_its_objects_collectable() -> None:
    import torch  # noqa: F401

    before = gc.get_freeze_count()
    import_libraries()
    assert gc.isenabled()
    assert gc.get_freeze_count() == before


@pytest.mark.parametrize(
    "command", [["train", "--model", "new:tiny", "--data", "d.jsonl", "--output", "r"], ["chat", "r"]]
)
def test_a_broken_library_is_named(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('broken transformers')")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *command], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "a package cannot be imported: ImportError: broken transformers" in done.stderr
    assert "report it as a bug" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "r", "--data", "d.jsonl", "--judge", "ftp://x"], ["chat", "r", "--temperature", "-1"],
        ["generate", "r", "--data", "d.jsonl", "--output", "o", "--samples", "0"], ["serve", "r", "--port", "x"],
        ["export", "none.gguf", "--verify"], ["export", "r", "--verify", "--type", "f16"], ["export", "r"],
        ["merge", "r"], ["train", "--model", "new:tiny", "--train.max_steps", "x"], ["lr-find", "--optim.lr", "x"],
        ["resume", "r", "--train.max_stepz", "3"],
    ],
    ids=lambda words: " ".join(words),
)  # fmt: skip
def test_an_error_of_the_command_line_comes_before_the_imports(words: list[str], tmp_path: Path) -> None:
    code = f"import sys; from tunesmith.cli import main; code = main({words!r}); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split()[-1] == "False", done.stdout
    assert done.stderr.strip()
