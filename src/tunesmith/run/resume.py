"""`tunesmith resume RUN`: go on from the newest checkpoint that verifies, as the run that it was."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.adapters.adapter import changes_base, load_adapter_weights, require_quantization
from tunesmith.adapters.base import same_base
from tunesmith.adapters.initial import restore_initial
from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import ModelSection, RunConfig
from tunesmith.data.ledger import Ledger
from tunesmith.data.store import open_store
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.files import read_sealed, sealed, sync_path, write_text_atomic
from tunesmith.model.source import find_model
from tunesmith.run.console import print_summary
from tunesmith.run.failures import explained_failures
from tunesmith.run.identity import RELABELS, compare_files, compare_runs, describe_files, describe_store, refuse_changes
from tunesmith.run.start import (
    Setting,
    assemble,
    build_trainer,
    choose_setting,
    finish_run,
    make_guard,
    train_to_end,
    write_run_files,
)
from tunesmith.run.summary import RunFacts, summary_lines
from tunesmith.runfolder import RUN_FILE
from tunesmith.staging import locked
from tunesmith.train.checkpoint import Checkpoint, leftovers, newest_valid, restore_optimizer
from tunesmith.train.interrupt import StopRequest
from tunesmith.train.loop import Progress, Trainer, Window
from tunesmith.train.metrics import require_trackers
from tunesmith.train.optim import lr_at, require_optimizer
from tunesmith.train.plan import Prepared, prepare_data
from tunesmith.train.randomness import restore_random_states, seed_all


def run_resume(name: str, flags: Mapping[str, Any], allowed: Sequence[str] = (), unknown: Sequence[str] = ()) -> Path:
    """Go on with a run, or extend a finished one; returns the folder of the finished model.

    Args:
        flags: dotted key -> value as typed, over RUN/config.yaml.
        allowed: parts of guard.PARTS that the person means to change.
    """
    run = find_run(name)
    if "train.output_dir" in flags:
        raise TunesmithError(f"--output: a run goes on in its own folder, {name}; leave the flag out.")
    again = as_typed(name, flags)
    flags = {key: absolute(value) if key in _NAMES else value for key, value in flags.items()}
    saved = read_json(run / RUN_FILE, ("cwd", "date", "id", "guard"))
    config = resolve_config(RunConfig, run / "config.yaml", flags, list(unknown))
    config = config.model_copy(update={"train": config.train.model_copy(update={"output_dir": name})})
    require_trackers(list(config.train.trackers))
    require_quantization(config.lora)
    require_optimizer(config.optim.name)
    with locked(run), StopRequest() as stop, started_in(saved["cwd"]):
        for path in leftovers(run):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        checkpoint = choose_checkpoint(run, name)
        state = checkpoint.load_state() if checkpoint else None
        is_done = is_finished(run, saved, state)
        # from here on it is made longer; a kill before its first new checkpoint must not forget that
        is_extended = is_done or (state is not None and saved.get("extended_from_step") == state["step"])
        if is_done and state and "train.max_steps" not in flags and "train.epochs" not in flags:
            print(
                f"{name} is finished ({state['step']:,} steps); nothing to do. "
                f"To train it longer: tunesmith resume {name} --train.max_steps N"
            )
            return run
        before = checkpoint.guard if checkpoint else saved["guard"]
        keep_threads(before["threads"])
        date = datetime.datetime.fromisoformat(saved["date"])
        require_model(name, config)
        setting = choose_setting(config, date)
        with explained_failures(run, config, setting.capacity) as running:
            prepared, guard = take_up(run, again, config, setting, before, allowed)
            weights, is_adapter = config.model, config.lora.kind != "none"
            if checkpoint and not is_adapter:
                weights = ModelSection(path=str(checkpoint.folder), trust_remote_code=config.model.trust_remote_code)
            facts = assemble(config, setting, prepared, weights)
            if is_adapter:
                take_up_adapter(run, again, facts, checkpoint, saved, allowed)
            if state:
                check_steps(name, facts, state, allowed, is_extended)
            print_summary([("resume", describe_place(name, checkpoint, state, facts)), *summary_lines(facts)])
            saved["guard"] = guard
            saved.pop("finished_at_step", None)
            if is_extended and state:
                saved["extended_from_step"] = state["step"]
            write_run_files(run, facts, date, saved)
            trainer = build_trainer(run, facts, stop, saved, state["step"] if state else None)
            running.append(trainer)
            seed_all(config.train.seed)
            if checkpoint and state:
                restore(trainer, checkpoint, state, is_extended)
            train_to_end(trainer)
            return finish_run(trainer, facts, saved)


_NAMES = ("data.train", "data.eval", "data.chat_template", "model.path", "model.tokenizer")


def as_typed(name: str, flags: Mapping[str, Any]) -> str:
    """The command with the person's flags, to be shown with one more."""
    words = ["tunesmith", "resume", name]
    for key, value in flags.items():
        words += [f"--{key}", *([str(item) for item in value] if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def require_model(name: str, config: RunConfig) -> None:
    """Raises:
    ModelError: the model that the run began from lies elsewhere now.
    """
    try:
        find_model(config.model.path)
    except ModelError as error:
        raise ModelError(f"{error} Where it lies elsewhere now: tunesmith resume {name} --model FOLDER") from None


def absolute(value: Any) -> Any:
    """Names typed now are meant from here, those in config.yaml from where the run began."""
    if isinstance(value, list):
        return [absolute(item) for item in value]
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value


def find_run(name: str) -> Path:
    """The folder of a run that can be gone on with.

    Raises:
        TunesmithError: it is none.
    """
    run = Path(name).expanduser()
    if not run.is_dir():
        raise TunesmithError(f"{name}: no such folder. Give the RUN folder that tunesmith train was given as --output.")
    if not (run / RUN_FILE).is_file():
        raise TunesmithError(f"{name}: is not a run that can be gone on with (no {RUN_FILE} in it).")
    return run.resolve()


def read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A file that the run wrote.

    Raises:
        TunesmithError: it is gone, damaged, or lacks a key.
    """
    try:
        content = read_sealed(path)
        lacking = [key for key in keys if key not in content]
    except OSError as error:
        raise TunesmithError(f"{path}: cannot be read: {error.strerror}. {_WITHOUT_IT}") from None
    except (ValueError, RecursionError) as error:
        reason = f" (it {error})" if "its own hash" in str(error) else ""
        raise TunesmithError(f"{path}: is damaged{reason}. {_WITHOUT_IT}") from None
    if lacking:
        raise TunesmithError(f"{path}: is damaged: it has no {lacking[0]}. {_WITHOUT_IT}")
    return content


_WITHOUT_IT = (
    "The run cannot go on without it; its checkpoints are model folders, and tunesmith train --model CHECKPOINT "
    "begins a new run from one."
)


@contextlib.contextmanager
def started_in(folder: str) -> Any:
    """Names in config.yaml are read from where the run began."""
    if not Path(folder).is_dir():
        yield
        return
    with contextlib.chdir(folder):
        yield


def choose_checkpoint(run: Path, name: str) -> Checkpoint | None:
    """The newest that verifies; what is wrong with newer ones is said.

    Raises:
        TunesmithError: there are checkpoints, but none verifies.
    """
    checkpoint, damaged = newest_valid(run)
    lines = [f"damaged: {folder.name}: {reason}" for folder, reason in sorted(damaged.items(), reverse=True)]
    if damaged and checkpoint is None:
        raise TunesmithError(
            f"{name}: no checkpoint verifies.\n  " + "\n  ".join(lines) + f"\nTo begin again at step 0, remove "
            f"{run / 'checkpoints'} first."
        )
    if checkpoint and any(folder.name > checkpoint.folder.name for folder in damaged):
        lines.append(f"going on from the newest one that verifies, {checkpoint.folder.name}")
    for line in lines:
        print(line)
    return checkpoint


def is_finished(run: Path, saved: Mapping[str, Any], state: Mapping[str, Any] | None) -> bool:
    """Whether the model in RUN is that of the newest checkpoint.

    Raises:
        TunesmithError: it has a model, but no checkpoint to go on from.
    """
    has_model = any((run / name).is_dir() for name in ("model", "adapter"))
    if has_model and state is None and "finished_at_step" in saved:
        raise TunesmithError(
            f"{run}: is finished, and its checkpoints are gone, so it cannot be made longer. To train its model "
            f"further: tunesmith train --model {run} --output NEW"
        )
    return has_model and state is not None and saved.get("finished_at_step") == state["step"]


def keep_threads(threads: int) -> None:
    """Sums over threads round differently for another number of them."""
    if torch.get_num_threads() != threads and not torch.cuda.is_available():
        print(f"threads: {threads}, as the run began ({torch.get_num_threads()} would be usual here)")
        torch.set_num_threads(threads)


def take_up(
    run: Path, again: str, config: RunConfig, setting: Setting, before: Mapping[str, Any], allowed: Sequence[str]
) -> tuple[Prepared, dict[str, Any]]:
    """The run's data, after everything that it is made of has been compared with what it began with.

    Args:
        again: the command as it was typed.

    Raises:
        TunesmithError: something that changes the mathematics is not what it was, and not allowed to be.
    """
    refusals, notes = compare_files(before["data"], config.data)
    now = make_guard(config, setting, before["store"], before["data"])
    more, others = compare_runs(before, now)
    changed = refuse_changes([*refusals, *more], allowed, run, again)
    for note in [*notes, *others]:
        print(f"note: {note}")
    damage = find_store_damage(run, before["store"])
    if set(changed) & set(RELABELS) or (damage and "data" in allowed):
        why = [f"changed {part}" for part in changed] or [damage]
        print(f"the data is read again, because of {', '.join(why)}")
        stores = relabel(run, config, setting)
        now = make_guard(config, setting, stores, describe_files(config.data))
    elif damage:
        raise TunesmithError(f"{damage}. To read the data again: {again} --allow data")
    return open_prepared(run, now["store"]), now


def open_prepared(run: Path, stores: Mapping[str, Mapping[str, str]]) -> Prepared:
    """The run's tokens and what became of its rows.

    Raises:
        TunesmithError: the ledger is damaged.
    """
    file, has_eval = run / "data_ledger.json", "eval_tokens" in stores
    saved = read_json(file, ("train", "eval"))
    try:
        ledger = Ledger.from_json(saved["train"])
        eval_ledger = Ledger.from_json(saved["eval"]) if has_eval else None
    except (TypeError, KeyError, ValueError, AttributeError):
        raise TunesmithError(f"{file}: is damaged. {_WITHOUT_IT}") from None
    eval_store = open_store(run / "eval_tokens") if has_eval else None
    return Prepared(open_store(run / "tokens"), ledger, eval_store, eval_ledger, stores)


def take_up_adapter(
    run: Path,
    again: str,
    facts: RunFacts,
    checkpoint: Checkpoint | None,
    saved: Mapping[str, Any],
    allowed: Sequence[str],
) -> None:
    """The checkpoint's weights into the adapter, once its base and its first matrices are those of before.

    Raises:
        TunesmithError: they are not.
    """
    adapter = facts.lm.adapter
    if changes_base(facts.config.lora):
        restore_initial(adapter, run, saved)
    if checkpoint:
        changes = same_base(checkpoint.folder, adapter.base_record)
        refuse_changes([f"model: the base's {change}" for change in changes], allowed, run, again)
        load_adapter_weights(adapter, checkpoint.load_adapter())


def find_store_damage(run: Path, stores: Mapping[str, Mapping[str, str]]) -> str:
    """Which file of the run's tokens is not what it was; empty where all are."""
    for folder, files in stores.items():
        now = describe_store(run / folder) if (run / folder).is_dir() else {}
        for file, sha256 in files.items():
            if now.get(file) != sha256:
                what = "has changed" if file in now else "is missing"
                return f"{run / folder / file}: {what} since the run began"
    return ""


def relabel(run: Path, config: RunConfig, setting: Setting) -> Mapping[str, Mapping[str, str]]:
    """New tokens in place of the old ones, with the ledger that goes with them; the hashes of the new ones.

    A kill in between leaves tokens that do not fit run.json: the same command reads the data again.
    """
    staging = run / f".tokens.{uuid.uuid4().hex[:8]}.partial"
    staging.mkdir()
    try:
        prepared = prepare_data(config.data, setting.encoder, setting.max_seq_len, staging)
        ledger = {"train": prepared.ledger.to_json(), "eval": None}
        if prepared.eval_ledger:
            ledger["eval"] = prepared.eval_ledger.to_json()
        write_text_atomic(run / "data_ledger.json", sealed(ledger))
        for folder in ("tokens", "eval_tokens"):
            shutil.rmtree(run / folder, ignore_errors=True)
            if (staging / folder).is_dir():
                (staging / folder).rename(run / folder)
        sync_path(run)
        return prepared.sha256
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_steps(
    name: str,
    facts: RunFacts,
    state: Mapping[str, Any],
    allowed: Sequence[str],
    is_extended: bool,
) -> None:
    """Another number of steps is fine where the learning rate allows it, or the run was finished.

    Raises:
        TunesmithError: the steps are already made, or the schedule of a run in the middle would change.
    """
    total, step = facts.plan.total_steps, state["step"]
    if total == state["total_steps"]:
        return
    if total < step:
        raise TunesmithError(f"{name}: is at step {step} already; --train.max_steps {total} lies before it.")
    optim = facts.config.optim
    was, will = lr_at(step, state["total_steps"], optim), lr_at(step, total, optim)
    if optim.schedule != "constant" and not is_extended and "schedule" not in allowed:
        raise TunesmithError(
            f"{name}: {total} steps instead of {state['total_steps']} would change the learning rate from here on "
            f"(step {step + 1}: {was:.2e} -> {will:.2e}), since optim.schedule is {optim.schedule}. If it is meant: "
            f"tunesmith resume {name} --train.max_steps {total} --allow schedule"
        )
    print(f"note: {total} steps instead of {state['total_steps']}; lr at step {step + 1}: {will:.2e}")


def describe_place(name: str, checkpoint: Checkpoint | None, state: Mapping[str, Any] | None, facts: RunFacts) -> str:
    if checkpoint is None or state is None:
        return f"{name} has no checkpoint yet; it begins at step 0"
    return f"{name} from {checkpoint.folder.name}: {facts.plan.total_steps - state['step']:,} steps to go"


def restore(trainer: Trainer, checkpoint: Checkpoint, state: Mapping[str, Any], is_extended: bool) -> None:
    """Everything that a checkpoint holds besides the weights; a run made longer has its patience back."""
    trainer.progress = Progress.from_json(state)
    trainer.saved_step = trainer.progress.step
    if is_extended:
        trainer.progress.stopped_early, trainer.progress.evals_without_gain = False, 0
    trainer.window = Window.from_json(state["window"])
    restore_optimizer(trainer.lm.model, trainer.optimizer, checkpoint.load_optimizer())
    trainer.scaler.load_state_dict(state["scaler"])
    restore_random_states(checkpoint.load_random(), state["random"])
