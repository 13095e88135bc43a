"""Under torchrun: the steps of several processes against those of one, in float64; process 0 prints the differences.

Usage: gradients_of_processes.py FOLDER (with a token store)

Prints a JSON object: case -> [largest difference of a gradient, of a loss or norm, of a weight at the end].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conftest import build_model, set_up_attention, tiny_config
from tunesmith.adapters.adapter import add_adapter
from tunesmith.config.schema import LoraSection, OptimSection
from tunesmith.config.train_keys import TrainSection
from tunesmith.data.feed import Batches
from tunesmith.data.store import open_store
from tunesmith.distributed.fsdp import Sharded
from tunesmith.distributed.processes import joined_world
from tunesmith.distributed.spread import Replicated, Spread
from tunesmith.distributed.world import OneProcess, World
from tunesmith.model.head import choose_head_path
from tunesmith.model.loss import SupervisedLM
from tunesmith.model.probe import probe_model
from tunesmith.training.evaluate import evaluate
from tunesmith.training.optim import build_optimizer
from tunesmith.training.precision import Precision
from tunesmith.training.step import train_step

FP64 = Precision("fp32", torch.float64, None)
# an uneven number of packs; one process has nothing to do in the second step
STEPS = ([[0, 1, 2], [3, 4], [5], [6, 7], [8]], [[9, 10]], [[11], [12, 13], [14, 15, 16]])
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "gpt2 dropout": ("gpt2", DROPOUT),
    "moe": ("qwen3_moe", {"router_aux_loss_coef": 0.0}),
    "moe router loss": ("qwen3_moe", {"router_aux_loss_coef": 0.1, "output_router_logits": True}),
}
CASES = [
    (model, kind, is_packed)
    for model in MODELS
    for kind in ("none", "lora")
    for is_packed in ((True, False) if model in ("llama", "moe", "gpt2 dropout") else (True,))
]


def build(model_name: str, kind: str, is_packed: bool) -> SupervisedLM:
    name, values = MODELS[model_name]
    model = build_model(tiny_config(name, initializer_range=0.02, **values), torch.float64)
    adapter = None
    if kind == "lora":
        torch.manual_seed(0)
        adapter = add_adapter(model, LoraSection(kind="lora", rank=4, dropout=0.1), "base")
    if is_packed:
        assert set_up_attention(model, 64, 256).is_isolated
    return SupervisedLM(model, is_packed, choose_head_path(probe_model(model), is_packed), adapter).train()


def work(
    case: tuple[str, str, bool], folder: Path, world: World, spread: Spread
) -> tuple[list[torch.Tensor], list[float], list[torch.Tensor]]:
    """Gradients and numbers of each step, and the weights after the last one."""
    lm = build(*case)
    spread.prepare(lm)
    optimizer = build_optimizer(lm.model, OptimSection(lr=1e-3))
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    gradients: list[torch.Tensor] = []

    def keep(*_: Any) -> None:
        whole = (spread.whole(torch.zeros_like(p) if p.grad is None else p.grad) for p in trained)
        gradients.extend(whole)

    optimizer.register_step_pre_hook(keep)
    scaler, store = torch.amp.GradScaler("cpu", enabled=False), open_store(folder)
    numbers: list[float] = []
    for number, packs in enumerate(STEPS):
        batches = Batches(store, [np.array(pack) for pack in packs], case[2])
        mine = batches.share(world.rank, world.size)
        result = train_step(lm, optimizer, mine, 1.0, FP64, scaler, world, spread, seed=(0, number))
        numbers += [result.loss, result.grad_norm, float(result.num_tokens), float(result.num_targets)]
    numbers += evaluate(lm, batches, FP64, world).to_record().values()
    return gradients, numbers, [spread.whole(p) for p in trained]


def as_float64(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def largest(ours: list[Any], theirs: list[Any]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((as_float64(one) - as_float64(other)).abs().max()) for one, other in pairs)


def spread_of(name: str, world: World) -> Spread:
    return Replicated(world) if name == "ddp" else Sharded(world, torch.device("cpu"), None)


def compare_all(folder: Path, world: World) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for case in CASES:
        wanted = work(case, folder, OneProcess(), Spread())
        for name in ("ddp", "fsdp"):
            got = work(case, folder, world, spread_of(name, world))
            title = f"{name} {case[0]} {case[1]} {'packed' if case[2] else 'one document a forward'}"
            if world.is_main:  # the others have no whole tensors
                found[title] = [largest(one, other) for one, other in zip(got, wanted, strict=True)]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined_world(TrainSection(output_dir="unused", parallel="fsdp")) as world:
        found = compare_all(Path(sys.argv[1]), world)
    if world.is_main:
        print(json.dumps(found))
