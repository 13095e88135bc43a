"""Find where a run continues: its newest valid checkpoint, and the remaining steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.errors import TunesmithError
from tunesmith.run.assemble import ReadyRun
from tunesmith.run.console import Reporter
from tunesmith.run.records import Fingerprint, RunRecord
from tunesmith.run.reopen import Allowed
from tunesmith.runfolder import RunFolder
from tunesmith.training.checkpoint import MANIFEST, Checkpoint, newest_valid, read_checkpoint
from tunesmith.training.optim import lr_at
from tunesmith.training.progress import Progress, TrainState


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run continues.

    Attributes:
        checkpoint, state: None if the run was killed before its first checkpoint.
        progress: from the state, or of step 0.
        fingerprint: that of the checkpoint, or of the start of the run if there is no checkpoint.
        is_finished: whether RUN has the model of this step.
        is_extended: whether a finished run is extended from here; still true after a kill before the next checkpoint.
    """

    checkpoint: Checkpoint | None
    state: TrainState | None
    progress: Progress
    fingerprint: Fingerprint
    is_finished: bool
    is_extended: bool

    @property
    def weights(self) -> Path | None:
        return self.checkpoint.folder if self.checkpoint else None

    def update(self, record: RunRecord) -> RunRecord:
        """The record of the run that continues from here."""
        record = record.updated(finished_at_step=None)
        return record.updated(extended_from_step=self.progress.step) if self.is_extended else record


def find_position(folder: RunFolder, name: str, record: RunRecord, chosen: str) -> Position:
    """Where the run continues.

    Args:
        chosen: name of the newest valid checkpoint; "" if there is none.

    Raises:
        TunesmithError: there is a model but no checkpoint.
    """
    checkpoint = read_checkpoint(folder.checkpoints / chosen) if chosen else None
    if checkpoint is None:
        if folder.has_model and record.finished_at_step is not None:
            raise TunesmithError(
                f"{folder.path}: is finished and has no checkpoints left, so it cannot be extended. To train its model "
                f"further: tunesmith train --model {folder.path} --output NEW",
                code="no-checkpoint",
            )
        return Position(None, None, Progress(), record.guard, is_finished=False, is_extended=False)
    state = checkpoint.load_state()
    fingerprint = Fingerprint.from_json(checkpoint.guard, checkpoint.folder / MANIFEST)
    is_finished = folder.has_model and record.finished_at_step == state.step
    is_extended = is_finished or record.extended_from_step == state.step
    if is_extended:  # early_stop_patience starts counting here
        state.progress.stopped_early, state.progress.evals_without_gain = False, 0
    return Position(checkpoint, state, state.progress, fingerprint, is_finished, is_extended)


def choose_checkpoint(folder: RunFolder, name: str, reporter: Reporter, verified: str = "") -> Checkpoint | None:
    """The newest valid checkpoint; damaged newer ones are reported.

    Args:
        verified: name of one that is known to be valid.

    Raises:
        TunesmithError: there are checkpoints, but none is valid.
    """
    checkpoint, damaged = newest_valid(folder, verified)
    lines = [f"damaged: {path.name}: {reason}" for path, reason in sorted(damaged.items(), reverse=True)]
    if damaged and checkpoint is None:
        raise TunesmithError(
            f"{name}: all checkpoints are damaged.\n  " + "\n  ".join(lines) + f"\nTo start again at step 0, remove "
            f"{folder.checkpoints} first.",
            code="no-valid-checkpoint",
        )
    if checkpoint and any(path.name > checkpoint.folder.name for path in damaged):
        lines.append(f"continuing from the newest valid checkpoint, {checkpoint.folder.name}")
    for line in lines:
        reporter.note(line)
    return checkpoint


def keep_threads(threads: int, reporter: Reporter) -> None:
    """Use the run's number of threads: sums are rounded differently with another number."""
    if torch.get_num_threads() != threads and not torch.cuda.is_available():
        reporter.note(f"threads: {threads}, as at the start of the run (default here: {torch.get_num_threads()})")
        torch.set_num_threads(threads)


def check_steps(name: str, ready: ReadyRun, position: Position, allow: Allowed) -> None:
    """Check a changed number of steps, which is fine if the learning rate stays the same or the run was finished.

    Raises:
        TunesmithError: the run has already passed that step, or the schedule would change in mid-run.
    """
    if position.state is None or ready.feed.total_steps == position.state.total_steps:
        return
    total, was_total, step = ready.feed.total_steps, position.state.total_steps, position.state.step
    if total < step:
        raise TunesmithError(
            f"{name}: has already reached step {step}, beyond --train.max_steps {total}. Give a larger number.",
            code="steps-already-done",
        )
    optim = ready.session.config.optim
    was, will = lr_at(step, was_total, optim), lr_at(step, total, optim)
    if optim.schedule != "constant" and not position.is_extended and "schedule" not in allow.parts:
        raise TunesmithError(
            f"{name}: {total} steps instead of {was_total} would change the learning rate from here on (step "
            f"{step + 1}: {was:.2e} -> {will:.2e}), since optim.schedule is {optim.schedule}. To allow it: tunesmith "
            f"resume {name} --train.max_steps {total} --allow schedule",
            code="schedule-changed",
        )
    ready.session.reporter.note(f"note: {total} steps instead of {was_total}; lr at step {step + 1}: {will:.2e}")


def describe_position(name: str, position: Position, ready: ReadyRun) -> str:
    if position.checkpoint is None:
        return f"{name} has no checkpoint yet; it starts at step 0"
    left = ready.feed.total_steps - position.progress.step
    return f"{name} from {position.checkpoint.folder.name}: {left:,} steps to go"
