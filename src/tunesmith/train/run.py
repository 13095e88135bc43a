"""One whole run, from a config to RUN/model: prepare data, load the model, check both, train, save."""

from __future__ import annotations

import datetime
import errno
import json
import math
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig

from tunesmith.config import DataSection, RunConfig, dump_yaml
from tunesmith.data.encode import Encoder
from tunesmith.data.ledger import Ledger
from tunesmith.data.pack import plan_epoch
from tunesmith.data.prepare import label_rows
from tunesmith.data.read import find_sources, read_rows
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.errors import InterruptedRun, RunError, TunesmithError
from tunesmith.files import sha256_text, write_text_atomic
from tunesmith.model.isolation import Isolation, set_up_attention
from tunesmith.model.load import check_vocabulary, choose_max_seq_len, load_config, load_model
from tunesmith.model.loss import SupervisedLM
from tunesmith.model.save import save_model
from tunesmith.model.tokenizer import load_encoder
from tunesmith.train.checkpoint import checkpoint_path, list_checkpoints
from tunesmith.train.console import StepDisplay, print_summary
from tunesmith.train.loop import Plan, Trainer
from tunesmith.train.metrics import require_trackers, start_trackers
from tunesmith.train.optim import build_optimizer
from tunesmith.train.precision import Precision, choose_precision, make_deterministic, pick_device
from tunesmith.train.summary import RunFacts, model_card, summary_lines

MIN_MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Prepared:
    """Data on disk, ready to train."""

    train: TokenStore
    ledger: Ledger
    eval: TokenStore | None
    eval_ledger: Ledger | None


def run_training(config: RunConfig) -> Path:
    """Train as the config says; returns the folder of the finished model."""
    output = resolve_output(config.train.output_dir)
    require_trackers(list(config.train.trackers))
    refuse_shared_files(config.data)
    device = pick_device()
    precision = choose_precision(config.train.precision, device)
    if config.train.deterministic:
        make_deterministic()
    torch.manual_seed(config.train.seed)
    date = datetime.datetime.now().replace(microsecond=0)
    encoder = load_encoder(config.model, config.data, date)
    model_config = load_config(config.model, encoder.tokenizer)
    max_seq_len, capacity, length_remark = choose_lengths(config, model_config)
    with explained_failures(output, config, capacity) as running:
        with staged_folder(output) as staging:
            prepared = prepare_data(config.data, encoder, max_seq_len, staging)
            model = load_model(config.model, model_config, precision.weights, config.train.seed)
            check_vocabulary(model, encoder.tokenizer)
            model.to(device)
            isolation = set_up_attention(model, max_seq_len, capacity)
            lm = build_lm(model, isolation, config)
            plan = build_plan(config, prepared, capacity)
            facts = RunFacts(config, encoder, prepared.ledger, prepared.eval_ledger, lm, plan, isolation, precision,
                             device, max_seq_len, length_remark)  # fmt: skip
            print_summary(summary_lines(facts))
            write_text_atomic(staging / "config.yaml", dump_yaml(config))
            ledger = ledger_json(prepared, plan, encoder, date)
            write_text_atomic(staging / "data_ledger.json", json.dumps(ledger, indent=1))
        trainer = start_trainer(config, output, lm, encoder, plan, precision)
        running.append(trainer)
        train_to_end(trainer)
        return finish_run(trainer, facts)


def resolve_output(name: str) -> Path:
    """The RUN folder's real path; it must not exist yet or be empty.

    Raises:
        TunesmithError: it is in use, or no path at all.
    """
    try:
        output = Path(name).expanduser().resolve()
        if output.is_file():
            raise TunesmithError(f"{name}: is a file; give --output a folder that does not exist yet.")
        if output.is_dir() and any(output.iterdir()):
            what = "holds another run" if (output / "config.yaml").exists() else "is not empty"
            raise TunesmithError(f"{name}: {what}; give --output a new folder, or remove this one.")
    except (OSError, RuntimeError) as error:  # RuntimeError: ~somebody without a home
        reason = getattr(error, "strerror", None) or error
        raise TunesmithError(f"{name[:80]}: cannot be used as --output: {reason}") from None
    return output


def refuse_shared_files(data: DataSection) -> None:
    """Every name is looked up before a model loads, and no file may be read twice."""
    train, held_out = find_sources(data.train), find_sources(data.eval or [])
    train_files = [path.resolve() for path in train.files]
    both = set(train_files) & {path.resolve() for path in held_out.files} or set(train.hub) & set(held_out.hub)
    if both:
        name = next(iter(both))
        raise TunesmithError(
            f"{name if isinstance(name, Path) else name[0]}: stands in data.train and in data.eval; what is trained on "
            "cannot be evaluated on. Give other files, or data.eval_split to hold some rows out."
        )
    twice = [str(path) for path in train_files if train_files.count(path) > 1]
    if twice:
        raise TunesmithError(f"{twice[0]}: is named twice in data.train, so that its rows would count twice.")


def choose_lengths(config: RunConfig, model_config: PretrainedConfig) -> tuple[int, int, str]:
    """max_seq_len, tokens of one packed forward, and a remark on the first.

    A forward smaller than the default max_seq_len lowers it; against one that was asked for it is an error.
    """
    max_seq_len, remark = choose_max_seq_len(model_config, config.data.max_seq_len)
    capacity = config.train.micro_batch_tokens
    if capacity is None:
        return max_seq_len, max(max_seq_len, MIN_MICRO_BATCH_TOKENS), remark
    if config.data.max_seq_len is None and capacity < max_seq_len:
        return capacity, capacity, "that of train.micro_batch_tokens"
    return max_seq_len, capacity, remark


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A hidden folder to prepare in, whose contents become RUN at the end of the block; on any error nothing stays.

    It lies beside RUN, or inside it where RUN exists already and is empty (it may be a mount of its own).
    """
    name = f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    is_there = output.is_dir()
    staging = output / name if is_there else output.with_name(name)
    missing = [parent for parent in staging.parents if not parent.exists()]
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise TunesmithError(f"{output}: cannot be made: {error.strerror}.") from None
    try:
        yield staging
        if is_there:
            for child in staging.iterdir():
                child.rename(output / child.name)
            staging.rmdir()
        else:
            staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing:
            parent.rmdir()
        raise


def prepare_data(data: DataSection, encoder: Encoder, max_seq_len: int, folder: Path) -> Prepared:
    """Label all rows into stores below `folder`; too many bad rows end it here."""
    sources = find_sources(data.train)
    eval_sources = find_sources(data.eval) if data.eval else None
    ledger = Ledger(passed_over=[str(path) for path in sources.passed_over])
    with StoreWriter(folder / "tokens") as writer:
        for row in label_rows(read_rows(sources), encoder, data, max_seq_len):
            ledger.add(row)
            writer.add(row)
    ledger.raise_if_unusable(data.max_refused)
    if eval_sources is None:
        return Prepared(open_store(folder / "tokens"), ledger, None, None)
    eval_ledger = Ledger(passed_over=[str(path) for path in eval_sources.passed_over])
    unlimited = data.model_copy(update={"limit": None})
    with StoreWriter(folder / "eval_tokens") as writer:
        for row in label_rows(read_rows(eval_sources), encoder, unlimited, max_seq_len):
            eval_ledger.add(row)
            writer.add(row)
    eval_ledger.raise_if_unusable(data.max_refused)
    return Prepared(open_store(folder / "tokens"), ledger, open_store(folder / "eval_tokens"), eval_ledger)


def split_eval(store: TokenStore, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers to train and to evaluate on; whole rows go to one side.

    Where there are too few rows to hold any out (one long text), its pieces are split instead.
    """
    everything = np.arange(len(store))
    if not share:
        return everything, everything[:0]
    row_ids = store.file_numbers * (int(store.row_numbers.max()) + 1) + store.row_numbers
    units = np.unique(row_ids)
    if len(units) * share < 1:
        row_ids = units = everything
    num_held_out = max(1, round(len(units) * share))
    if num_held_out >= len(units):
        raise TunesmithError(
            f"data.eval_split {share}: {len(units)} rows are too few to hold any out. Give data.eval, or more data."
        )
    held_out = np.random.default_rng([seed, 0x5EED]).choice(units, num_held_out, replace=False)
    is_eval = np.isin(row_ids, held_out)
    return everything[~is_eval], everything[is_eval]


def build_lm(model: nn.Module, isolation: Isolation, config: RunConfig) -> SupervisedLM:
    lm = SupervisedLM(model, is_packed=isolation.is_isolated)
    if config.train.gradient_checkpointing:
        try:
            model.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError:
            raise TunesmithError(
                f"train.gradient_checkpointing: {type(model).__name__} does not support it; set it to false."
            ) from None
    if config.train.compile:
        model.get_decoder().compile(dynamic=True)
    return lm


def build_plan(config: RunConfig, prepared: Prepared, capacity: int) -> Plan:
    train = config.train
    train_ids, held_out = split_eval(prepared.train, config.data.eval_split, train.seed)
    eval_store = prepared.eval or (prepared.train if len(held_out) else None)
    eval_packs: list[np.ndarray] = []
    if eval_store is not None:
        eval_ids = held_out if prepared.eval is None else np.arange(len(eval_store))
        packs = plan_epoch(eval_store.lengths[eval_ids], capacity, 0, 0)
        eval_packs = [eval_ids[pack] for pack in packs]
    plan = Plan(prepared.train, train_ids, eval_store, eval_packs, capacity, train.seed, train.grad_accum_steps,
                total_steps=0, first_epoch=[])  # fmt: skip
    plan = Plan(**{**plan.__dict__, "first_epoch": plan.epoch(0)})
    return Plan(**{**plan.__dict__, "total_steps": train.max_steps or count_steps(plan, train.epochs)})


def count_steps(plan: Plan, epochs: float) -> int:
    """Steps of so many epochs; each epoch is packed anew and may differ by a pack or two."""
    total = 0.0
    for number in range(math.ceil(epochs)):
        packs = plan.first_epoch if number == 0 else plan.epoch(number)
        total += math.ceil(len(packs) / plan.grad_accum_steps) * min(1.0, epochs - number)
    return max(1, round(total))


def ledger_json(prepared: Prepared, plan: Plan, encoder: Encoder, date: datetime.datetime) -> dict[str, Any]:
    template, store = encoder.template, prepared.train
    trained = set(plan.train_ids.tolist())
    return {
        # rows of the training files that data.eval_split holds out (pieces of rows, where one long text was split)
        "held_out": [store.where(index) for index in range(len(store)) if index not in trained],
        "train": prepared.ledger.to_json(),
        "eval": prepared.eval_ledger.to_json() if prepared.eval_ledger else None,
        "template": {
            "source": template.source if template else "none",
            "sha256": sha256_text(template.text) if template else None,
            "date": date.isoformat(),
            "stop_token": encoder.stop.text,
        },
    }


def start_trainer(
    config: RunConfig, output: Path, lm: SupervisedLM, encoder: Encoder, plan: Plan, precision: Precision
) -> Trainer:
    optimizer = build_optimizer(lm.model, config.optim)
    trackers = start_trackers(list(config.train.trackers), output, config.model_dump(mode="json"))
    return Trainer(config, output, lm, optimizer, encoder, plan, precision, trackers, on_log=lambda record: None)


def train_to_end(trainer: Trainer) -> None:
    torch.manual_seed(trainer.config.train.seed)  # dropout does not depend on how the model was loaded
    display = StepDisplay(trainer.plan.total_steps)
    trainer.on_log = display.show
    try:
        trainer.train()
    finally:
        display.close()
        for tracker in trainer.trackers:
            tracker.finish()


def finish_run(trainer: Trainer, facts: RunFacts) -> Path:
    """Write RUN/model: the last step's weights, or the best evaluated ones where those came earlier."""
    progress, run = trainer.progress, trainer.run
    model = trainer.lm.model
    is_best_earlier = progress.best_step is not None and progress.best_step != progress.step
    if is_best_earlier:
        folder = checkpoint_path(run, progress.best_step)
        model = type(model).from_pretrained(folder, dtype=trainer.precision.weights)
        print(f"best eval_loss {progress.best_eval_loss:.4f} was at step {progress.best_step}: that model is saved")
    save_model(model, trainer.encoder, model_card(facts, progress), run / "model")
    if progress.step < trainer.plan.total_steps:
        print(f"stopped early at step {progress.step}: eval_loss no longer fell")
    named = Path(trainer.config.train.output_dir)  # as the person wrote it
    print(f"model saved: {named / 'model'}\ntalk to it: tunesmith chat {named}")
    return run / "model"


@contextmanager
def explained_failures(run: Path, config: RunConfig, capacity: int) -> Iterator[list[Trainer]]:
    """Turn what can go wrong during a run into one message with the last good checkpoint.

    Yields a list that the trainer is put into once there is one.
    """
    running: list[Trainer] = []

    def where() -> str:
        return f"at step {running[0].progress.step}" if running else "before step 1"

    try:
        yield running
    except KeyboardInterrupt:
        if not running:
            raise
        raise InterruptedRun(f"interrupted {where()}. {_last_checkpoint(run)}") from None
    except torch.OutOfMemoryError:
        raise RunError(f"{explain_out_of_memory(config, capacity)} {_last_checkpoint(run)}") from None
    except (OSError, SafetensorError) as error:
        if not _is_about_disk(error):
            raise
        raise RunError(f"{run}: no room left on the disk {where()}. Make room there. {_last_checkpoint(run)}") from None
    except RunError as error:
        raise RunError(f"{error} {_last_checkpoint(run)}") from None


def _is_about_disk(error: Exception) -> bool:
    """safetensors wraps the system's error in one of its own, with the number in its text."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"os error {code}" in str(error) for code in codes)


def _last_checkpoint(run: Path) -> str:
    checkpoints = list_checkpoints(run)
    return f"Last good checkpoint: {checkpoints[-1]}" if checkpoints else "There is no checkpoint yet."


def explain_out_of_memory(config: RunConfig, capacity: int) -> str:
    """What to lower and by how much; halving the forward and doubling the accumulation trains the same."""
    train = config.train
    half, longest = capacity // 2, config.data.max_seq_len or capacity
    advice = []
    if half >= longest:
        advice.append(
            f"set train.micro_batch_tokens {half} and train.grad_accum_steps {train.grad_accum_steps * 2} (same step, "
            "half the activations)"
        )
    else:
        advice.append(f"set data.max_seq_len {longest // 2} and train.micro_batch_tokens {half}")
    if not train.gradient_checkpointing:
        advice.append("set train.gradient_checkpointing true")
    if train.precision != "bf16_pure":
        advice.append("set train.precision bf16_pure (half the weights and optimizer state)")
    return f"the GPU is out of memory. In this order: {'; '.join(advice)}."
