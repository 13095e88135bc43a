"""Global state that `train` sets in its process, and its state afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--train.max_steps", 2)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Keep changes made here from other tests."""
    environment, is_on, benchmark = (
        dict(os.environ),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.use_deterministic_algorithms(is_on)
    torch.backends.cudnn.benchmark = benchmark


def global_state() -> dict[str, Any]:
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "folder": os.getcwd(),
    }


class Watcher:
    """A forward hook of a model module that records the global state during a run."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.handle = torch.nn.modules.module.register_module_forward_pre_hook(self.note)

    def note(self, module: torch.nn.Module, _: Any) -> None:
        if module.training and isinstance(module, torch.nn.Embedding):
            self.seen.append(global_state())


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    watcher = Watcher()
    yield watcher
    watcher.handle.remove()


def test_deterministic_is_set_while_training(
    run: Any, model_folder: Path, chats: Path, tmp_path: Path, watcher: Watcher
) -> None:
    torch.backends.cudnn.benchmark = True
    words = ["--model", model_folder, "--data", chats, *SMALL]
    assert run("train", *words, "--output", tmp_path / "plain")[0] == 0
    assert watcher.seen
    assert not any(state["deterministic"] for state in watcher.seen)
    watcher.seen.clear()
    assert run("train", *words, "--output", tmp_path / "same", "--train.deterministic", "true")[0] == 0
    assert all(state["deterministic"] and not state["benchmark"] and state["cublas"] for state in watcher.seen)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "same")
    ]
    assert losses[0] == losses[1]  # on a CPU all kernels are deterministic already


@pytest.mark.parametrize("deterministic", ["false", "true"])
def test_nothing_global_is_left_when_train_returns(
    run: Any, model_folder: Path, chats: Path, tmp_path: Path, deterministic: str
) -> None:
    torch.backends.cudnn.benchmark = True
    before = global_state()
    words = ["--model", model_folder, "--data", chats, "--output", tmp_path / "run", *SMALL]
    assert run("train", *words, "--train.deterministic", deterministic)[0] == 0
    assert global_state() == before
