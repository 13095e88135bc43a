"""The samples as the model writes them, kept on disk as soon as they end, so that a killed process loses none."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.files import read_sealed, sealed, sync_path, write_text_atomic
from tunesmith.sources.folders import LEDGER_SUFFIX
from tunesmith.staging import locked

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """A reply as generated.

    Attributes:
        question: its number.
        sample: which of the question's samples it is.
        text: without stop token and stop string; "" where there is an error.
        finish_reason: "stop", "length" or "error".
        error: code of the error because of which there is no reply.
        tokens: its length, without the stop token.
        logprob: mean log-probability of its tokens, the stop token included.
        controls: spellings of control tokens that it holds as tokens.
    """

    question: int
    sample: int
    text: str
    finish_reason: str
    error: str
    tokens: int
    logprob: float | None
    controls: Sequence[str] = ()

    def to_line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_line(cls, line: bytes) -> Sample:
        """Raises:
        ValueError, TypeError: the line is not such a sample.
        """
        content = json.loads(line)
        if not isinstance(content, dict) or set(content) != {one.name for one in fields(cls)}:
            raise ValueError("is not a sample of this version")
        sample = cls(**content)
        if type(sample.question) is not int or type(sample.sample) is not int or not isinstance(sample.text, str):
            raise ValueError("has a value of another type")
        return sample


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Where the samples of an output are kept: a hidden folder beside it, which readers of data pass over."""

    output: Path

    @property
    def path(self) -> Path:
        return self.output.with_name(f".{self.output.stem}.samples")

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def ledger(self) -> Path:
        return self.output.with_name(f"{self.output.stem}{LEDGER_SUFFIX}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and let no other process write to it.

        Raises:
            TunesmithError: another process generates into it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.path):
                yield
        except TunesmithError as error:
            if error.code != "run-in-use":
                raise
            raise TunesmithError(
                f"{self.output}: another process generates it. Wait for it, or give --output another name.",
                code="generation-in-use",
            ) from None

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what is only needed now; what a killed process left of it is removed."""
        folder = self.path / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        for path in (self.state, self.samples):
            path.unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """After an error before anything was generated, leave nothing behind."""
        with suppress(OSError):
            self.path.rmdir()


class SampleLog:
    """samples.jsonl: whole lines, in the order in which the samples ended.

    Args:
        num_questions, num_samples: questions, and samples of each.
    """

    def __init__(self, path: Path, num_questions: int, num_samples: int) -> None:
        self._path, self._each = path, num_samples
        self._offsets = array("q", [-1]) * (num_questions * num_samples)
        self.num_done = 0
        self._end = self._recover()
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(self._end)
        self._file.seek(self._end)
        self._reader = path.open("rb")

    def _recover(self) -> int:
        """Find the whole lines; returns where the last one ends. A kill or a full disk cuts the last line."""
        self._path.touch()
        end = 0
        with self._path.open("rb") as file:
            for line in file:
                try:
                    sample = Sample.from_line(line)
                    self._note(sample, end)
                except (ValueError, TypeError, IndexError, RecursionError):
                    break
                if not line.endswith(b"\n"):
                    self._offsets[sample.question * self._each + sample.sample] = -1
                    self.num_done -= 1
                    break
                end += len(line)
        return end

    def _note(self, sample: Sample, offset: int) -> None:
        if not 0 <= sample.sample < self._each or sample.question < 0:
            raise IndexError(sample.sample)
        place = sample.question * self._each + sample.sample
        self.num_done += self._offsets[place] < 0
        self._offsets[place] = offset

    def has(self, question: int, sample: int) -> bool:
        return self._offsets[question * self._each + sample] >= 0

    def add(self, samples: Sequence[Sample]) -> None:
        """Append lines, which are on the disk when this returns.

        Raises:
            OSError: the disk is full; the lines before are whole.
        """
        if not samples:
            return
        lines = [f"{sample.to_line()}\n".encode() for sample in samples]
        try:
            left = memoryview(b"".join(lines))
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            error.filename = error.filename or str(self._path)
            raise
        for sample, line in zip(samples, lines, strict=True):
            self._note(sample, self._end)
            self._end += len(line)

    def read(self, question: int, samples: int) -> list[Sample]:
        """The samples of a question, in order."""
        found = []
        for sample in range(samples):
            self._reader.seek(self._offsets[question * self._each + sample])
            found.append(Sample.from_line(self._reader.readline()))
        return found

    def __enter__(self) -> SampleLog:
        sync_path(self._path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._reader.close()


def read_state(folder: WorkFolder) -> dict[str, Any]:
    """The state of an earlier process; empty where there is none.

    Returns:
        {"fingerprint", "date" of the first start, "output": hash of the output that was written last, or None}

    Raises:
        TunesmithError: it is damaged.
    """
    try:
        saved = read_sealed(folder.state)
        return {"fingerprint": dict(saved["fingerprint"]), "date": str(saved["date"]), "output": saved["output"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise TunesmithError(
            f"{folder.state}: is damaged, so that nobody knows what the samples beside it answer. Give --overwrite to "
            "start again, or another --output.",
            code="generation-damaged",
        ) from None


def write_state(folder: WorkFolder, fingerprint: Mapping[str, Any], date: str, output: str | None) -> None:
    write_text_atomic(folder.state, sealed({"fingerprint": fingerprint, "date": date, "output": output}))


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two fingerprints, in words."""
    if before.get("format") != now["format"]:
        yield "it was made by another version"
        return
    old, new = before["settings"], now["settings"]
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield f"{name.replace('_', '-')}: {old.get(name)} -> {new.get(name)}"
    old, new = before["rows"], now["rows"]
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            yield f"data: {name} is not read now"
        elif name not in old:
            yield f"data: {name} is new"
        elif old[name] != new[name]:
            yield f"data: the rows of {name} have changed"
    if list(old) != list(new) and set(old) == set(new):
        yield "data: the files come in another order"
    for name, about in (
        ("weights", "its weights have changed"),
        ("config", "its config, generation_config or adapter_config has changed"),
        ("tokenizer", "its tokenizer has changed"),
        ("template", "its chat template or its variables have changed"),
    ):
        if before["model"].get(name) != now["model"][name]:
            yield f"model: {about}"
    if before["prompts"] != now["prompts"] and before["model"] == now["model"] and old == new:
        yield "the prompts have other tokens (data.control_text, or another version of a library)"
