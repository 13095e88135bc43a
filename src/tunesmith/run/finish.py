"""The end of a run: write RUN/model or RUN/adapter, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from tunesmith.adapters.adapter import changes_base, load_adapter_weights
from tunesmith.adapters.initial import require_initial
from tunesmith.errors import InterruptedRun
from tunesmith.model.save import save_adapter, save_in_groups, save_model
from tunesmith.run.assemble import ReadyRun
from tunesmith.run.records import RunRecord
from tunesmith.run.summary import model_card
from tunesmith.training.checkpoint import Checkpoint, DamagedError, copy_weights, find_damage, read_checkpoint
from tunesmith.training.loop import Trainer
from tunesmith.training.progress import Progress
from tunesmith.training.sharded import GROUP_BYTES, StoredGroups, WeightGroups


def finish_run(ready: ReadyRun, trainer: Trainer, record: RunRecord, lines: list[tuple[str, str]]) -> Path:
    """Write the last step's weights, or those of the best evaluated step if that was earlier; returns their folder.

    Args:
        lines: from summary_lines, for the model's card.
    """
    session, lm, progress = ready.session, ready.lm, trainer.progress
    folder, world = session.folder, session.world
    saved = folder.model if lm.adapter is None else folder.adapter
    session.reporter.stage("saving the model")
    is_adapter = lm.adapter is not None
    takes_best = world.share(lambda: find_best(ready, progress) is not None)
    if trainer.saver.in_shards and not is_adapter:
        _finish_in_groups(ready, trainer, record, lines, takes_best)
        return saved
    weights = None
    if not takes_best and trainer.spread.must_gather:
        weights = copy_weights(lm, trainer.spread)

    def write() -> None:
        best = find_best(ready, progress) if takes_best else None
        card = model_card(ready, progress, lines)
        if is_adapter:
            initial = require_initial(folder, record.adapter_init) if changes_base(session.config.lora) else None
            if best and initial:  # peft converts what it finds in the model
                load_adapter_weights(lm.adapter, best.load_adapter())
            found = best.load_adapter() if best else weights
            save_adapter(lm.model, lm.adapter, session.encoder, card, saved, initial, found)
        else:
            stored = best.open_weights() if best else None
            if stored is not None:
                groups = StoredGroups(stored, GROUP_BYTES)
                save_in_groups(lm.model, session.encoder, card, saved, groups, len(groups))
            else:
                kind: Any = type(lm.model)
                model = kind.from_pretrained(best.folder, dtype=session.precision.weights) if best else lm.model
                save_model(model, session.encoder, card, saved, weights)
        _record_end(ready, progress, record, best, saved.name)

    world.share(write)
    return saved


def _finish_in_groups(
    ready: ReadyRun, trainer: Trainer, record: RunRecord, lines: list[tuple[str, str]], takes_best: bool
) -> None:
    """Write the model a group of weights at a time: every process takes part in gathering those of the last step."""
    lm, progress, world = ready.lm, trainer.progress, ready.session.world
    groups = None if takes_best else WeightGroups(lm, trainer.spread, GROUP_BYTES)

    def write() -> None:
        best = find_best(ready, progress) if takes_best else None
        card = model_card(ready, progress, lines)
        stored = best.open_weights() if best else None
        found = StoredGroups(stored, GROUP_BYTES) if stored is not None else groups
        saved = ready.session.folder.model
        if found is not None:
            save_in_groups(lm.model, ready.session.encoder, card, saved, found, len(found))
        else:  # the best checkpoint was written whole, before the run was resumed
            assert best is not None
            kind: Any = type(lm.model)
            model = kind.from_pretrained(best.folder, dtype=ready.session.precision.weights)
            save_model(model, ready.session.encoder, card, saved)
        _record_end(ready, progress, record, best, saved.name)

    if groups is not None and not world.is_main:
        for _ in groups:
            pass
    world.share(write)


def _record_end(ready: ReadyRun, progress: Progress, record: RunRecord, best: Checkpoint | None, what: str) -> None:
    # only now: until here, the folder of an extended run has its earlier model
    record.updated(finished_at_step=progress.step).write(ready.session.folder.record)
    tell_best(ready, progress, best, what)
    tell_end(ready, progress, what)


def raise_late_stop(ready: ReadyRun, saved: Path) -> NoReturn:
    """Honour a signal that arrived after the last step, now that the model is saved.

    Raises:
        InterruptedRun: a caller that trains several runs must not start the next.
    """
    named = Path(ready.session.config.train.output_dir)
    raise InterruptedRun(
        f"interrupted after the last step. The run is finished: {named / saved.name} is complete.",
        code="interrupted-finished",
    )


def find_best(ready: ReadyRun, progress: Progress) -> Checkpoint | None:
    """The checkpoint of the best evaluated step, if that is not the last one, and it is valid."""
    if progress.best_step is None or progress.best_step == progress.step:
        return None
    try:
        checkpoint = read_checkpoint(ready.session.folder.checkpoint(progress.best_step))
    except DamagedError:
        return None
    return None if find_damage(checkpoint) else checkpoint


def tell_best(ready: ReadyRun, progress: Progress, best: Checkpoint | None, what: str) -> None:
    note = ready.session.reporter.note
    if progress.best_step is None or progress.best_step == progress.step:
        return
    if best is None:
        note(
            f"the checkpoint of the best step, {progress.best_step}, is missing or damaged: saving the last step's "
            f"{what}"
        )
    else:
        note(f"best eval_loss {progress.best_eval_loss:.4f} was at step {progress.best_step}: saving that {what}")


def tell_end(ready: ReadyRun, progress: Progress, what: str) -> None:
    note = ready.session.reporter.note
    if progress.step < ready.feed.total_steps:
        note(f"stopped early at step {progress.step}: eval_loss stopped falling")
    if progress.skipped:
        note(f"{progress.skipped} steps were skipped because of a non-finite loss (metrics.jsonl names the rows)")
    named = Path(ready.session.config.train.output_dir)  # as the user wrote it
    note(f"{what} saved: {named / what}\ntalk to it: tunesmith chat {named}")
    if what == "adapter":
        note(f"merge it into its base: tunesmith merge {named} --output {named}-merged")
