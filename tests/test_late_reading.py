"""On a GPU the numbers of a step are read a step later. On a CPU, made to do the same, a run has the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith.run.training
from conftest import build_model, chat_row, killed_after, set_up_attention, tiny_config, write_jsonl
from test_pack import make_store
from test_resume import BUSY, checkpoints, poisoned, records, weights
from test_sharded import command, launch
from test_world import FP32, LENGTHS, PACKS, Reads, ThreadWorld, in_threads
from tunesmith.attention.layout import AttentionPlan, make_layout
from tunesmith.config.schema import OptimSection
from tunesmith.data.feed import Batches
from tunesmith.data.pack import Documents
from tunesmith.distributed.world import OneProcess
from tunesmith.model.head import choose_head_path
from tunesmith.model.loss import SupervisedLM
from tunesmith.training.optim import build_optimizer
from tunesmith.training.step import make_gradient, train_step, update_unread
from tunesmith.training.transfer import OnTheWay, copied_ahead, tensors_of

Run = Callable[..., tuple[int, str, str]]
__all__ = ["poisoned"]
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def choose(is_late: bool) -> None:
        monkeypatch.setattr(tunesmith.run.training, "can_read_late", lambda *_: is_late)

    return choose


@pytest.mark.parametrize("more", [(), ("--lora.kind", "lora"), ("--optim.max_grad_norm", 0)])
def test_a_run_is_the_same(run: Run, late: Any, model_folder: Path, chats: Path, tmp_path: Path, more: Any) -> None:
    """Records, checkpoints and weights: with evaluations, saves and a log every third step."""
    for is_late in (False, True):
        late(is_late)
        code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", tmp_path / f"{is_late}",
                           *BUSY, *more)  # fmt: skip
        assert code == 0, err
    soon, later = tmp_path / "False", tmp_path / "True"
    assert records(later) == records(soon)
    assert checkpoints(later) == checkpoints(soon)
    for path in sorted(soon.glob("checkpoints/*/*.safetensors")):
        assert (later / path.relative_to(soon)).read_bytes() == path.read_bytes(), path
    if not more:
        assert weights(later) == weights(soon)


def test_the_router_is_counted_alike(run: Run, late: Any, chats: Path, tmp_path: Path, tokenizer: Any) -> None:
    from conftest import save_folder

    folder = save_folder(tmp_path / "moe", tiny_config("qwen3_moe", initializer_range=0.02), tokenizer)
    for is_late in (False, True):
        late(is_late)
        code, _, err = run("train", "--model", folder, "--data", chats, "--output", tmp_path / f"{is_late}", *BUSY)
        assert code == 0, err
    found = records(tmp_path / "True")
    assert found == records(tmp_path / "False")
    assert any("expert_load" in record for record in found)


def test_a_step_that_is_not_finite(run: Run, fails: Any, late: Any, poisoned: Path, tmp_path: Path) -> None:
    """The same step is named, or left out; with the last checkpoint before it, and without an update."""
    rows = [chat_row(f"What is the answer {'~' if i == 7 else i}?", f"The answer is {i} and you.") for i in range(20)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    words = ("--model", poisoned, "--data", data, "--data.max_seq_len", 64, "--train.micro_batch_tokens", 64,
             "--train.epochs", 2, "--train.log_steps", 1, "--train.save_steps", 1)  # fmt: skip
    stopped = []
    for is_late in (False, True):
        late(is_late)
        error = fails("train", *words, "--output", tmp_path / f"stop-{is_late}")
        assert error.code == "loss-not-finite"
        stopped.append(str(error).replace(f"stop-{is_late}", "stop"))
        code, _, err = run("train", *words, "--output", tmp_path / f"skip-{is_late}", "--train.on_nonfinite", "skip")
        assert code == 0, err
    assert stopped[0] == stopped[1]
    for kind in ("stop", "skip"):
        assert records(tmp_path / f"{kind}-True") == records(tmp_path / f"{kind}-False")
        assert checkpoints(tmp_path / f"{kind}-True") == checkpoints(tmp_path / f"{kind}-False")
    assert weights(tmp_path / "skip-True") == weights(tmp_path / "skip-False")


def test_a_step_that_is_not_finite_and_unlogged_stops_before_the_next_update(
    fails: Any, late: Any, poisoned: Path, tmp_path: Path
) -> None:
    """The step after it is computed, and named neither in the message nor in metrics.jsonl."""
    rows = [chat_row(f"What is the answer {'~' if i == 7 else i}?", f"The answer is {i} and you.") for i in range(20)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    found = []
    for is_late in (False, True):
        late(is_late)
        error = fails("train", "--model", poisoned, "--data", data, "--data.max_seq_len", 64, "--train.log_steps", 5,
                      "--train.micro_batch_tokens", 64, "--output", tmp_path / f"{is_late}")  # fmt: skip
        found.append((str(error).split(".")[0], records(tmp_path / f"{is_late}")))
    assert found[0] == found[1]


def test_a_killed_run_continues_to_the_same_bits(
    run: Run, late: Any, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    """Killed after a step that was not read yet, and continued with or without late reading."""
    late(False)
    words = ("train", "--model", model_folder, "--data", chats, *BUSY)
    assert run(*words, "--output", tmp_path / "soon")[0] == 0
    late(True)
    assert run(*words, "--output", tmp_path / "late")[0] == 0
    for is_late, output in ((False, "late"), (True, "late")):
        late(is_late)
        killed = killed_after(tmp_path / output, 4, tmp_path / f"{output}-{is_late}")
        code, _, err = run("resume", killed)
        assert code == 0, err
        assert weights(killed) == weights(tmp_path / "soon")
        assert records(killed) == records(tmp_path / "soon")


@pytest.mark.slow
def test_several_processes_read_late(tmp_path: Path, model_folder: Path, chats: Path) -> None:
    """Whole models and shards: the bits of a run that reads at once. The optimizer of shards takes found_inf too."""
    cases = {
        f"{parallel} {is_late}": {
            "words": command(model_folder, chats, tmp_path / f"{parallel}-{is_late}", "--train.parallel", parallel,
                             "--train.log_steps", 3),
            "late": is_late,
        }
        for parallel in ("ddp", "fsdp") for is_late in (False, True)
    }  # fmt: skip
    found = launch(2, cases, tmp_path)
    assert {name: result for name, result in found.items() if result} == {}
    for parallel in ("ddp", "fsdp"):
        soon, later = (tmp_path / f"{parallel}-{is_late}" for is_late in (False, True))
        own = ("process_memory_gb", "process_tokens_per_s")
        pairs = zip(records(later), records(soon), strict=True)
        assert all(one[key] == other[key] for one, other in pairs for key in other if key not in own)
        assert weights(later) == weights(soon)


def build() -> SupervisedLM:
    model = build_model(tiny_config("qwen3", initializer_range=0.02))
    assert set_up_attention(model, 64, 256).is_isolated
    return SupervisedLM(model, True, choose_head_path(model, True)).train()


class Transfers(Reads):
    """Also copies between devices: of which there is one here, so none may be asked for."""

    WAITING = (*Reads.WAITING, "_pin_memory", "is_pinned")


def test_no_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its numbers are asked for: not in forwards, backwards, clipping or the update."""
    lm = build()
    optimizer = build_optimizer(lm.model, OptimSection())
    batches, waits = Batches(make_store(tmp_path, LENGTHS), PACKS), []
    wait = OnTheWay.wait
    monkeypatch.setattr(OnTheWay, "wait", lambda numbers: waits.append(1) or wait(numbers))
    with Transfers() as reads:
        for _ in range(2):
            made = make_gradient(lm, optimizer, batches, 1.0, FP32, NO_SCALER)
            update_unread(optimizer, made, OneProcess())
    assert not waits
    assert not reads.found
    assert made.read().loss > 0


def test_an_unread_update_has_the_bits_of_a_read_one(tmp_path: Path) -> None:
    """And one that is not finite changes neither weights nor averages, also not their count of steps."""
    batches = Batches(make_store(tmp_path, LENGTHS), PACKS)
    soon, later = build(), build()
    optimizers = [build_optimizer(lm.model, OptimSection()) for lm in (soon, later)]
    for number in range(3):
        train_step(soon, optimizers[0], batches, 1.0, FP32, NO_SCALER)
        update_unread(optimizers[1], make_gradient(later, optimizers[1], batches, 1.0, FP32, NO_SCALER), OneProcess())
        if number == 1:
            made = make_gradient(later, optimizers[1], batches, 1.0, FP32, NO_SCALER)
            made.grad_norm.fill_(float("nan"))
            for parameter in later.parameters():
                parameter.grad.fill_(float("nan"))
            update_unread(optimizers[1], made, OneProcess())
            assert all(parameter.grad is None for parameter in later.parameters())
    pairs = zip(soon.parameters(), later.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    for one, other in zip(optimizers[0].state.values(), optimizers[1].state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not hasattr(optimizers[1], "found_inf")


def test_no_process_updates_where_one_is_not_finite(tmp_path: Path) -> None:
    """Also where only the norm of one process is not: it is summed over the processes."""
    batches = Batches(make_store(tmp_path, LENGTHS), PACKS)
    models = [build() for _ in range(2)]
    start = [[p.detach().clone() for p in lm.parameters()] for lm in models]

    def work(rank: int, world: ThreadWorld) -> None:
        optimizer = build_optimizer(models[rank].model, OptimSection())
        made = make_gradient(models[rank], optimizer, batches.share(rank, 2), 1.0, FP32, NO_SCALER, world)
        if rank:
            made.grad_norm.fill_(float("inf"))
        update_unread(optimizer, made, world)

    assert in_threads(2, work) == [None, None]
    for lm, before in zip(models, start, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(lm.parameters(), before, strict=True))


def test_batches_are_copied_one_ahead(tmp_path: Path) -> None:
    """Each with the layout that its attention needs; their order and number are the same."""
    lm, store = build(), make_store(tmp_path, LENGTHS)
    made: list[int] = []

    class Watched(Batches):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                made.append(batch.num_tokens)
                yield batch

    batches = Watched(store, PACKS, num_empty=1)
    seen = 0
    for batch in copied_ahead(batches, lm):
        seen += 1
        assert len(made) == min(seen + 1, len(PACKS) + 1)
        assert batch.inputs["layout"].lens == batch.layout.lens
        assert torch.equal(batch.inputs["input_ids"], torch.from_numpy(batch.input_ids))
    assert seen == len(PACKS) + 1


def test_all_tensors_of_a_batch_are_handed_over() -> None:
    """What another stream made must not be freed under the forward that reads it."""
    kind = (8, False, False, 16, torch.float32)
    other = (None, False, False, 16, torch.bfloat16)
    plan = AttentionPlan({kind: ("flex",), other: ("varlen",)})
    layout = make_layout(Documents([300, 20]), torch.device("cpu"), plan)
    found = {id(tensor) for tensor in tensors_of({"input_ids": torch.ones(3), "layout": layout})}
    assert id(layout.cu_seqlens) in found
    mask = layout.masks[8]
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
             "full_q_num_blocks", "full_q_indices")  # fmt: skip
    assert all(id(getattr(mask, name)) in found for name in names)
    closures = [cell.cell_contents for cell in mask.mask_mod.__closure__ or ()]
    assert all(id(cell) in found for cell in closures if isinstance(cell, torch.Tensor))


def test_the_layout_makes_no_wait() -> None:
    plan = AttentionPlan({(8, False, False, 16, torch.float32): ("flex",)})
    with Transfers() as reads:
        make_layout(Documents([300, 20]), torch.device("cpu"), plan)
    assert not reads.found
