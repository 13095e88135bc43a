"""Every kernel of attention equals the loop over documents; what differs on the model at hand is not used.

The kernels themselves need a GPU: here FlexAttention runs uncompiled, and flash attention is a dense one, written from
torch's description. bench/gpu_step.py makes the same comparisons on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import build_model, set_up_attention, tiny_config
from tunesmith.attention.choose import branching, find_difference, kind_of
from tunesmith.attention.kernels import KERNELS, attend_flex, attend_varlen
from tunesmith.attention.layout import (
    BLOCK,
    AttentionPlan,
    classify_blocks,
    cu_seqlens_of,
    make_layout,
    spans_of,
)
from tunesmith.attention.loop import LayerOptions, attend_documents
from tunesmith.attention.opaque import attend_by_hand_opaque, attend_documents_opaque
from tunesmith.data.pack import Documents
from tunesmith.model.attention import packed_attention
from tunesmith.model.isolation import choose_kernels
from tunesmith.plans.tree import Tree

# raised inside torch's compiler, and by FlexAttention where it is not compiled
pytestmark = pytest.mark.filterwarnings("default::UserWarning")
CPU = torch.device("cpu")
LENS = [7, 1, 12, 40, 9]


def forest(lens: list[int], parents: list[int]) -> Tree:
    """Prefix trees of nodes; -1 is the parent of a root."""
    ends, depths = np.cumsum(lens).tolist(), []
    for length, parent in zip(lens, parents, strict=True):
        depths.append(length + (depths[parent] if parent >= 0 else 0))
    anchors = [ends[parent] - 1 if parent >= 0 else -1 for parent in parents]
    return Tree(lens, anchors, np.arange(ends[-1]), depths)


def make_inputs(tokens: int, dtype: torch.dtype, kv_heads: int = 2, head_dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, tokens, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for heads in (4, kv_heads, kv_heads)
    ]


def with_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]


@torch.no_grad()
def without_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    return [function(*inputs)]


def is_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    """Relative to the largest of all; where documents have one token, gradients of their queries are zero."""
    scale = max(tensor.abs().max() for tensor in wanted)
    return all((a - b).abs().max() <= tolerance * scale for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 8])
def test_the_loop_as_one_operation_has_the_bits_of_the_loop(
    dtype: torch.dtype, kv_heads: int, window: int | None
) -> None:
    inputs = make_inputs(sum(LENS), dtype, kv_heads)
    options = LayerOptions(0.3, window=window)
    sizes = torch.tensor([*LENS, 0, 0, 0])
    wanted = with_gradients(lambda q, k, v: attend_documents(q, k, v, LENS, options), inputs)
    found = with_gradients(lambda q, k, v: attend_documents_opaque(q, k, v, sizes, 0.3, window), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


BY_HAND = {
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)},
    "window": {"window": 8},
    "all": {"window": 8, "softcap": 2.0, "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)},
}


@pytest.mark.parametrize(
    ("lens", "kv_heads"),
    [(LENS, 4), (LENS, 2), ([1] * 70, 2), ([1100, 3], 1)],
    ids=["equal", "grouped", "ones", "long"],
)
@pytest.mark.parametrize("kind", BY_HAND)
def test_gradients_by_hand_are_those_of_the_loop(lens: list[int], kind: str, kv_heads: int) -> None:
    inputs = make_inputs(sum(lens), torch.float64, kv_heads)
    options = LayerOptions(0.3, **BY_HAND[kind])
    sizes, sinks = torch.tensor([*lens, 0, 0]), [options.sinks] if options.sinks is not None else []

    def loop(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        return attend_documents(q, k, v, lens, replace(options, sinks=own[0] if own else None))

    def by_hand(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        return attend_by_hand_opaque(q, k, v, sizes, replace(options, sinks=own[0] if own else None))

    wanted, found = with_gradients(loop, [*inputs, *sinks]), with_gradients(by_hand, [*inputs, *sinks])
    assert len(wanted) == 4 + len(sinks)
    assert torch.equal(found[0], wanted[0])
    assert is_close(found, wanted, 1e-12)
    halves = [tensor.to(torch.bfloat16) for tensor in (*inputs, *sinks)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        usual = loop(*halves)
    assert torch.equal(by_hand(*halves), usual)
    assert is_close(with_gradients(by_hand, halves), wanted, 0.02)


@pytest.mark.parametrize("case", ["plain", "softcap", "all", "varlen", "flex"])
def test_attention_compiles_without_breaks_and_once_for_all_batches(flash: DenseFlash, case: str) -> None:
    """The second batch makes sizes dynamic; no batch after it is compiled again."""
    options = LayerOptions(0.3, **BY_HAND.get(case, {"window": 8}))
    dtype = {"varlen": torch.bfloat16, "flex": torch.float32}.get(case, torch.float64)

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Tensor:
        output, _ = packed_attention(
            torch.nn.Identity(), q, k, v, None, options.scale, documents=layout,
            sliding_window=options.window, softcap=options.softcap, s_aux=options.sinks,
        )  # fmt: skip
        return output.transpose(1, 2)

    torch._dynamo.reset()
    graphs, counts = torch._dynamo.utils.counters["stats"], []
    graphs.clear()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for lens in (LENS, [3, 4, 5], [60, 1], [5] * 13, [30, 30], [1] * 70, [300, 200]):
        lens = [*lens, 900] if case == "flex" else lens  # with blocks fewer than, or as many as heads, once more
        inputs = make_inputs(sum(lens), dtype)
        plan = AttentionPlan({kind_of(inputs[0], options): (case,)} if case in KERNELS else {})
        layout = make_layout(Documents(lens), CPU, plan)
        results = without_gradients if case == "flex" else with_gradients  # torch's has no backward on a CPU
        wanted = results(lambda q, k, v: attend_documents(q, k, v, lens, options), inputs)  # noqa: B023
        found = results(lambda q, k, v: compiled(q, k, v, layout), inputs)  # noqa: B023
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
        assert is_close(found, wanted, tolerance)
        counts.append(graphs["unique_graphs"])
    assert counts[1] == counts[-1], counts
    assert bool(flash.max_lens) == (case == "varlen")
    torch._dynamo.reset()


def visible(source: Any, window: int | None) -> np.ndarray:
    """[tokens, tokens]: which keys a query sees, by going through paths."""
    bounds = np.cumsum([0, *source.lens])
    anchors = getattr(source, "anchors", [-1] * len(source.lens))
    seen = np.zeros((bounds[-1], bounds[-1]), bool)
    paths: list[list[int]] = []
    for node, anchor in enumerate(anchors):
        above = paths[int(np.searchsorted(bounds, anchor, side="right")) - 1] if anchor >= 0 else []
        path = [token for token in above if token <= anchor] + list(range(bounds[node], bounds[node + 1]))
        paths.append(path)
        depth = {token: number for number, token in enumerate(path)}
        for query in range(bounds[node], bounds[node + 1]):
            for key in path[: depth[query] + 1]:
                seen[query, key] = window is None or depth[query] - depth[key] < window
    return seen


SOURCES = [
    Documents([300, 1, 90, 128, 37]),
    Documents([3] * 120),
    Documents([600]),
    forest([100, 130, 40, 3, 200, 60, 20], [-1, 0, 1, 1, 0, -1, 5]),
    forest([1, 1, 1, 300], [-1, 0, 1, 2]),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: f"{type(s).__name__}{len(s.lens)}")
@pytest.mark.parametrize("window", [None, 50, 200])
def test_blocks_of_the_mask_are_those_of_the_whole_mask(source: Any, window: int | None) -> None:
    """No visible pair is outside of the listed blocks, and blocks listed as whole have no invisible pair."""
    seen, (ends, depths) = visible(source, window), spans_of(source)
    numbers = np.arange(len(ends))
    rule = (numbers[None] <= numbers[:, None]) & (numbers[:, None] < ends[None])
    rule &= window is None or (depths[:, None] - depths[None] < window)
    assert (rule == seen).all()
    partial, full = classify_blocks(ends, depths, window)
    assert not (partial & full).any()
    for query, key in np.ndindex(*partial.shape):
        block = seen[query * BLOCK : (query + 1) * BLOCK, key * BLOCK : (key + 1) * BLOCK]
        assert partial[query, key] or full[query, key] or not block.any()
        assert not full[query, key] or block.all()


@pytest.mark.parametrize("source", SOURCES[:4:3], ids=["documents", "trees"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@torch.no_grad()
def test_flex_attention_equals_the_loop(
    source: Any, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0]) if has_sinks else None
    options = LayerOptions(0.3, window=window, softcap=softcap, sinks=sinks)
    q, k, v = make_inputs(sum(source.lens), torch.float32)
    plan = AttentionPlan({kind_of(q, options): ("flex",)})
    found = attend_flex(q, k, v, make_layout(source, CPU, plan), options)
    if isinstance(source, Documents):
        wanted = attend_documents(q, k, v, source.lens, options)
    else:
        wanted = dense(q, k, v, torch.from_numpy(visible(source, window)), options)
    assert (found - wanted).abs().max() < 1e-5


def test_nodes_out_of_preorder_are_an_error() -> None:
    with pytest.raises(AssertionError, match="preorder"):
        spans_of(forest([3, 2, 2, 4], [-1, -1, 0, 1]))


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, options: LayerOptions) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * options.scale
    scores = scores if options.softcap is None else options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if options.sinks is not None:
        sink = options.sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v.repeat_interleave(groups, 1)


def flash_mask(cu_seqlens: Tensor, tokens: int, window: list[int]) -> Tensor:
    """What flash attention sees: `window` tokens to the left and right of the query; -1: all."""
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == tokens
    document = torch.bucketize(torch.arange(tokens), cu_seqlens[1:], right=True)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    seen = document[:, None] == document[None]
    seen &= (distance <= window[0]) | torch.tensor(window[0] < 0)
    return seen & ((-distance <= window[1]) | torch.tensor(window[1] < 0))


class DenseFlash:
    """torch's varlen operations on a CPU.

    Attributes:
        shift: of the window, an error to be found.
    """

    def __init__(self) -> None:
        self.shift = 0
        self.max_lens: list[int] = []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Any, max_q: int, max_k: int, *rest: Any
    ) -> Any:
        _, scale, window, *_ = rest
        self.max_lens.append(max_q)
        out, _ = self._attend(q, k, v, cu_q, scale, window)
        return out, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor,
                 cu_k: Tensor, max_q: int, max_k: int, is_causal: bool, rng: Tensor, scale: Any, window: Any) -> Any:  # fmt: skip
        _, weights = self._attend(q, k, v, cu_q, scale, window)
        groups, g = q.shape[1] // k.shape[1], grad.double().transpose(0, 1)
        keys, values = (t.double().transpose(0, 1).repeat_interleave(groups, 0) for t in (k, v))
        d_values = weights.mT @ g
        d_weights = g @ values.mT
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
        d_q, d_keys = d_scores @ keys, d_scores.mT @ q.double().transpose(0, 1)
        d_k, d_v = (t.unflatten(0, (-1, groups)).sum(1) for t in (d_keys, d_values))
        return tuple(d.transpose(0, 1).to(t.dtype).contiguous() for d, t in ((d_q, q), (d_k, k), (d_v, v)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, scale: float, window: list[int]) -> Any:
        groups = q.shape[1] // k.shape[1]
        left = window[0] + self.shift if window[0] >= 0 else -1
        queries, keys, values = (t.double().transpose(0, 1) for t in (q, k, v))
        scores = queries @ keys.repeat_interleave(groups, 0).mT * scale
        weights = scores.masked_fill(~flash_mask(cu_q, len(q), [left, window[1]]), -math.inf).softmax(-1)
        return (weights @ values.repeat_interleave(groups, 0)).transpose(0, 1).to(q.dtype).contiguous(), weights


@pytest.fixture
def flash() -> Iterator[DenseFlash]:
    dense_flash = DenseFlash()
    library = torch.library.Library("torch_attn", "IMPL")
    library.impl("_varlen_attn", dense_flash.forward, "CPU")
    library.impl("_varlen_attn_backward", dense_flash.backward, "CPU")
    yield dense_flash
    library._destroy()


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_varlen_is_called_as_torch_describes_it(flash: DenseFlash, window: int | None, kv_heads: int) -> None:
    inputs = make_inputs(sum(LENS), torch.bfloat16, kv_heads)
    options = LayerOptions(0.3, window=window)
    layout = make_layout(Documents(LENS), CPU, AttentionPlan({kind_of(inputs[0], options): ("varlen",)}))
    difference = find_difference(
        inputs, options, Documents(LENS), lambda q, k, v, own: attend_varlen(q, k, v, layout, own)
    )
    assert difference == ""
    assert set(flash.max_lens) == {64}  # a power of two: few values for many batches


def run_model(model: Any, lens: list[int], plan: AttentionPlan) -> Tensor:
    ids = torch.randint(0, 400, (1, sum(lens)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lens])[None]
    layout = make_layout(Documents(lens), CPU, plan)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False, "documents": layout}
        hidden: Tensor = model.get_decoder()(**inputs).last_hidden_state
    return hidden


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_kernels_are_chosen_by_comparison_on_the_model(flash: DenseFlash, name: str) -> None:
    """Under autocast, as in training; a kernel whose window is one token too wide is refused for layers with one."""
    model = build_model(tiny_config(name, initializer_range=0.05))
    assert set_up_attention(model, 128, 256).is_isolated
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    found = choose_kernels(model, autocast, 128, 256)
    assert not found.refused
    assert set(found.kernels.values()) == {("varlen",)}
    assert {kind[0] for kind in found.kernels} == ({8, None} if name == "gemma3" else {None})
    assert model.training
    calls = len(flash.max_lens)
    slow, fast = (run_model(model, LENS, plan) for plan in (AttentionPlan(), found.plan()))
    assert len(flash.max_lens) == calls + 2  # once a layer
    assert (slow - fast).abs().max() < 0.05 * slow.abs().max()
    flash.shift = 1
    refused = choose_kernels(model, torch.autocast("cpu", dtype=torch.bfloat16), 128, 256)
    assert any("varlen is not used" in line and "window" in line for line in refused.refused) == (name == "gemma3")


def test_layers_that_no_kernel_serves_use_the_loop() -> None:
    """In float32, and without a GPU: torch's own errors are the reason that is told."""
    model = build_model(tiny_config("gemma2"))
    assert set_up_attention(model, 128, 256).is_isolated
    found = choose_kernels(model, nullcontext(), 128, 256)
    assert set(found.kernels.values()) == {()}
    assert all("flex is not used" in line and "softcap" in line for line in found.refused)
    layout = make_layout(Documents(LENS), CPU, found.plan())
    assert layout.cu_seqlens is None
    assert not layout.masks


def test_a_mutant_that_leaks_between_documents_is_found() -> None:
    inputs = make_inputs(sum(LENS), torch.bfloat16)
    joined = [LENS[0] + LENS[1], *LENS[2:]]
    reason = find_difference(
        inputs, LayerOptions(0.3), Documents(LENS), lambda q, k, v, own: attend_documents(q, k, v, joined, own)
    )
    assert "output" in reason


@pytest.mark.parametrize("lens", [[20, 5, 9, 3, 7], [1, 1, 1], [4], [2, 30, 1, 8, 8, 8]])
@pytest.mark.parametrize("window", [None, 6])
def test_kernels_are_compared_on_prefix_trees_too(lens: list[int], window: int | None) -> None:
    """A right kernel agrees, and one that takes the strands for documents does not."""
    tree = branching(lens)
    seen = torch.from_numpy(visible(tree, window))
    assert all(anchor >= 0 for anchor in tree.anchors[1:])
    inputs, options = make_inputs(sum(lens), torch.float32), LayerOptions(0.3, window=window)
    assert find_difference(inputs, options, tree, lambda q, k, v, own: dense(q, k, v, seen, own)) == ""
    mutant = find_difference(inputs, options, tree, lambda q, k, v, own: attend_documents(q, k, v, lens, own))
    assert ("output" in mutant) == (len(lens) > 1)


def test_bounds_of_documents_have_few_sizes() -> None:
    sizes = {len(cu_seqlens_of([3] * count)) for count in range(1, 500)}
    assert sizes == {33, 65, 129, 257, 513}
    assert cu_seqlens_of([2, 3]).tolist() == [0, 2, *[5] * 31]
    assert len(cu_seqlens_of([1] * 32)) == 33
