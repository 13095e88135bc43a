"""Settings with which a run fits into the memory that is free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tunesmith.monitor.memory import ERROR, Kept, MemoryPlan, heap_share

_SMALLEST = 64  # tokens
_MANY = 3  # ways that are told
_ADAPTER = 0.05  # of the weights, about what an adapter trains, and more of what a forward keeps
_ADAPTER_KEPT = 1.3


def find_settings(
    plan: MemoryPlan, free: float, max_seq_len: int, packs: int, can_adapt: bool, is_full_width: bool
) -> list[str]:
    """Keys and values, each a way to make the run fit; those that change least first.

    Args:
        free: bytes that this process may still take.
        max_seq_len: tokens that a document may have.
        packs: train.grad_accum_steps.
        can_adapt: whether an adapter could be trained instead of all weights.
        is_full_width: whether weights have 4 bytes.
    """
    whole: list[str] = []
    cut: list[str] = []
    for words, changed in _ways(plan, can_adapt, is_full_width):
        tokens = _most_tokens(changed, plan.taken + free)
        if not tokens or (tokens == plan.tokens and not words):
            continue
        keys = [words] if words else []
        if tokens < min(changed.tokens, max_seq_len):
            keys.append(f"data.max_seq_len {tokens}")
        if tokens < changed.tokens:
            keys.append(f"train.micro_batch_tokens {tokens}")
            if tokens >= changed.longest:
                keys.append(f"train.grad_accum_steps {packs * -(-changed.tokens // tokens)}")
        (whole if tokens >= changed.longest else cut).append(" with ".join(keys))
    return [*whole, *cut][:_MANY]


def _ways(plan: MemoryPlan, can_adapt: bool, is_full_width: bool) -> Iterator[tuple[str, MemoryPlan]]:
    checkpointed = as_checkpointed(plan)
    yield "", plan
    if not plan.is_checkpointed:
        yield "train.gradient_checkpointing true", checkpointed
    if can_adapt:
        yield "lora.kind lora", as_adapter(plan)
        if not plan.is_checkpointed:
            yield "lora.kind lora with train.gradient_checkpointing true", as_adapter(checkpointed)
    if is_full_width:
        yield "train.precision bf16_pure", as_half(plan)
        if not plan.is_checkpointed:
            yield "train.precision bf16_pure with train.gradient_checkpointing true", as_half(checkpointed)


def _most_tokens(plan: MemoryPlan, total: float) -> int:
    """Tokens of the largest forward that fits for certain; 0 if none does."""
    if _fits(plan, total):
        return plan.tokens
    low, high = 0, plan.tokens // _SMALLEST
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(plan.fewer_tokens(middle * _SMALLEST), total):
            low = middle
        else:
            high = middle
    return low * _SMALLEST


def _fits(plan: MemoryPlan, total: float) -> bool:
    return plan.need().total * (1 + ERROR) <= total


def as_checkpointed(plan: MemoryPlan) -> MemoryPlan:
    return replace(plan, is_checkpointed=True, heap=heap_share(True, True) if plan.heap > 1 else 1.0)


def as_adapter(plan: MemoryPlan) -> MemoryPlan:
    """The same with frozen weights and a LoRA adapter on all linear layers, at most."""
    trained = _ADAPTER * plan.weights
    kept = Kept(plan.kept.constant, _ADAPTER_KEPT * plan.kept.per_token, plan.kept.per_pair)
    return replace(
        plan, taken=plan.taken + trained, gradients=trained, averages=2 * trained, snapshot=3 * trained, kept=kept,
        exchange=min(plan.exchange, 2 * trained),
        head=replace(plan.head, gradient=0.0), heap=_heap(plan),
    )  # fmt: skip


def _heap(plan: MemoryPlan) -> float:
    return heap_share(True, plan.is_checkpointed) if plan.heap > 1 else 1.0


def as_half(plan: MemoryPlan) -> MemoryPlan:
    """The same with weights, gradients, averages and activations of 2 bytes instead of 4; norms keep more."""
    kept = Kept(plan.kept.constant, 0.7 * plan.kept.per_token, plan.kept.per_pair)
    return replace(
        plan, taken=plan.taken - plan.weights / 2, weights=plan.weights / 2, gradients=plan.gradients / 2,
        averages=plan.averages / 2, snapshot=plan.snapshot / 2, kept=kept, exchange=plan.exchange / 2,
        head=replace(plan.head, gradient=plan.head.gradient / 2, width=2), heap=_heap(plan),
    )  # fmt: skip
