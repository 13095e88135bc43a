"""Compare a resumed run with its start (data, template, tokenizer, model, config, adapter), and reopen its parts."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.adapters.adapter import changes_base, load_adapter_weights
from tunesmith.adapters.base import same_base
from tunesmith.adapters.initial import restore_initial
from tunesmith.data.dataset import (
    Dataset,
    StoreHashes,
    find_data,
    find_store_damage,
    open_dataset,
    refuse_shared_files,
)
from tunesmith.data.feed import Place
from tunesmith.data.ledger import Ledger
from tunesmith.encode.draws import RowDraws
from tunesmith.errors import TunesmithError
from tunesmith.files import spell_sealed, write_text_atomic
from tunesmith.preparation.replace import replace_dataset
from tunesmith.preparation.write import write_dataset
from tunesmith.run.assemble import ReadyRun, stream_settings
from tunesmith.run.identity import (
    RELABELS,
    compare_files,
    compare_runs,
    describe_files,
    refuse_changes,
    take_fingerprint,
)
from tunesmith.run.records import WITHOUT_IT, Fingerprint, RunRecord, read_record
from tunesmith.run.session import Session
from tunesmith.runfolder import RunFolder
from tunesmith.streaming.data import StreamedDataset, open_stream
from tunesmith.training.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Allowed:
    """Changes that the user allows on resume.

    Attributes:
        command: as typed, for advice.
        parts: of the fingerprint that may change.
    """

    command: str
    parts: Sequence[str]

    def refuse_others(self, refusals: Sequence[str], session: Session) -> list[str]:
        """The changed parts that are allowed; raises TunesmithError for all others."""
        return refuse_changes(refusals, self.parts, session.folder.path, self.command)


def reopen_data(
    session: Session, before: Fingerprint, allow: Allowed, place: Place
) -> tuple[Dataset | StreamedDataset, Fingerprint]:
    """The run's data, after everything that training depends on has been compared with the start of the run.

    Args:
        place: of the feed, where the run continues.

    Raises:
        TunesmithError: something that would alter training has changed without --allow.
    """
    config, folder = session.config, session.folder
    refusals, notes = compare_files(before.data, session.sources)
    now = take_fingerprint(session, before.data, before.store)
    more, others = compare_runs(before, now)
    changed = allow.refuse_others([*refusals, *more], session)
    for note in [*notes, *others]:
        session.reporter.note(f"note: {note}")
    damage = find_store_damage(folder, before.store)
    if config.data.stream:
        return reopen_stream(session, now, changed, damage, place), now
    relabels = {*RELABELS, *(["seed"] if RowDraws.of(config.data, config.train.seed) else [])}
    if set(changed) & relabels or (damage and "data" in allow.parts):
        why = [f"changed {part}" for part in changed] or [damage]
        session.reporter.note(f"labelling the data again because of {', '.join(why)}")
        now = relabel(session)
    elif damage:
        raise TunesmithError(
            f"{damage}. To build the tokens again: {allow.command} --allow data", code="tokens-damaged"
        )
    ledger, eval_ledger = read_ledgers(folder, now.store)
    return open_dataset(config.data, config.train.seed, folder, now.store, ledger, eval_ledger), now


def reopen_stream(
    session: Session, now: Fingerprint, changed: Sequence[str], damage: str, place: Place
) -> StreamedDataset:
    """The data of a streamed run, from its place on.

    Raises:
        TunesmithError: the rows have changed, so that the place means nothing.
    """
    folder = session.folder
    if "data" in changed or damage:
        raise TunesmithError(
            f"{folder.path}: {damage or 'its data have changed'}, and a streamed run has no copy of them to continue "
            "with. Restore them, or start a new run from its newest checkpoint: tunesmith train --model CHECKPOINT",
            code="stream-changed",
        )
    sources = session.sources or find_data(session.config.data)
    _, eval_ledger = read_ledgers(folder, now.store)
    return open_stream(stream_settings(session), sources, folder, now.store, place, eval_ledger)


def read_ledgers(folder: RunFolder, store: StoreHashes) -> tuple[Ledger, Ledger | None]:
    """The ledgers of training and evaluation data.

    Raises:
        TunesmithError: the ledger is damaged.
    """
    saved = read_record(folder.ledger)
    try:
        eval_ledger = Ledger.from_json(saved["eval"]) if folder.eval_tokens.name in store else None
        return Ledger.from_json(saved["train"]), eval_ledger
    except (TypeError, KeyError, ValueError, AttributeError):
        raise TunesmithError(f"{folder.ledger}: is damaged. {WITHOUT_IT}", code="run-file-damaged") from None


def relabel(session: Session) -> Fingerprint:
    """Replace tokens and ledger by newly labelled ones, atomically.

    After a kill in between, the tokens may differ from run.json; the same command then labels the data again.
    """
    config, folder = session.config, session.folder
    sources = session.sources or find_data(config.data)  # find_data raises an error that names the missing file
    refuse_shared_files(sources)
    staging = RunFolder(folder.path / f".tokens.{uuid.uuid4().hex[:8]}.partial")
    staging.path.mkdir()
    try:
        max_seq_len, seed = session.lengths.max_seq_len, config.train.seed
        data = config.data.model_copy(update={"max_cut_replies": 1.0})  # the run has begun with such replies
        dataset = write_dataset(data, sources, session.encoder, max_seq_len, seed, staging, session.reporter)
        write_text_atomic(staging.ledger, spell_sealed(dataset.ledger_json(session.encoder, session.date)))
        replace_dataset(folder, staging)
        return take_fingerprint(session, describe_files(sources), dataset.sha256)
    finally:
        shutil.rmtree(staging.path, ignore_errors=True)


def reopen_adapter(ready: ReadyRun, checkpoint: Checkpoint | None, record: RunRecord, allow: Allowed) -> None:
    """Load the checkpoint's weights into the adapter, after checking its base and its initial matrices.

    Raises:
        TunesmithError: the base or the matrices have changed.
    """
    session, adapter = ready.session, ready.lm.adapter
    if changes_base(session.config.lora) and (remark := restore_initial(adapter, session.folder, record.adapter_init)):
        session.reporter.note(remark)
    if checkpoint:
        changes = same_base(checkpoint.folder, adapter.base_record)
        allow.refuse_others([f"model: the base's {change}" for change in changes], session)
        load_adapter_weights(adapter, checkpoint.load_adapter())
