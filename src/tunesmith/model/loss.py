"""The supervised loss: a sum over trained positions, the head applied to those positions alone, in chunks.

Labels are unshifted as in transformers; the one shift of the project is in `SupervisedLM.forward`.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.data.pack import IGNORE_INDEX, PackedBatch
from tunesmith.model.attention import Documents
from tunesmith.model.isolation import in_fp32

_CHUNK_BYTES = 256 * 2**20  # fp32 logits that may exist at once


@dataclass(frozen=True, slots=True, eq=False)
class LossSums:
    """Sums of one forward.

    Attributes:
        loss: scalar, cross-entropy summed over targets, with gradient.
        router_loss: scalar, the load balancing loss of a mixture of experts, with gradient; None for other models.
        num_correct: targets that were the most likely token; only counted without gradient.
        expert_counts: [experts], how often each was chosen, over all tokens and layers; None for other models.
    """

    loss: Tensor
    router_loss: Tensor | None
    num_correct: Tensor | None
    expert_counts: Tensor | None = None


class SupervisedLM(nn.Module):
    """Decoder, head at trained positions, loss sum: one module, so that data parallel wrappers see one forward.

    Args:
        model: a transformers causal LM.
        is_packed: whether its attention is ours and takes the documents; else a batch holds one document.
        adapter: peft's PeftModel around the model, where only an adapter is trained.
    """

    def __init__(self, model: nn.Module, is_packed: bool, adapter: Any = None) -> None:
        super().__init__()
        self.model = model
        self._adapter = (adapter,)  # in a tuple: as a submodule it would hold every weight a second time
        self.is_packed = is_packed
        self.router = find_router(model)
        self.head_path = "logits"
        self.head_path = choose_head_path(self)

    @property
    def adapter(self) -> Any:
        return self._adapter[0]

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, doc_lens: list[int]) -> LossSums:
        """Loss sums of one pack; all tensors int64 [1, tokens]."""
        # alone, a document gets the positions that the model gives it itself (RoBERTa's begin at 2)
        extra = {"position_ids": position_ids, "documents": Documents(doc_lens)} if self.is_packed else {}
        targets = labels[0, 1:]
        at = (targets != IGNORE_INDEX).nonzero(as_tuple=True)[0]  # position i predicts token i + 1
        targets = targets[at]
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False, **extra}
        router_loss = expert_counts = None
        if self.head_path == "decoder":
            if self.router:
                inputs["output_router_logits"] = True
            output = self.model.get_decoder()(**inputs)
            hidden = output.last_hidden_state[0, at]
            loss, num_correct = self._chunked_loss(hidden, targets)
        else:
            output, logits = self._model_logits(inputs, at)
            loss, num_correct = token_loss_sum(logits, targets)
        if self.router:
            router_loss = self.router.loss(output.router_logits)
            expert_counts = self.router.count_choices(output.router_logits)
        return LossSums(loss, router_loss, None if torch.is_grad_enabled() else num_correct, expert_counts)

    def _model_logits(self, inputs: dict[str, Any], at: Tensor) -> tuple[Any, Tensor]:
        """The model's output, and its own [targets, vocab] logits."""
        if self.router:
            inputs = inputs | {"output_router_logits": True}
        if self.head_path == "logits_to_keep":
            output = self.model(**inputs, logits_to_keep=at)
            return output, output.logits[0]
        output = self.model(**inputs)
        return output, output.logits[0, at]

    def head_logits(self, hidden: Tensor) -> Tensor:
        """[targets, hidden] -> [targets, vocab], with what the model's forward does to its logits."""
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(hidden)
        scale = getattr(config, "logit_scale", None)  # Cohere
        if scale is not None:
            logits = logits * scale
        divisor = getattr(config, "logits_scaling", None)  # Granite
        if divisor is not None:
            logits = logits / divisor
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _chunked_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss sum and correct count without ever holding all logits; chunks are recomputed in the backward."""

        def chunk_loss(hidden_chunk: Tensor, target_chunk: Tensor) -> tuple[Tensor, Tensor]:
            return token_loss_sum(self.head_logits(hidden_chunk), target_chunk)

        vocab = self.model.config.get_text_config().vocab_size
        rows = max(1, _CHUNK_BYTES // (4 * vocab))
        if len(targets) <= rows:
            return chunk_loss(hidden, targets)
        loss_sum = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for hidden_chunk, target_chunk in zip(hidden.split(rows), targets.split(rows), strict=True):
            loss, correct = checkpoint(chunk_loss, hidden_chunk, target_chunk, use_reentrant=False)
            loss_sum, num_correct = loss_sum + loss, num_correct + correct
        return loss_sum, num_correct


def token_loss_sum(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of [n, vocab] logits against [n] targets, and how many argmaxes were right."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    with torch.no_grad():
        num_correct = (logits.argmax(-1) == targets).sum()
    return F.cross_entropy(logits, targets, reduction="sum"), num_correct


@dataclass(frozen=True, slots=True)
class Router:
    """A mixture of experts' load balancing loss, by the model's own function (Fedus et al. 2022)."""

    function: Any
    coefficient: float
    num_experts: int
    top_k: int

    def loss(self, router_logits: Any) -> Tensor:
        """coefficient * the mean over layers, of one forward."""
        value = self.function(router_logits, self.num_experts, self.top_k)
        return self.coefficient * value

    @torch.no_grad()
    def count_choices(self, router_logits: Any) -> Tensor:
        """[experts], over all tokens and layers of one forward."""
        chosen = torch.cat([layer.topk(self.top_k, -1).indices.reshape(-1) for layer in router_logits])
        return torch.bincount(chosen, minlength=self.num_experts)


def find_router(model: nn.Module) -> Router | None:
    """The router loss that belongs to this architecture, or None."""
    config = model.config.get_text_config()
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    coefficient = getattr(config, "router_aux_loss_coef", None)
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if function is None or not coefficient or not num_experts:
        return None
    return Router(function, coefficient, num_experts, config.num_experts_per_tok)


def choose_head_path(lm: SupervisedLM) -> str:
    """ "decoder" where decoder + head give the model's own logits, else the cheapest way through the model itself.

    Checked on a tiny document at start: a model may scale, cap or bias its logits in ways unknown to us.
    """
    with in_fp32(lm.model):
        return _choose_head_path(lm)


def _choose_head_path(lm: SupervisedLM) -> str:
    model = lm.model
    device = next(model.parameters()).device
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (1, 8), generator=torch.Generator().manual_seed(1)).to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if lm.is_packed:
        inputs |= {"position_ids": torch.arange(8, device=device)[None], "documents": Documents([8])}
    reference = model(**inputs).logits[0]
    path = "logits"
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        path = "logits_to_keep"
    try:
        ours = lm.head_logits(model.get_decoder()(**inputs).last_hidden_state[0])
        if ours.shape == reference.shape and torch.allclose(ours, reference, rtol=1e-4, atol=1e-5):
            path = "decoder"
    except (AttributeError, TypeError):  # no decoder of the usual shape
        pass
    return path


def to_tensors(batch: PackedBatch, device: torch.device) -> dict[str, Any]:
    """The keyword arguments of SupervisedLM.forward."""
    arrays = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "labels": batch.labels}
    tensors = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
    return {**tensors, "doc_lens": batch.doc_lens}
