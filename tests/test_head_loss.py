"""The fused head and loss against the plain one: values, gradients, memory, and where it steps aside."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import build_model, run_apart, tiny_config
from tunesmith.model import head as module
from tunesmith.model.head import LogitRule, head_logits, head_loss, plain_head

RULES = [LogitRule(), LogitRule(scale=0.25), LogitRule(cap=3.0), LogitRule(scale=4.0, divisor=1.5, cap=5.0)]
VOCAB, HIDDEN, NUM_TARGETS = 37, 8, 23


def plain_loss(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor, rule: LogitRule) -> torch.Tensor:
    logits = head(hidden).float() if hidden.dtype != torch.float64 else head(hidden)
    logits = logits if rule.scale is None else logits * rule.scale
    logits = logits if rule.divisor is None else logits / rule.divisor
    logits = logits if rule.cap is None else rule.cap * torch.tanh(logits / rule.cap)
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("frozen", ["", "weight", "hidden"])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_loss_and_gradients_equal_the_plain_ones(
    rule: LogitRule, has_bias: bool, frozen: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * VOCAB * rows)
    torch.manual_seed(1)
    head = nn.Linear(HIDDEN, VOCAB, bias=has_bias, dtype=torch.float64)
    head.requires_grad_(frozen != "weight")
    hidden = (torch.randn(NUM_TARGETS, HIDDEN, dtype=torch.float64) * 3).requires_grad_(frozen != "hidden")
    targets = torch.randint(0, VOCAB, (NUM_TARGETS,))
    wanted = plain_loss(hidden, head, targets, rule)
    inputs = [tensor for tensor in (hidden, *head.parameters()) if tensor.requires_grad]
    gradients = torch.autograd.grad(wanted.sum() / 7, inputs)
    loss, each = head_loss(hidden, head, targets, rule)
    assert torch.allclose(each, wanted, rtol=0, atol=1e-12)
    assert not each.requires_grad
    ours = torch.autograd.grad(loss / 7, inputs)
    for mine, theirs in zip(ours, gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_is_as_exact_as_the_plain_path(rule: LogitRule, weights: torch.dtype) -> None:
    """Under autocast, and with weights in bf16 as sharded processes hold them."""
    torch.manual_seed(1)
    exact = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.float64)
    hidden = torch.randn(NUM_TARGETS, HIDDEN, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, VOCAB, (NUM_TARGETS,))
    true = torch.autograd.grad(plain_loss(hidden, exact, targets, rule).sum(), [hidden, exact.weight])
    head, inputs = copy.deepcopy(exact).to(weights), hidden.detach().to(weights).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=weights is torch.float32):
        plain = torch.autograd.grad(plain_loss(inputs, head, targets, rule).sum(), [inputs, head.weight])
        loss, _ = head_loss(inputs, head, targets, rule)
    ours = torch.autograd.grad(loss, [inputs, head.weight])
    for mine, theirs, exactly in zip(ours, plain, true, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - exactly).norm() < 1.5 * (theirs - exactly).norm() + 1e-9


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_rule_of_a_model_is_that_of_its_logits(name: str) -> None:
    config = tiny_config(name) if name in ("llama", "gemma2") else tiny_config("llama")
    if name == "cohere":
        config.logit_scale = 0.0625
    if name == "granite":
        config.logits_scaling = 8.0
    model = build_model(config, torch.float64)
    head = plain_head(model)
    assert head is not None
    hidden = torch.randn(5, head.in_features, dtype=torch.float64)
    targets = torch.arange(5)
    wanted = F.cross_entropy(head_logits(model, hidden), targets, reduction="none")
    assert torch.allclose(head_loss(hidden, head, targets, LogitRule.of(model))[1], wanted, rtol=0, atol=1e-12)


def test_a_head_with_hooks_or_an_adapter_is_called_as_it_is() -> None:
    from peft import LoraConfig, get_peft_model

    model = build_model(tiny_config("llama"), torch.float32)
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda *_: None)
    assert plain_head(model) is None
    handle.remove()
    assert plain_head(model) is not None
    get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    assert plain_head(model) is None


@pytest.mark.parametrize("allocator", ["nullcontext()", "freed_memory_kept()"])
def test_memory_does_not_grow_with_the_targets(allocator: str) -> None:
    """8,000 targets of a vocabulary of 30,000 would be 960 MB of logits. As in training, where glibc keeps what is
    freed, too: it does not always find it again."""
    code = (
        "import resource, torch\n"
        "from contextlib import nullcontext\n"
        "from torch import nn\n"
        "from tunesmith.model.head import LogitRule, head_loss\n"
        "from tunesmith.monitor.allocator import freed_memory_kept\n"
        "torch.set_num_threads(1)\n"
        "head = nn.Linear(16, 30_000, bias=False)\n"
        f"with {allocator}:\n"
        "    hidden = torch.randn(NUMBER, 16, requires_grad=True)\n"
        "    loss, _ = head_loss(hidden, head, torch.randint(0, 30_000, (NUMBER,)), LogitRule())\n"
        "    loss.backward()\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    first, last = (int(run_apart(code.replace("NUMBER", number))) for number in ("2_000", "8_000"))
    assert last < first + 200  # with their logits 1,400 more
