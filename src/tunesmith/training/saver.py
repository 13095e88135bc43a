"""Write checkpoints in the background, from a snapshot, one at a time."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.distributed.spread import Spread
from tunesmith.distributed.world import OneProcess, World
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import RunError
from tunesmith.files import is_no_room, system_error
from tunesmith.model.loss import SupervisedLM
from tunesmith.runfolder import RunFolder
from tunesmith.tensors import find_not_finite
from tunesmith.training.checkpoint import (
    Snapshot,
    copy_optimizer,
    copy_weights,
    find_damage,
    newest_valid,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from tunesmith.training.sharded import (
    AbandonedError,
    ShardSnapshot,
    begin_shards,
    copy_shards,
    finish_shards,
    write_own_shards,
)

_LEAVE_S = 20.0  # for the shards of other processes, after an error

logger = logging.getLogger(__name__)


class Saver:
    """Write snapshots in a thread.

    A failed write does not end the run: `failure` then says what could not be saved, why, and which checkpoint is the
    last good one, and the next snapshot is tried. Weights that are not finite do end the run: their checkpoint would
    replace a good one.

    Whole snapshots are written by the first process alone; in shards, every process writes its own.

    Attributes:
        failure: why the newest snapshot could not be saved; "" if it was. Of the first process.
        seconds: that the last checkpoint took.
        in_shards: the form of the checkpoints.
    """

    def __init__(
        self,
        run: RunFolder,
        lm: SupervisedLM,
        encoder: Encoder,
        guard: Mapping[str, Any],
        keep: int,
        world: World | None = None,
        in_shards: bool = False,
    ) -> None:
        self.failure, self.seconds, self.in_shards = "", 0.0, in_shards
        self._run, self._lm, self._encoder, self._guard, self._keep = run, lm, encoder, guard, keep
        self._world = world or OneProcess()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._partial: Path | None = None
        self._errno = 0  # of this process's own shards
        self._has_written, self._is_abandoned = threading.Event(), threading.Event()

    def take(
        self,
        optimizer: torch.optim.Optimizer,
        spread: Spread,
        random: dict[str, Tensor],
        state: dict[str, Any],
    ) -> Snapshot | ShardSnapshot | None:
        """What this process will write; None if nothing. Every process calls this: a sharded model is gathered."""
        if not self.in_shards:
            weights, averages = copy_weights(self._lm, spread), copy_optimizer(self._lm.model, optimizer, spread)
            return Snapshot(weights, averages, random, state) if self._world.is_main else None
        partial = self._world.share(lambda: self._begin(int(state["step"])))
        if not partial:
            return None
        self._partial = Path(partial)
        return ShardSnapshot(self._partial, *copy_shards(self._lm, optimizer, spread), random, state)

    def _begin(self, step: int) -> str:
        try:
            return str(begin_shards(self._run, step))
        except OSError as error:
            self.failure = self._explain(error, step)
            return ""

    def save(self, snapshot: Snapshot | ShardSnapshot, best_step: int | None, is_told: bool = False) -> None:
        """Start writing; waits for the previous snapshot if that is not on disk yet.

        Args:
            is_told: log where the checkpoint is when it is on disk.
        """
        self.wait()
        self._has_written.clear()
        self._is_abandoned.clear()
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

    def settle(self) -> str:
        """Wait until the last snapshot of all processes is on disk; returns `failure`. Every process calls this."""
        if self.in_shards:
            self._settle_shards()
        failure: str = self._world.share(self._waited)
        return failure

    def _waited(self) -> str:
        self.wait()
        return self.failure

    def _settle_shards(self) -> None:
        """The first process stops waiting for shards that will not come."""
        if self._thread:
            self._has_written.wait()
        if self._error or not self._world.is_main:
            self.wait()
        errors = torch.zeros(self._world.size, dtype=torch.int64)
        errors[self._world.rank] = self._errno
        failed = {rank: number for rank, number in enumerate(self._world.sum(errors).tolist()) if number}
        self._errno = 0
        if not self._world.is_main:
            return
        if failed:
            self._is_abandoned.set()
        self.wait()
        if failed:
            rank, number = next(iter(failed.items()))
            self.failure = f"process {rank} cannot write its shards ({os.strerror(number).lower()}){self._last_good()}"
        if self._partial:  # it has another name if it was completed
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None

    def leave(self) -> None:
        """After an error: an earlier snapshot is still worth keeping, if all processes have written theirs."""
        thread = self._thread
        if self.in_shards and thread:
            thread.join(_LEAVE_S)
            self._is_abandoned.set()
        self.wait()

    def _write(self, snapshot: Snapshot | ShardSnapshot, best_step: int | None, is_told: bool) -> None:
        began = time.monotonic()
        try:
            folder = (
                self._write_shards(snapshot) if isinstance(snapshot, ShardSnapshot) else self._write_whole(snapshot)
            )
            if folder is None:
                return
            # verify before an older one is deleted; shards are read back where they are written
            damage = find_damage(read_checkpoint(folder), () if self.in_shards else None)
            if damage:
                self.failure = f"checkpoint of step {snapshot.step} does not verify ({damage}); older ones are kept"
                return
            self.failure, self.seconds = "", time.monotonic() - began
            if is_told:
                logger.info("checkpoint saved: %s", folder)
            prune_checkpoints(self._run, self._keep, best_step, snapshot.step)
        except AbandonedError:  # `_settle_shards` says why
            return
        except BaseException as error:
            reason = system_error(error)
            if reason is None:
                self._error = error
                return
            self.failure = self._explain(error, snapshot.step)
        finally:
            self._has_written.set()

    def _write_whole(self, snapshot: Snapshot) -> Path:
        require_finite(snapshot.step, snapshot.weights, snapshot.optimizer)
        return write_checkpoint(self._run, snapshot, self._lm, self._encoder, self._guard)

    def _write_shards(self, snapshot: ShardSnapshot) -> Path | None:
        weights, optimizer = (
            {name: shard.tensor for name, shard in found.items()} for found in (snapshot.weights, snapshot.optimizer)
        )
        require_finite(snapshot.step, weights, optimizer)
        rank, size = self._world.rank, self._world.size
        try:
            write_own_shards(snapshot, rank, size)
        except BaseException as error:
            if reason := system_error(error):
                self._errno = reason.errno or errno.EIO
            raise
        self._has_written.set()
        if not self._world.is_main:
            return None
        return finish_shards(self._run, snapshot, self._lm, self._encoder, self._guard, size, self._is_abandoned)

    def _explain(self, error: BaseException, step: int) -> str:
        reason = system_error(error)
        text = (reason.strerror if reason else "") or "the disk failed"
        why = "no room" if is_no_room(error) else text.lower()
        return f"{why} for the checkpoint of step {step}{self._last_good()}"

    def _last_good(self) -> str:
        try:
            last, _ = newest_valid(self._run)
        except OSError:
            return ""
        return f"; the last good one is {last.folder.name}" if last else "; there is no earlier one"


def require_finite(step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    """Check that weights and optimizer averages are finite.

    Raises:
        RunError: one of them is NaN or infinite, which later steps cannot repair.
    """
    name = find_not_finite(weights)
    what = f"the weights are not finite ({name})"
    if not name and (name := find_not_finite(optimizer)):
        what = f"the optimizer's averages are not finite ({name})"
    if name:
        raise RunError(
            f"step {step}: {what}, so it is not saved. Lower optim.lr, set optim.max_grad_norm 1, or train in "
            "fp32 or bf16 instead of fp16.",
            code="weights-not-finite",
        )
