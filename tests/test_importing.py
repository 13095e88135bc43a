"""Importing the large libraries: the garbage collector rests meanwhile, and works afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

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
