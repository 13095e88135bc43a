"""stages.json: the stages of a run with their configs, and which of them is trained next."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunesmith.config.runfile import build_config, read_yaml
from tunesmith.config.schema import RunConfig
from tunesmith.config.stages import StagedConfig
from tunesmith.distributed.launch import find_launch
from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.files import sealed, write_text_atomic
from tunesmith.run.identity import find_changes
from tunesmith.run.records import WITHOUT_IT, RunRecord, read_record
from tunesmith.run.resume import absolute_names
from tunesmith.runfolder import STAGES_FILE, RunFolder, has_stages, name_stage

_FIXED = ("model.path", "model.tokenizer", "model.revision")  # of a stage after the first


class StageRecord(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    config: RunConfig


class StagesRecord(BaseModel):
    """Contents of stages.json.

    Attributes:
        date: when the run began.
        cwd: the folder to which names in the configs are relative.
        threads: number of torch threads; stages that a resume starts use it too, so that they round alike.
    """

    model_config = ConfigDict(frozen=True)

    date: datetime.datetime
    cwd: str
    threads: int
    stages: list[StageRecord] = Field(min_length=1)

    @classmethod
    def of(cls, config: StagedConfig) -> StagesRecord:
        return cls(
            date=datetime.datetime.now().replace(microsecond=0),
            cwd=os.getcwd(),
            threads=torch.get_num_threads(),
            stages=[StageRecord(name=stage.name, config=stage.config) for stage in config.stages],
        )

    def write(self, folder: Path) -> None:
        write_text_atomic(folder / STAGES_FILE, sealed(self.model_dump(mode="json")))


@dataclass(frozen=True, slots=True)
class StagedRun:
    """The RUN folder of a run file with stages.

    Attributes:
        path: absolute.
        named: as the user wrote it.
    """

    path: Path
    named: str
    record: StagesRecord

    def __len__(self) -> int:
        return len(self.record.stages)

    def name(self, place: int) -> str:
        return self.record.stages[place].name

    def folder(self, place: int) -> RunFolder:
        return RunFolder(self.path / name_stage(place + 1, self.name(place)))

    def shown(self, place: int) -> str:
        """A stage's folder as the user would write it."""
        folder = self.folder(place).path
        named = os.path.join(self.named, folder.name)
        return named if os.path.realpath(os.path.expanduser(named)) == str(folder) else str(folder)

    def is_finished(self, place: int) -> bool:
        """Whether the stage's model is complete. A stage that is being extended is not finished."""
        folder = self.folder(place)
        if not (folder.is_run and folder.has_complete_model):
            return False
        return RunRecord.from_json(read_record(folder.record), folder.record).finished_at_step is not None

    def base(self, place: int) -> str:
        """Name of the model, or of the adapter, that a stage after the first starts from."""
        before = RunFolder(Path(self.shown(place - 1)))
        return str(before.adapter if self.folder(place - 1).adapter.is_dir() else before.model)

    def config(self, place: int, flags: Mapping[str, Any]) -> RunConfig:
        """The config of a stage that has not begun.

        Args:
            flags: dotted key -> value as typed; they override stages.json.

        Raises:
            ConfigError: a flag has a wrong value, or is for the first stage only.
        """
        config = self.record.stages[place].config
        if os.getcwd() != self.record.cwd:
            config = absolute_names(config, self.record.cwd)
        refuse_fixed(self, place, flags)
        tree = config.model_dump(mode="json")
        tree["train"]["output_dir"] = self.shown(place)
        if place:
            tree["model"]["path"] = self.base(place)
        changed, problems = build_config(RunConfig, tree, flags, is_python=False)
        if changed is None:
            raise ConfigError(f"resume {self.named}", problems)
        return changed

    def moved_base(self, place: int) -> dict[str, Any]:
        """The flag for a stage that has begun and whose model to start from is no longer where it was then."""
        folder = self.folder(place)
        if not place or not folder.is_run:
            return {}
        cwd = RunRecord.from_json(read_record(folder.record), folder.record).cwd
        began_from = os.path.join(cwd, os.path.expanduser(str(read_yaml(folder.config)["model"]["path"])))
        base = os.path.realpath(self.base(place))
        return {} if os.path.realpath(began_from) == base else {"model.path": base}


def refuse_fixed(run: StagedRun, place: int, flags: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: a flag changes where a stage is written, or what a stage after the first starts from.
    """
    problems = ["train.output_dir: a run is resumed in its own folder; leave --output out"] * (
        "train.output_dir" in flags
    )
    problems += [
        f"{key}: a stage after the first starts from the model of the stage before; leave it out"
        for key in _FIXED
        if place and key in flags
    ]
    if problems:
        raise ConfigError(f"resume {run.named}", problems, code="fixed-on-resume")


def read_stages(path: Path, named: str) -> StagedRun:
    """The run in a folder that has stages.

    Raises:
        TunesmithError: stages.json is damaged.
    """
    file = path / STAGES_FILE
    try:
        return StagedRun(path, named, StagesRecord.model_validate(read_record(file)))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise TunesmithError(
            f"{file}: is damaged: {field}: {problem['msg']}. {WITHOUT_IT}", code="run-file-damaged"
        ) from None


def find_next(run: StagedRun) -> int:
    """The stage to train next, from 0; the number of stages where all are finished.

    The stage that began last decides: if it is finished, the next one follows. Earlier ones are not looked at, so that
    their folders may be deleted once a later stage needs them no more.

    It reads the disk. Processes that train together must have the same answer: all call it before any of them trains.
    """
    begun = [place for place in range(len(run)) if run.folder(place).is_run]
    if not begun:
        return 0
    last = begun[-1]
    return last + 1 if run.is_finished(last) else last


def find_begun(config: StagedConfig) -> StagedRun | None:
    """The run that this command began before and may continue: with train.resume, or after a restart by torchrun.

    Raises:
        TunesmithError: stages.json is damaged, or of other stages.
    """
    launch = find_launch()
    is_asked = any(stage.config.train.resume for stage in config.stages)
    path = Path(config.output_dir).expanduser().resolve()
    if not (is_asked or (launch is not None and launch.is_again)) or not has_stages(path):
        return None
    run = read_stages(path, config.output_dir)
    before, now = [run.name(place) for place in range(len(run))], [stage.name for stage in config.stages]
    if before != now:
        raise TunesmithError(
            f"{config.output_dir}: contains another run: its stages are {', '.join(before)} there, and "
            f"{', '.join(now)} here. Give --output a new folder, or restore the stages.",
            code="output-taken",
        )
    return run


def update_stages(run: StagedRun, config: StagedConfig, place: int) -> dict[str, object]:
    """Take over what the command changes: flags for the stage that is next, and the configs of those after it.

    Raises:
        TunesmithError: a key differs that decides what a stage that has begun trains.
    """
    changes: dict[str, object] = {}
    for number, stage in enumerate(config.stages):
        if run.folder(number).is_run:
            changes = find_changes(stage.config, run.folder(number))
    record = StagesRecord.of(config).model_copy(update={"date": run.record.date, "threads": run.record.threads})
    record.write(run.path)
    return changes if run.folder(min(place, len(run) - 1)).is_run else {}
