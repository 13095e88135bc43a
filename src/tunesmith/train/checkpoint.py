"""Checkpoints: a model folder with the optimizer beside it, appearing whole under its name or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.data.encode import Encoder
from tunesmith.files import atomic_directory
from tunesmith.model.save import write_model


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, encoder: Encoder, state: dict[str, Any]
) -> Path:
    """Write step-NNNNNN: weights in training precision, optimizer state, and `state` (which has the step)."""
    folder = checkpoint_path(run, state["step"])
    with atomic_directory(folder) as partial:
        write_model(model, encoder, partial)
        save_file(optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    return folder


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, so that it needs no order to be read back in."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            tensors[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value).contiguous()
    return tensors


def list_checkpoints(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))


def prune_checkpoints(run: Path, keep: int, best_step: int | None) -> None:
    """Delete the oldest beyond `keep`; the best one stays."""
    best = checkpoint_path(run, best_step) if best_step is not None else None
    for old in list_checkpoints(run)[:-keep]:
        if old != best:
            shutil.rmtree(old)
