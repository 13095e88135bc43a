"""A step of several processes equals the step of one; and no step synchronizes with the device more often than needed."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import build_model, set_up_attention, tiny_config
from test_pack import make_store
from tunesmith.config.schema import OptimSection
from tunesmith.data.feed import Batches
from tunesmith.distributed.world import OneProcess
from tunesmith.model.head import choose_head_path
from tunesmith.model.loss import SupervisedLM
from tunesmith.training.evaluate import evaluate
from tunesmith.training.optim import build_optimizer
from tunesmith.training.precision import Precision
from tunesmith.training.step import NotFiniteError, StepResult, train_step
from tunesmith.training.transfer import OnTheWay

FP64, FP32 = Precision("fp32", torch.float64, None), Precision("fp32", torch.float32, None)
LENGTHS = [9, 3, 21, 14, 2, 17, 6, 30]
PACKS = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5]), np.array([6, 7])]


class ThreadWorld:
    """One of several threads that stand for processes; each has its own model."""

    def __init__(self, rank: int, size: int, shared: dict[int, Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.is_main = rank, size, rank == 0
        self._shared, self._barrier = shared, barrier

    def sum(self, values: Tensor) -> Tensor:
        return sum(self._gather(values.clone()), torch.zeros_like(values))

    def agree(self, wish: bool) -> bool:
        return any(self._gather(wish))

    def barrier(self) -> None:
        self._barrier.wait(30)

    def _gather(self, value: Any) -> list[Any]:
        self._shared[self.rank] = value
        self.barrier()
        values = [self._shared[rank] for rank in range(self.size)]
        self.barrier()
        return values


def build(dtype: torch.dtype) -> SupervisedLM:
    model = build_model(tiny_config("llama", initializer_range=0.02), dtype)
    assert set_up_attention(model, 64, 256).is_isolated
    return SupervisedLM(model, True, choose_head_path(model, True)).train()


def work(lm: SupervisedLM, batches: Batches, world: Any) -> tuple[StepResult, list[Tensor], float, float]:
    """A step without an update, its gradients, and an evaluation."""
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.0)
    kept: list[Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: kept.extend(p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in lm.parameters())
    )
    mine = batches.share(world.rank, world.size)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = train_step(lm, optimizer, mine, 0.0, FP64, scaler, world)
    found = evaluate(lm, batches, FP64, world)
    return result, kept, found.loss, found.token_accuracy


def in_threads(size: int, call: Any) -> list[Any]:
    shared, barrier, found = {}, threading.Barrier(size), [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = call(rank, ThreadWorld(rank, size, shared, barrier))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_compute_the_step_of_one(tmp_path: Path, size: int) -> None:
    """Counts, loss and evaluation are equal in all processes; gradients are shares whose sum is that of one process."""
    batches = Batches(make_store(tmp_path, LENGTHS), PACKS)
    whole, gradients, loss, accuracy = work(build(torch.float64), batches, OneProcess())
    models = [build(torch.float64) for _ in range(size)]
    found = in_threads(size, lambda rank, world: work(models[rank], batches, world))
    for result, _, eval_loss, eval_accuracy in found:
        assert (result.num_tokens, result.num_targets) == (whole.num_tokens, whole.num_targets)
        assert abs(result.loss - whole.loss) < 1e-10
        assert abs(eval_loss - loss) < 1e-10
        assert eval_accuracy == accuracy
    for wanted, *parts in zip(gradients, *(shares for _, shares, _, _ in found), strict=True):
        assert (sum(parts) - wanted).abs().max() < 1e-10


def test_no_process_updates_where_one_is_not_finite(tmp_path: Path) -> None:
    """A NaN reaches the others through the sum, so all processes stop and none waits."""
    batches = Batches(make_store(tmp_path, LENGTHS), PACKS)
    models = [build(torch.float64) for _ in range(2)]
    models[1].model.lm_head.weight.data[0] = float("nan")
    found = in_threads(2, lambda rank, world: work(models[rank], batches, world))
    assert [type(error) for error in found] == [NotFiniteError, NotFiniteError]


class Reads(TorchDispatchMode):
    """Count operations whose result is copied to the host."""

    WAITING = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])  # GPT-2 of transformers reads a number itself
def test_a_step_reads_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same number for any number of forwards; the same for an evaluation."""
    model = build_model(tiny_config(name, initializer_range=0.02))
    assert set_up_attention(model, 64, 256).is_isolated
    lm = SupervisedLM(model, True, choose_head_path(model, True)).train()
    optimizer = build_optimizer(model, OptimSection())
    batches = Batches(make_store(tmp_path, LENGTHS), PACKS)
    wait, transfers = OnTheWay.wait, []
    monkeypatch.setattr(OnTheWay, "wait", lambda numbers: transfers.append(1) or wait(numbers))
    with Reads() as reads:
        train_step(lm, optimizer, batches, 1.0, FP32, torch.amp.GradScaler("cpu", enabled=False))
        evaluate(lm, batches, FP32)
    assert not reads.found
    assert len(transfers) == 1
    with Reads() as reads:
        torch.tensor([1.0, 0.0]).nonzero()
        torch.ones(()).item()
    assert reads.found == {"nonzero": 1, "_local_scalar_dense": 1}
