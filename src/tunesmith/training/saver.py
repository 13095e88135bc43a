"""Write checkpoints in the background, from a snapshot, one at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from tunesmith.encode.encoder import Encoder
from tunesmith.errors import RunError
from tunesmith.files import is_no_room, system_error
from tunesmith.model.loss import SupervisedLM
from tunesmith.runfolder import RunFolder
from tunesmith.tensors import find_not_finite
from tunesmith.training.checkpoint import (
    Snapshot,
    find_damage,
    newest_valid,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)

logger = logging.getLogger(__name__)


class Saver:
    """Write snapshots in a thread.

    A failed write does not end the run: `failure` then says what could not be saved, why, and which checkpoint is the
    last good one, and the next snapshot is tried. Weights that are not finite do end the run: their checkpoint would
    replace a good one.

    Attributes:
        failure: why the newest snapshot could not be saved; "" if it was.
        seconds: that the last checkpoint took.
    """

    def __init__(self, run: RunFolder, lm: SupervisedLM, encoder: Encoder, guard: Mapping[str, Any], keep: int) -> None:
        self.failure, self.seconds = "", 0.0
        self._run, self._lm, self._encoder, self._guard, self._keep = run, lm, encoder, guard, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot, best_step: int | None, is_told: bool = False) -> None:
        """Start writing; waits for the previous snapshot if that is not on disk yet.

        Args:
            is_told: log where the checkpoint is when it is on disk.
        """
        self.wait()
        # daemon: a second Ctrl-C must not wait for the disk
        arguments = (snapshot, best_step, is_told)
        self._thread = threading.Thread(target=self._write, args=arguments, name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last snapshot is on disk; raises errors of its thread other than a full disk."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot, best_step: int | None, is_told: bool) -> None:
        began = time.monotonic()
        try:
            require_finite(snapshot)
            folder = write_checkpoint(self._run, snapshot, self._lm, self._encoder, self._guard)
            damage = find_damage(read_checkpoint(folder))  # verify before an older one is deleted
            if damage:
                self.failure = f"checkpoint of step {snapshot.step} does not verify ({damage}); older ones are kept"
                return
            self.failure, self.seconds = "", time.monotonic() - began
            if is_told:
                logger.info("checkpoint saved: %s", folder)
            prune_checkpoints(self._run, self._keep, best_step, snapshot.step)
        except BaseException as error:
            reason = system_error(error)
            if reason is None:
                self._error = error
                return
            why = "no room" if is_no_room(error) else (reason.strerror or "the disk failed").lower()
            self.failure = f"{why} for the checkpoint of step {snapshot.step}{self._last_good()}"

    def _last_good(self) -> str:
        try:
            last, _ = newest_valid(self._run)
        except OSError:
            return ""
        return f"; the last good one is {last.folder.name}" if last else "; there is no earlier one"


def require_finite(snapshot: Snapshot) -> None:
    """Check that weights and optimizer averages are finite.

    Raises:
        RunError: one of them is NaN or infinite, which later steps cannot repair.
    """
    name = find_not_finite(snapshot.weights)
    what = f"the weights are not finite ({name})"
    if not name and (name := find_not_finite(snapshot.optimizer)):
        what = f"the optimizer's averages are not finite ({name})"
    if name:
        raise RunError(
            f"step {snapshot.step}: {what}, so it is not saved. Lower optim.lr, set optim.max_grad_norm 1, or train in "
            "fp32 or bf16 instead of fp16.",
            code="weights-not-finite",
        )
