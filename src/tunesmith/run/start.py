"""One run, from a config to RUN/model: prepare the data, load the model, check both, train, save."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from tunesmith.adapters.adapter import changes_base
from tunesmith.adapters.initial import keep_initial
from tunesmith.config.schema import RunConfig
from tunesmith.data.dataset import find_data, refuse_shared_files, write_dataset
from tunesmith.model.reopen import require_one_reading
from tunesmith.model.source import find_model
from tunesmith.run.assemble import assemble
from tunesmith.run.console import ConsoleReporter, Reporter
from tunesmith.run.failures import explained_failures
from tunesmith.run.finish import finish_run, raise_late_stop
from tunesmith.run.folder import require_room, resolve_output
from tunesmith.run.given import Rows, keep_rows, name_rows, named_as_given
from tunesmith.run.identity import describe_files, run_id, take_fingerprint
from tunesmith.run.records import RunRecord
from tunesmith.run.session import open_session, require_packages
from tunesmith.run.summary import cpu_lines, summary_lines
from tunesmith.run.training import build_trainer, train_to_end, write_run_files
from tunesmith.runfolder import RunFolder
from tunesmith.staging import locked, staged_folder
from tunesmith.training.interrupt import StopRequest
from tunesmith.training.progress import Progress
from tunesmith.training.randomness import unchanged_process


@unchanged_process()
def run_training(config: RunConfig, reporter: Reporter | None = None, rows: Rows | None = None) -> Path:
    """Train with a config; returns the folder of the finished model.

    Args:
        reporter: shows the run; the console by default.
        rows: data given in Python, in place of the config's names.
    """
    folder = RunFolder(resolve_output(config.train.output_dir))
    require_packages(config)
    rows = rows or {}
    config = name_rows(config, folder, rows)
    sources = find_data(config.data, given=rows)
    refuse_shared_files(sources)
    date = datetime.datetime.now().replace(microsecond=0)
    model = find_model(config.model.path, config.model.config)
    session = open_session(config, folder, reporter or ConsoleReporter(), date, sources, model)
    require_one_reading(config.model, session.encoder, session.model_config, session.is_adapter, session.tokenizer)
    progress = Progress()
    with StopRequest() as stop, explained_failures(folder, config, session.lengths.capacity, progress):
        with staged_folder(folder.path) as path:
            staging = RunFolder(path)
            if rows:
                session = keep_rows(session, rows, staging)
                sources = session.sources or sources
            max_seq_len, seed = session.lengths.max_seq_len, config.train.seed
            session.reporter.stage("reading the data")
            with named_as_given(folder, rows):
                dataset = write_dataset(config.data, sources, session.encoder, max_seq_len, seed, staging)
            session.reporter.stage("loading the model")
            ready = assemble(session, dataset)
            initial = keep_initial(ready.lm.adapter, staging) if changes_base(config.lora) else None
            room = require_room(path, ready)
            session.reporter.summary([*summary_lines(ready), ("room", room), *cpu_lines(ready)])
            guard = take_fingerprint(session, describe_files(sources), dataset.sha256)
            record = RunRecord(
                id=run_id(folder.path, date), date=date, cwd=os.getcwd(), guard=guard, adapter_init=initial
            )
            write_run_files(staging, ready, record)
        with locked(folder.path):
            trainer = build_trainer(ready, record, stop, progress)
            train_to_end(ready, trainer)
            saved = finish_run(ready, progress, record)
    raise_late_stop(stop, ready, saved)
    return saved
