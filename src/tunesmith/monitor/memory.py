"""Memory of a run, estimated before its first step.

What a forward keeps for the backward depends on the model's code, its adapter, precision and attention. So it is
measured with a few tokens on the model at hand, and scaled to a forward of the run. All else follows from shapes, but
for the constants below, which `bench/memory.py` checks on real runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.data.pack import Batch, Documents
from tunesmith.display import format_bytes
from tunesmith.layers.swiglu import watching_kept
from tunesmith.model.head import CHUNK_BYTES, plain_head
from tunesmith.model.loss import SupervisedLM, supervised_loss
from tunesmith.monitor.allocator import glibc_version, leaves_gaps

ERROR = 0.15  # of a total, at most, on the runs of bench/memory.py
_SIZES = (16, 32, 64)  # tokens of the forwards that are measured
_CHUNKS = 2.0  # of fp32 logits that the head's loss holds at once (model/head.py)
_LOGITS = 2.5  # the same where all logits are made: logits, softmax, and half of another while they are made
_LAYER = 1.6  # of what a layer keeps, its backward takes where the layer is made again for it
# Bytes of glibc's heap for each byte of tensors in a step: plain, where small tensors lie between large ones, and where
# layers, or weights of a quantized base, are made again. Before 2.38, freed aligned memory is not found again for a
# tensor of the same size.
_HEAP, _HEAP_OF_SMALL, _HEAP_OF_AGAIN = 1.25, 1.6, 2.0


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that a forward keeps for its backward, without weights and logits: constant, a token, a pair of tokens in
    one document."""

    constant: float
    per_token: float
    per_pair: float

    def of(self, tokens: float, pairs: float) -> float:
        return self.constant + self.per_token * tokens + self.per_pair * pairs


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What decides the memory of head and loss.

    Attributes:
        width: bytes of a number in activations.
        holds_all: copies of the logits of all tokens that the model's own forward makes.
        is_chunked: whether the loss is computed chunk by chunk.
        gradient: bytes of the weight's gradient, which exists before the backward; 0 of a frozen head.
    """

    vocab: int
    width: int
    holds_all: int
    is_chunked: bool
    gradient: float

    def work(self, tokens: float, targets: float) -> float:
        logits = targets * self.vocab * 4
        if not self.is_chunked:
            return self.holds_all * tokens * self.vocab * self.width + _LOGITS * logits
        return _CHUNKS * min(logits, CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the memory of one process follows from.

    Attributes:
        taken: bytes now: on a CPU the whole process with its imports, weights and data, on a GPU the weights.
        weights, gradients, averages: bytes of all weights, of the gradients and of the optimizer's state.
        exchange: bytes beside all gradients: the buffers that processes sum them in, or the second gradient of a tied
            embedding, which is added to that of the head.
        snapshot: bytes of what is copied for a checkpoint, in the memory of the host, beside the next steps.
        tokens: of the largest forward.
        longest: tokens of its longest document.
        share: of the tokens, supervised.
        hidden: numbers that a layer hands to the next, of one token.
        accumulates: whether gradients are there while a forward's activations are.
        heap: bytes of the process for each byte that a step takes.
        peak: of the process until now, as while it loaded its weights.
    """

    taken: float
    weights: float
    gradients: float
    averages: float
    snapshot: float
    kept: Kept
    head: HeadShape
    layers: int
    hidden: int
    tokens: int
    longest: int
    share: float
    accumulates: bool
    is_checkpointed: bool
    exchange: float = 0.0
    heap: float = 1.0
    peak: float = 0.0

    def need(self) -> MemoryNeed:
        kept = self.kept.of(self.tokens, self.tokens * self.longest)
        layer = kept / self.layers
        if self.is_checkpointed:  # a layer is made again, and then worked with
            kept, layer = self.layers * self.tokens * self.hidden * self.head.width, _LAYER * layer
        head = self.head.work(self.tokens, self.share * self.tokens)
        early = self.gradients if self.accumulates else self.head.gradient
        return MemoryNeed(
            self.taken, self.gradients, self.averages, kept + max(layer, head), early, layer, self.exchange,
            self.snapshot, self.heap,
        )  # fmt: skip

    def fewer_tokens(self, tokens: int) -> MemoryPlan:
        heap = max(self.heap, heap_share(True, self.is_checkpointed)) if self.heap > 1 else 1.0
        return replace(self, tokens=tokens, longest=min(self.longest, tokens), accumulates=True, heap=heap)


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of one process at its peak.

    Attributes:
        activations: what a forward keeps, with the work of one layer or of the head.
        early: gradients that exist while all activations do.
        layer: the work of a layer, while all gradients exist.
    """

    taken: float
    gradients: float
    averages: float
    activations: float
    early: float
    layer: float
    exchange: float = 0.0
    snapshot: float = 0.0
    heap: float = 1.0

    @property
    def step(self) -> float:
        """Taken by a step and released at its end."""
        return max(self.activations + self.early, self.gradients + max(self.layer, self.exchange))

    @property
    def total(self) -> float:
        return self.taken + self.averages + self.heap * self.step + self.snapshot

    @property
    def least(self) -> float:
        """Without what is copied for checkpoints, and what the allocator holds beside live tensors."""
        return self.taken + self.averages + self.step

    def describe(self) -> str:
        """The largest parts."""
        parts = {
            "already in use": self.taken,
            "optimizer": self.averages,
            "gradients": self.gradients if self.gradients <= self.early else 0.0,
            "activations": self.heap * self.activations,
            "copy for a checkpoint": self.snapshot,
        }
        shown = [f"{name} {format_bytes(size)}" for name, size in parts.items() if size >= 0.02 * self.total]
        return ", ".join(shown)


def measure_kept(lm: SupervisedLM, context: contextlib.AbstractContextManager[object], most: int) -> Kept | None:
    """Measure small forwards of one document; None where its weights are not loaded whole, or the model refuses.

    Checkpointing and torch.compile are left out for it. The caller restores random states.

    Args:
        context: of a forward, for its precision.
        most: tokens that a forward may have.
    """
    parameters = list(lm.parameters())
    sizes = [max(2, min(_SIZES[-1], most) * size // _SIZES[-1]) for size in _SIZES]
    if len(set(sizes)) < len(sizes) or any(is_elsewhere(p) for p in parameters):
        return None
    with lm.computing():
        own = {tensor.untyped_storage().data_ptr() for tensor in [*parameters, *lm.parameters(), *lm.buffers()]}
    was_training = lm.training
    try:
        lm.train()
        with _without_checkpointing(lm.model), _without_compiling():
            found = []
            for tokens in sizes:
                with lm.computing(), context:
                    found.append(_count_kept(lm, tokens, own))
    except Exception:  # of the model's own code: the run itself will tell
        return None
    finally:
        lm.train(was_training)
    return _fit(sizes, found)


def is_elsewhere(parameter: Tensor) -> bool:
    """Whether the memory of a weight is not all here: not loaded yet, or shared out over processes."""
    return parameter.is_meta or any(hasattr(parameter, name) for name in ("full_tensor", "part", "ds_id"))


def _count_kept(lm: SupervisedLM, tokens: int, own: set[int]) -> int:
    """Bytes of the storages that the graph of a forward of one target refers to."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output with its graph, kept by that graph, would never be freed

    vocabulary = lm.model.config.get_text_config().vocab_size
    ids = np.arange(tokens, dtype=np.int64) % vocabulary
    at, target = np.array([tokens - 2], np.int64), np.array([ids[-1]], np.int64)
    batch = Batch(ids[None], np.arange(tokens, dtype=np.int64)[None], target, at, Documents([tokens]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), watching_kept(pack):
        sums = supervised_loss(lm, batch)
        size = sum(found.values())  # while the graph holds them: memory that is freed is used again
    del sums
    return size


def _fit(sizes: list[int], found: list[int]) -> Kept:
    (t1, t2, t3), (s1, s2, s3) = sizes, found
    slope_1, slope_2 = (s2 - s1) / (t2 - t1), (s3 - s2) / (t3 - t2)
    per_pair = max(0.0, (slope_2 - slope_1) / (t3 - t1))
    per_token = max(0.0, slope_1 - per_pair * (t1 + t2))
    return Kept(max(0.0, s1 - per_token * t1 - per_pair * t1 * t1), per_token, per_pair)


@contextlib.contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    modules: list[Any] = list(model.modules())
    marked = [module for module in modules if getattr(module, "gradient_checkpointing", False) is True]
    for module in marked:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in marked:
            module.gradient_checkpointing = True


def _without_compiling() -> contextlib.AbstractContextManager[object]:
    if "torch._dynamo" not in sys.modules:  # which takes a second to import
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def head_shape(lm: SupervisedLM, width: int) -> HeadShape:
    """Of a model whose weights are loaded.

    Args:
        width: bytes of a number in activations.
    """
    vocab = lm.model.config.get_text_config().vocab_size
    weight = getattr(lm.model.get_output_embeddings(), "weight", None)
    is_plain = lm.head_path == "decoder" and plain_head(lm.model) is not None
    is_trained = is_plain and isinstance(weight, Tensor) and weight.requires_grad
    gradient = float(weight.numel() * weight.element_size()) if is_trained and weight is not None else 0.0
    holds_all = 2 if lm.head_path == "logits" else 0
    return HeadShape(vocab, width, holds_all, lm.head_path == "decoder", gradient)


def tied_bytes(model: Any) -> float:
    """Bytes of a trained embedding that is the head's weight too; else 0."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    is_tied = embedding is not None and embedding is getattr(model.get_output_embeddings(), "weight", None)
    if not is_tied or not isinstance(embedding, Tensor) or not embedding.requires_grad:
        return 0.0
    return float(embedding.numel() * embedding.element_size())


def heap_share(is_split: bool, makes_again: bool) -> float:
    """Bytes of the process for each byte of tensors in a step.

    Args:
        is_split: tensors of many sizes come and go: of an adapter, of half precision, of experts, beside kept
            gradients.
        makes_again: layers that are checkpointed, or weights of a quantized base.
    """
    if glibc_version() is None:
        return 1.0
    if not leaves_gaps() or not (is_split or makes_again):
        return _HEAP
    return _HEAP_OF_AGAIN if makes_again else _HEAP_OF_SMALL


def process_memory() -> tuple[float, float]:
    """Bytes of this process now, and at most until now; 0 where the system does not say."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        numbers = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
        return 1024.0 * int(numbers["VmRSS"]), 1024.0 * int(numbers["VmHWM"])
    return 0.0, 0.0
