"""The memory of a run is estimated before step 1, and a run that cannot fit is refused."""

from __future__ import annotations

import gc
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from conftest import build_model, raises, tiny_config
from tunesmith.adapters.adapter import add_adapter
from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import LoraSection, RunConfig
from tunesmith.data.pack import Batch, Documents
from tunesmith.errors import TunesmithError
from tunesmith.layers.speedup import speed_up
from tunesmith.model.head import choose_head_path
from tunesmith.model.isolation import use_packed_attention
from tunesmith.model.loss import SupervisedLM, supervised_loss
from tunesmith.monitor import room
from tunesmith.monitor.fitting import find_settings
from tunesmith.monitor.memory import HeadShape, Kept, MemoryPlan, measure_kept
from tunesmith.monitor.room import Room, free_memory, free_swap
from tunesmith.run.console import Silent
from tunesmith.run.start import run_training
from tunesmith.run.summary import plan_memory

GIB = 2.0**30
HEAD = HeadShape(vocab=1000, width=4, holds_all=0, is_chunked=True, gradient=3e6)
PLAN = MemoryPlan(
    taken=5e8, weights=1e8, gradients=1e8, averages=2e8, snapshot=3e8, kept=Kept(0, 4e5, 0), head=HEAD, layers=8, hidden=512,
    tokens=8192, longest=1000, share=0.5, accumulates=False, is_checkpointed=False,
)  # fmt: skip


class Watched(Silent):
    """Keeps the summary, and ends the run at its first record."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def summary(self, lines: list[tuple[str, str]]) -> None:
        self.lines = lines

    def step(self, record: dict[str, Any], remark: str) -> None:
        raise KeyboardInterrupt


def wrap(model: Any, adapter: Any = None) -> SupervisedLM:
    use_packed_attention(model)
    return SupervisedLM(model, True, choose_head_path(model, True), adapter)


def count(lm: SupervisedLM, lens: list[int]) -> float:
    """Bytes that a forward of documents of these lengths keeps, with one target."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*lm.parameters(), *lm.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = sum(lens)
    at, target = np.array([tokens - 2]), np.array([7])
    positions = np.concatenate([np.arange(length) for length in lens])
    batch = Batch(np.arange(tokens)[None] % 300, positions[None], target, at, Documents(lens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sums = supervised_loss(lm, batch)
        size = float(sum(found.values()))
    del sums
    return size


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "qwen3_moe", "llama"])
@pytest.mark.parametrize("is_adapter", [False, True])
def test_activations_of_a_large_forward_follow_from_small_ones(name: str, is_adapter: bool) -> None:
    longer = {"n_positions": 1024} if name == "gpt2" else {"max_position_embeddings": 1024}
    model = build_model(tiny_config(name, **longer))
    adapter = add_adapter(model, LoraSection(kind="lora", rank=4), "base", [], None, None) if is_adapter else None
    lm = wrap(model, adapter).train()
    kept = measure_kept(lm, nullcontext(), 1024)
    assert kept is not None
    assert kept.of(600, 600 * 600) == pytest.approx(count(lm, [600]), rel=0.1)
    assert kept.of(600, 2 * 300 * 300) == pytest.approx(count(lm, [300, 300]), rel=0.15)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = build_model(tiny_config("qwen3"))
    lm = wrap(model).eval()
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    plain = measure_kept(lm, nullcontext(), 64)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert measure_kept(lm, nullcontext(), 64) == plain  # of all layers, checkpointed or not
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not lm.training
    assert all(parameter.grad is None for parameter in lm.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())


def test_what_cannot_be_measured_is_not_estimated() -> None:
    with torch.device("meta"):
        model = build_model(tiny_config("qwen3"))
    assert measure_kept(SupervisedLM(model, True, "decoder"), nullcontext(), 64) is None  # not loaded
    lm = wrap(build_model(tiny_config("qwen3")))
    assert measure_kept(lm, nullcontext(), 4) is None  # too short to see how it grows
    lm.model.register_forward_pre_hook(lambda *_: 1 / 0)
    lm.model.get_decoder().register_forward_pre_hook(lambda *_: 1 / 0)
    assert measure_kept(lm, nullcontext(), 64) is None  # the model's own code fails


def test_parts_of_a_peak() -> None:
    need = PLAN.need()
    head = 2 * 4096 * 1000 * 4  # logits and their gradient
    activations = 8192 * 4e5 + max(8192 * 4e5 / 8, head)
    assert need.total == 5e8 + 2e8 + activations + 3e6 + 3e8
    assert need.least == need.total - 3e8
    assert replace(PLAN, accumulates=True).need().total == need.total + 1e8 - 3e6
    assert replace(PLAN, gradients=1e10).need().step == 1e10 + 8192 * 4e5 / 8
    assert replace(PLAN, is_checkpointed=True).need().total < need.total / 2
    assert replace(PLAN, heap=2.0).need().least == need.least
    assert Kept(1, 2, 3).of(10, 100) == 321
    assert replace(HEAD, is_chunked=False, holds_all=2).work(10, 5) == 2 * 10 * 1000 * 4 + 2.5 * 5 * 1000 * 4
    assert HEAD.work(1e9, 1e9) == 2 * 128 * 2**20  # however many tokens and however large the vocabulary


@pytest.mark.parametrize("free", [4e9, 2e9, 1e9, 7e8, 5e8, 3e8])
@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, heap=1.15), replace(PLAN, gradients=2e9, averages=4e9)])
def test_settings_that_are_told_do_fit(free: float, plan: MemoryPlan) -> None:
    for way in find_settings(plan, free, 2048, 2, True, True):
        pairs = dict(part.split() for part in way.split(" with "))
        tokens = int(pairs.get("train.micro_batch_tokens", plan.tokens))
        if "data.max_seq_len" in pairs:
            assert int(pairs["data.max_seq_len"]) == tokens  # a forward holds the longest row
        elif tokens != plan.tokens:
            assert tokens >= 2048
        if tokens >= plan.longest and tokens != plan.tokens:
            assert tokens * int(pairs["train.grad_accum_steps"]) >= 2 * plan.tokens  # the same step
        if "lora.kind" in pairs or "train.precision" in pairs:
            continue
        changed = replace(plan, is_checkpointed="train.gradient_checkpointing" in pairs)
        changed = changed if tokens == plan.tokens else changed.fewer_tokens(tokens)
        assert changed.need().total <= plan.taken + free


def test_nothing_is_told_where_nothing_helps() -> None:
    assert find_settings(PLAN, 1e6, 2048, 1, True, True) == []


GROUPS = {"2": ("0::/job/step", "", "memory.max", "memory.current"),
          "1": ("5:memory:/job/step", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")}  # fmt: skip


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_limits_of_all_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    line, root, limit, used = GROUPS[version]
    (tmp_path / "own").write_text(f"3:cpu:/x\n{line}\n")
    folder = tmp_path / root
    (folder / "job" / "step").mkdir(parents=True)
    (folder / "job" / limit).write_text(f"{300 * 2**20}\n")
    (folder / "job" / used).write_text(f"{200 * 2**20}\n")
    (folder / "job" / "memory.stat").write_text(f"anon 1\ninactive_file {2**20}\nactive_file {2**20}\n")
    (folder / "job" / "step" / limit).write_text("max\n")
    (folder / "job" / "step" / used).write_text("5\n")
    monkeypatch.setattr(room, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(room, "_GROUPS", tmp_path)
    assert free_memory() == 102 * 2**20
    (folder / "job" / "memory.swap.max").write_text("0\n")
    (folder / "job" / "memory.swap.current").write_text("0\n")
    assert free_swap() == 0


def test_where_the_system_says_nothing_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MEMORY", tmp_path / "missing")
    monkeypatch.setattr(room, "_OWN_GROUPS", tmp_path / "missing")
    monkeypatch.setattr(room, "_GROUPS", tmp_path)
    assert free_memory() == room.total_memory()
    assert free_swap() == float("inf")


def settings(model_folder: Path, chats: Path, tmp_path: Path, **more: Any) -> RunConfig:
    keys = {"model.path": str(model_folder), "data.train": [str(chats)], "data.max_seq_len": 64, "train.max_steps": 2,
            "train.output_dir": str(tmp_path / "run")}  # fmt: skip
    return resolve_config(RunConfig, None, {**keys, **more})


def with_room(monkeypatch: pytest.MonkeyPatch, free: float, swap: float = 0.0) -> None:
    monkeypatch.setattr("tunesmith.run.failures.find_room", lambda device: Room(free, swap, "this machine has"))


needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


@needs_cpu
def test_a_run_that_cannot_fit_is_refused(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch, 2.0**19)
    with raises(TunesmithError, "memory-too-small"):
        run_training(settings(model_folder, chats, tmp_path), Watched())
    assert not (tmp_path / "run").exists()
    with_room(monkeypatch, 2.0**19, swap=GIB)
    watched = Watched()
    with pytest.raises(TunesmithError):
        run_training(settings(model_folder, chats, tmp_path), watched)  # slow, but it runs
    assert any("out of memory" in text for name, text in watched.lines if name == "warning")


@needs_cpu
def test_the_settings_of_the_error_start_the_run(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch, 10 * 2.0**20)
    monkeypatch.setattr("tunesmith.run.summary.process_memory", lambda: (0.0, 0.0))  # a toy beside all that is imported
    large: dict[str, Any] = {"data.max_seq_len": 64, "train.micro_batch_tokens": 4096}
    many = tmp_path / "many.jsonl"
    many.write_text(chats.read_text(encoding="utf-8") * 20, encoding="utf-8")
    with pytest.raises(TunesmithError) as caught:
        run_training(settings(model_folder, many, tmp_path, **large), Watched())
    assert caught.value.code == "memory-too-small"
    found = re.search(r"Set (.*?)(;|: this|: each)", str(caught.value))
    assert found
    changes = {key: yaml.safe_load(value) for key, value in (part.split() for part in found[1].split(" with "))}
    assert changes["train.micro_batch_tokens"] < 4096
    watched = Watched()
    with pytest.raises(TunesmithError) as stopped:
        run_training(settings(model_folder, many, tmp_path, **large | changes), watched)
    assert stopped.value.code == "run-interrupted"
    assert not any(name == "warning" for name, _ in watched.lines)


@needs_cpu
@pytest.mark.parametrize(("share", "is_told"), [(1.05, True), (4.0, False)])
def test_a_tight_run_is_warned_of(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, is_told: bool
) -> None:
    coming: list[float] = []

    def watch(ready: Any) -> MemoryPlan:
        plan = plan_memory(ready)
        assert isinstance(plan, MemoryPlan)
        coming.append(plan.need().total - plan.taken)
        return plan

    monkeypatch.setattr("tunesmith.run.start.plan_memory", watch)
    free = lambda device: Room(share * coming[0] if coming else GIB, 0.0, "this machine has")  # noqa: E731
    monkeypatch.setattr("tunesmith.run.failures.find_room", free)
    watched = Watched()
    with pytest.raises(TunesmithError):
        run_training(settings(model_folder, chats, tmp_path), watched)
    assert any(re.match("about .* at its peak", text) for name, text in watched.lines if name == "memory")
    assert any("out of memory" in text for name, text in watched.lines if name == "warning") == is_told


@needs_cpu
def test_weights_that_cannot_fit_are_refused_before_the_data_are_read(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    watched.stage = lambda text: pytest.fail(text)  # type: ignore[method-assign]
    large = {"model.path": "new:tiny", "model.tokenizer": str(model_folder), "model.config.intermediate_size": 2**40}
    with_room(monkeypatch, GIB)
    with raises(TunesmithError, "memory-too-small"):
        run_training(settings(model_folder, chats, tmp_path, **large), watched)


def test_what_down_projections_keep_is_counted() -> None:
    """Their own hooks, which let them keep less, hide it from the estimate's."""
    model = build_model(tiny_config("llama", intermediate_size=256))
    settings = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
    adapter = get_peft_model(model, settings)
    plain = measure_kept(wrap(model, adapter), nullcontext(), 64)
    speed_up(model, model.get_output_embeddings(), False)
    found = measure_kept(wrap(model, adapter), nullcontext(), 64)
    assert plain is not None
    assert found is not None
    dropped = 2 * 256 * 4  # bytes a token: two layers keep the dropped product, the second gate and up as well
    assert found.per_token >= dropped + 2 * 256 * 4
    assert found.per_token < plain.per_token


def test_measuring_leaves_nothing_behind() -> None:
    """A graph that its own saved tensors keep is never freed, not even by the garbage collector."""
    lm = wrap(build_model(tiny_config("qwen3")))
    speed_up(lm.model, lm.model.get_output_embeddings(), False)
    measure_kept(lm, nullcontext(), 64)
    counts = []
    for _ in range(2):
        gc.collect()
        counts.append(sum(isinstance(found, torch.Tensor) for found in gc.get_objects()))
        measure_kept(lm, nullcontext(), 64)
    assert counts[0] == counts[1]
