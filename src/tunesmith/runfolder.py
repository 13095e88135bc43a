"""The folder of a run (RUN), its file names, and the lines of its metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.reading import read_text

RUN_FILE = "run.json"
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
