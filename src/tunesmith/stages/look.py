"""Look at all stages before the first is trained, so that a mistake in the last does not show after hours."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.config.schema import ModelSection, RunConfig
from tunesmith.config.stages import StagedConfig
from tunesmith.data.dataset import find_data, refuse_shared_files
from tunesmith.data.labelling import label_rows
from tunesmith.data.ledger import Ledger
from tunesmith.distributed.world import OneProcess
from tunesmith.errors import DataError
from tunesmith.model.source import ModelSource, find_model
from tunesmith.run.console import Reporter, Silent
from tunesmith.run.session import Session, open_session, require_packages
from tunesmith.runfolder import RunFolder
from tunesmith.sources.read import RawRow, Sources, read_rows
from tunesmith.stages.failures import named_stage

_FILES = 16  # of a stage that are looked into
_ROWS = 8  # of each
_CHARACTERS = 20_000  # of a text file


def look_at_stages(config: StagedConfig, path: Path, reporter: Reporter) -> None:
    """Find the packages and the data of every stage, and label the first rows of its files.

    Args:
        path: the RUN folder to be.

    Raises:
        TunesmithError: what is wrong, with the name of the stage.
    """
    stages = config.stages
    for stage in stages:
        with named_stage(stage.name):
            require_packages(stage.config)
            refuse_shared_files(find_data(stage.config.data))
    first = stages[0].config.model
    model = find_model(first.path, first.config)
    template = None
    for stage in stages:
        reporter.stage(f"looking at the data of stage {stage.name}")
        with named_stage(stage.name):
            template = stage.config.data.chat_template or template
            _look(_with_model(stage.config, first, template), path / stage.folder, model)


def _with_model(config: RunConfig, first: ModelSection, template: str | None) -> RunConfig:
    """The config with the first stage's model, whose tokenizer and template the later stages' models will have."""
    model = first.model_copy(update={"add_tokens": config.model.add_tokens or first.add_tokens})
    data = config.data.model_copy(update={"chat_template": template})
    return config.model_copy(update={"model": model, "data": data})


def _look(config: RunConfig, folder: Path, model: ModelSource) -> None:
    sources = find_data(config.data)
    date = datetime.datetime.now().replace(microsecond=0)
    session = open_session(config, RunFolder(folder), Silent(), date, sources, model, OneProcess())
    for key, part in (("train", sources.train), ("eval", sources.eval)):
        if part.files or part.hub:
            _label_first(session, key, part)


def _label_first(session: Session, key: str, sources: Sources) -> None:
    """Raises:
    DataError: a file cannot be read, or none of the first rows can be trained on.
    """
    data, ledger = session.config.data, Ledger()
    for row in label_rows(_first_rows(sources, data.encoding, data.max_row_mb), session.encoder,
                          data.model_copy(update={"limit": None}), session.lengths.max_seq_len):  # fmt: skip
        ledger.add(row)
    if data.max_refused < 1 or not ledger.rows:
        try:
            ledger.raise_if_unusable(1.0)
        except DataError as error:
            raise DataError(f"data.{key}: of its first rows, {error}", code=error.code) from None


def _first_rows(sources: Sources, encoding: str, max_row_mb: float) -> Iterator[RawRow]:
    for place, path in islice(enumerate(sources.files), _FILES):
        entry = sources.entries.get(place)
        one = Sources(files=[path], entries={0: entry} if entry else {}, names=sources.names)
        for row in islice(read_rows(one, encoding, max_row_mb), _ROWS):
            yield replace(row, value=_beginning(row.value))
    if sources.hub:
        yield from islice(read_rows(replace(sources, files=[], entries={}, parts=[]), encoding, max_row_mb), _ROWS)


def _beginning(value: Any) -> Any:
    """A row; of a text file, which is one row of any size, its beginning."""
    if isinstance(value, Mapping) and value.keys() == {"text"}:
        return {"text": str(value["text"])[:_CHARACTERS]}
    return value
