"""Promise 2: one loss and gradient whatever the batching; and models with logits of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from conftest import ARCHITECTURES, build_model, set_up_attention, tiny_config
from test_pack import make_store
from tunesmith.config.schema import OptimSection
from tunesmith.data.feed import Batches
from tunesmith.data.pack import Batch, build_batch
from tunesmith.model import head as head_module
from tunesmith.model.head import choose_head_path
from tunesmith.model.loss import SupervisedLM, supervised_loss
from tunesmith.training.optim import build_optimizer
from tunesmith.training.precision import Precision
from tunesmith.training.step import train_step

LENGTHS = [9, 3, 21, 14, 2, 17, 6, 30]
FP64 = Precision("fp32", torch.float64, None)
BATCHINGS = {  # the same eight documents as forwards of one step
    "one forward": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "two forwards": [[2, 0, 5, 7], [1, 3, 4, 6]],
    "unequal forwards": [[7, 6, 5, 4, 3, 2, 1], [0]],
    "one document a forward": [[0], [1], [2], [3], [4], [5], [6], [7]],
}


def unshifted_labels(batch: Batch) -> torch.Tensor:
    """Labels as transformers takes them: -100 where nothing is trained."""
    labels = torch.full((1, batch.num_tokens), -100)
    labels[0, batch.target_at + 1] = torch.from_numpy(batch.targets)
    return labels


def gradients(
    name: str, store, packs: list[list[int]], is_packed: bool = True
) -> tuple[float, dict[str, torch.Tensor]]:
    extra = {"router_aux_loss_coef": 0.0} if "moe" in name else {}
    model = build_model(tiny_config(name, initializer_range=0.02, **extra), torch.float64)
    if is_packed:
        assert set_up_attention(model, 64, 256).is_isolated
    lm = SupervisedLM(model, is_packed, choose_head_path(model, is_packed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kept = {}
    optimizer.register_step_pre_hook(
        lambda *_: kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    batches = Batches(store, [np.array(pack) for pack in packs])
    result = train_step(lm, optimizer, batches, 0.0, FP64, torch.amp.GradScaler("cpu", enabled=False))
    return result.loss, kept


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_do_not_depend_on_the_batching(name: str, tmp_path: Path) -> None:
    """float64, 1e-10; 1e-8 for Gemma, whose norm weights get their gradients in fp32."""
    store = make_store(tmp_path, LENGTHS)
    limit = 1e-8 if name.startswith("gemma") else 1e-10
    reference_loss, reference = gradients(name, store, BATCHINGS["one forward"])
    for packs in BATCHINGS.values():
        loss, grads = gradients(name, store, packs)
        assert abs(loss - reference_loss) < limit
        assert grads.keys() == reference.keys()
        for parameter, grad in grads.items():
            assert (grad - reference[parameter]).abs().max() <= limit * max(1.0, reference[parameter].abs().max()), (
                parameter
            )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_the_one_transformers_computes(name: str, tmp_path: Path) -> None:
    """Compare with the model's own forward with labels, one document at a time."""
    store = make_store(tmp_path, LENGTHS)
    loss, _ = gradients(name, store, BATCHINGS["two forwards"])
    model = build_model(tiny_config(name, initializer_range=0.02), torch.float64)
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(LENGTHS)):
            batch = build_batch(store, [index])
            logits = model(input_ids=torch.from_numpy(batch.input_ids), use_cache=False).logits
            labels = unshifted_labels(batch)
            total += F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum").item()
            count += batch.num_targets
    assert abs(loss - total / count) < 1e-5


def test_a_mean_of_means_would_be_seen(tmp_path: Path) -> None:
    """The forwards of one step have different token counts, so a mean of means would change the number."""
    store = make_store(tmp_path, LENGTHS)
    whole, _ = gradients("llama", store, BATCHINGS["unequal forwards"])
    parts = [gradients("llama", store, [pack])[0] for pack in BATCHINGS["unequal forwards"]]
    assert abs(whole - np.mean(parts)) > 1e-4


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, LENGTHS)
    loss, grads = gradients("gemma2", store, BATCHINGS["one forward"])
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * 400 * 7)  # seven rows of logits at once
    chunked_loss, chunked = gradients("gemma2", store, BATCHINGS["one forward"])
    assert abs(loss - chunked_loss) < 1e-10
    assert all((grads[n] - chunked[n]).abs().max() < 1e-10 * max(1.0, grads[n].abs().max()) for n in grads)


HEADS = {
    "qwen3": (lambda: build_model(tiny_config("qwen3")), "decoder"),
    "gemma2 softcap": (lambda: build_model(tiny_config("gemma2", final_logit_softcapping=3.0)), "decoder"),
    "cohere scale": (
        lambda: build_model(transformers.CohereConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                                     intermediate_size=64, logit_scale=0.25, initializer_range=0.3)),
        "decoder",
    ),
    "granite divisor": (
        lambda: build_model(transformers.GraniteConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                                      intermediate_size=64, logits_scaling=8.0, initializer_range=0.3)),
        "decoder",
    ),
    "phi bias": (
        lambda: build_model(transformers.PhiConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                                  intermediate_size=64, initializer_range=0.3)),
        "decoder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_scale_cap_or_bias_are_honoured(name: str, tmp_path: Path) -> None:
    build, path = HEADS[name]
    model = build().double().eval()
    if name == "phi bias":
        model.lm_head.bias.data.normal_()
    store = make_store(tmp_path, LENGTHS)
    assert set_up_attention(model, 64, 256).is_isolated
    lm = SupervisedLM(model, True, choose_head_path(model, True))
    assert lm.head_path == path
    ours = supervised_loss(lm, build_batch(store, range(8))).loss.item()
    lm.head_path = "logits"
    theirs = supervised_loss(lm, build_batch(store, range(8))).loss.item()
    assert abs(ours - theirs) < 1e-8 * theirs


def test_a_head_that_we_do_not_know_is_left_to_the_model(tmp_path: Path) -> None:
    """A model whose forward changes the logits: the check at start must detect it."""
    model = build_model(tiny_config("llama")).eval()
    forward = type(model).forward

    class Odd(type(model)):
        def forward(self, input_ids, logits_to_keep=0, **kwargs):
            output = forward(self, input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)
            output.logits = output.logits.sin()
            return output

    Odd.__module__ = type(model).__module__
    model.__class__ = Odd
    set_up_attention(model, 64, 256)
    lm = SupervisedLM(model, True, choose_head_path(model, True))
    assert lm.head_path == "logits_to_keep"
    store = make_store(tmp_path, LENGTHS)
    ours = supervised_loss(lm, build_batch(store, range(8))).loss
    lm.head_path = "logits"
    assert torch.allclose(ours, supervised_loss(lm, build_batch(store, range(8))).loss)


def test_the_router_loss_is_added_and_kept_apart(tmp_path: Path) -> None:
    store = make_store(tmp_path, LENGTHS)
    model = build_model(tiny_config("qwen3_moe", router_aux_loss_coef=0.5))
    assert set_up_attention(model, 64, 256).is_isolated
    lm = SupervisedLM(model, True, choose_head_path(model, True))
    batch = build_batch(store, range(8))
    sums = supervised_loss(lm, batch)
    theirs = model(
        input_ids=torch.from_numpy(batch.input_ids), position_ids=torch.from_numpy(batch.position_ids),
        labels=unshifted_labels(batch), output_router_logits=True, use_cache=False, documents=batch.layout,
    )  # fmt: skip
    assert torch.allclose(sums.router_loss, 0.5 * theirs.aux_loss)
    assert torch.allclose(sums.loss / batch.num_targets + sums.router_loss, theirs.loss, rtol=1e-4)
    sums.router_loss.backward()
    assert any(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if n.endswith("mlp.gate.weight")
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_gradient_checkpointing_changes_no_gradient(name: str, tmp_path: Path) -> None:
    store = make_store(tmp_path, LENGTHS)
    grads = []
    for checkpointing in (False, True):
        model = build_model(tiny_config(name), torch.float64)
        assert set_up_attention(model, 64, 256).is_isolated
        lm = SupervisedLM(model, True, choose_head_path(model, True)).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        supervised_loss(lm, build_batch(store, range(8))).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_weight_decay_spares_norms_biases_and_embeddings() -> None:
    model = build_model(tiny_config("gpt2"))
    decayed, others = build_optimizer(model, OptimSection(weight_decay=0.1)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decayed["params"]} == {"c_attn", "c_proj", "c_fc"}
    assert {"wte", "wpe", "ln_f"} <= {names[id(p)].rsplit(".", 2)[-2] for p in others["params"]}
    total = sum(p.numel() for g in (decayed, others) for p in g["params"])
    assert total == sum(p.numel() for p in model.parameters())
