"""Rows given in Python: written to RUN/rows, and from there on data like any other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from tunesmith.config.schema import RunConfig
from tunesmith.data.dataset import DataSources
from tunesmith.run.session import Session
from tunesmith.runfolder import RunFolder
from tunesmith.sources.memory import sources_of, write_rows

Rows = Mapping[str, Iterable[Any]]  # "train" or "eval" -> rows
_ARGUMENTS = {"train": "data", "eval": "eval_data"}


def name_rows(config: RunConfig, folder: RunFolder, rows: Rows) -> RunConfig:
    """The config with the files that the rows will be in, so that resume finds them."""
    names = {part: [str(folder.rows / f"{part}.jsonl")] for part in rows}
    return config.model_copy(update={"data": config.data.model_copy(update=names)})


def keep_rows(session: Session, rows: Rows, staging: RunFolder) -> Session:
    """Write the rows into the folder that becomes RUN; they are named after the place that they will have there.

    Raises:
        DataError: there are no rows, or one has a value that JSON does not have.
    """
    assert session.sources is not None
    sources = {"train": session.sources.train, "eval": session.sources.eval}
    staging.rows.mkdir()
    for part, given in rows.items():
        file = staging.rows / f"{part}.jsonl"
        write_rows(_ARGUMENTS[part], given, file)
        sources[part] = sources_of(file, str(session.folder.rows / file.name))
    return replace(session, sources=DataSources(**sources))
