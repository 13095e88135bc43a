"""Errors of a stage: they name the stage, and the command that continues the whole run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tunesmith.errors import InterruptedRun, TunesmithError
from tunesmith.runfolder import started_stages
from tunesmith.stages.record import StagedRun, find_next

_AFTER_THE_END = ("interrupted-finished", "interrupted-report")  # the stage's model is complete


@contextmanager
def named_stage(name: str) -> Iterator[None]:
    """Raises:
    TunesmithError: as in the block, with the name of the stage.
    """
    try:
        yield
    except TunesmithError as error:
        error.args = (f"stage {name}: {error}",)  # the same class, code and attributes
        raise


@contextmanager
def explained_stage(run: StagedRun, place: int, added: Mapping[str, Any]) -> Iterator[None]:
    """Errors of a stage that is trained name it, and say how the whole run continues.

    Args:
        added: flags that nobody has typed; commands in errors have them not.

    Raises:
        TunesmithError: as in the block.
        InterruptedRun: an interrupt before the stage has anything to keep, or after its end, where another follows.
    """
    folder = run.folder(place)
    with named_stage(run.name(place)):
        try:
            yield
        except KeyboardInterrupt:
            if not started_stages(run.path):
                raise
            raise InterruptedRun(f"interrupted before step 1. {how_to_continue(run)}", code="run-interrupted") from None
        except InterruptedRun as error:
            if error.code in _AFTER_THE_END and place + 1 < len(run):
                raise InterruptedRun(
                    f"interrupted after its last step; its model is complete. Stage {run.name(place + 1)} is next. "
                    f"{how_to_continue(run)}",
                    code="run-interrupted",
                ) from None
            error.args = (_name_run(run, place, added, str(error)),)
            raise
        except TunesmithError as error:
            text = _name_run(run, place, added, str(error))
            if not folder.is_run and started_stages(run.path) and "tunesmith resume" not in text:
                text = f"{text}\nThe stages before it are complete. {how_to_continue(run)}"
            error.args = (text,)
            raise


@contextmanager
def explained_run(run: StagedRun) -> Iterator[None]:
    """Raises:
    InterruptedRun: an interrupt between two stages or after the last one, which says what there is.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not started_stages(run.path):
            raise
        is_finished = find_next(run) == len(run)
        where = "after the last stage" if is_finished else "between two stages"
        rest = f"All {len(run)} stages are trained: {run.named}" if is_finished else how_to_continue(run)
        raise InterruptedRun(f"interrupted {where}. {rest}", code="run-interrupted") from None


def how_to_continue(run: StagedRun) -> str:
    return f"Continue with: tunesmith resume {shlex.quote(run.named)}"


def _name_run(run: StagedRun, place: int, added: Mapping[str, Any], text: str) -> str:
    """The text with commands that resume the run in place of its stage."""
    for key, value in added.items():
        text = text.replace(f" --{key} {shlex.quote(str(value))}", "")
    for name in dict.fromkeys((run.shown(place), shlex.quote(run.shown(place)), str(run.folder(place).path))):
        text = text.replace(f"tunesmith resume {name}", f"tunesmith resume {shlex.quote(run.named)}")
    return text
