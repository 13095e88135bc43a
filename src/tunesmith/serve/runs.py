"""What the page shows of a run: its verdict, its curves as they grow, and the rows that it was trained on.

Everything comes from the folder of the run; the data files that it was made of are not opened.
"""

from __future__ import annotations

import datetime
import itertools
import math
import os
import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.config.schema import ModelSection, RunConfig
from tunesmith.data.labels import Sample
from tunesmith.data.store import TokenStore, has_store, index_files, open_store
from tunesmith.display import visible
from tunesmith.encode.encoder import Encoder
from tunesmith.model.tokenizer import build_encoder, load_encoder, load_tokenizer
from tunesmith.reading import open_file
from tunesmith.report.page import list_facts, list_files, list_problems
from tunesmith.report.records import RunRecords, find_run, parse_record, read_run
from tunesmith.report.replies import kept_replies
from tunesmith.report.verdict import judge
from tunesmith.report.write import describe_outcome, is_of_last_step
from tunesmith.runfolder import RunFolder, latest_stage
from tunesmith.serve.turns import Opening, learn_openings, split_turns
from tunesmith.sources.names import name_row
from tunesmith.use.labels import shorten_names
from tunesmith.use.preview import iterate_runs
from tunesmith.use.turns import Turn

PAGE_ROWS = 10
_PART_BYTES = 1 << 20
_MARK_BYTES = 256
_LIVE_S = 300.0  # since something was logged
_SHOWN_TOKENS = 3000  # of a sample
_SERIES = (
    "step", "loss", "eval_loss", "lr", "grad_norm", "tokens_per_s", "eval_perplexity", "eval_token_accuracy",
    "router_loss",
)  # fmt: skip


def find_runs(paths: Iterable[str]) -> list[ServedRun]:
    """The runs among models and adapters as they were given: a RUN, or the model, adapter or checkpoint of one."""
    folders: dict[Path, None] = {}
    for path in paths:
        place = latest_stage(Path(path).expanduser().resolve())
        near = (RunFolder(folder) for folder in (place, *place.parents[:2]))
        run = next((one for one in near if one.is_run and one.ledger.is_file()), None)
        if run is not None:
            folders[run.path] = None
    return _name_runs(folders)


def open_runs(paths: Iterable[str]) -> list[ServedRun]:
    """The runs in these folders.

    Raises:
        TunesmithError: one is no run.
    """
    return _name_runs(dict.fromkeys(find_run(Path(path)).path.resolve() for path in paths))


def _name_runs(folders: Iterable[Path]) -> list[ServedRun]:
    """The runs, each with the name of its folder, or with a number behind it where another has the same."""
    names: list[str] = []
    for folder in (folders := list(folders)):
        counted = (f"{folder.name}-{number}" for number in itertools.count(2))
        names.append(next(name for name in itertools.chain([folder.name], counted) if name not in names))
    return [ServedRun(name, RunFolder(folder)) for name, folder in zip(names, folders, strict=True)]


class ServedRun:
    """A run that the page shows. Its methods may be called from several threads.

    Args:
        name: on the page, instead of its path.
    """

    def __init__(self, name: str, folder: RunFolder) -> None:
        self.name = name
        self.folder = folder
        self._lock = threading.Lock()
        self._about: tuple[object, dict[str, Any]] | None = None
        self._data: tuple[object, _Data] | None = None

    def about(self) -> dict[str, Any]:
        """Outcome, verdict, facts and numbers of rows.

        Raises:
            TunesmithError: a file of the run is damaged.
        """
        folder = self.folder
        with self._lock:
            now = _stamp(folder.config, folder.metrics, folder.ledger, folder.record, folder.replies)
            if self._about is None or self._about[0] != now:
                self._about = now, _describe(read_run(folder.path))
            about = self._about[1]
        return {**about, "is_live": not about["is_finished"] and _age_s(folder.metrics) < _LIVE_S}

    def metrics(self, offset: int, mark: str) -> dict[str, Any]:
        """The records logged since a part that was read before.

        Args:
            offset, mark: as that part gave them; 0 and "" for the first.

        Returns:
            `is_new`: the file is another by now (a resumed run repeats steps), so that earlier records do not count.
        """
        try:
            file = open_file(self.folder.metrics)
        except OSError:  # no step was logged yet
            return {"records": [], "offset": 0, "mark": "", "is_new": offset > 0, "has_more": False}
        with file:
            size = os.fstat(file.fileno()).st_size
            is_new = offset > 0 and (offset > size or _mark(file, offset) != mark)
            start = 0 if is_new else offset
            file.seek(start)
            read = file.read(_PART_BYTES)
            part = read[: read.rfind(b"\n") + 1]  # a line may be half written
            records = [parse_record(line) for line in part.decode("utf-8", "replace").split("\n")]
            return {
                "records": [{name: record[name] for name in _SERIES if name in record} for record in records if record],
                "offset": start + len(part),
                "mark": _mark(file, start + len(part)),
                "is_new": is_new,
                "has_more": bool(part) and len(read) == _PART_BYTES,
            }

    def rows(self, part: str, kind: str, start: int) -> dict[str, Any]:
        """A page of samples of the token store, or of refused rows.

        Args:
            part: train or eval.
            kind: used or refused.
            start: index of the first.

        Raises:
            TunesmithError, OSError: a file of the run is missing or damaged.
        """
        data = self._open_data()
        samples, refused = data.samples(part), data.refused(part)
        if kind == "refused":
            rows = [data.show_refused(one) for one in refused[start : start + PAGE_ROWS]]
        else:
            rows = [data.show_sample(part, int(index)) for index in samples[start : start + PAGE_ROWS]]
        return {
            "rows": rows,
            "total": len(refused if kind == "refused" else samples),
            "counts": {"used": len(samples), "refused": len(refused)},
            "size": PAGE_ROWS,
            "stop": visible(data.encoder.stop.text),
        }

    @property
    def parts(self) -> list[str]:
        """train, and eval where rows were held out."""
        has_eval = has_store(self.folder.eval_tokens)
        try:
            return ["train", "eval"] if has_eval or self._open_data().held_out.any() else ["train"]
        except Exception:  # the data itself is asked for later, and then says what is wrong
            return ["train"]

    def _open_data(self) -> _Data:
        folder = self.folder
        with self._lock:
            stores = [*index_files(folder.tokens), *index_files(folder.eval_tokens)]
            now = _stamp(folder.ledger, folder.config, *stores)
            if self._data is None or self._data[0] != now:
                self._data = now, _Data(read_run(folder.path))
            return self._data[1]


@dataclass(frozen=True, slots=True)
class _Refused:
    file: str
    number: int
    reason: str


class _Data:
    """The stored samples of a run with what its ledger says about their rows."""

    def __init__(self, run: RunRecords) -> None:
        folder, ledger = run.folder, run.ledger
        self.config, self._folder = run.config, folder
        self._ledgers: dict[str, Mapping[str, Any]] = {
            "train": ledger["train"],
            "eval": ledger.get("eval") or {"files": {}},
        }
        self._stores = {"train": open_store(folder.tokens)}
        if has_store(folder.eval_tokens):
            self._stores["eval"] = open_store(folder.eval_tokens)
        self.held_out = _among(self._stores["train"], ledger.get("held_out") or ())
        self._names = shorten_names(name for store in self._ledgers.values() for name in store["files"])
        self._refused = {part: list(_list_refused(self._ledgers[part])) for part in ("train", "eval")}

    @cached_property
    def encoder(self) -> Encoder:
        return _load_encoder(self.config, self._folder)

    @cached_property
    def openings(self) -> dict[Opening, str]:
        return learn_openings(self.encoder, self.config.data)

    @cached_property
    def remarks(self) -> dict[tuple[str, int], tuple[int, list[str]]]:
        """(file, row) -> tokens lost and notes, for rows that have any."""
        found: dict[tuple[str, int], tuple[int, list[str]]] = {}
        for ledger in self._ledgers.values():
            for file, entry in ledger["files"].items():
                for cut in entry["truncated"]:
                    found[file, cut["row"]] = cut["tokens_lost"], []
                for note, numbers in entry["notes"].items():
                    for number in numbers:
                        found.setdefault((file, number), (0, []))[1].append(note)
        return found

    def samples(self, part: str) -> npt.NDArray[np.int64]:
        """Numbers of the samples of a part, in its store."""
        if part == "eval":
            own = self._stores.get("eval")
            return np.flatnonzero(self.held_out) if own is None else np.arange(len(own))
        return np.flatnonzero(~self.held_out)

    def refused(self, part: str) -> Sequence[_Refused]:
        return self._refused[part]

    def show_refused(self, row: _Refused) -> dict[str, Any]:
        return {"name": self._name(row.file, row.number), "reason": visible(row.reason)}

    def show_sample(self, part: str, index: int) -> dict[str, Any]:
        store = self._stores.get(part) or self._stores["train"]
        sample = store[index]
        shown = Sample(sample.input_ids[:_SHOWN_TOKENS], sample.loss_mask[:_SHOWN_TOKENS])
        file, number = store.files[store.file_numbers[index]], int(store.row_numbers[index])
        lost, notes = self.remarks.get((file, number), (0, []))
        return {
            "name": self._name(file, number),
            "tokens": len(sample.input_ids),
            "trained": int(sample.loss_mask.sum()),
            "not_shown": len(sample.input_ids) - len(shown.input_ids),
            "tokens_lost": lost,
            "notes": [visible(note) for note in notes],
            "turns": [self._show_turn(shown, turn) for turn in split_turns(shown, self.openings)],
        }

    def _show_turn(self, sample: Sample, turn: Turn) -> dict[str, Any]:
        runs = [[visible(text), is_trained] for text, is_trained in iterate_runs(sample, self.encoder, turn)]
        return {"role": turn.role, "runs": runs}

    def _name(self, file: str, number: int) -> str:
        return visible(name_row(self._names.get(file, Path(file).name), number))


def _list_refused(ledger: Mapping[str, Any]) -> Iterable[_Refused]:
    for file, entry in ledger["files"].items():
        found = [(number, reason) for reason, numbers in entry["refused"].items() for number in numbers]
        yield from (_Refused(file, number, reason) for number, reason in sorted(found))


def _among(store: TokenStore, names: Iterable[str]) -> npt.NDArray[np.bool_]:
    """Which samples of a store come from rows of these names."""
    wanted = set(names)
    if not wanted:
        return np.zeros(len(store), dtype=bool)
    return np.array([store.where(index) in wanted for index in range(len(store))], dtype=bool)


def _load_encoder(config: RunConfig, folder: RunFolder) -> Encoder:
    """The encoder of a run, from the tokenizer beside its weights if there is one."""
    checkpoints = sorted(folder.checkpoints.glob("step-*"), reverse=True)
    for place in (folder.model, folder.adapter, *checkpoints):
        if (place / "tokenizer_config.json").is_file():
            template = "none" if config.data.chat_template == "none" else None  # any other is saved with the weights
            tokenizer = load_tokenizer(ModelSection(path=str(place), tokenizer=str(place)))
            return build_encoder(tokenizer, template, config.data.template_kwargs, datetime.datetime.now())
    return load_encoder(config.model, config.data, datetime.datetime.now())


def _describe(run: RunRecords) -> dict[str, Any]:
    is_finished = is_of_last_step(run)
    verdict = judge(run, kept_replies(run.folder, run.last_step))
    names = shorten_names(entry["file"] for entry in list_files(run.ledger))
    files = []
    for entry in list_files(run.ledger):
        numbers = dict(entry["numbers"])
        counts = {name: numbers[name] for name in ("rows", "used", "refused", "truncated")}
        files.append({"part": entry["part"], "name": visible(names[entry["file"]]), **counts})
    problems = [
        {
            "part": problem["part"], "level": problem["level"], "what": visible(problem["what"]),
            "count": problem["count"], "rows": [visible(name) for _, name in problem["places"]],
        }
        for problem in list_problems(run.ledger, run.config.data)
    ]  # fmt: skip
    return {
        "outcome": describe_outcome(run),
        "is_finished": is_finished,
        "summary": visible(verdict.summary),
        "findings": [{"what": visible(one.what), "advice": visible(one.advice)} for one in verdict.findings],
        "facts": [[name, visible(value)] for name, value in list_facts(run)],
        "files": files,
        "problems": problems,
    }


def _stamp(*paths: Path) -> tuple[object, ...]:
    """Differs once one of the files has been written."""
    found: list[object] = []
    for path in paths:
        try:
            state = path.stat()
            found.append((state.st_mtime_ns, state.st_size, state.st_ino))
        except OSError:
            found.append(None)
    return tuple(found)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return math.inf


def _mark(file: Any, end: int) -> str:
    """Tells whether a file still has the same bytes before `end`."""
    start = max(0, end - _MARK_BYTES)
    file.seek(start)
    return f"{zlib.crc32(file.read(end - start)):08x}"
