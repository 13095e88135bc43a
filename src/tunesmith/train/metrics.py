"""metrics.jsonl, one object a logged step, and the trackers that people look at it with."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any, Protocol

from tunesmith.errors import ConfigError

Record = dict[str, Any]


class Tracker(Protocol):
    def log(self, record: Record) -> None: ...
    def finish(self) -> None: ...


class MetricsFile:
    """Appends records; each line is whole on disk before the next step begins."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        # NaN is not JSON; null keeps the line readable everywhere
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def finish(self) -> None:
        self._file.close()


class TensorBoardTracker:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def finish(self) -> None:
        self._writer.close()


class WandbTracker:
    def __init__(self, folder: Path, run_name: str, config: Record) -> None:
        import wandb

        self._run = wandb.init(project="tunesmith", name=run_name, config=config, dir=str(folder))

    def log(self, record: Record) -> None:
        self._run.log(_numbers(record), step=record["step"])

    def finish(self) -> None:
        self._run.finish()


class SwanlabTracker:
    def __init__(self, folder: Path, run_name: str, config: Record) -> None:
        import swanlab

        self._swanlab = swanlab
        swanlab.init(project="tunesmith", experiment_name=run_name, config=config, logdir=str(folder / "swanlab"))

    def log(self, record: Record) -> None:
        self._swanlab.log(_numbers(record), step=record["step"])

    def finish(self) -> None:
        self._swanlab.finish()


class TrackioTracker:
    def __init__(self, run_name: str, config: Record) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project="tunesmith", name=run_name, config=config)

    def log(self, record: Record) -> None:
        self._trackio.log(_numbers(record), step=record["step"])

    def finish(self) -> None:
        self._trackio.finish()


def _numbers(record: Record) -> Record:
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}


def require_trackers(names: list[str]) -> None:
    """Fail before any work where a tracker's package is not installed."""
    missing = []
    for name in names:
        module = "torch.utils.tensorboard" if name == "tensorboard" else name
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(f"{name} is not installed: pip install 'tunesmith[{name}]'")
    if missing:
        raise ConfigError("train.trackers", missing)


def start_trackers(names: list[str], folder: Path, config: Record) -> list[Tracker]:
    """The metrics file, then the trackers by name. `config` must hold no secrets (ours never does)."""
    trackers: list[Tracker] = [MetricsFile(folder / "metrics.jsonl")]
    for name in names:
        if name == "tensorboard":
            trackers.append(TensorBoardTracker(folder))
        elif name == "wandb":
            trackers.append(WandbTracker(folder, folder.name, config))
        elif name == "swanlab":
            trackers.append(SwanlabTracker(folder, folder.name, config))
        elif name == "trackio":
            trackers.append(TrackioTracker(folder.name, config))
    return trackers
