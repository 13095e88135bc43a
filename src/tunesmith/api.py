"""The Python API. The command calls the same functions.

Sections of the config are keyword arguments: `optim={"lr": 1e-5}`. `model`, `data`, `tokenizer`, `eval_data` and
`output` are short for model.path, data.train, model.tokenizer, data.eval and train.output_dir; `model` and `data` may
also be whole sections. Nothing is printed and nothing global stays changed; messages go to the logger "tunesmith".
"""

from __future__ import annotations

import html
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.arguments import Name, as_path, read_arguments, refuse_rows_with_stages, section_of
from tunesmith.config.choices import RESUME_PARTS
from tunesmith.config.runfile import flatten_sections, read_yaml
from tunesmith.config.schema import PreviewConfig, RunConfig
from tunesmith.config.stages import StagedConfig, resolve_stages, resolve_training
from tunesmith.display import LEVEL_STYLES
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.process import embedded, one_run
from tunesmith.reading import read_text
from tunesmith.report.verdict import Verdict
from tunesmith.runfolder import RunFolder, has_stages, read_metrics, started_stages
from tunesmith.sources.memory import sources_of, write_rows
from tunesmith.sources.read import Sources
from tunesmith.use.check import CheckResult
from tunesmith.use.preview import Preview

if TYPE_CHECKING:
    from tunesmith.lr_find import FoundLr

logger = logging.getLogger("tunesmith")
OnLog = Callable[[dict[str, Any]], None]


class CallbackFailed(BaseException):
    """Carries an exception of the caller's `on_log` out of the run, so that it is not reported as the run's own.

    Not an Exception, so that nothing on its way handles it as a failure of the disk, the memory or the run.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def callback_errors() -> Iterator[None]:
    """Raise an exception of the caller's `on_log` as the caller raised it."""
    try:
        yield
    except CallbackFailed as failed:
        raise failed.error from None


class LoggedReporter:
    """Shows a run to a Python caller: records to `on_log`, the rest to the logger."""

    owns_process = False

    def __init__(self, on_log: OnLog | None) -> None:
        if on_log is not None and not callable(on_log):
            raise TypeError(f"on_log: {on_log!r} cannot be called")
        self._on_log = on_log

    def stage(self, text: str) -> None: ...

    def preparing(self, rows: int, share: float | None) -> None: ...

    def prepared(self) -> None: ...

    def summary(self, lines: list[tuple[str, str]]) -> None:
        for name, text in lines:
            logger.log(logging.WARNING if name in LEVEL_STYLES else logging.INFO, "%s  %s", name, text)

    def note(self, text: str) -> None:
        logger.info("%s", text)

    def begin(self, total_steps: int, first_step: int, total_epochs: float | None) -> None: ...

    def doing(self, text: str) -> None: ...

    def step(self, record: dict[str, Any], remark: str) -> None:
        if remark:
            logger.warning("step %s: %s", record["step"], remark)
        if self._on_log is not None:
            from tunesmith.training.randomness import restore_random_states, take_random_states

            states = take_random_states()  # random numbers that the caller draws must not change the run
            try:
                self._on_log(record)
            except Exception as error:
                raise CallbackFailed(error) from error
            restore_random_states(*states)

    def end(self) -> None: ...


class Run:
    """A RUN folder: what was trained, and how it went.

    Of a run with stages, the config, the figures and the model are those of the stage that began last; `stages` has
    each of them.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Name) -> None:
        self.path = Path(path).expanduser().absolute()  # the same folder after os.chdir
        if not RunFolder(self.path).is_run and not started_stages(self.path):
            raise TunesmithError(
                f"{path}: is not a run. Give the folder that train was given as output.", code="not-a-run"
            )

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @property
    def _folder(self) -> RunFolder:
        started = started_stages(self.path)
        return started[-1] if started else RunFolder(self.path)

    @property
    def stages(self) -> list[Run]:
        """The stages that have begun, each as a run; none where the run has no stages."""
        return [Run(stage.path) for stage in started_stages(self.path)]

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        rows = [("folder", str(self.path)), ("finished", str(self.is_finished))]
        last = self.metrics[-1:] and {k: v for record in self.metrics for k, v in record.items()}
        rows += [
            (name, f"{value:g}" if isinstance(value, float) else str(value)) for name, value in (last or {}).items()
        ]
        cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
        return f"<table>{cells}</table>"

    @property
    def config(self) -> RunConfig:
        """The config as resolved, from RUN/config.yaml."""
        return RunConfig.model_validate(read_yaml(self._folder.config))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of RUN/metrics.jsonl, one a logged step."""
        return read_metrics(self._folder.metrics)

    @property
    def ledger(self) -> dict[str, Any]:
        """What became of every row, from RUN/data_ledger.json."""
        ledger: dict[str, Any] = json.loads(read_text(self._folder.ledger))
        return ledger

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the final model or adapter; of a run with stages, that of the last one."""
        if has_stages(self.path):
            from tunesmith.stages.record import find_next, read_stages

            run = read_stages(self.path, str(self.path))
            return find_next(run) == len(run)
        return self._folder.has_complete_model

    @property
    def model_dir(self) -> Path:
        """RUN/model, or RUN/adapter where an adapter was trained. It exists once the run is finished."""
        return self._folder.adapter if self.config.lora.kind != "none" else self._folder.model

    def resume(self, *, max_steps: int | None = None, **options: Any) -> Run:
        """As `tunesmith.resume` for this run."""
        return resume(self, max_steps=max_steps, **options)

    @property
    def verdict(self) -> Verdict:
        """How the run went, judged by its figures: a summary, and findings with what to try next."""
        from tunesmith.report.write import read_verdict

        return read_verdict(self._folder.path)

    def report(self) -> Path:
        """As `tunesmith report`: write RUN/report.html again, with sample replies of the finished model.

        Returns:
            Its path.
        """
        from tunesmith.report.stages import report_run

        with embedded():
            return report_run(self.path)


def train(
    run_file: Name | None = None,
    *,
    model: Name | Mapping[str, Any] | None = None,
    data: Any = None,
    output: Name | None = None,
    tokenizer: Name | None = None,
    eval_data: Any = None,
    on_log: OnLog | None = None,
    **sections: Any,
) -> Run:
    """Fine-tune a model.

    Args:
        run_file: a YAML run file, or recipe:NAME; the other arguments win over it.
        model: a local folder, a RUN, a hub id, or new:PRESET; or the whole model section.
        data: names of files, folders or hub data sets; or rows: a list of dicts, a `datasets.Dataset`, a DataFrame or
            an Arrow table; or the whole data section. Rows are kept in RUN/rows, so that the run can be resumed and
            each row is accounted for.
        output: the RUN folder, new or empty.
        tokenizer: a folder or hub id; default: the model's own.
        eval_data: held-out data, in the same forms as `data`.
        on_log: called with each record of metrics.jsonl, as it is written. An exception from it ends the run, which
            can then be resumed.
        sections: optim, lora and train; and stages, a list as in a run file.

    Raises:
        ConfigError: a key is unknown or a value is wrong; all problems at once.
        DataError, ModelError: the data or the model cannot be used.
        RunError: the run failed (non-finite loss, memory, disk); it names the last good checkpoint.
        InterruptedRun: Ctrl-C, SIGTERM or a closed terminal; the run is saved.
    """
    from tunesmith.stages.command import train_config

    tree, rows = read_arguments(model, data, tokenizer, eval_data, sections)
    if output is not None:
        section_of(tree, "train")["output_dir"] = os.fspath(output)
    config = resolve_training(as_path(run_file), {}, arguments=tree)
    if rows and isinstance(config, StagedConfig):
        refuse_rows_with_stages("data")
    with one_run(), embedded(), callback_errors():
        return Run(train_config(config, LoggedReporter(on_log), rows))


def resume(
    run: Name,
    *,
    max_steps: int | None = None,
    allow: Sequence[str] = (),
    on_log: OnLog | None = None,
    **sections: Any,
) -> Run:
    """Continue an interrupted run from its newest valid checkpoint, or train a finished one longer.

    Args:
        max_steps: short for train={"max_steps": ...}.
        allow: what may differ from how the run began: data, template, tokenizer, model, optimizer, lora, schedule,
            batch, seed, precision, versions.
        on_log: as in `train`.
        sections: keys that change, as in `train`.

    Raises:
        TunesmithError: the run cannot be resumed, or something that changes its mathematics is not as it was.
    """
    from tunesmith.stages.command import resume_run

    tree, rows = read_arguments(sections.pop("model", None), sections.pop("data", None), None, None, sections)
    if rows:
        raise UsageError("data: a run keeps its own rows; to train on others, start a new run.", code="rows-on-resume")
    changes = flatten_sections(tree)
    if max_steps is not None:
        if changes.get("train.max_steps", max_steps) != max_steps:
            raise UsageError("max_steps: train has another max_steps; give one of the two.", code="two-max-steps")
        changes["train.max_steps"] = max_steps
    wrong = [allow] if isinstance(allow, str) else [part for part in allow if part not in RESUME_PARTS]
    if wrong:
        raise UsageError(f"allow: {wrong[0]!r}; give a list of {', '.join(RESUME_PARTS)}.", code="unknown-part")
    with one_run(), embedded(), callback_errors():
        return Run(resume_run(os.fspath(run), changes, allow, LoggedReporter(on_log)))


def preview(
    run_file: Name | None = None,
    *,
    model: Name | Mapping[str, Any] | None = None,
    data: Any = None,
    rows: int | None = None,
    row: int | str | Iterable[int | str] = (),
    only: str | Iterable[str] = (),
    tokenizer: Name | None = None,
    stage: str | None = None,
    **sections: Any,
) -> Preview:
    """Label rows exactly as `train` does. A notebook shows the trained tokens coloured.

    Args:
        rows: how many at most; default: all that `row` names, else the first 5.
        row: rows as `check` names them: "chats.jsonl:12", "chats.jsonl:10-20"; numbers alone where there is one file.
            Rows given in Python by their index: 16, or "data[16]".
        only: kinds of rows: refused, used, truncated, cut (before a stop token), split, noted, unrolled, composed.
        stage: of a run file with stages; default: the first.
        run_file, model, data, tokenizer, sections: as in `train`.
    """
    from tunesmith.use.preview import choose_rows, preview_rows

    asked, kinds, limit = choose_rows(rows, row, only)
    with _preview_config(run_file, model, data, tokenizer, None, sections, stage, limit) as (config, sources):
        return preview_rows(config, rows, sources, asked, kinds)


def check(
    run_file: Name | None = None,
    *,
    model: Name | Mapping[str, Any] | None = None,
    data: Any = None,
    eval_data: Any = None,
    tokenizer: Name | None = None,
    stage: str | None = None,
    **sections: Any,
) -> CheckResult:
    """Read a whole data set and collect what is wrong or odd about it. Findings are returned, not raised.

    Args:
        stage: of a run file with stages; default: the first.
        run_file, model, data, eval_data, tokenizer, sections: as in `train`.
    """
    from tunesmith.use.check import check_data

    with _preview_config(run_file, model, data, tokenizer, eval_data, sections, stage) as (config, sources):
        return check_data(config, sources)


def find_lr(
    run_file: Name | None = None,
    *,
    model: Name | Mapping[str, Any] | None = None,
    data: Any = None,
    tokenizer: Name | None = None,
    eval_data: Any = None,
    stage: str | None = None,
    **sections: Any,
) -> FoundLr:
    """Find a learning rate for a run by short runs on its model and data; nothing is written, no model changes.

    The search begins at optim.lr. Without `eval_data`, a tenth of the rows is held out to compare the short runs.

    Args:
        stage: of a run file with stages; default: the first.
        run_file, model, data, tokenizer, eval_data, sections: as in `train`.

    Raises:
        RunError: no learning rate lowers eval_loss, or memory or disk is full.
    """
    from tunesmith.config.schema import LrFindConfig
    from tunesmith.lr_find import find_lr as search

    tree, rows = read_arguments(model, data, tokenizer, eval_data, sections)
    config = resolve_stages(LrFindConfig, as_path(run_file), {}, arguments=tree, name=stage)[0].config
    with one_run(), embedded():
        return search(config, rows=rows)


@contextmanager
def _preview_config(
    run_file: Name | None,
    model: Any,
    data: Any,
    tokenizer: Any,
    eval_data: Any,
    sections: Mapping[str, Any],
    stage: str | None,
    limit: int | None = None,
) -> Iterator[tuple[PreviewConfig, dict[str, Sources]]]:
    """The config, and the sources of rows given in Python, which are kept in a file until the block ends."""
    tree, rows = read_arguments(model, data, tokenizer, eval_data, sections)
    config = resolve_stages(PreviewConfig, as_path(run_file), {}, arguments=tree, name=stage)[0].config
    limit = limit or config.data.limit
    with embedded(), tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        sources = {}
        for key, given in rows.items():
            name = "data" if key == "train" else "eval_data"
            if limit and key == "train" and isinstance(given, Iterator):  # which may be long, or endless
                given = itertools.islice(given, limit)
            write_rows(name, given, Path(folder) / f"{key}.jsonl")
            sources[key] = sources_of(Path(folder) / f"{key}.jsonl", name)
        yield config, sources
