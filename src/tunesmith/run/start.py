"""One whole run, from a config to RUN/model: prepare data, load the model, check both, train, save."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from tunesmith.adapters.adapter import (
    add_adapter,
    cast_trained,
    changes_base,
    load_adapter_weights,
    quantization_config,
    require_quantization,
)
from tunesmith.adapters.base import record_base
from tunesmith.adapters.initial import INITIAL, keep_initial, require_initial
from tunesmith.config.runfile import dump_yaml
from tunesmith.config.schema import ModelSection, RunConfig
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.files import sealed, wait_if_asked, write_text_atomic
from tunesmith.model.device import pick_device
from tunesmith.model.isolation import Isolation, set_up_attention
from tunesmith.model.lengths import choose_lengths
from tunesmith.model.load import check_vocabulary, extend_vocabulary, load_config, load_model
from tunesmith.model.loss import SupervisedLM
from tunesmith.model.reopen import require_one_reading
from tunesmith.model.save import save_adapter, save_model
from tunesmith.model.source import ModelSource, find_model
from tunesmith.model.tokenizer import load_encoder
from tunesmith.run.console import StepDisplay, print_summary
from tunesmith.run.failures import explained_failures
from tunesmith.run.folder import require_room, resolve_output
from tunesmith.run.identity import describe_files, describe_run, run_id
from tunesmith.run.summary import RunFacts, model_card, summary_lines
from tunesmith.runfolder import RUN_FILE
from tunesmith.staging import locked, staged_folder
from tunesmith.tensors import find_not_finite
from tunesmith.train.checkpoint import Checkpoint, DamagedError, checkpoint_path, find_damage, read_checkpoint
from tunesmith.train.interrupt import StopRequest
from tunesmith.train.loop import Trainer
from tunesmith.train.metrics import require_trackers, start_trackers
from tunesmith.train.optim import build_optimizer, require_optimizer
from tunesmith.train.plan import Prepared, build_plan, ledger_json, prepare_data, refuse_shared_files
from tunesmith.train.precision import Precision, choose_precision, make_deterministic
from tunesmith.train.randomness import seed_all
from tunesmith.train.saver import Saver


@dataclass(frozen=True)
class Setting:
    """What a config comes to on this machine, before any data is read."""

    device: torch.device
    precision: Precision
    encoder: Encoder
    model_config: PretrainedConfig
    max_seq_len: int
    capacity: int
    length_remark: str


def run_training(config: RunConfig) -> Path:
    """Train as the config says; returns the folder of the finished model."""
    output = resolve_output(config.train.output_dir)
    require_trackers(list(config.train.trackers))
    require_quantization(config.lora)
    require_optimizer(config.optim.name)
    refuse_shared_files(config.data)
    date = datetime.datetime.now().replace(microsecond=0)
    setting = choose_setting(config, date)
    require_one_reading(config.model, setting.encoder, setting.model_config, config.lora.kind != "none")
    with StopRequest() as stop, explained_failures(output, config, setting.capacity) as running:
        with staged_folder(output) as staging:
            prepared = prepare_data(config.data, setting.encoder, setting.max_seq_len, staging)
            facts = assemble(config, setting, prepared, config.model)
            first = {INITIAL: keep_initial(facts.lm.adapter, staging)} if changes_base(config.lora) else {}
            room = require_room(staging, facts.lm, config, facts.plan.total_steps)
            print_summary([*summary_lines(facts), ("room", room)])
            guard = make_guard(config, setting, prepared.sha256, describe_files(config.data))
            facts_of_run = {"id": run_id(output, date.isoformat()), "date": date.isoformat(), "cwd": os.getcwd(),
                            "guard": guard, **first}  # fmt: skip
            write_run_files(staging, facts, date, facts_of_run)
        with locked(output):
            trainer = build_trainer(output, facts, stop, facts_of_run)
            running.append(trainer)
            seed_all(config.train.seed)  # dropout does not depend on how the model was loaded
            train_to_end(trainer)
            return finish_run(trainer, facts, facts_of_run)


def choose_setting(config: RunConfig, date: datetime.datetime) -> Setting:
    device = pick_device()
    precision = choose_precision(config.train.precision, device)
    if config.train.deterministic:
        make_deterministic()
    torch.manual_seed(config.train.seed)
    encoder = load_encoder(config.model, config.data, date)
    model_config = load_config(config.model, encoder.tokenizer)
    lengths = choose_lengths(model_config, config.data.max_seq_len, config.train.micro_batch_tokens)
    return Setting(device, precision, encoder, model_config, lengths.max_seq_len, lengths.capacity, lengths.remark)


def assemble(config: RunConfig, setting: Setting, prepared: Prepared, weights: ModelSection) -> RunFacts:
    """Model, attention and plan.

    Args:
        weights: where the model's weights come from: the model that was named, or a checkpoint.
    """
    precision, is_adapter = setting.precision, config.lora.kind != "none"
    source = find_model(config.model.path)
    if is_adapter:
        require_real_base(config.model.path, source)
    # frozen weights need no fp32 copy: autocast computes with their half precision anyway
    dtype = precision.autocast if is_adapter and precision.autocast else precision.weights
    quantization = quantization_config(config.lora, dtype)
    tokenizer = setting.encoder.tokenizer
    is_new = weights is config.model  # a checkpoint of the whole model has the added rows already, trained
    model_config = setting.model_config if is_new else load_config(weights, tokenizer)
    model = load_model(weights, model_config, dtype, config.train.seed, quantization)
    new_ids = extend_vocabulary(model, tokenizer, config.model.add_tokens) if is_new else []
    check_vocabulary(model, tokenizer)
    if quantization is None:
        model.to(setting.device)
    own_memory(model)
    refuse_not_finite(config.model.path, model)
    adapter = None
    if is_adapter:
        torch.manual_seed(config.train.seed)
        base = record_base(source.kind, source.name, config.model.revision)
        adapter = add_adapter(model, config.lora, name_of_base(config.model.path), new_ids, config.model.revision, base)
        if precision.autocast:
            cast_trained(model, precision.weights)
    isolation = set_up_attention(model, setting.max_seq_len, setting.capacity)
    lm = build_lm(model, isolation, config, adapter)
    plan = build_plan(config, prepared, setting.capacity)
    return RunFacts(config, setting.encoder, prepared.ledger, prepared.eval_ledger, lm, plan, isolation,
                    setting.precision, setting.device, setting.max_seq_len, setting.length_remark)  # fmt: skip


def require_real_base(path: str, source: ModelSource) -> None:
    """Raises:
    ModelError: nobody else could open the adapter, because its base lies nowhere.
    """
    if source.adapter:
        raise ModelError(
            f"{path}: is already an adapter; peft and other tools cannot load a second adapter on top of it. Merge it "
            f"first: tunesmith merge {path} --output MERGED; then train on MERGED."
        )
    if source.kind == "preset":
        raise ModelError(
            f"{path}: has random weights that are saved nowhere, so an adapter on them could never be opened. Train it "
            "in full (--lora.kind none), and an adapter on that."
        )


def name_of_base(path: str) -> str:
    """What goes into adapter_config.json: an absolute folder, or the hub id."""
    return str(Path(path).expanduser().resolve()) if find_model(path).kind == "local" else path


def own_memory(model: nn.Module) -> None:
    """Every weight in memory that torch aligned: a file's view may lie anywhere, and sums then round otherwise."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():  # others are quantised, and keep their own books
            tensor.data = tensor.data.clone()


def refuse_not_finite(name: str, model: nn.Module) -> None:
    """Raises:
    ModelError: the model's own weights hold NaN or infinities.
    """
    if found := find_not_finite(model.state_dict()):
        raise ModelError(
            f"{name}: its weights are not finite ({found} holds NaN or an infinity), and no training mends that. The "
            "file is damaged, or was saved by a run that had failed."
        )


def build_lm(model: nn.Module, isolation: Isolation, config: RunConfig, adapter: Any) -> SupervisedLM:
    lm = SupervisedLM(model, isolation.is_isolated, adapter)
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


def make_guard(
    config: RunConfig, setting: Setting, stores: Mapping[str, Mapping[str, str]], files: Mapping[str, Any]
) -> dict[str, Any]:
    """What the run is made of.

    Args:
        stores: hashes of its tokens, as in Prepared.sha256.
        files: its data, from describe_files.
    """
    return describe_run(config, setting.encoder, setting.model_config, files) | {"store": stores}


def write_run_files(folder: Path, facts: RunFacts, date: datetime.datetime, facts_of_run: dict[str, Any]) -> None:
    """config.yaml, data_ledger.json, and run.json: what makes the folder a run that can be gone on with."""
    ledger = ledger_json(facts.ledger, facts.eval_ledger, facts.plan, facts.encoder, date)
    write_text_atomic(folder / "data_ledger.json", sealed(ledger))
    write_text_atomic(folder / "config.yaml", dump_yaml(facts.config))
    write_text_atomic(folder / RUN_FILE, sealed(facts_of_run))


def build_trainer(
    run: Path, facts: RunFacts, stop: StopRequest, facts_of_run: dict[str, Any], last_step: int | None = None
) -> Trainer:
    """Args:
    last_step: of the checkpoint that the run goes on from.
    """
    config, model = facts.config, facts.lm.model
    optimizer = build_optimizer(model, config.optim, config.lora.lr_ratio)
    names, record = list(config.train.trackers), config.model_dump(mode="json")
    trackers = start_trackers(names, run, record, facts_of_run["id"], last_step)
    saver = Saver(run, facts.lm, facts.encoder, facts_of_run["guard"], config.train.keep_checkpoints)
    scaler = facts.precision.scaler(facts.device)
    return Trainer(config, run, facts.lm, optimizer, scaler, facts.plan, facts.precision, saver, trackers, stop,
                   on_log=lambda record, remark: None)  # fmt: skip


def train_to_end(trainer: Trainer) -> None:
    display = StepDisplay(trainer.plan.total_steps, trainer.progress.step)
    trainer.on_log = display.show
    trainer.stop.defer()
    try:
        trainer.train()
    except BaseException:
        with contextlib.suppress(Exception):
            trainer.saver.wait()  # what was taken before is still worth having
        for tracker in trainer.trackers:
            with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
                tracker.finish()
        raise
    else:
        for tracker in trainer.trackers:
            tracker.finish()
    finally:
        display.close()


def finish_run(trainer: Trainer, facts: RunFacts, facts_of_run: dict[str, Any]) -> Path:
    """Write RUN/model or RUN/adapter: the last step's weights, or the best evaluated ones where those came earlier."""
    progress, run = trainer.progress, trainer.run
    model: Any = trainer.lm.model
    what = "model" if trainer.lm.adapter is None else "adapter"
    if progress.best_step is not None and progress.best_step != progress.step:
        best = find_best(run, progress.best_step)
        if best is None:
            print(f"the checkpoint of the best step, {progress.best_step}, is gone: the last step's {what} is saved")
        else:
            print(
                f"best eval_loss {progress.best_eval_loss:.4f} was at step {progress.best_step}: that {what} is saved"
            )
            if trainer.lm.adapter is None:
                model = type(model).from_pretrained(best.folder, dtype=trainer.precision.weights)
            else:
                load_adapter_weights(trainer.lm.adapter, best.load_adapter())
    card = model_card(facts, progress)
    if trainer.lm.adapter is None:
        save_model(model, facts.encoder, card, run / "model")
    else:
        initial = require_initial(run, facts_of_run) if changes_base(trainer.config.lora) else None
        save_adapter(model, trainer.lm.adapter, facts.encoder, card, run / "adapter", initial)
    wait_if_asked()
    # only now: a run that is made longer has the model of before until here
    write_text_atomic(run / RUN_FILE, sealed(facts_of_run | {"finished_at_step": progress.step}))
    if progress.step < trainer.plan.total_steps:
        print(f"stopped early at step {progress.step}: eval_loss no longer fell")
    if progress.skipped:
        print(f"{progress.skipped} steps were left out, their loss was not finite (metrics.jsonl names the rows)")
    named = Path(trainer.config.train.output_dir)  # as the person wrote it
    print(f"{what} saved: {named / what}\ntalk to it: tunesmith chat {named}")
    if what == "adapter":
        print(f"merge it into its base: tunesmith merge {named} --output {named}-merged")
    return run / what


def find_best(run: Path, step: int) -> Checkpoint | None:
    """The best evaluated step's checkpoint, if it verifies."""
    try:
        checkpoint = read_checkpoint(checkpoint_path(run, step))
    except DamagedError:
        return None
    return None if find_damage(checkpoint) else checkpoint
