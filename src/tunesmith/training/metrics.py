"""metrics.jsonl, one object for each logged step, and the trackers that show it."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tunesmith.errors import ConfigError
from tunesmith.files import write_text_atomic
from tunesmith.runfolder import RunFolder, read_lines

Record = dict[str, Any]
logger = logging.getLogger(__name__)


class Tracker(Protocol):
    def log(self, record: Record) -> None: ...
    def sync(self) -> None: ...
    def finish(self) -> None: ...


class MetricsFile:
    """Appends records, one a line; where a write fails they stay in memory until one succeeds.

    Args:
        last_step: of the checkpoint that the run continues from; lines of later steps are removed, since these steps
            are repeated. None keeps nothing.
    """

    def __init__(self, path: Path, last_step: int | None = None) -> None:
        kept = [line for line, step in read_lines(path) if last_step is not None and step <= last_step]
        if path.exists():
            write_text_atomic(path, "".join(f"{line}\n" for line in kept))
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""

    def log(self, record: Record) -> None:
        # NaN is not JSON; null keeps the line readable everywhere
        self._waiting += (json.dumps(_finite(record)) + "\n").encode()
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._fd, self._waiting) :]

    def sync(self) -> None:
        with contextlib.suppress(OSError):
            self._write()
            os.fsync(self._fd)

    def finish(self) -> None:
        try:
            self._write()
        finally:
            os.close(self._fd)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class OutsideTracker:
    """A third-party tracker: its first error is reported, and does not end the run."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._is_alive = True

    def _try(self, call: Callable[[], None]) -> None:
        if not self._is_alive:
            return
        try:
            call()
        except Exception as error:
            self._is_alive = False
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.info(
                "note: %s failed and gets no more of this run: %s. metrics.jsonl has all of it.", self._name, reason
            )

    def log(self, record: Record) -> None:
        self._try(lambda: self._tracker.log(record))

    def sync(self) -> None:
        self._try(self._tracker.sync)

    def finish(self) -> None:
        self._try(self._tracker.finish)


class TensorBoardTracker:
    def __init__(self, folder: Path, last_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard itself leaves out what an earlier writer logged from purge_step on
        purge_step = last_step + 1 if last_step is not None else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class WandbTracker:
    def __init__(self, folder: Path, run_id: str, config: Record) -> None:
        import wandb

        self._run = wandb.init(
            project="tunesmith", name=folder.name, config=config, dir=str(folder), id=run_id, resume="allow"
        )

    def log(self, record: Record) -> None:
        self._run.log(_numbers(record), step=record["step"])

    def sync(self) -> None:
        pass  # it sends in the background

    def finish(self) -> None:
        self._run.finish()


class SwanlabTracker:
    def __init__(self, folder: RunFolder, run_id: str, config: Record) -> None:
        import swanlab

        self._swanlab = swanlab
        swanlab.init(
            project="tunesmith", name=folder.path.name, config=config, log_dir=str(folder.tracker_logs("swanlab")),
            id=run_id, resume="allow",
        )  # fmt: skip

    def log(self, record: Record) -> None:
        self._swanlab.log(_numbers(record), step=record["step"])

    def sync(self) -> None:
        pass  # it sends in the background

    def finish(self) -> None:
        self._swanlab.finish()


class TrackioTracker:
    def __init__(self, folder: Path, config: Record) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project="tunesmith", name=folder.name, config=config, resume="allow")

    def log(self, record: Record) -> None:
        self._trackio.log(_numbers(record), step=record["step"])

    def sync(self) -> None:
        pass  # it sends in the background

    def finish(self) -> None:
        self._trackio.finish()


def source_record(
    names: Sequence[str], losses: Sequence[float], targets: Sequence[int], tokens: Sequence[int]
) -> Record:
    """Of each source of a mix: the mean loss of its targets since the last record, where there were any, and its tokens
    since step 0.

    Args:
        losses, targets: sums since the last record.
    """
    return {
        "source_loss": mean_by_source(names, losses, targets),
        "source_tokens": dict(zip(names, tokens, strict=True)),
    }


def mean_by_source(names: Sequence[str], losses: Sequence[float], targets: Sequence[int]) -> dict[str, float]:
    """The mean loss of each source that has targets."""
    return {name: loss / count for name, loss, count in zip(names, losses, targets, strict=True) if count}


def _numbers(record: Record) -> Record:
    """The numbers of a record; one of a source is named source_loss/NAME."""
    flat: Record = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": number for name, number in value.items() if isinstance(number, (int, float))}
        elif isinstance(value, (int, float)) and key not in ("step", "time"):
            flat[key] = value
    return flat


def require_trackers(names: Sequence[str]) -> None:
    """Fail before any work where a tracker's package is not installed."""
    missing = []
    for name in names:
        module = "torch.utils.tensorboard" if name == "tensorboard" else name
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(f"{name} is not installed: pip install 'tunesmith[{name}]'")
    if missing:
        raise ConfigError("train.trackers", missing, code="package-missing")


def tracker_hints(names: Sequence[str], output_dir: str) -> list[str]:
    """How to look at what the trackers write into the RUN folder."""
    if "tensorboard" not in names:
        return []
    folder = RunFolder(Path(output_dir)).tracker_logs("tensorboard")
    return [f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder))}"]


def start_trackers(
    names: Sequence[str], folder: RunFolder, config: Record, run_id: str, last_step: int | None = None
) -> list[Tracker]:
    """The metrics file, then the trackers by name.

    Args:
        config: must hold no secrets (ours never does).
        run_id: under which wandb and swanlab find the run again.
        last_step: of the checkpoint that the run continues from.
    """
    start: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker(folder.tracker_logs("tensorboard"), last_step),
        "wandb": lambda: WandbTracker(folder.path, run_id, config),
        "swanlab": lambda: SwanlabTracker(folder, run_id, config),
        "trackio": lambda: TrackioTracker(folder.path, config),
    }
    trackers: list[Tracker] = [MetricsFile(folder.metrics, last_step)]
    return trackers + [OutsideTracker(name, start[name]()) for name in names]
