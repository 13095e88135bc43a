"""`tunesmith lr-find`: a learning rate for a run, from short runs on its own model and data. No file is left behind."""

from __future__ import annotations

import datetime
import html
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tunesmith.config.schema import LrFindConfig, RunConfig
from tunesmith.data.dataset import find_data, refuse_shared_files
from tunesmith.distributed.world import OneProcess
from tunesmith.errors import RunError
from tunesmith.model.reopen import require_one_reading
from tunesmith.model.source import find_model
from tunesmith.preparation.write import write_dataset
from tunesmith.run.assemble import ReadyRun, assemble
from tunesmith.run.console import Silent, print_summary
from tunesmith.run.failures import explained_failures
from tunesmith.run.given import Rows, keep_rows, name_rows, named_as_given
from tunesmith.run.session import open_session, require_packages
from tunesmith.run.summary import plan_memory, summary_lines
from tunesmith.runfolder import RunFolder
from tunesmith.training.progress import Progress
from tunesmith.training.randomness import unchanged_process
from tunesmith.training.trials import Trial, Trials, lowest, search_lr

SHARE, FEWEST, MOST = 8, 10, 50  # steps of a trial: an eighth of the run's, within these limits
_HELD_OUT = 0.1  # of the rows, where neither data.eval nor data.eval_split is given
_STREAM_ROWS = 20_000  # that are read of a stream
_EVAL_TOKENS = 32_768  # that judge a trial
_SHOWN = ("model", "adapter", "device", "data", "eval data", "template", "steps")  # lines of the run's summary


@dataclass(frozen=True, slots=True)
class FoundLr:
    """What a search found.

    Attributes:
        lr: the suggestion for optim.lr.
        first_loss: eval_loss before any training.
        trials: each learning rate that was tried with its eval_loss, in ascending order of lr; inf where it diverged.
        num_steps: of each trial.
        run_steps: of the run that the search was for.
    """

    lr: float
    first_loss: float
    trials: list[Trial]
    num_steps: int
    run_steps: int

    def __str__(self) -> str:
        return "\n".join([*_table(self.trials), f"optim.lr {format_lr(self.lr)}"])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class Shown:
    """Shows nothing of a search."""

    def begin(self, ready: ReadyRun, num_steps: int, first_loss: float) -> None:
        """The model and the data are ready."""

    def trying(self, lr: float) -> None:
        """A trial begins."""

    def tried(self, loss: float) -> None:
        """It has ended."""


class _Printed(Shown):
    def begin(self, ready: ReadyRun, num_steps: int, first_loss: float) -> None:
        lines, name = [], ""
        for line in summary_lines(ready, plan_memory(ready)):
            name = line[0] or name  # an empty name continues the line before
            lines += [line] if name in _SHOWN else []
        plan = f"short runs of {num_steps} steps each from the same start, usually 5 to 8 of them"
        print_summary([*lines, ("trials", plan)])
        print(f"\n{'lr':>9}  eval_loss\n{'before':>9}  {first_loss:.4f}", flush=True)

    def trying(self, lr: float) -> None:
        print(f"{format_lr(lr):>9}  ", end="", flush=True)

    def tried(self, loss: float) -> None:
        print(_loss(loss), flush=True)


def run_lr_find(config: LrFindConfig) -> None:
    """Search and print."""
    found = find_lr(config, _Printed())
    print("\nin order of lr:\n" + "\n".join(_table(found.trials)))
    print(f"\nsuggested for a run of {found.run_steps:,} steps: --optim.lr {format_lr(found.lr)}")
    print(f"in a run file:\noptim:\n  lr: {found.lr:.6f}".rstrip("0"))


@unchanged_process()
def find_lr(config: LrFindConfig, shown: Shown | None = None, rows: Rows | None = None) -> FoundLr:
    """Train from the same start with several learning rates, each for a few steps, and compare eval_loss.

    Args:
        rows: data given in Python, in place of the config's names.

    Raises:
        RunError: no learning rate lowers eval_loss; or memory or disk is full.
    """
    shown = shown or Shown()
    with tempfile.TemporaryDirectory(prefix="tunesmith-", ignore_cleanup_errors=True) as name:
        folder = RunFolder(Path(name))
        ready = prepare(for_search(config, folder), folder, rows or {})
        session = ready.session
        with explained_failures(folder, session.config, session.lengths.capacity, Progress()):
            found = _search(ready, shown)
    if not min(trial.loss for trial in found.trials) < found.first_loss:
        raise RunError(_explain_none(config, found), code="no-lr-found")
    return found


def for_search(config: LrFindConfig, folder: RunFolder) -> RunConfig:
    """The run's config, with some rows held out to judge the trials, and nothing written but its tokens."""
    data = config.data
    if data.stream:  # the trials need the first rows only
        data = data.model_copy(update={"stream": False, "limit": min(data.limit or _STREAM_ROWS, _STREAM_ROWS)})
    if not (data.eval or data.eval_split):
        data = data.model_copy(update={"eval_split": _HELD_OUT})
    train = config.train.model_copy(update={"output_dir": str(folder.path), "trackers": []})
    return config.model_copy(update={"data": data, "train": train})


def prepare(config: RunConfig, folder: RunFolder, rows: Rows) -> ReadyRun:
    """Data and model as `tunesmith train` prepares them."""
    require_packages(config)
    config = name_rows(config, folder, rows)
    sources = find_data(config.data, given=rows)
    refuse_shared_files(sources)
    model = find_model(config.model.path, config.model.config)
    date = datetime.datetime.now().replace(microsecond=0)
    session = open_session(config, folder, Silent(), date, sources, model, OneProcess())
    require_one_reading(config.model, session.encoder, session.model_config, session.is_adapter, session.tokenizer)
    with explained_failures(folder, config, session.lengths.capacity, Progress()):
        if rows:
            session = keep_rows(session, rows, folder)
            sources = session.sources or sources
        max_seq_len = session.lengths.max_seq_len
        with named_as_given(folder, rows):
            dataset = write_dataset(config.data, sources, session.encoder, max_seq_len, config.train.seed, folder)
        return assemble(session, dataset)


def _search(ready: ReadyRun, shown: Shown) -> FoundLr:
    feed, config = ready.feed, ready.session.config
    num_steps = min(feed.total_steps, max(FEWEST, min(MOST, feed.total_steps // SHARE)))
    max_packs = max(1, _EVAL_TOKENS // ready.session.lengths.capacity)
    trials = Trials(ready.lm, feed, config, ready.session.precision, max_packs)
    first_loss = trials.first_loss()
    shown.begin(ready, num_steps, first_loss)

    def measure(lr: float) -> float:
        shown.trying(lr)
        loss = trials.measure(lr, num_steps)
        shown.tried(loss)
        return loss

    tried = sorted(search_lr(measure, config.optim.lr, first_loss), key=lambda trial: trial.lr)
    lr = float(f"{lowest(tried):.1e}")
    return FoundLr(lr, first_loss, tried, num_steps, feed.total_steps)


def _explain_none(config: RunConfig, found: FoundLr) -> str:
    first, last = (format_lr(found.trials[at].lr) for at in (0, -1))
    return (
        f"{config.model.path}: no learning rate from {first} to {last} lowers eval_loss ({found.first_loss:.4f} "
        f"before) within {found.num_steps} steps. Look at the rows (tunesmith check), give more steps (train.epochs), "
        "or evaluate on rows of the kind that is trained on (data.eval)."
    )


def format_lr(lr: float) -> str:
    """2.0e-05 as 2e-5."""
    digits, exponent = f"{lr:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if loss < float("inf") else "diverged"


def _table(trials: list[Trial]) -> list[str]:
    lines, best = [], min(trials, key=lambda trial: trial.loss)
    for trial in trials:
        mark = "  lowest" if trial is best else ""
        lines.append(f"{format_lr(trial.lr):>9}  {_loss(trial.loss)}{mark}")
    return lines
