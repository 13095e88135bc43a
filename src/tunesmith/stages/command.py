"""Train and resume, whether the run has stages or not: what the command and the Python API call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tunesmith.config.schema import RunConfig
from tunesmith.config.stages import StagedConfig
from tunesmith.distributed.launch import is_first
from tunesmith.report.write import reported
from tunesmith.run.console import Reporter, Silent
from tunesmith.run.given import Rows
from tunesmith.run.resume import run_resume
from tunesmith.run.start import run_training
from tunesmith.runfolder import has_stages, whole_run
from tunesmith.stages.train import resume_stages, train_stages


def train_config(config: RunConfig | StagedConfig, reporter: Reporter, rows: Rows | None = None) -> Path:
    """Train with a config, and write the report; returns the RUN folder.

    Args:
        rows: data given in Python, in place of the config's names; a run with stages takes none.
    """
    if isinstance(config, StagedConfig):
        path = _absolute(config.output_dir)
        train_stages(config, reporter if is_first() else Silent(reporter.owns_process))
        return path
    path = _absolute(config.train.output_dir)
    with reported(path, reporter.note) if is_first() else nullcontext():
        run_training(config, reporter, rows)
    return path


def resume_run(name: str, flags: Mapping[str, Any], allowed: Sequence[str], reporter: Reporter) -> Path:
    """Continue a run, or extend a finished one, and write its report; returns the RUN folder.

    Args:
        name, flags, allowed: as in `run_resume`.
    """
    path = _absolute(name)
    if has_stages(whole_run(path)):
        resume_stages(name, flags, allowed, reporter if is_first() else Silent(reporter.owns_process))
        return whole_run(path)
    with reported(path, reporter.note) if is_first() else nullcontext():
        run_resume(name, flags, allowed, reporter=reporter)
    return path


def _absolute(name: str) -> Path:
    """A path that a later change of the working folder does not move."""
    return Path(os.path.abspath(Path(name).expanduser()))
