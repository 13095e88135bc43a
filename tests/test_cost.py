"""A plan for a GPU is recognised on a CPU before step 1; nobody is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_model, tiny_config
from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.errors import InterruptedRun
from tunesmith.monitor.room import total_memory
from tunesmith.run.console import Silent
from tunesmith.run.start import run_training
from tunesmith.training.cost import Cost, count_step_flops, explain_cost, measure_flops_per_s

GIB = 2.0**30


class Watched(Silent):
    """Keeps the summary, and ends the run at its first record."""

    owns_process = False

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def summary(self, lines: list[tuple[str, str]]) -> None:
        self.lines = lines

    def step(self, record: dict[str, Any], remark: str) -> None:
        raise KeyboardInterrupt


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize(("path", "named"), [("new:tiny", "recipe:laptop-pretrain"), (None, "recipe:laptop-sft")])
def test_a_hopeless_plan_is_said_before_step_1(
    model_folder: Path, chats: Path, tmp_path: Path, path: str | None, named: str
) -> None:
    keys = {"model.path": path or str(model_folder), "model.tokenizer": str(model_folder), "data.train": [str(chats)],
            "data.max_seq_len": 64}  # fmt: skip
    for name, steps in (("long", 10**9), ("short", 10)):
        flags = {**keys, "train.output_dir": str(tmp_path / name), "train.max_steps": steps}
        watched = Watched()
        with pytest.raises(InterruptedRun):
            run_training(resolve_config(RunConfig, None, flags), watched)
        text = "\n".join(f"{name} {line}" for name, line in watched.lines)
        assert ("warning" in text) == (name == "long")
        assert (named in text) == (name == "long")


@pytest.mark.parametrize(
    ("cost", "gflops", "is_told"),
    [
        (Cost(104_900 * 6 * 23.7e6, 5, 6.9 * GIB), 40, True),  # minimind-pretrain on three books, a laptop's CPU
        (Cost(104_900 * 6 * 23.7e6, 5, 6.9 * GIB), 2000, False),  # the same on a server's
        (Cost(1024 * 6 * 1.6e6, 4000, 0.5 * GIB), 10, False),  # the size of a laptop recipe
        (Cost(2048 * 6 * 0.4e9, 10_000, 6.0 * GIB), 400, True),  # each step is short; the run takes days
        (Cost(1e9, 10, 100 * GIB), 400, True),
    ],
)
def test_time_and_memory_decide(cost: Cost, gflops: float, is_told: bool) -> None:
    reason = explain_cost(cost, gflops * 1e9, 16 * GIB)
    assert (reason is not None) == is_told
    if not is_told and gflops <= 10:
        assert cost.is_cheap()
    if is_told:
        assert not cost.is_cheap() or cost.memory > 16 * GIB


def test_the_time_is_a_lower_bound_from_the_weights_that_a_token_meets() -> None:
    model = build_model(tiny_config("llama"))
    products = sum(p.numel() for name, p in model.named_parameters() if "layers." in name and p.ndim == 2)
    assert count_step_flops(model, 100) == 600 * products
    model.requires_grad_(requires_grad=False)
    assert count_step_flops(model, 100) == 400 * products
    sparse = build_model(tiny_config("qwen3_moe"))
    experts = sum(p.numel() for name, p in sparse.named_parameters() if ".experts." in name)
    others = sum(
        p.numel()
        for name, p in sparse.named_parameters()
        if "layers." in name and p.ndim == 2 and ".experts." not in name
    )
    share = sparse.config.num_experts_per_tok / sparse.config.num_experts
    assert experts
    assert count_step_flops(sparse, 1) == pytest.approx(6 * (others + experts * share))


def test_the_machine_is_measured() -> None:
    assert 1e8 < measure_flops_per_s(128) < 1e15
    assert total_memory() > GIB / 4
