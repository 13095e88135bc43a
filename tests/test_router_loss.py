"""train.router_loss: what each choice computes, over what, and that a run keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import build_model, killed_after, save_folder, tiny_config
from test_loss import BATCHINGS, FP64, LENGTHS
from test_pack import make_store
from tunesmith.config.schema import RunConfig
from tunesmith.data.feed import Batches
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.isolation import use_packed_attention
from tunesmith.model.loss import Router, SupervisedLM, find_router
from tunesmith.run.identity import compare_runs
from tunesmith.run.records import Fingerprint
from tunesmith.training.step import train_step

LENS = [5, 1, 12, 30]
FAST = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--train.max_steps", 4, "--train.save_steps", 2, "--train.save_minutes", "null",
        "--train.keep_checkpoints", 9, "--optim.lr", 1e-2)  # fmt: skip


def balance(logits: Tensor, top_k: int) -> float:
    """experts * sum(share of tokens that chose an expert * its mean score), written out token by token."""
    scores, num_experts = logits.double().softmax(-1), logits.shape[1]
    total = 0.0
    for expert in range(num_experts):
        chosen = sum(expert in row.topk(top_k).indices.tolist() for row in scores)
        total += chosen / len(scores) * scores[:, expert].mean().item()
    return num_experts * total


def written_out(kind: str, layers: list[Tensor], lens: list[int], top_k: int) -> float:
    if kind == "transformers":
        return balance(torch.cat(layers), top_k)
    if kind == "layers":
        return sum(balance(layer, top_k) for layer in layers)
    return sum(balance(document, top_k) / top_k for layer in layers for document in layer.split(lens))


def router_of(kind: Any, top_k: int, name: str = "qwen3_moe") -> Router:
    model = build_model(tiny_config(name, num_experts_per_tok=top_k, router_aux_loss_coef=0.5))
    router = find_router(model.config, type(model), kind)
    assert router is not None
    return router


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", ["transformers", "layers", "sequences"])
def test_each_kind_is_its_formula(kind: str, top_k: int) -> None:
    """Also where no token chooses an expert."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(sum(LENS), 4, generator=generator) - torch.tensor([0, 0, 0, 9.0]) for _ in range(3)]
    value = router_of(kind, top_k).loss(tuple(layers), LENS)
    assert value.item() == pytest.approx(0.5 * written_out(kind, layers, LENS, top_k), rel=1e-5)


def test_even_routing_has_the_value_that_is_known() -> None:
    """Scores alike for all experts: top_k a layer; sequences, 1 a layer and document."""
    layers = (torch.zeros(8, 4), torch.zeros(8, 4))
    values = [router_of(kind, 2).loss(layers, [8]).item() for kind in ("transformers", "layers", "sequences")]
    assert values == pytest.approx([0.5 * 2, 0.5 * 4, 0.5 * 2])


@pytest.fixture(scope="module")
def packed_moe() -> SupervisedLM:
    model = build_model(tiny_config("qwen3_moe", router_aux_loss_coef=0.5), torch.float64)
    use_packed_attention(model)
    return SupervisedLM(model, True, "decoder")


def router_step(lm: SupervisedLM, batches: Batches, kind: Any) -> tuple[float | None, dict[str, Tensor]]:
    """Router loss and gradients of a step that changes no weight; float64."""
    lm.router = find_router(lm.model.config, type(lm.model), kind)
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.0)
    kept: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(lambda *_: kept.update({n: p.grad.clone() for n, p in lm.named_parameters()}))
    result = train_step(lm, optimizer, batches, 0.0, FP64, torch.amp.GradScaler("cpu", enabled=False))
    return result.router_loss, kept


def test_sequences_does_not_depend_on_the_packing(packed_moe: SupervisedLM, tmp_path: Path) -> None:
    """A step's value is the mean over its documents, however they are spread over forwards."""
    store = make_store(tmp_path, LENGTHS)
    ways = [Batches(store, [np.array(pack) for pack in packs]) for packs in BATCHINGS.values()]
    ways.append(replace(ways[1], is_packed=False))
    value, wanted = router_step(packed_moe, ways[0], "sequences")
    for batches in ways[1:]:
        other, gradients = router_step(packed_moe, batches, "sequences")
        assert other == pytest.approx(value, rel=1e-12)
        assert all((gradients[n] - wanted[n]).abs().max() < 1e-10 for n in wanted)
    whole, parts = (router_step(packed_moe, ways[i], "layers")[0] for i in (0, 2))
    assert whole != pytest.approx(parts, rel=1e-4)  # not so the others


def test_layers_is_transformers_times_the_layers_where_they_route_alike(tmp_path: Path) -> None:
    """What transformers pools, `layers` adds up; on one layer both are the same number."""
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    one = router_of("transformers", 2).loss((logits,), [20])
    assert router_of("layers", 2).loss((logits,), [20]) == one
    assert router_of("layers", 2).loss((logits,) * 3, [20]).item() == pytest.approx(3 * one.item(), rel=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("qwen2_moe", "sequences"), ("qwen3_moe", "layers")])
def test_a_run_says_and_keeps_its_router_loss(
    run: Any, tokenizer: Any, chats: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """With one expert a token: summary, report and config.json name it, and a resume gives the same weights to the bit."""
    base = save_folder(tmp_path / "base", tiny_config(name, initializer_range=0.1, num_experts_per_tok=1), tokenizer)
    whole = tmp_path / "whole"
    code, out, err = run("train", "--model", base, "--data", chats, *FAST, "--output", whole, "--train.router_loss", kind,
                         "--model.config.router_aux_loss_coef", 0.25)  # fmt: skip
    assert code == 0, err
    assert f"router loss added ({kind}, coefficient 0.25)" in out
    assert f"({kind}: " in (whole / "report.html").read_text()
    assert json.loads((whole / "model" / "config.json").read_text())["router_aux_loss_coef"] == 0.25
    part = killed_after(whole, 2, tmp_path / "part")
    code, _, err = run("resume", part)
    assert code == 0, err
    for file in ("model/model.safetensors", "checkpoints/step-000004/optimizer.safetensors"):
        assert (part / file).read_bytes() == (whole / file).read_bytes()


def test_a_resume_takes_no_other_kind_and_a_run_from_before_the_key() -> None:
    config = RunConfig.model_validate({"model": {"path": "m"}, "data": {"train": ["d"]}, "train": {"output_dir": "o"}})
    now = Fingerprint(data={}, template="", tokenizer="", model="", config=config.model_dump(mode="json"), threads=1,
                      versions={}, store={})  # fmt: skip
    before = now.model_copy(deep=True)
    del before.config["train"]["router_loss"]
    assert compare_runs(before, now) == ([], [])
    now.config["train"]["router_loss"] = "layers"
    assert compare_runs(before, now) == (["optimizer: train.router_loss transformers -> layers"], [])


def test_a_coefficient_of_0_turns_it_off(run: Any, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", tiny_config("qwen3_moe", initializer_range=0.1), tokenizer)
    code, out, err = run("train", "--model", base, "--data", chats, "--output", tmp_path / "run", *FAST,
                         "--model.config.router_aux_loss_coef", 0)  # fmt: skip
    assert code == 0, err
    assert "router loss" not in out
    assert "router_loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()


BAD: dict[str, tuple[str, tuple[Any, ...], Any, str]] = {
    "kind without routers": ("qwen3", ("--train.router_loss", "layers"), ModelError, "no-router-loss"),
    "coefficient without routers": ("qwen3", ("--model.config.router_aux_loss_coef", 0.1), ModelError, "no-router-loss"),
    "kind without coefficient": (
        "qwen3_moe",
        ("--train.router_loss", "layers", "--model.config.router_aux_loss_coef", 0),
        ModelError,
        "no-router-loss",
    ),
    "negative": ("qwen3_moe", ("--model.config.router_aux_loss_coef", -0.1), ConfigError, "config"),
    "no number": ("qwen3_moe", ("--model.config.router_aux_loss_coef", "yes"), ConfigError, "config"),
    "no kind": ("qwen3_moe", ("--train.router_loss", "minimind"), ConfigError, "config"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_keys_without_effect_are_refused(fails: Any, tokenizer: Any, tmp_path: Path, name: str) -> None:
    """Before the data are read: there are none."""
    architecture, flags, kind, code = BAD[name]
    base = save_folder(tmp_path / "base", tiny_config(architecture), tokenizer)
    (tmp_path / "d.jsonl").write_text("no json\n")
    error = fails("train", "--model", base, "--data", tmp_path / "d.jsonl", "--output", tmp_path / "run", *FAST, *flags)
    assert (type(error), error.code) == (kind, code), error
    assert flags[0].removeprefix("--") in str(error)
    assert not (tmp_path / "run").exists()
