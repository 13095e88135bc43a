"""Train the stages of a run one after another, each as a run of its own in its folder, and continue them as one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tunesmith.config.stages import StagedConfig
from tunesmith.distributed.launch import is_first
from tunesmith.distributed.processes import joined_world
from tunesmith.errors import TunesmithError
from tunesmith.report.stages import write_index_quietly
from tunesmith.report.write import reported
from tunesmith.run.console import Reporter
from tunesmith.run.folder import resolve_output
from tunesmith.run.position import keep_threads
from tunesmith.run.resume import run_resume
from tunesmith.run.start import run_training
from tunesmith.runfolder import STAGES_FILE, started_stages, whole_run
from tunesmith.stages.failures import explained_run, explained_stage
from tunesmith.stages.look import look_at_stages
from tunesmith.stages.record import (
    StagedRun,
    StagesRecord,
    find_begun,
    find_next,
    read_stages,
    refuse_fixed,
    update_stages,
)
from tunesmith.staging import locked, staged_folder
from tunesmith.training.randomness import unchanged_process


@unchanged_process()
def train_stages(config: StagedConfig, reporter: Reporter) -> None:
    """Train all stages of a run file; of several processes, all call this."""
    if run := find_begun(config):
        with joined_world(run.record.stages[0].config.train, reporter.owns_process) as world:
            place = world.share(lambda: find_next(run))
            flags = world.share(lambda: update_stages(run, config, place))
        _go_on(read_stages(run.path, run.named), place, reporter, flags, ())
        return
    with joined_world(config.stages[0].config.train, reporter.owns_process) as world:
        path = Path(world.share(lambda: str(_create(config, reporter))))
    try:
        stages = read_stages(path, config.output_dir)
        with explained_run(stages), _alone(path):
            _train_from(stages, 0, reporter)
    except BaseException:
        if is_first() and not started_stages(path):  # as for a run that fails before it has anything to keep
            with suppress(OSError):
                (path / STAGES_FILE).unlink()
                path.rmdir()
        raise


def _create(config: StagedConfig, reporter: Reporter) -> Path:
    """Make RUN with stages.json, after a look at all stages; the work of one process."""
    path = resolve_output(config.output_dir)
    look_at_stages(config, path, reporter)
    with staged_folder(path) as staging:
        StagesRecord.of(config).write(staging)
    return path


@unchanged_process()
def resume_stages(name: str, flags: Mapping[str, Any], allowed: Sequence[str], reporter: Reporter) -> None:
    """Continue the unfinished stage and train those after it; or extend the last one, where all are finished.

    Args:
        name: RUN, or the folder of the stage that is next.
        flags: as in `run_resume`; for the stage that is next, not for those after it.
        allowed: as in `run_resume`, for the same stage.
    """
    given = Path(name).expanduser().resolve()
    path = whole_run(given)
    run = read_stages(path, name if path == given else os.path.relpath(path) if not os.path.isabs(name) else str(path))
    with joined_world(run.record.stages[0].config.train, reporter.owns_process) as world:
        place = world.share(lambda: find_next(run))
    _require_next(run, given, min(place, len(run) - 1))
    _go_on(run, place, reporter, flags, allowed)


def _go_on(run: StagedRun, place: int, reporter: Reporter, flags: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Continue at a stage; where all are finished, extend the last one, or say that there is nothing to do."""
    if place == len(run) and "train.max_steps" not in flags and "train.epochs" not in flags:
        names = ", ".join(run.name(number) for number in range(len(run)))
        reporter.note(
            f"{run.named} is finished (stages {names}); nothing to do. To train its last stage longer: tunesmith "
            f"resume {run.named} --train.max_steps N"
        )
        return
    keep_threads(run.record.threads, reporter)
    with explained_run(run), _alone(run.path):
        _train_from(run, min(place, len(run) - 1), reporter, flags, allowed)


def _alone(path: Path) -> AbstractContextManager[None]:
    """RUN, locked by the process that writes."""
    return locked(path) if is_first() else nullcontext()


def _require_next(run: StagedRun, given: Path, place: int) -> None:
    """Raises:
    TunesmithError: the folder of another stage than the one to be trained was given.
    """
    if given not in (run.path, run.folder(place).path):
        raise TunesmithError(
            f"{given}: is a stage of {run.named}, whose stage {run.name(place)} is the one to continue. Later stages "
            f"start from the model of earlier ones, so that only the last that began can be trained longer: tunesmith "
            f"resume {run.named}",
            code="other-stage",
        )


def _train_from(
    run: StagedRun,
    first: int,
    reporter: Reporter,
    flags: Mapping[str, Any] | None = None,
    allowed: Sequence[str] = (),
) -> None:
    """Start or continue a stage, and train those after it."""
    try:
        for place in range(first, len(run)):
            _train_stage(run, place, reporter, flags or {}, allowed)
            flags, allowed = {}, ()
        reporter.note(f"all {len(run)} stages are trained: {run.named}\ntalk to it: tunesmith chat {run.named}")
    finally:
        if is_first():
            write_index_quietly(run.path)


def _train_stage(
    run: StagedRun, place: int, reporter: Reporter, flags: Mapping[str, Any], allowed: Sequence[str]
) -> None:
    name, folder = run.shown(place), run.folder(place)
    start = f", from {run.base(place)}" if place else ""
    reporter.note(f"stage {place + 1} of {len(run)}: {run.name(place)}{start}")
    added: dict[str, Any] = {}
    with explained_stage(run, place, added), reported(folder.path, reporter.note) if is_first() else nullcontext():
        if folder.is_run:
            refuse_fixed(run, place, flags)
            added |= run.moved_base(place)
            run_resume(name, {**flags, **added}, allowed, reporter)
        else:
            _require_empty(folder.path)
            run_training(run.config(place, flags), reporter)


def _require_empty(folder: Path) -> None:
    """Raises:
    TunesmithError: the folder of a stage that has not begun has files; its run.json may have been lost.
    """
    if folder.is_dir() and any(path for path in folder.iterdir() if not path.name.startswith(".")):
        raise TunesmithError(
            f"{folder}: has files and no run.json, so that the stage can neither be continued nor begun. Restore its "
            "run.json, or remove the folder to train the stage from its beginning.",
            code="stage-damaged",
        )
