"""One run, from a config to RUN/model: prepare the data, load the model, check both, train, save."""

from __future__ import annotations

import contextlib
import datetime
import os
from pathlib import Path
from typing import NoReturn

from tunesmith.adapters.adapter import changes_base
from tunesmith.adapters.initial import keep_initial
from tunesmith.config.schema import RunConfig
from tunesmith.data.dataset import DataSources, find_data, refuse_shared_files
from tunesmith.distributed.launch import find_launch
from tunesmith.distributed.processes import joined_world
from tunesmith.distributed.world import World
from tunesmith.model.reopen import require_one_reading
from tunesmith.model.source import find_model
from tunesmith.run.assemble import ReadyRun, assemble, follow_data, write_data
from tunesmith.run.console import ConsoleReporter, Reporter, Silent
from tunesmith.run.failures import explained_failures, require_memory, require_weights_memory
from tunesmith.run.finish import finish_run, raise_late_stop
from tunesmith.run.folder import require_room, resolve_output
from tunesmith.run.given import Rows, keep_rows, name_rows, named_as_given
from tunesmith.run.identity import describe_files, find_changes, run_id, take_fingerprint
from tunesmith.run.records import RunRecord
from tunesmith.run.resume import run_resume
from tunesmith.run.session import Session, open_session, require_packages, require_same_start
from tunesmith.run.summary import cpu_lines, plan_memory, summary_lines
from tunesmith.run.training import build_trainer, train_to_end, write_run_files
from tunesmith.runfolder import RunFolder
from tunesmith.staging import locked, staged_folder
from tunesmith.streaming.data import refuse_rows
from tunesmith.training.interrupt import StopRequest
from tunesmith.training.progress import Progress
from tunesmith.training.randomness import unchanged_process


@unchanged_process()
def run_training(config: RunConfig, reporter: Reporter | None = None, rows: Rows | None = None) -> Path:
    """Train with a config; returns the folder of the finished model.

    In several processes all of them call this. The first prepares the data, logs and writes; the others follow it.

    Args:
        reporter: shows the run; the console by default.
        rows: data given in Python, in place of the config's names.
    """
    reporter = reporter or ConsoleReporter()
    rows = rows or {}
    if done := continue_if_begun(config, reporter, rows):
        return done
    with joined_world(config.train, reporter.owns_process) as world:
        return _train(config, reporter if world.is_main else Silent(reporter.owns_process), rows, world)


def continue_if_begun(config: RunConfig, reporter: Reporter, rows: Rows) -> Path | None:
    """The finished model's folder, if this command has begun its run before and may continue it; else None.

    It may with train.resume, and where torchrun has started the processes again (--max-restarts).
    All processes decide alike: none creates the folder before all have joined.

    Raises:
        TunesmithError: the folder contains another run.
    """
    launch = find_launch()
    if not config.train.resume and (launch is None or not launch.is_again):
        return None
    output = Path(config.train.output_dir).expanduser()
    folder = RunFolder(output.resolve())
    if not folder.is_run:
        return None
    changes = find_changes(name_rows(config, folder, rows), folder)
    return run_resume(config.train.output_dir, changes, reporter=reporter)


def _train(config: RunConfig, reporter: Reporter, rows: Rows, world: World) -> Path:
    folder = RunFolder(Path(world.share(lambda: str(resolve_output(config.train.output_dir)))))
    require_packages(config)
    if config.data.stream:
        refuse_rows(rows)
    config = name_rows(config, folder, rows)
    sources = _find_data(config, rows) if world.is_main else None
    date = datetime.datetime.fromisoformat(world.share(_now))
    model = find_model(config.model.path, config.model.config)
    session = open_session(config, folder, reporter, date, sources, model, world)
    require_one_reading(config.model, session.encoder, session.model_config, session.is_adapter, session.tokenizer)
    require_same_start(session)
    progress = Progress()
    with (
        StopRequest() as stop,
        explained_failures(folder, config, session.lengths.capacity, progress),
        world.explained(),
    ):
        ready, record, lines = _prepare(session, rows) if world.is_main else _follow(session)
        with locked(folder.path) if world.is_main else contextlib.nullcontext():
            trainer = build_trainer(ready, record, stop, progress)
            train_to_end(ready, trainer)
            saved = finish_run(ready, trainer, record, lines)
        is_late = world.agree(stop.is_made)
    if is_late:
        raise_late_stop(ready, saved)
    return saved


def _now() -> str:
    return datetime.datetime.now().replace(microsecond=0).isoformat()


def _find_data(config: RunConfig, rows: Rows) -> DataSources:
    sources = find_data(config.data, given=rows)
    refuse_shared_files(sources)
    return sources


Lines = list[tuple[str, str]]


def _prepare(session: Session, rows: Rows) -> tuple[ReadyRun, RunRecord, Lines]:
    """Write RUN with data and records, and load the model; the work of the first process."""
    config, folder, world, sources = session.config, session.folder, session.world, session.sources
    assert sources is not None
    require_weights_memory(session)
    with staged_folder(folder.path) as path:
        staging = RunFolder(path)
        if rows:
            session = keep_rows(session, rows, staging)
            sources = session.sources or sources
        session.reporter.stage("reading the data")
        with named_as_given(folder, rows):
            dataset = write_data(session, sources, staging)
        world.share(lambda: {"folder": str(path), "sha256": dataset.sha256, "sources": dataset.ledger.sources})
        world.agree(False)  # waits until the others have opened the data under this name
        session.reporter.stage("loading the model")
        ready = assemble(session, dataset)
        initial = keep_initial(ready.lm.adapter, staging) if changes_base(config.lora) else None
        room = require_room(path, ready)
        memory = plan_memory(ready)
        tight = require_memory(ready, memory)
        lines = summary_lines(ready, memory)
        session.reporter.summary([*lines, *tight, ("room", room), *cpu_lines(ready, memory)])
        guard = take_fingerprint(session, describe_files(sources, config.data.stream), dataset.sha256)
        guard = guard.model_copy(update={"shares_prefixes": ready.sharing.is_on})
        record = RunRecord(
            id=run_id(folder.path, session.date), date=session.date, cwd=os.getcwd(), guard=guard, adapter_init=initial
        )
        write_run_files(staging, ready, record)
    world.share(record.to_json)
    return ready, record, lines


def _follow(session: Session) -> tuple[ReadyRun, RunRecord, Lines]:
    """Open the data that the first process has prepared, and load the model."""
    world = session.world
    prepared = world.share(_of_main)
    staging = RunFolder(Path(prepared["folder"]))
    dataset = follow_data(session, staging, prepared["sha256"], prepared["sources"])
    world.agree(False)
    ready = assemble(session, dataset)
    record = RunRecord.from_json(world.share(_of_main), session.folder.record)
    return ready, record, []


def _of_main() -> NoReturn:
    raise AssertionError("only the first process makes what is shared")
