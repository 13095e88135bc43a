"""run.json and its fingerprint as typed records; every field is checked when resume reads them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunesmith.errors import TunesmithError
from tunesmith.files import read_sealed, sealed, write_text_atomic

WITHOUT_IT = (
    "The run cannot be resumed without it. Its checkpoints are model folders (unless they are in shards): tunesmith "
    "train --model CHECKPOINT starts a new run from one."
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def from_json(cls, content: Mapping[str, Any], path: Path) -> Self:
        """The record from parsed JSON.

        Args:
            path: the file that the content was read from, for the error.

        Raises:
            TunesmithError: a field is missing or invalid; the message names it.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            what = f"it has no {field}" if problem["type"] == "missing" else f"{field}: {problem['msg']}"
            raise TunesmithError(f"{path}: is damaged: {what}. {WITHOUT_IT}", code="run-file-damaged") from None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, without fields that are not set."""
        content = self.model_dump(mode="json")
        return {name: value for name, value in content.items() if value is not None}


class Fingerprint(_Record):
    """Data, tokenizer, model, config and versions of a run. Resume refuses changes that would alter training.

    Attributes:
        data: "train" and "eval" -> their files, each with path, size, time and SHA-256; hub data by name.
        template, tokenizer, model: SHA-256 of the template with its variables, of the tokenizer, of the model's config.
        weights: the model's files with size and SHA-256 of their ends, or a hub model's commit.
        config: the run's resolved config.
        threads: number of torch threads; sums are rounded differently with another number.
        processes: how many train together.
        precision: the resolved train.precision.
        has_copies: whether bf16 is had by copies of the weights.
        store: folder of a token store -> file -> SHA-256.
        shares_prefixes: whether shared prefixes are computed once: what data.share_prefix auto decided.
    """

    data: dict[str, list[dict[str, Any]]]
    template: str
    tokenizer: str
    model: str
    weights: dict[str, Any] = Field(default_factory=dict)  # missing in runs of earlier versions
    config: dict[str, Any]
    threads: int
    processes: int = 1
    precision: str | None = None  # missing in runs of earlier versions
    has_copies: bool = False  # missing in runs of earlier versions
    versions: dict[str, str | None]
    store: dict[str, dict[str, str]]
    shares_prefixes: bool = False  # missing in runs of earlier versions


class RunRecord(_Record):
    """Contents of run.json.

    Attributes:
        id: the run's id in trackers.
        date: when the run began.
        cwd: the folder to which names in config.yaml are relative.
        guard: the fingerprint.
        adapter_init: SHA-256 of the initial matrices of a PiSSA or OLoRA adapter.
        finished_at_step: step of the model in the folder.
        extended_from_step: step at which a finished run was extended.
    """

    id: str
    date: datetime.datetime
    cwd: str
    guard: Fingerprint
    adapter_init: dict[str, str] | None = None
    finished_at_step: int | None = None
    extended_from_step: int | None = None

    def write(self, path: Path) -> None:
        write_text_atomic(path, sealed(self.to_json()))

    def updated(self, **fields: Any) -> RunRecord:
        return self.model_copy(update=fields)


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON file written by the run.

    Raises:
        TunesmithError: the file is missing or damaged.
    """
    try:
        return read_sealed(path)
    except OSError as error:
        raise TunesmithError(
            f"{path}: cannot be read: {error.strerror}. {WITHOUT_IT}", code="run-file-unreadable"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = f" (it {error})" if "its own hash" in str(error) else ""
        raise TunesmithError(f"{path}: is damaged{reason}. {WITHOUT_IT}", code="run-file-damaged") from None
