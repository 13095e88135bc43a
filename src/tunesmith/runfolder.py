"""The folder of a run (RUN), its file names, and the lines of its metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.reading import read_text

RUN_FILE = "run.json"
STAGES_FILE = "stages.json"  # of a run with stages, beside the folder of each stage
LEDGER_FILE = "data_ledger.json"
INITIAL_ADAPTER = "adapter_init"
SUBFOLDERS = ("adapter", INITIAL_ADAPTER, "model", "checkpoints", "tokens", "eval_tokens", "rows")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of all files that a run writes; the folder need not exist yet."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """run.json, which makes the folder a run; written last."""
        return self.path / RUN_FILE

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def eval_replies(self) -> Path:
        """Replies to held-out rows at each evaluation (train.eval_generate)."""
        return self.path / "eval_replies.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / LEDGER_FILE

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def replies(self) -> Path:
        """The sample replies of the report."""
        return self.path / "sample_replies.json"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens"

    @property
    def eval_tokens(self) -> Path:
        return self.path / "eval_tokens"

    @property
    def model(self) -> Path:
        """The finished model of a run that trains all weights."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """The finished adapter of a run that trains one."""
        return self.path / "adapter"

    @property
    def initial_adapter(self) -> Path:
        """The initial matrices of a PiSSA or OLoRA adapter."""
        return self.path / INITIAL_ADAPTER

    @property
    def rows(self) -> Path:
        """Rows given in Python, as JSON Lines."""
        return self.path / "rows"

    @property
    def profile(self) -> Path:
        """Traces of train.profile_steps."""
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def tracker_logs(self, name: str) -> Path:
        return self.path / name

    @property
    def is_run(self) -> bool:
        """Whether resume accepts the folder."""
        return self.record.is_file()

    @property
    def has_model(self) -> bool:
        """Whether a model or an adapter was saved here; it may be older than the newest checkpoint."""
        return self.model.is_dir() or self.adapter.is_dir()

    @property
    def has_complete_model(self) -> bool:
        """Whether the saved model or adapter has its config."""
        return (self.model / "config.json").is_file() or (self.adapter / "adapter_config.json").is_file()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete records of metrics.jsonl."""
    return [json.loads(line) for line, _ in read_lines(path)]


def read_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Complete lines and their steps; a kill may have truncated the last one."""
    if not path.exists():
        return
    for line in read_text(path, errors="replace").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if isinstance(step, int):
            yield line, step


def name_stage(number: int, name: str) -> str:
    """Name of a stage's folder in RUN, as in 2-sft.

    Args:
        number: from 1.
    """
    return f"{number}-{name}"


def has_stages(path: Path) -> bool:
    """Whether a folder is the RUN of a run file with stages."""
    return (path / STAGES_FILE).is_file()


def started_stages(path: Path) -> list[RunFolder]:
    """The stages of a run that have begun, in order; none where it has no stages."""
    if not has_stages(path):
        return []
    found = [(re.match(r"(\d+)-", folder.name), RunFolder(folder)) for folder in path.iterdir()]
    numbered = [(int(match[1]), run) for match, run in found if match and run.config.is_file()]
    return [run for _, run in sorted(numbered, key=lambda one: one[0])]


def latest_stage(path: Path) -> Path:
    """For the RUN of a run with stages, the folder of the last stage with a finished model, or else of the first.

    Other paths are returned unchanged, so that whatever takes a RUN takes one with stages too.
    """
    started = started_stages(path)
    finished = [run for run in started if run.has_complete_model]
    return next((run.path for run in (finished[-1:] or started[:1])), path)


def whole_run(path: Path) -> Path:
    """The RUN to name to `tunesmith resume`: for the folder of a stage that of all stages, else the path itself."""
    return path.parent if has_stages(path.parent) and re.match(r"\d+-", path.name) else path


def moved_in_run(path: Path, name: str) -> str:
    """Where a model that a stage started from is now, if the whole run was moved; else the name unchanged.

    Args:
        path: a folder in the stage.
        name: of the model when the stage was trained: RUN/1-pretrain/model.
    """
    there = Path(name)
    for stage in (path, *path.resolve().parents[:2]):
        now = stage.parent / there.parent.name / there.name
        if has_stages(stage.parent) and now.is_dir() and (there.is_absolute() and not there.exists()):
            return str(now)
    return name
