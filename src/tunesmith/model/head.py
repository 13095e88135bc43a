"""The head of a language model, at supervised positions only: hidden states to logits, and to the loss.

Autograd would keep the logits of all targets for the backward, or, checkpointed, compute them twice. The gradient of a
summed cross-entropy is known as soon as the logits are: softmax minus one-hot. So the forward, chunk by chunk, turns
the logits into that gradient and multiplies it at once; the backward only scales what is there. The idea is that of
Liger Kernel's fused linear cross-entropy (Hsu et al. 2024).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tunesmith.data.pack import Documents
from tunesmith.model.probe import in_fp32

_SLICE = 1 << 24  # numbers of a product in half precision that is added to a sum in fp32
CHUNK_BYTES = 128 * 2**20  # of fp32 logits; about twice as much is in memory at once


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What a model does to the product of hidden states and head: scaled, then capped.

    Attributes:
        scale: logit_scale (Cohere).
        divisor: logits_scaling (Granite).
        cap: final_logit_softcapping (Gemma 2): cap * tanh(logits / cap).
    """

    scale: float | None = None
    divisor: float | None = None
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> LogitRule:
        config = model.config.get_text_config()
        names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        return cls(*(getattr(config, name, None) for name in names))

    def apply(self, logits: Tensor) -> Tensor:
        if self.scale is not None:
            logits = logits * self.scale
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits

    def multiply_slope(self, grad: Tensor, logits: Tensor) -> None:
        """Multiply a gradient, in place, by the slope of `apply` where it gave these logits."""
        if self.cap is not None:
            grad *= 1 - (logits / self.cap) ** 2
        if self.divisor is not None:
            grad /= self.divisor
        if self.scale is not None:
            grad *= self.scale


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[targets, hidden] -> [targets, vocab], including what the model's forward does to its logits."""
    return LogitRule.of(model).apply(model.get_output_embeddings()(hidden))


def chunk_rows(vocab: int) -> int:
    """Targets whose logits may be in memory at once."""
    return max(1, CHUNK_BYTES // (4 * vocab))


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head, if calling it is nothing but a product with its weights: not quantized, no adapter, no hooks (DeepSpeed
    gathers weights in such)."""
    head = model.get_output_embeddings()
    is_plain = type(head) is nn.Linear and not head._forward_pre_hooks and not head._forward_hooks
    return head if is_plain else None


def choose_head_path(model: PreTrainedModel, is_packed: bool) -> str:
    """How to compute logits: "decoder" where decoder and head_logits give the model's own logits, else the cheapest
    option through its forward.

    Compared on a document of eight tokens: a model may scale, cap or bias its logits in ways that we do not know.

    Args:
        model: from probe_model.
        is_packed: whether its attention takes `documents`.
    """
    device = next(model.parameters()).device
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (1, 8), generator=torch.Generator().manual_seed(1)).to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if is_packed:
        inputs |= {"position_ids": torch.arange(8, device=device)[None], "documents": Documents([8])}
    with in_fp32(model):
        reference = model(**inputs).logits[0]
        try:
            ours = head_logits(model, model.get_decoder()(**inputs).last_hidden_state[0])
            if ours.shape == reference.shape and torch.allclose(ours, reference, rtol=1e-4, atol=1e-5):
                return "decoder"
        except (AttributeError, TypeError):  # no decoder with the usual interface
            pass
    return "logits_to_keep" if "logits_to_keep" in inspect.signature(type(model).forward).parameters else "logits"


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy, the loss of each target, and the gradients of the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rule: LogitRule,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = chunk_rows(weight.shape[0])
        # All chunks share it: glibc before 2.38 does not find freed memory again for a tensor of the same size
        shape = min(rows, len(targets)), weight.shape[0]
        work = [hidden.new_empty(shape, dtype=sum_dtype(hidden)) for _ in range(2)]
        losses: list[Tensor] = []
        hidden_grads: list[Tensor] = []
        weight_grad: Tensor | None = None
        bias_grad: Tensor | None = None
        for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            found, grad, dtype = _chunk(part, weight, bias, wanted, rule, [each[: len(part)] for each in work])
            losses.append(found)
            if needs_bias:
                of_bias = grad.sum(0)
                bias_grad = of_bias if bias_grad is None else bias_grad.add_(of_bias)
            grad = grad.to(dtype)  # that of the product in the forward, also without autocast
            if needs_hidden:
                hidden_grads.append(torch.mm(grad, weight).to(hidden.dtype))
            if needs_weight:
                weight_grad = _add_product(weight_grad, grad.t(), part, is_last=len(targets) <= rows)
        each = torch.cat(losses)
        ctx.gradients = (
            torch.cat(hidden_grads) if needs_hidden else None,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias is None or bias_grad is None else bias_grad.to(bias.dtype),
        )
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the loss of the head can be differentiated once"
        gradients, ctx.gradients = ctx.gradients, None
        return (*(found.mul_(grad) if found is not None else None for found in gradients), None, None)


def _add_product(total: Tensor | None, grad: Tensor, hidden: Tensor, is_last: bool) -> Tensor:
    """total + grad @ hidden, summed in fp32, without a second tensor of that size.

    Args:
        total: None at first.
        is_last: there is nothing to add to the first product.
    """
    is_half = not grad.dtype == hidden.dtype == sum_dtype(grad)
    if total is None and (is_last or not is_half):
        return torch.mm(grad, hidden)
    if total is None:
        total = torch.zeros(len(grad), hidden.shape[1], dtype=torch.float32, device=grad.device)
    if not is_half:
        return total.addmm_(grad, hidden)
    size = max(1, _SLICE // hidden.shape[1])
    for part, rows in zip(total.split(size), grad.split(size), strict=True):
        part.add_(torch.mm(rows, hidden))
    return total


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rule: LogitRule, work: list[Tensor]
) -> tuple[Tensor, Tensor, torch.dtype]:
    """[n] losses, the [n, vocab] gradient of their sum with respect to the product with the head, its dtype.

    Args:
        work: two of [n, vocab]; the second will hold the gradient.
    """
    logits, log_probabilities = work
    dtype = _multiply(hidden, weight, bias, logits)
    logits = rule.apply(logits)
    torch.log_softmax(logits, -1, out=log_probabilities)
    losses = F.nll_loss(log_probabilities, targets, reduction="none")
    grad = log_probabilities.exp_()
    grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -1.0))
    rule.multiply_slope(grad, logits)
    return losses, grad, dtype


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> torch.dtype:
    """Write the product with the head into `logits`; returns the dtype in which it was computed."""
    if hidden.dtype == weight.dtype == logits.dtype and not torch.is_autocast_enabled(hidden.device.type):
        if bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden, weight.t(), out=logits)
        return logits.dtype
    product = F.linear(hidden, weight, bias)
    logits.copy_(product)
    return product.dtype


def sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def head_loss(hidden: Tensor, head: nn.Linear, targets: Tensor, rule: LogitRule) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy (differentiable, once) and the [targets] losses (not differentiable).

    Args:
        hidden: [targets, hidden], the outputs that predict the targets.
        targets: int64 [targets].
    """
    sum_and_each: tuple[Tensor, Tensor] = _HeadLoss.apply(hidden, head.weight, head.bias, targets, rule)  # type: ignore[no-untyped-call]
    return sum_and_each
