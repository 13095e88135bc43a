"""fp16's loss scale is saved in checkpoints: the steps after a resume equal those without the interruption.

The command refuses fp16 on a CPU (test_bad_input.py), so the train step and the checkpoint are called directly, with
torch's CPU scaler. On a machine with a GPU the last test does the same with the command.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import build_model, set_up_attention, tiny_config
from tunesmith.config.schema import OptimSection
from tunesmith.data.feed import Batches
from tunesmith.data.store import TokenStore
from tunesmith.distributed.spread import Spread
from tunesmith.encode.encoder import Encoder
from tunesmith.model.head import choose_head_path
from tunesmith.model.loss import SupervisedLM
from tunesmith.runfolder import RunFolder
from tunesmith.training.checkpoint import (
    Snapshot,
    copy_optimizer,
    copy_weights,
    find_damage,
    read_checkpoint,
    restore_optimizer,
    write_checkpoint,
)
from tunesmith.training.optim import build_optimizer
from tunesmith.training.precision import Precision
from tunesmith.training.progress import Progress, TrainState, Window
from tunesmith.training.step import train_step

FP16 = Precision("fp16", torch.float32, torch.float16)
STEPS = 12


def batches(number: int) -> Batches:
    """One pack of two documents, different in each step."""
    ids = np.random.default_rng(number).integers(3, 400, size=24).astype(np.uint32)
    twelve, rows = np.array([11, 11]), np.array([1, 2])
    shard = (ids, np.ones(24, np.uint8))
    ends = np.array([0, 12, 24])
    store = TokenStore([shard], ends[::2], ends, twelve, rows - rows, rows, ["x.jsonl"])
    return Batches(store, [np.array([0, 1])])


class Run:
    """The parts of an fp16 run, without the command."""

    def __init__(self, weights: dict[str, torch.Tensor] | None = None) -> None:
        model = build_model(tiny_config("qwen3"))
        if weights:
            model.load_state_dict(weights, strict=False)  # tied weights are saved once
        assert set_up_attention(model, 24, 24).is_isolated
        self.lm = SupervisedLM(model, True, choose_head_path(model, True))
        self.optimizer = build_optimizer(model, OptimSection(lr=1e-3))
        # with this scale the first steps overflow, and it grows again during the test
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        self.scales: list[float] = []

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for number in range(first, last):
            result = train_step(self.lm, self.optimizer, batches(number), 1.0, FP16, self.scaler)
            losses.append(result.loss)
            self.scales.append(self.scaler.get_scale())
        return losses

    def save(self, run: Path, step: int, encoder: Encoder) -> Path:
        state = TrainState(Progress(step), STEPS, Window(), self.scaler.state_dict(), {}).to_json()
        weights, optimizer = copy_weights(self.lm, Spread()), copy_optimizer(self.lm.model, self.optimizer, Spread())
        snapshot = Snapshot(weights, optimizer, {"cpu": torch.get_rng_state()}, state)
        return write_checkpoint(RunFolder(run), snapshot, self.lm, encoder, {})


def test_the_scaler_belongs_to_fp16_alone() -> None:
    cpu = torch.device("cpu")
    assert FP16.scaler(cpu).is_enabled()
    assert FP16.context(cpu).fast_dtype == torch.float16  # type: ignore[attr-defined]
    for other in (Precision("fp32", torch.float32, None), Precision("bf16", torch.float32, torch.bfloat16)):
        assert not other.scaler(cpu).is_enabled()


@pytest.mark.parametrize("at", [2, 7])
def test_the_loss_scale_goes_through_a_checkpoint(tmp_path: Path, encoder: Encoder, at: int) -> None:
    straight = Run()
    wanted = straight.train(0, STEPS)
    assert min(straight.scales) < straight.scales[0] < 2.0**20  # it overflowed, more than once
    assert any(after > before for before, after in zip(straight.scales, straight.scales[1:], strict=False))

    first = Run()
    losses = first.train(0, at)
    checkpoint = read_checkpoint(first.save(tmp_path, at, encoder))
    assert not find_damage(checkpoint)
    second = Run(load_file(checkpoint.folder / "model.safetensors"))
    restore_optimizer(second.lm.model, second.optimizer, checkpoint.open_optimizer(), Spread())
    second.scaler.load_state_dict(dict(checkpoint.load_state().scaler))
    assert second.scaler.state_dict() == first.scaler.state_dict()
    losses += second.train(at, STEPS)
    assert losses == wanted
    assert first.scales + second.scales == straight.scales
    for name, tensor in straight.lm.model.state_dict().items():
        assert torch.equal(second.lm.model.state_dict()[name], tensor), name


def test_without_its_scale_a_run_would_go_on_differently(tmp_path: Path, encoder: Encoder) -> None:
    """The test above can fail: without the scale, the steps differ."""
    straight = Run()
    wanted = straight.train(0, STEPS)
    first = Run()
    losses = first.train(0, 7)
    checkpoint = read_checkpoint(first.save(tmp_path, 7, encoder))
    second = Run(load_file(checkpoint.folder / "model.safetensors"))
    restore_optimizer(second.lm.model, second.optimizer, checkpoint.open_optimizer(), Spread())
    assert losses + second.train(7, STEPS) != wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="train.precision fp16 needs a GPU")
def test_a_resumed_fp16_run_ends_in_the_same_weights(run: Any, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    words = ["--model", model_folder, "--data", chats, "--data.max_seq_len", 64, "--train.micro_batch_tokens", 128,
             "--train.precision", "fp16", "--train.deterministic", "true", "--train.max_steps", 8, "--train.save_steps", 4]  # fmt: skip
    code, _, err = run("train", *words, "--output", tmp_path / "run")
    assert code == 0, err
    shutil.copytree(tmp_path / "run", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "model")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-000008")
    state = json.loads((tmp_path / "part" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["scaler"]["scale"] > 0
    assert run("resume", tmp_path / "part")[0] == 0
    one, other = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "part"))
    assert one == other
