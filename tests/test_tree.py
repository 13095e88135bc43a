"""Prefix trees: the loss and gradients of samples packed as a tree equal those of naive packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import build_model, tiny_config
from tunesmith.attention.loop import LayerOptions
from tunesmith.attention.trees import attend_trees
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.pack import Batch, Documents, build_batch, build_tree_batch
from tunesmith.data.store import StoreWriter, TokenStore, open_store
from tunesmith.model.attention import packed_attention
from tunesmith.model.head import choose_head_path
from tunesmith.model.isolation import probe_trees, use_packed_attention
from tunesmith.model.loss import SupervisedLM, supervised_loss
from tunesmith.plans import tree as tree_module
from tunesmith.plans.mix import Mix
from tunesmith.plans.tree import Tree, build_tree

FP32_NORMS = 1e-6  # of gradients in float64, where a model's norms and rope compute in fp32


def random_samples(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Samples that share prefixes: continuations of earlier ones, duplicates, prefixes, and unrelated ones."""
    rng = np.random.default_rng(seed)
    samples = [rng.integers(1, 4, rng.integers(1, 20))]
    for _ in range(rng.integers(1, 9)):
        old = samples[rng.integers(len(samples))]
        cut = rng.integers(0, len(old) + 1)
        samples.append(np.concatenate([old[:cut], rng.integers(1, 4, rng.integers(0 if cut else 1, 12))]))
    masks = [rng.random(len(sample)) < 0.6 for sample in samples]
    masks[0][-1] = True
    return samples, masks


def store_of(folder: Path, seed: int, rows: int = 3) -> TokenStore:
    """Random samples, those of a row one after another."""
    samples, masks = random_samples(seed)
    with StoreWriter(folder / str(seed)) as writer:
        for row in range(rows):
            own = tuple(
                Sample(ids.astype(np.uint32), mask.astype(np.uint8))
                for ids, mask in zip(samples[row::rows], masks[row::rows], strict=True)
            )
            writer.add(LabelledRow("x.jsonl", row + 1, "used", samples=own))
    return open_store(folder / str(seed))


@pytest.fixture(autouse=True)
def _share_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one token too."""
    monkeypatch.setattr(tree_module.build_tree, "__defaults__", (1,))


@pytest.mark.parametrize("seed", range(100))
def test_a_tree_holds_each_prefix_once(seed: int) -> None:
    samples, _ = random_samples(seed)
    joined = build_tree(samples)
    prefixes = {tuple(sample[: n + 1].tolist()) for sample in samples for n in range(len(sample))}
    assert len(joined.input_ids) == len(prefixes) == sum(joined.layout.lens)
    seen = ancestors(joined.layout)
    for sample, place in zip(samples, joined.places, strict=True):
        assert (joined.input_ids[place] == sample).all()
        assert (joined.position_ids[place] == np.arange(len(sample))).all()
        assert seen[place[-1]] == place.tolist()
    assert joined.layout.copies.tolist() == np.concatenate(joined.places).tolist()


@pytest.mark.parametrize("seed", range(100))
def test_what_descends_from_a_token_lies_in_one_piece(seed: int) -> None:
    """So that a mask needs one number a token."""
    tree = build_tree(random_samples(seed)[0]).layout
    seen = ancestors(tree)
    ends, depths = tree.spans()
    assert depths.tolist() == [len(path) - 1 for path in seen]
    for token in range(len(seen)):
        below = [other for other, path in enumerate(seen) if token in path]
        assert below == list(range(token, token + len(below))) == list(range(token, ends[token]))


def ancestors(tree: Tree) -> list[list[int]]:
    """Of each token, the positions it attends to."""
    found, start = [], 0
    for length, path in zip(tree.lens, tree.paths(), strict=True):
        above = [position for piece in path for position in range(*piece)]
        found += [[*above, *range(start, start + n + 1)] for n in range(length)]
        start += length
    return found


def test_short_prefixes_are_not_shared() -> None:
    one, two = np.arange(20), np.concatenate([np.arange(15), [99]])
    assert len(build_tree([one, two], 16).input_ids) == 36
    assert len(build_tree([one, two], 15).input_ids) == 21


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "window": {"sliding_window": 5}, "softcap": {"softcap": 3.0}, "sinks": {"s_aux": True},
    "window and softcap": {"sliding_window": 7, "softcap": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(8))
def test_attention_of_trees_equals_that_of_their_samples(name: str, seed: int, kv_heads: int) -> None:
    """Output and gradients, to the last digits of float64: windows, softcap, sinks and grouped heads."""
    tree = build_tree(random_samples(seed)[0]).layout
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, sum(tree.lens), 8) for heads in (4, kv_heads, kv_heads)]
    options = dict(OPTIONS[name])
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    if options.get("s_aux"):
        options["s_aux"] = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
        leaves.append(options["s_aux"])
    copies = torch.from_numpy(tree.copies)
    weights = torch.randn((1, len(copies), 4, 8), generator=generator, dtype=torch.float64)
    module = torch.nn.Identity()
    found = packed_attention(module, *leaves[:3], None, documents=tree, **options)[0][:, copies]
    apart = [leaf[:, :, copies] for leaf in leaves[:3]]
    wanted = packed_attention(module, *apart, None, documents=Documents(tree.sample_lens), **options)[0]
    gradients = [torch.autograd.grad((one * weights).sum(), leaves) for one in (found, wanted)]
    for one, two in zip([found, *gradients[0]], [wanted, *gradients[1]], strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-12)


def test_attention_of_trees_in_bf16_and_under_autocast() -> None:
    tree = build_tree(random_samples(3)[0]).layout
    q, k, v = (torch.randn(1, heads, sum(tree.lens), 8) for heads in (4, 2, 2))
    options = LayerOptions(0.3)
    exact = attend_trees(q, k, v, tree, options)
    half = attend_trees(*(tensor.bfloat16() for tensor in (q, k, v)), tree, options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attend_trees(q, k, v, tree, options)
    assert torch.equal(half, cast)
    assert half.dtype == torch.bfloat16
    assert float((half - exact).abs().max()) < 0.05


def compute_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rope and routers, which transformers computes in fp32."""
    to = torch.Tensor.to

    def to_64(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return to(tensor, *args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})

    softmax = torch.nn.functional.softmax

    def softmax_64(tensor: Any, dim: int | None = None, dtype: Any = None, **kwargs: Any) -> Any:
        return softmax(tensor, dim=dim, dtype=torch.float64 if dtype is torch.float32 else dtype, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to_64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax_64)


def supervised(name: str, router_loss: Any = "transformers", head: str = "") -> SupervisedLM:
    more = {"router_aux_loss_coef": 0.3, "output_router_logits": True} if "moe" in name else {}
    model = build_model(tiny_config(name, **more), torch.float64)
    use_packed_attention(model)
    return SupervisedLM(model, True, head or choose_head_path(model, True), None, router_loss)


def sums_and_gradients(lm: SupervisedLM, batch: Batch) -> list[torch.Tensor]:
    lm.zero_grad(set_to_none=True)
    sums = supervised_loss(lm, batch)
    loss = sums.loss if sums.router_loss is None else sums.loss + sums.router_loss
    loss.backward()
    with torch.no_grad():
        correct = supervised_loss(lm, batch).num_correct
    more = [part.double() for part in (sums.source_losses, sums.expert_counts, correct) if part is not None]
    return [loss.detach(), *more, *(p.grad for p in lm.parameters() if p.grad is not None)]


def largest_difference(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
    differences = [float((a - b).abs().max() / b.abs().max().clamp_min(1.0)) for a, b in zip(one, two, strict=True)]
    return max(differences)


CASES = ["llama", "qwen3", "gpt2", "gemma2", "gemma3", "qwen3_moe", "qwen2_moe"]


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_naive_packing(
    name: str, is_exact: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The gradient of a shared token is added up before it goes back through a norm, not after: where that is done in
    fp32, its rounding differs. Where it is float64, everything is equal to 1e-10."""
    if is_exact:
        compute_in_float64(monkeypatch)
    lm = supervised(name)
    for seed in range(4):
        store = store_of(tmp_path, seed)
        samples = np.random.default_rng(seed).permutation(len(store))
        mix = Mix(("a", "b"), (np.arange(len(store)) % 2).astype(np.int16))
        naive, tree = build_batch(store, samples, mix=mix), build_tree_batch(store, samples, mix=mix)
        assert tree.num_targets == naive.num_targets
        found, wanted = sums_and_gradients(lm, tree), sums_and_gradients(lm, naive)
        assert largest_difference(found, wanted) <= (1e-10 if is_exact or name == "gpt2" else FP32_NORMS)


@pytest.mark.parametrize("router_loss", ["transformers", "layers", "sequences"])
def test_every_router_loss_counts_a_shared_token_as_often_as_it_occurs(
    router_loss: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compute_in_float64(monkeypatch)
    lm, store = supervised("qwen3_moe", router_loss), store_of(tmp_path, 5)
    found, wanted = (
        sums_and_gradients(lm, build(store, range(len(store)))) for build in (build_tree_batch, build_batch)
    )
    assert largest_difference(found, wanted) <= 1e-10


@pytest.mark.parametrize("head", ["decoder", "logits_to_keep", "logits"])
def test_every_way_to_the_logits(head: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compute_in_float64(monkeypatch)
    lm, store = supervised("llama", head=head), store_of(tmp_path, 6)
    found, wanted = (
        sums_and_gradients(lm, build(store, range(len(store)))) for build in (build_tree_batch, build_batch)
    )
    assert largest_difference(found, wanted) <= 1e-10


@pytest.mark.parametrize("seed", range(20))
def test_a_row_may_train_what_its_samples_share_once(seed: int, tmp_path: Path) -> None:
    """By rows: what other rows share is trained by each."""
    store = store_of(tmp_path, seed)
    samples = np.arange(len(store))
    batch = build_tree_batch(store, samples, row_ids=store.row_ids)
    wanted = {
        (int(store.row_numbers[n]), tuple(store[n].input_ids[: at + 1].tolist()))
        for n in samples
        for at in np.flatnonzero(store[n].loss_mask)
        if at
    }
    assert batch.num_targets == len(wanted)
    assert sorted(batch.targets.tolist()) == sorted(path[-1] for _, path in wanted)


def test_a_sample_that_a_mix_takes_twice_trains_twice(tmp_path: Path) -> None:
    store = store_of(tmp_path, 0)
    samples = np.arange(len(store))
    once = build_tree_batch(store, samples, row_ids=store.row_ids)
    twice = build_tree_batch(store, np.concatenate([samples, samples[::-1]]), row_ids=store.row_ids)
    assert twice.num_tokens == once.num_tokens
    assert sorted(twice.targets.tolist()) == sorted(2 * once.targets.tolist())


def test_half_precision_keeps_what_many_samples_add_to_a_prefix() -> None:
    """Gradients of keys and values of a prefix that hundreds of samples share."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 1000, 32)
    tree = build_tree([np.concatenate([prefix, rng.integers(0, 1000, 4)]) for _ in range(400)]).layout
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, sum(tree.lens), 16) for _ in range(3)]
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in tensors]
        attend_trees(*leaves, tree, LayerOptions(0.25)).sum().backward()
        found[dtype] = [leaf.grad[:, :, :32].double() for leaf in leaves[1:] if leaf.grad is not None]
    for exact, half in zip(found[torch.float64], found[torch.bfloat16], strict=True):
        assert (half - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("name", CASES)
def test_the_check_at_start_knows_trees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tiny_config(name)).eval()
    own = model.config._attn_implementation
    use_packed_attention(model)
    assert probe_trees(model, own, 64, 128).is_exact
    monkeypatch.setattr("tunesmith.model.attention.attend_trees", leaking)
    assert not probe_trees(model, own, 64, 128).is_exact


def leaking(query: Any, key: Any, value: Any, tree: Tree, options: LayerOptions) -> Any:
    """Attention in which branches see each other."""
    everything = Tree([sum(tree.lens)], [-1], tree.copies, [sum(tree.lens)])
    return attend_trees(query, key, value, everything, options)
