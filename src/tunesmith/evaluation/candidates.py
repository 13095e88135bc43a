"""The models to evaluate, each with the settings that its rows are labelled by, and the rows to score them on."""

from __future__ import annotations

import datetime
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.config.data_keys import DataSection
from tunesmith.config.runfile import explain_problems, read_yaml
from tunesmith.config.schema import ModelSection, RunConfig
from tunesmith.config.section import Section
from tunesmith.data.dataset import DataSources, find_data, refuse_shared_files
from tunesmith.errors import ConfigError, ModelError, TunesmithError, UsageError
from tunesmith.evaluation.settings import EvaluateSettings
from tunesmith.model.source import find_model
from tunesmith.run.given import own_files, own_names
from tunesmith.run.identity import compare_files
from tunesmith.run.records import RunRecord, read_record
from tunesmith.run.resume import absolute_names
from tunesmith.runfolder import RunFolder, latest_stage
from tunesmith.sources.read import Sources, find_sources

_DRAWN_KEYS = ("train", "eval", "eval_split", "limit", "system_prompts", "system_prompt_share", "empty_think_share")
_TEMPLATE_KEYS = ("chat_template", "template_kwargs")
_RESERVED = ("reference",)  # the replies in the data, beside which a judge puts a single model
_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """The run that a model is of.

    Attributes:
        config: with absolute paths.
        record: run.json.
    """

    folder: RunFolder
    config: RunConfig
    record: RunRecord


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        name: in tables and files; different for each.
        path: as given.
        section: how it is opened.
        data: how its rows are labelled; data.train is not used.
        template: data.chat_template for its encoder.
        other_template: the same where the model brings no template of its own.
        date: for templates that print today's date.
        micro_batch_tokens: of its run.
        base: path of the base that is put beside it (--base).
        is_base: whether it is such a base, and was not asked for.
    """

    name: str
    path: str
    section: ModelSection
    data: DataSection
    template: str | None
    date: datetime.datetime
    other_template: str | None = None
    micro_batch_tokens: int | None = None
    run: TrainedRun | None = None
    base: str | None = None
    is_base: bool = False


class _EvaluateTree(Section):
    data: DataSection


def find_run(path: str) -> TrainedRun | None:
    """The run that a model folder is or lies in (RUN, RUN/model, RUN/checkpoints/step-N)."""
    found = Path(path).expanduser()
    try:
        if not found.exists():  # a hub id, also where the working folder is a run
            return None
        found = latest_stage(found.resolve())
        for place in (found, *found.parents[:2]):
            folder = RunFolder(place)
            if folder.config.is_file() and folder.is_run:
                record = RunRecord.from_json(read_record(folder.record), folder.record)
                config = RunConfig.model_validate(read_yaml(folder.config))
                return TrainedRun(folder, own_names(absolute_names(config, record.cwd), folder), record)
    except ValidationError as error:
        raise ConfigError(str(folder.config), explain_problems(error)) from None
    except (OSError, RuntimeError, ValueError):  # no path: a name that find_model explains
        return None
    return None


def find_candidates(settings: EvaluateSettings, now: datetime.datetime) -> list[Candidate]:
    """The models as given; with has_base, each base before the models that it is the base of.

    Raises:
        TunesmithError: a model cannot be evaluated, or a setting of the data is wrong.
    """
    if settings.tokenizer and len(settings.models) > 1:
        raise UsageError("--tokenizer: is for one model; several have each its own.", code="tokenizer-for-several")
    runs = [find_run(path) for path in settings.models]
    rows_of = next((run for run in runs if run is not None), None)
    found: list[Candidate] = []
    for path, run in zip(settings.models, runs, strict=True):
        section = ModelSection(
            path=path,
            tokenizer=settings.tokenizer,
            config=dict(settings.config),
            trust_remote_code=settings.trust_remote_code,
        )
        candidate = _candidate(settings, path, section, run, rows_of, now)
        if any(_is_same(candidate, other) for other in found):
            raise UsageError(f"{path}: is given twice.", code="model-twice")
        if settings.has_base:
            base = _base_of(candidate, settings)
            if not any(_is_same(base, other) for other in found):
                found.append(base)
            candidate = replace(candidate, base=base.path)
        found.append(candidate)
    return _named(found)


def _candidate(
    settings: EvaluateSettings,
    path: str,
    section: ModelSection,
    run: TrainedRun | None,
    rows_of: TrainedRun | None,
    now: datetime.datetime,
) -> Candidate:
    """Args:
    rows_of: the run whose settings say how rows are read, for a model that is not of a run.
    """
    if path.startswith("new:"):
        raise ModelError(
            f"{path}: has random weights. Evaluate a trained model: a run, a model folder or a hub id.",
            code="random-weights",
        )
    find_model(path, section.config)
    tree: dict[str, Any] = {}
    if (trained := run or rows_of) is not None:
        own = trained.config.data.model_dump()
        left_out = (*_DRAWN_KEYS, *(() if run else _TEMPLATE_KEYS))
        tree = {name: value for name, value in own.items() if name not in left_out}
    asked = {name: value for name, value in settings.data.items() if name != "train"}
    kwargs = {**(tree.get("template_kwargs") or {}), **(asked.pop("template_kwargs", None) or {})}
    fields = {**(tree.get("fields") or {}), **(asked.pop("fields", None) or {})}
    tree |= {"train": ["?"], "template_kwargs": kwargs, "fields": fields} | asked
    try:
        data = _EvaluateTree.model_validate({"data": tree}).data
    except ValidationError as error:
        raise ConfigError("the settings of the data", explain_problems(error)) from None
    template = settings.data.get("chat_template")
    if run is not None and template is None and data.chat_template == "none":
        template = "none"  # any other template of a run is saved with its weights
    micro = run.config.train.micro_batch_tokens if run else None
    date = run.record.date if run else now
    return Candidate(path, path, section, data, template, date, None, micro, run)


def _base_of(candidate: Candidate, settings: EvaluateSettings) -> Candidate:
    """The base of a run or an adapter, with the same settings of the data and its own template where it has one."""
    section = find_base(candidate.section, candidate.run)
    section = section.model_copy(update={"trust_remote_code": section.trust_remote_code or settings.trust_remote_code})
    return replace(
        candidate,
        path=section.path,
        section=section,
        other_template=saved_template(candidate.run),
        run=None,
        is_base=True,
    )


def find_base(model: ModelSection, run: TrainedRun | None) -> ModelSection:
    """How the base of a run or an adapter is opened.

    Raises:
        ModelError: it has no base with weights.
    """
    path = model.path
    source = find_model(path, model.config)
    if source.adapter is not None:
        section = ModelSection(path=str(source.file or source.name), revision=source.revision)
    elif run is not None:
        section = run.config.model
    else:
        raise ModelError(
            f"{path}: --base needs a run or an adapter, which name their base; a plain model names none. To compare "
            "two models: tunesmith evaluate BASE MODEL",
            code="no-base",
        )
    if run is not None and section.path == run.config.model.path:
        section = run.config.model
    if section.path.startswith("new:"):
        raise ModelError(
            f"{path}: its base {section.path} had random weights. Leave out --base.", code="random-weights"
        )
    return section.model_copy(update={"add_tokens": []})


def saved_template(run: TrainedRun | None) -> str | None:
    """The template that a run saved with its weights."""
    folders = (run.folder.model, run.folder.adapter) if run else ()
    return next((str(folder / _TEMPLATE_FILE) for folder in folders if (folder / _TEMPLATE_FILE).is_file()), None)


def _is_same(one: Candidate, two: Candidate) -> bool:
    def spell(candidate: Candidate) -> str:
        path = Path(candidate.path).expanduser()
        return str(path.resolve()) if path.exists() else candidate.path

    return spell(one) == spell(two)


def _named(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with short names: the run's or folder's, or "base"."""
    bases = sum(candidate.is_base for candidate in candidates)
    wanted = ["base" if c.is_base and bases == 1 else _short_name(c) for c in candidates]
    counts = Counter([*wanted, *_RESERVED])
    taken, named = set(wanted), []
    for candidate, name in zip(candidates, wanted, strict=True):
        if counts[name] > 1:
            numbered = (f"{name}-{number}" for number in itertools.count(1))
            name = next(one for one in numbered if one not in taken)
            taken.add(name)
        named.append(replace(candidate, name=name))
    return named


def _short_name(candidate: Candidate) -> str:
    path = Path(candidate.path).expanduser()
    if not path.exists():
        return candidate.path.rpartition("/")[2] or candidate.path
    path = path.resolve()
    if candidate.run is not None and path.name in ("model", "adapter"):
        path = path.parent
    if candidate.run is not None and path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}/{path.name}"
    return path.name or "model"


@dataclass(frozen=True, slots=True)
class RowsToScore:
    """Where the rows come from.

    Attributes:
        only: (file, number) of the rows to score; None: all.
        is_held_out: whether they are a run's own held-out rows.
    """

    sources: Sources
    only: frozenset[tuple[str, int]] | None = None
    is_held_out: bool = False


def find_rows(settings: EvaluateSettings, candidates: Sequence[Candidate]) -> RowsToScore:
    """The rows of --data, or those that the first run held out.

    Raises:
        TunesmithError: a name matches nothing, or there are no held-out rows that can be told from the others.
    """
    names = settings.data.get("train")
    if names:
        given = find_sources([names] if isinstance(names, str) else names)
        refuse_shared_files(DataSources(given, Sources()))
        return RowsToScore(given)
    run = next((candidate.run for candidate in candidates if candidate.run is not None), None)
    if run is None:
        raise UsageError(
            "evaluate: no data is given. Give --data D; only a run has rows of its own (those it held out).",
            code="no-data",
        )
    name, data = run.folder.path, run.config.data
    if not data.eval and not data.eval_split:
        raise UsageError(
            f"{name}: held out no rows (it has no data.eval and no data.eval_split). Give --data D.",
            code="no-held-out-rows",
        )
    sources = find_data(data)
    _require_unchanged(run, sources)
    if data.eval:
        return RowsToScore(sources.eval, is_held_out=True)
    return RowsToScore(sources.train, frozenset(_held_out(run, sources.train)), is_held_out=True)


def find_trained_on(candidate: Candidate, wanted: RowsToScore) -> list[str]:
    """Files of the rows to score that the model's own run was trained on, where none of it was held out."""
    run = candidate.run
    if run is None or wanted.is_held_out:
        return []
    trained = {os.path.realpath(entry["path"]) for entry in run.record.guard.data["train"] if "path" in entry}
    return [wanted.sources.name_of(path) for path in wanted.sources.files if os.path.realpath(path) in trained]


def _require_unchanged(run: TrainedRun, sources: DataSources) -> None:
    changes, _ = compare_files(own_files(run.record.guard, run.folder).data, sources)
    if changes:
        raise TunesmithError(
            f"{run.folder.path}: {changes[0].removeprefix('data: ')}, so its held-out rows can no longer be told from "
            "those it was trained on. Restore the file, or give --data D.",
            code="held-out-rows-changed",
        )


def _held_out(run: TrainedRun, sources: Sources) -> Iterator[tuple[str, int]]:
    """Rows that data.eval_split held out, from the run's ledger, under the names that the files have now.

    Raises:
        UsageError: pieces of rows were held out.
    """
    ledger: Mapping[str, Any] = read_record(run.folder.ledger)
    now = {os.path.realpath(path): sources.name_of(path) for path in sources.files}
    names = {}
    for file in ledger["train"]["files"]:
        path = Path(run.record.cwd, file)
        own = run.folder.rows / path.name
        names[file] = now.get(os.path.realpath(own if path.parent.name == own.parent.name else path), file)
    held_out = [where.rpartition(":") for where in ledger["held_out"]]
    for file, _, number in held_out:
        if int(number) in ledger["train"]["files"][file]["split"]:
            raise UsageError(
                f"{run.folder.path}: held out pieces of {file}:{number}, not whole rows. Give --data D.",
                code="no-held-out-rows",
            )
        yield names[file], int(number)
