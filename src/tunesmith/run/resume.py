"""`tunesmith resume RUN`: continue from the newest checkpoint that verifies, as the same run."""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.config.choices import FIXED_KEYS
from tunesmith.config.plainyaml import show
from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.config.sources import Source, SourceSection, with_path
from tunesmith.data.dataset import DataSources, find_data
from tunesmith.data.feed import Place
from tunesmith.distributed.processes import joined_world
from tunesmith.distributed.world import World
from tunesmith.errors import ConfigError, ModelError, TunesmithError
from tunesmith.model.source import ModelSource, find_model
from tunesmith.preparation.replace import finish_replacing
from tunesmith.run.assemble import AnyDataset, assemble, follow_data
from tunesmith.run.console import ConsoleReporter, Reporter, Silent
from tunesmith.run.failures import explained_failures, require_memory
from tunesmith.run.finish import finish_run, raise_late_stop
from tunesmith.run.given import own_files, own_names
from tunesmith.run.identity import flatten
from tunesmith.run.position import check_steps, choose_checkpoint, describe_position, find_position, keep_threads
from tunesmith.run.records import Fingerprint, RunRecord, read_record
from tunesmith.run.reopen import Allowed, reopen_adapter, reopen_data
from tunesmith.run.session import Session, open_session, require_packages, require_same_start
from tunesmith.run.summary import plan_memory, summary_lines
from tunesmith.run.training import build_trainer, train_to_end, write_run_files
from tunesmith.runfolder import RUN_FILE, RunFolder
from tunesmith.staging import locked
from tunesmith.training.checkpoint import leftovers
from tunesmith.training.interrupt import StopRequest
from tunesmith.training.randomness import unchanged_process
from tunesmith.training.sharded import verify_together


@unchanged_process()
def run_resume(
    name: str,
    flags: Mapping[str, Any],
    allowed: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Path:
    """Continue a run, or extend a finished one; returns the folder of the finished model.

    Args:
        flags: dotted key -> value as typed; they override RUN/config.yaml.
        allowed: parts of the fingerprint that may change.
        reporter: shows the run; the console by default.
    """
    folder, reporter = find_run(name), reporter or ConsoleReporter()
    record = RunRecord.from_json(read_record(folder.record), folder.record)
    config = own_names(absolute_names(read_config(name, folder, flags), record.cwd), folder)
    require_packages(config)
    with joined_world(config.train, reporter.owns_process) as world:
        reporter = reporter if world.is_main else Silent(reporter.owns_process)
        with locked(folder.path) if world.is_main else contextlib.nullcontext():
            return _resume(name, flags, allowed, reporter, world, record, config)


def _resume(
    name: str,
    flags: Mapping[str, Any],
    allowed: Sequence[str],
    reporter: Reporter,
    world: World,
    record: RunRecord,
    config: RunConfig,
) -> Path:
    folder, allow = RunFolder(find_run(name).path), Allowed(as_typed(name, flags), allowed)
    with StopRequest() as stop, world.explained():
        verified = verify_together(folder, world) if world.size > 1 else ""
        chosen = world.share(lambda: _choose_checkpoint(folder, name, reporter, verified))
        position = find_position(folder, name, record, chosen)
        position = replace(position, fingerprint=own_files(position.fingerprint, folder))
        if position.is_finished and "train.max_steps" not in flags and "train.epochs" not in flags:
            reporter.note(
                f"{name} is finished ({position.progress.step:,} steps); nothing to do. To train it longer: tunesmith "
                f"resume {name} --train.max_steps N"
            )
            return folder.path
        keep_threads(position.fingerprint.threads, reporter)
        model = require_model(name, config)
        sources = find_data_or_none(config) if world.is_main else None
        session = open_session(config, folder, reporter, record.date, sources, model, world, begun=position.fingerprint)
        require_same_start(session)
        with explained_failures(folder, config, session.lengths.capacity, position.progress), world.explained():
            dataset, guard = _open_data(session, position.fingerprint, allow, position.progress.place)
            reporter.stage("loading the model")
            weights = None if session.is_adapter else position.weights
            ready = assemble(session, dataset, weights, keeps_sharing(config, position.fingerprint))
            guard = guard.model_copy(update={"shares_prefixes": ready.sharing.is_on})
            if session.is_adapter:
                reopen_adapter(ready, position.checkpoint, record, allow)
            check_steps(name, ready, position, allow)
            memory = plan_memory(ready) if world.is_main else ""
            lines = summary_lines(ready, memory) if world.is_main else []
            tight = require_memory(ready, memory, is_strict=False)
            reporter.summary([("resume", describe_position(name, position, ready)), *lines, *tight])
            record = position.update(record).updated(guard=guard)
            if world.is_main:
                write_run_files(folder, ready, record)
            trainer = build_trainer(ready, record, stop, position.progress, position.checkpoint, position.state)
            train_to_end(ready, trainer)
            saved = finish_run(ready, trainer, record, lines)
        is_late = world.agree(stop.is_made)
    if is_late:
        raise_late_stop(ready, saved)
    return saved


def keeps_sharing(config: RunConfig, before: Fingerprint) -> bool | None:
    """Whether the run computes shared prefixes once, as it began; None where data.share_prefix asks for another way."""
    was, now = before.config.get("data", {}).get("share_prefix", "auto"), config.data.share_prefix
    return before.shares_prefixes if now in (was, before.shares_prefixes) else None


def _choose_checkpoint(folder: RunFolder, name: str, reporter: Reporter, verified: str) -> str:
    """Name of the newest valid checkpoint, which may be known already; "" if there is none yet."""
    remove_leftovers(folder)
    reporter.stage("verifying the newest checkpoint")
    checkpoint = choose_checkpoint(folder, name, reporter, verified)
    return checkpoint.folder.name if checkpoint else ""


def _open_data(session: Session, before: Fingerprint, allow: Allowed, place: Place) -> tuple[AnyDataset, Fingerprint]:
    """The run's data; the first process compares them with the start of the run, and labels them again if need be."""
    world = session.world
    found: list[tuple[AnyDataset, Fingerprint]] = []

    def reopen() -> dict[str, Any]:
        found.append(reopen_data(session, before, allow, place))
        dataset, guard = found[0]
        return {"guard": guard.to_json(), "sources": dataset.ledger.sources}

    shared = world.share(reopen)
    if found:
        return found[0]
    guard = Fingerprint.from_json(shared["guard"], session.folder.record)
    return follow_data(session, session.folder, guard.store, shared["sources"]), guard


_NAMES = ("data.train", "data.eval", "data.chat_template", "model.path", "model.tokenizer", "train.deepspeed")


def find_run(name: str) -> RunFolder:
    """The run in a folder.

    Raises:
        TunesmithError: the folder does not exist or has no run.
    """
    run = RunFolder(Path(name).expanduser())
    if not run.path.is_dir():
        raise TunesmithError(
            f"{name}: no such folder. Give the folder that was passed to tunesmith train as --output.",
            code="run-not-found",
        )
    if not run.is_run:
        raise TunesmithError(
            f"{name}: is not a run (it has no {RUN_FILE}), so it cannot be resumed. Give the folder that was passed "
            "to tunesmith train as --output.",
            code="not-a-run",
        )
    return RunFolder(run.path.resolve())


def read_config(name: str, folder: RunFolder, flags: Mapping[str, Any]) -> RunConfig:
    """RUN/config.yaml overridden by the flags."""
    if "train.output_dir" in flags:
        raise TunesmithError(
            f"--output: a run is resumed in its own folder, {name}. Remove the flag.", code="output-on-resume"
        )
    flags = {key: absolute(value) if key in _NAMES else value for key, value in flags.items()}
    before = resolve_config(RunConfig, folder.config, {})
    if "data.train" in flags:
        flags["data.train"] = move_sources(before.data.train, flags["data.train"])
    try:
        config = resolve_config(RunConfig, folder.config, flags)
    except ConfigError as error:  # the file alone was right
        raise ConfigError(f"resume {name}", error.problems, error.exit_code, code=error.code) from None
    refuse_fixed(name, flags, flatten(before.model_dump()), config)
    return config.model_copy(update={"train": config.train.model_copy(update={"output_dir": name})})


def move_sources(before: Sequence[Source], names: Any) -> Any:
    """Names typed for the sources of a mix are their new paths; their weights, epochs and limits stay."""
    if len(names) != len(before) or not all(isinstance(name, str) for name in names):
        return names
    return [with_path(source, name) for source, name in zip(before, names, strict=True)]


def refuse_fixed(name: str, flags: Mapping[str, Any], before: Mapping[str, Any], config: RunConfig) -> None:
    """Raises:
    ConfigError: a flag changes a key that a run keeps to its end.
    """
    now = flatten(config.model_dump())
    problems = [
        f"{key}: is fixed when a run begins ({show(before.get(key))}); to change it, train a new run"
        for key in flags
        if key.startswith(FIXED_KEYS) and now.get(key) != before.get(key)
    ]
    if problems:
        raise ConfigError(f"resume {name}", problems, code="fixed-on-resume")


def absolute(value: Any) -> Any:
    """Make a path absolute: names typed now are relative to the working directory, not to where the run began."""
    if isinstance(value, list):
        return [absolute(item) for item in value]
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value


def as_typed(name: str, flags: Mapping[str, Any]) -> str:
    """The command with the user's flags, for advice that adds one more."""
    words = ["tunesmith", "resume", name]
    for key, value in flags.items():
        words += [f"--{key}", *([str(item) for item in value] if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def absolute_names(config: RunConfig, folder: str) -> RunConfig:
    """The config with absolute paths; names in config.yaml are relative to where the run began."""
    sections: dict[str, dict[str, Any]] = {}
    for key in _NAMES:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        sections.setdefault(section, {})[name] = _from(folder, value)
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=names) for section, names in sections.items()}
    )


def _from(folder: str, value: Any) -> Any:
    """Make a name absolute if it exists in the folder: a file, a folder, FOLDER:SPLIT, or a glob pattern."""
    if isinstance(value, list):
        return [_from(folder, item) for item in value]
    if isinstance(value, SourceSection):
        return with_path(value, _from(folder, value.path))
    if not isinstance(value, str) or os.path.isabs(value) or value.startswith("~"):
        return value
    path = os.path.join(folder, value)
    head = path.split(":")[0]
    return path if os.path.lexists(path) or os.path.isdir(head) or glob.glob(path, recursive=True) else value


def remove_leftovers(folder: RunFolder) -> None:
    """Complete a committed data set replacement, and delete everything else that a killed process left."""
    finish_replacing(folder)
    for path in leftovers(folder):
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def require_model(name: str, config: RunConfig) -> ModelSource:
    """The base model of the run.

    Raises:
        ModelError: it is no longer where it was.
    """
    try:
        return find_model(config.model.path, config.model.config)
    except ModelError as error:
        raise ModelError(f"{error} If it has moved: tunesmith resume {name} --model FOLDER", code=error.code) from None


def find_data_or_none(config: RunConfig) -> DataSources | None:
    """The data files; None if one is missing, since a run with its own tokens does not need them."""
    try:
        return find_data(config.data)
    except TunesmithError:
        return None
