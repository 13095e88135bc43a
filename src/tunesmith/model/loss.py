"""The supervised loss: a sum over trained positions; the head is applied only there, in chunks.

A batch has its targets and the positions whose outputs predict them (data/pack.py), so nothing is shifted here.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.attention.layout import LOOP_ONLY, AttentionPlan, PackedLayout, make_layout, to_device
from tunesmith.config.schema import ROUTER_COEFFICIENT, RunConfig
from tunesmith.config.train_keys import RouterLoss
from tunesmith.data.pack import Batch, Documents
from tunesmith.errors import ModelError
from tunesmith.layers.copies import HalfCopies
from tunesmith.model.head import LogitRule, chunk_rows, head_logits, head_loss, plain_head, sum_dtype
from tunesmith.plans.tree import Tree


class LossSums(NamedTuple):
    """Sums of one forward. A named tuple, since wrappers of a model look for tensors in tuples.

    Attributes:
        loss: scalar, cross-entropy summed over targets; differentiable.
        router_loss: scalar, the load balancing loss of a mixture of experts: of the forward, or summed over its
            documents (see `Router`); differentiable. None for other models.
        num_correct: targets that were the most likely token; None with gradient.
        expert_counts: [experts], how often each was chosen over all tokens and layers; None for other models.
        source_losses: [sources], the loss of the targets of each source of a mix; None for other batches.
    """

    loss: Tensor
    router_loss: Tensor | None
    num_correct: Tensor | None
    expert_counts: Tensor | None = None
    source_losses: Tensor | None = None


class TargetSums(NamedTuple):
    """Sums over some targets.

    Attributes:
        loss: differentiable.
        num_correct: None with gradient.
        by_source: [sources], the loss of each source; None where the sources are not given.
    """

    loss: Tensor
    num_correct: Tensor | None
    by_source: Tensor | None


class SupervisedLM(nn.Module):
    """Decoder, head at trained positions, and loss sum as one module, so that data-parallel wrappers see one forward.

    Args:
        model: a transformers causal LM.
        is_packed: whether the model uses our attention and takes the layout; otherwise a batch has one document.
        head_path: from choose_head_path.
        adapter: peft's PeftModel around the model, if only an adapter is trained.
        router_loss: train.router_loss.
        own_attention: what the model's config named before our attention replaced it, which generation needs.
        plan: the kernels of its attention, chosen for the device (attention/choose.py).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        is_packed: bool,
        head_path: str,
        adapter: Any = None,
        router_loss: RouterLoss = "transformers",
        own_attention: str | None = None,
        plan: AttentionPlan = LOOP_ONLY,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.model = model
        self.own_attention = own_attention
        self.copies: HalfCopies | None = None
        self._adapter = (adapter,)  # in a tuple: as a submodule, it would register every weight twice
        self.is_packed = is_packed
        self.router = find_router(model.config, type(model), router_loss)
        self.head_path = head_path

    @property
    def adapter(self) -> Any:
        return self._adapter[0]

    def computing(self) -> AbstractContextManager[None]:
        """Within the block, the model computes with the copies of its weights, if it has some."""
        return self.copies or nullcontext()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets: Tensor,
        target_at: Tensor,
        layout: Documents | Tree | PackedLayout,
        sources: Tensor | None = None,
        num_sources: int = 0,
    ) -> LossSums:
        """Loss sums of a batch, given as tensors (see `to_tensors`)."""
        if not isinstance(layout, PackedLayout) and self.is_packed:
            layout = make_layout(layout, input_ids.device, self.plan)
        tree = layout.source if isinstance(layout, PackedLayout) and isinstance(layout.source, Tree) else None
        # a single document gets the model's own positions (RoBERTa's start at 2)
        extra = {"position_ids": position_ids, "documents": layout} if self.is_packed else {}
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False, **extra}
        if self.router:
            inputs["output_router_logits"] = True
        if self.head_path == "decoder":
            output = self.model.get_decoder()(**inputs)
            hidden = take_rows(output.last_hidden_state[0], target_at, tree)
            sums = self._chunked_loss(hidden, targets, sources, num_sources)
        else:
            output, logits = self._model_logits(inputs, target_at, tree)
            sums = sum_targets(logits, targets, sources, num_sources)
        router_loss = expert_counts = None
        if self.router and output.router_logits:  # none where every layer picks experts by token id (DeepSeek V4)
            router_logits, lens = output.router_logits, layout.lens
            if tree is not None:  # a mean over tokens, of which naive packing has copies
                copies = to_device(tree.copies, input_ids.device)
                router_logits = tuple(take_rows(of_layer, copies, tree) for of_layer in router_logits)
                lens = tree.sample_lens
            router_loss = self.router.loss(router_logits, lens)
            expert_counts = self.router.count_choices(router_logits)
        return LossSums(sums.loss, router_loss, sums.num_correct, expert_counts, sums.by_source)

    def _model_logits(self, inputs: dict[str, Any], at: Tensor, tree: Tree | None) -> tuple[Any, Tensor]:
        """The model's output, and its [targets, vocab] logits."""
        if self.head_path == "logits_to_keep" and tree is None:
            output = self.model(**inputs, logits_to_keep=at)
            return output, output.logits[0]
        output = self.model(**inputs)
        return output, take_rows(output.logits[0], at, tree)

    def _chunked_loss(self, hidden: Tensor, targets: Tensor, sources: Tensor | None, num_sources: int) -> TargetSums:
        """Sums over the targets without holding all logits."""
        if torch.is_grad_enabled() and (head := plain_head(self.model)) is not None and len(targets):
            loss, losses = head_loss(hidden, head, targets, LogitRule.of(self.model))
            by_source = None if sources is None else sum_by_source(losses, sources, num_sources)
            return TargetSums(loss, None, by_source)

        def chunk_sums(hidden_chunk: Tensor, target_chunk: Tensor, source_chunk: Tensor | None) -> TargetSums:
            return sum_targets(head_logits(self.model, hidden_chunk), target_chunk, source_chunk, num_sources)

        rows = chunk_rows(self.model.config.get_text_config().vocab_size)
        if len(targets) <= rows:
            return chunk_sums(hidden, targets, sources)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = hidden.new_zeros((), dtype=dtype)
        num_correct = None if torch.is_grad_enabled() else torch.zeros((), dtype=torch.int64, device=hidden.device)
        by_source = None if sources is None else hidden.new_zeros(num_sources, dtype=dtype)
        source_chunks: Any = sources.split(rows) if sources is not None else itertools.repeat(None)
        for chunk in zip(hidden.split(rows), targets.split(rows), source_chunks, strict=False):
            found = checkpoint(chunk_sums, *chunk, use_reentrant=False)  # recomputed in the backward
            loss = loss + found.loss
            num_correct = None if num_correct is None else num_correct + found.num_correct
            by_source = None if by_source is None else by_source + found.by_source
        return TargetSums(loss, num_correct, by_source)


def take_rows(rows: Tensor, at: Tensor, tree: Tree | None) -> Tensor:
    """rows[at]. In prefix trees a row may occur several times: its gradients are summed in fp32, on a CPU in order."""
    if tree is None:
        return rows[at]
    wide = rows.to(sum_dtype(rows))
    return (wide.index_select(0, at) if rows.device.type == "cpu" else wide[at]).to(rows.dtype)


def sum_targets(logits: Tensor, targets: Tensor, sources: Tensor | None = None, num_sources: int = 0) -> TargetSums:
    """Summed cross-entropy of [n, vocab] logits and [n] targets; without gradient, also the number of correct argmaxes.

    The losses by source are computed from the same logits beside the sum, so that they cannot change its rounding.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    by_source = None
    if sources is not None:
        with torch.no_grad():
            losses = F.cross_entropy(logits, targets, reduction="none")
        by_source = sum_by_source(losses, sources, num_sources)
    num_correct = None if torch.is_grad_enabled() else (logits.argmax(-1) == targets).sum()
    return TargetSums(F.cross_entropy(logits, targets, reduction="sum"), num_correct, by_source)


def sum_by_source(losses: Tensor, sources: Tensor, num_sources: int) -> Tensor:
    """[sources] sums of [targets] losses; index_add_ is not deterministic on a GPU."""
    is_of = sources == torch.arange(num_sources, device=sources.device)[:, None]
    return torch.where(is_of, losses, 0).sum(-1)


@dataclass(frozen=True, slots=True)
class Router:
    """Load balancing loss of a mixture of experts (Fedus et al. 2022): experts * sum(share of choices * mean score).

    It is not linear in the tokens, so its value depends on what it is computed over:
    - transformers: all tokens and layers of a forward at once, by the model's own function.
    - layers: all tokens of a forward, by the same function layer by layer, and summed.
    - sequences: each document by itself, divided by the experts a token, and summed over layers. A step's value, the
      mean over its documents, does not depend on how they are packed; those of the others, means over forwards, do.

    Attributes:
        function: load_balancing_loss_func of the model's module.
    """

    kind: RouterLoss
    function: Any
    coefficient: float
    num_experts: int
    top_k: int

    @property
    def is_per_document(self) -> bool:
        """Whether a step's value is the mean over its documents, and not over its forwards."""
        return self.kind == "sequences"

    def loss(self, router_logits: Sequence[Tensor], lens: Sequence[int]) -> Tensor:
        """coefficient * loss of one forward; for `sequences`, summed over its documents.

        Args:
            router_logits: [tokens, experts] of each layer.
            lens: tokens of each document.
        """
        value: Tensor
        if self.kind == "transformers":
            value = self.function(router_logits, self.num_experts, self.top_k)
        elif self.kind == "layers":
            value = sum_tensors([self.function((layer,), self.num_experts, self.top_k) for layer in router_logits])
        else:
            num_tokens = to_device(np.array(lens), router_logits[0].device)
            value = sum_tensors([balance_documents(layer, num_tokens, self.top_k).sum() for layer in router_logits])
        return self.coefficient * value

    @torch.no_grad()
    def count_choices(self, router_logits: Any) -> Tensor:
        """[experts] counts over all tokens and layers of one forward."""
        chosen = torch.cat([layer.topk(self.top_k, -1).indices.reshape(-1) for layer in router_logits])
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=chosen.device)
        return counts.scatter_add_(0, chosen, torch.ones_like(chosen))  # bincount would synchronize with the device


def sum_tensors(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum()


def balance_documents(logits: Tensor, num_tokens: Tensor, top_k: int) -> Tensor:
    """[documents] balance loss of one layer (expert-level balance loss of DeepSeek-V2, DeepSeek-AI 2024):
    experts / (top_k * tokens) * sum over experts of choices * mean score.

    Args:
        logits: [tokens, experts], of consecutive documents.
        num_tokens: [documents], of each document.
    """
    num_documents, num_experts = len(num_tokens), logits.shape[-1]
    scores = logits.reshape(-1, num_experts)
    scores = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    document = torch.repeat_interleave(
        torch.arange(num_documents, device=scores.device), num_tokens, output_size=len(scores)
    )
    chosen = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(top_k, -1).indices, 1.0)
    zeros = scores.new_zeros(num_documents, num_experts)
    choices = zeros.index_add(0, document, chosen)
    score_sums = zeros.index_add(0, document, scores)
    return num_experts / top_k * (choices * score_sums).sum(-1) / num_tokens**2


def find_router(config: PretrainedConfig, model_class: type, kind: RouterLoss = "transformers") -> Router | None:
    """The router loss of a model; None if it has none, or its coefficient is 0."""
    text: Any = config.get_text_config()
    function = getattr(sys.modules[model_class.__module__], "load_balancing_loss_func", None)
    coefficient = getattr(text, ROUTER_COEFFICIENT, None)
    num_experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    if function is None or not coefficient or not num_experts:
        return None
    return Router(kind, function, coefficient, num_experts, text.num_experts_per_tok)


def require_router(config: RunConfig, router: Router | None) -> None:
    """Check that keys of the router loss have an effect.

    Args:
        router: from find_router.

    Raises:
        ModelError: one of them is set, and the model has no router loss.
    """
    if router is not None:
        return
    section = config.model
    if section.config.get(ROUTER_COEFFICIENT):
        raise ModelError(
            f"model.config.{ROUTER_COEFFICIENT}: {section.path} has no router loss: it is not a mixture of experts, or "
            "transformers has no such loss for it. Remove the key.",
            code="no-router-loss",
        )
    if config.train.router_loss != "transformers":
        raise ModelError(
            f"train.router_loss {config.train.router_loss}: {section.path} has no router loss: it is not a mixture of "
            f"experts, or its {ROUTER_COEFFICIENT} is 0. Remove the key, or set model.config.{ROUTER_COEFFICIENT}.",
            code="no-router-loss",
        )


Objective = Callable[[nn.Module, Batch], LossSums]


def supervised_loss(lm: nn.Module, batch: Batch) -> LossSums:
    """Objective of supervised fine-tuning and pre-training; other objectives are functions of the same signature.

    Args:
        lm: a SupervisedLM, or a data-parallel wrapper around one.
    """
    inputs = batch.inputs or to_tensors(batch, next(lm.parameters()).device)
    sums: LossSums = lm(**inputs)
    return sums


def to_tensors(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The keyword arguments of SupervisedLM.forward."""
    names = ["input_ids", "position_ids", "targets", "target_at", *(["sources"] if batch.num_sources else [])]
    tensors = {name: to_device(getattr(batch, name), device) for name in names}
    return {**tensors, "layout": batch.layout, **({"num_sources": batch.num_sources} if batch.num_sources else {})}
