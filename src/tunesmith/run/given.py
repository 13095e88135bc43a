"""Rows given in Python: written to RUN/rows, then treated as any other data file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.config.schema import RunConfig
from tunesmith.config.sources import path_of, with_path
from tunesmith.data.dataset import DataSources
from tunesmith.errors import DataError
from tunesmith.run.records import Fingerprint
from tunesmith.run.session import Session
from tunesmith.runfolder import RunFolder
from tunesmith.sources.memory import sources_of, write_rows
from tunesmith.sources.names import name_nth

Rows = Mapping[str, Iterable[Any]]  # "train" or "eval" -> rows
_ARGUMENTS = {"train": "data", "eval": "eval_data"}


def name_rows(config: RunConfig, folder: RunFolder, rows: Rows) -> RunConfig:
    """The config with the names of the files that the rows will be written to, so that resume finds them."""
    names = {part: [str(folder.rows / f"{part}.jsonl")] for part in rows}
    return config.model_copy(update={"data": config.data.model_copy(update=names)})


def keep_rows(session: Session, rows: Rows, staging: RunFolder) -> Session:
    """Write the rows into the staging folder; they are named after their final location.

    Raises:
        DataError: there are no rows, or a row has a value that JSON cannot represent.
    """
    assert session.sources is not None
    sources = {"train": session.sources.train, "eval": session.sources.eval}
    staging.rows.mkdir()
    for part, given in rows.items():
        file = staging.rows / f"{part}.jsonl"
        limit = session.config.data.limit if part == "train" else None
        given = islice(given, limit) if limit and isinstance(given, Iterator) else given
        write_rows(_ARGUMENTS[part], given, file)
        sources[part] = sources_of(file, str(session.folder.rows / file.name))
    return replace(session, sources=DataSources(**sources))


@contextmanager
def named_as_given(folder: RunFolder, rows: Rows) -> Iterator[None]:
    """Name rows in errors as the caller has them, data[16]: the folder with their file is gone afterwards.

    Raises:
        DataError: as in the block.
    """
    try:
        yield
    except DataError as error:
        text = str(error)
        for part in rows:
            text = _rename(text, str(folder.rows / f"{part}.jsonl"), _ARGUMENTS[part])
        raise DataError(text, code=error.code) from None


def _rename(text: str, path: str, name: str) -> str:
    """PATH:17 becomes data[16], and PATH alone data."""

    def name_found(found: re.Match[str]) -> str:
        return name_nth(name, int(found[1]))

    return re.sub(rf"{re.escape(path)}:(\d+)", name_found, text).replace(path, name)


def own_names(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The config of a run that may have been moved: files of rows given in Python are looked up in its own folder."""
    names: dict[str, Any] = {
        part: [with_path(item, _own(path_of(item), folder)) for item in getattr(config.data, part) or []] or None
        for part in _ARGUMENTS
    }
    return config.model_copy(update={"data": config.data.model_copy(update=names)})


def own_files(fingerprint: Fingerprint, folder: RunFolder) -> Fingerprint:
    """The same for the files in the fingerprint."""
    data = {
        part: [entry | {"path": _own(entry["path"], folder)} if "path" in entry else entry for entry in entries]
        for part, entries in fingerprint.data.items()
    }
    return fingerprint.model_copy(update={"data": data})


def _own(name: str, folder: RunFolder) -> str:
    own = folder.rows / Path(name).name
    return str(own) if Path(name).parent.name == own.parent.name and own.is_file() else name
