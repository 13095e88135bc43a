"""The end of a run: write RUN/model or RUN/adapter, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.adapters.adapter import changes_base, load_adapter_weights
from tunesmith.adapters.initial import require_initial
from tunesmith.errors import InterruptedRun
from tunesmith.model.save import save_adapter, save_model
from tunesmith.run.assemble import ReadyRun
from tunesmith.run.records import RunRecord
from tunesmith.run.summary import model_card
from tunesmith.runfolder import RunFolder
from tunesmith.training.checkpoint import Checkpoint, DamagedError, find_damage, read_checkpoint
from tunesmith.training.interrupt import StopRequest
from tunesmith.training.progress import Progress


def finish_run(ready: ReadyRun, progress: Progress, record: RunRecord) -> Path:
    """Write the last step's weights, or those of the best evaluated step if that was earlier; returns their folder."""
    session, lm = ready.session, ready.lm
    folder = session.folder
    session.reporter.stage("saving the model")
    model = take_best(ready, progress)
    card = model_card(ready, progress)
    if lm.adapter is None:
        saved = folder.model
        save_model(model, session.encoder, card, saved)
    else:
        saved = folder.adapter
        initial = require_initial(folder, record.adapter_init) if changes_base(session.config.lora) else None
        save_adapter(model, lm.adapter, session.encoder, card, saved, initial)
    # only now: until here, the folder of an extended run has its earlier model
    record.updated(finished_at_step=progress.step).write(folder.record)
    tell_end(ready, progress, saved.name)
    return saved


def raise_late_stop(stop: StopRequest, ready: ReadyRun, saved: Path) -> None:
    """Honour a signal that arrived after the last step, now that the model is saved.

    Raises:
        InterruptedRun: there was one. A caller that trains several runs must not start the next.
    """
    if stop.is_made:
        named = Path(ready.session.config.train.output_dir)
        raise InterruptedRun(
            f"interrupted after the last step. The run is finished: {named / saved.name} is complete.",
            code="interrupted-finished",
        )


def take_best(ready: ReadyRun, progress: Progress) -> Any:
    """The model with the weights to save; those of the best step are loaded into it or into the adapter."""
    lm, note = ready.lm, ready.session.reporter.note
    if progress.best_step is None or progress.best_step == progress.step:
        return lm.model
    what = "model" if lm.adapter is None else "adapter"
    best = find_best(ready.session.folder, progress.best_step)
    if best is None:
        note(
            f"the checkpoint of the best step, {progress.best_step}, is missing or damaged: saving the last step's "
            f"{what}"
        )
        return lm.model
    note(f"best eval_loss {progress.best_eval_loss:.4f} was at step {progress.best_step}: saving that {what}")
    if lm.adapter is None:
        kind: Any = type(lm.model)
        return kind.from_pretrained(best.folder, dtype=ready.session.precision.weights)
    load_adapter_weights(lm.adapter, best.load_adapter())
    return lm.model


def find_best(folder: RunFolder, step: int) -> Checkpoint | None:
    """The checkpoint of the best evaluated step, if it is valid."""
    try:
        checkpoint = read_checkpoint(folder.checkpoint(step))
    except DamagedError:
        return None
    return None if find_damage(checkpoint) else checkpoint


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
