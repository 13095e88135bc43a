"""Models in shards: loaded, saved and resumed by several processes, none of which has a whole model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import build_model, chat_row, killed_after, raises, save_folder, tiny_config, write_jsonl
from test_world import ThreadWorld
from tunesmith.config.schema import ModelSection
from tunesmith.distributed.held import shard_rows
from tunesmith.distributed.shards import Shard, ShardFiles, write_shards
from tunesmith.distributed.spread import Spread
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.model.load import load_model
from tunesmith.model.loss import SupervisedLM
from tunesmith.model.save import save_in_groups
from tunesmith.runfolder import RunFolder
from tunesmith.training.checkpoint import find_damage, list_checkpoints, newest_valid, restore_optimizer
from tunesmith.training.saver import Saver
from tunesmith.training.sharded import ShardSnapshot, StoredGroups, choose_form, plan_groups, verify_together

CASES = Path(__file__).with_name("sharded_cases.py")
LONG = pytest.mark.skipif("TUNESMITH_LONG" not in os.environ, reason="takes minutes: TUNESMITH_LONG=1")


def launch(size: int, cases: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run cases in `size` processes; returns case -> result."""
    (folder / "cases.json").write_text(json.dumps(cases))
    source = Path(__file__).resolve().parents[1] / "src"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    done = subprocess.run(
        [*torchrun, str(CASES), str(folder / "cases.json")], capture_output=True, text=True, check=False,
        env=environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in [*run.glob("model/*.safetensors"), *run.glob("adapter/*.safetensors")]:
        found |= load_file(file)
    return found


def losses_of(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def command(model: Path, data: Path, output: Path, *words: object) -> list[str]:
    fixed = ["--train.max_steps", 4, "--train.save_steps", 2, "--train.grad_accum_steps", 3, "--optim.lr", 1e-3]
    fixed += ["--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--train.precision", "fp32"]
    return [str(word) for word in ["train", "--model", model, "--data", data, "--output", output, *fixed, *words]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Small models: tied, Conv1D, fused experts saved apart, mixed attention; in bf16 and several files."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for name in ("qwen3", "gpt2", "qwen3_moe", "gemma3"):
        tied = {"tie_word_embeddings": True} if name == "qwen3" else {}
        config = tiny_config(name, initializer_range=0.02, **tied)
        found[name] = root / name
        build_model(config, torch.bfloat16).save_pretrained(found[name], max_shard_size="60KB")
        tokenizer.save_pretrained(found[name])
    assert len(list(found["qwen3"].glob("*.safetensors"))) > 1
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [chat_row(f"What is the answer {i}?", f"The answer is {i} and you.") for i in range(40)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


def test_two_processes_load_and_save_in_shards(
    tmp_path: Path, folders: dict[str, Path], data: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Every weight is loaded to the bit; losses are those of one process, which continues from the shards."""
    cases: dict[str, Any] = {f"load {name}": {"folder": str(folder)} for name, folder in folders.items()}
    sharded = ["--train.parallel", "fsdp", "--train.sharded_checkpoints", "true"]
    cases["train"] = {"words": command(folders["qwen3_moe"], data, tmp_path / "two", *sharded)}
    found = launch(2, cases, tmp_path)
    assert {name: result for name, result in found.items() if result} == {}
    last = tmp_path / "two" / "checkpoints" / "step-000004"
    assert len(list((last / "shards").iterdir())) == 5
    assert not list(last.glob("*model*"))
    alone = killed_after(tmp_path / "two", 2, tmp_path / "alone")
    code, _, err = run("resume", alone, "--train.parallel", "auto")
    assert code == 0, err
    assert losses_of(alone) == pytest.approx(losses_of(tmp_path / "two"), abs=2e-6)
    by_one, by_two = weights_of(alone), weights_of(tmp_path / "two")
    assert by_one.keys() == by_two.keys()
    assert max(float((by_one[key] - by_two[key]).abs().max()) for key in by_two) < 1e-6


@LONG
def test_two_processes_resume_in_shards_to_the_bit(
    tmp_path: Path, folders: dict[str, Path], data: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Losses are those of one process; a run that was killed after step 2 continues
    in shards to the bit, and a checkpoint in shards is continued by one process."""
    sharded = ["--train.parallel", "fsdp", "--train.sharded_checkpoints", "true"]
    cases: dict[str, Any] = {}
    for name in ("qwen3", "qwen3_moe"):
        cases[f"train {name}"] = {"words": command(folders[name], data, tmp_path / name, *sharded)}
        code, _, err = run(*command(folders[name], data, tmp_path / f"{name}-one"))
        assert code == 0, err
    found = launch(2, cases, tmp_path)
    assert {name: result for name, result in found.items() if result} == {}
    for name in ("qwen3", "qwen3_moe"):
        one, two = weights_of(tmp_path / f"{name}-one"), weights_of(tmp_path / name)
        assert one.keys() == two.keys()
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(tmp_path / f"{name}-one"), abs=2e-6)
        files = {path.name for path in (tmp_path / name / "checkpoints" / "step-000004" / "shards").iterdir()}
        assert len(files) == 5
        assert not list((tmp_path / name / "checkpoints" / "step-000004").glob("*model*"))
    cases = {}
    for name in ("qwen3", "qwen3_moe"):
        again = killed_after(tmp_path / name, 2, tmp_path / f"{name}-again")
        cases[name] = {"words": ["resume", str(again)]}
    assert launch(2, cases, tmp_path) == {"qwen3": 0, "qwen3_moe": 0}
    for name in cases:
        again, two = weights_of(tmp_path / f"{name}-again"), weights_of(tmp_path / name)
        assert again.keys() == two.keys()
        assert all(torch.equal(again[key], two[key]) for key in two)
        alone = killed_after(tmp_path / name, 2, tmp_path / f"{name}-alone")
        code, _, err = run("resume", alone, "--train.parallel", "auto")
        assert code == 0, err
        by_one = weights_of(alone)
        assert by_one.keys() == two.keys()
        assert max(float((by_one[key] - two[key]).abs().max()) for key in two) < 1e-6


@LONG
def test_what_is_trained_in_shards_equals_one_process(
    tmp_path: Path, folders: dict[str, Path], data: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Adapters on a frozen base, new tokens, checkpointed activations, one document a forward, answers to held-out
    rows, early stopping, bf16 over fp32 weights, 4 bits; with 2 processes, and some with 3."""
    held_out = ["--data.eval_split", 0.2, "--train.eval_steps", 1]
    special: dict[str, tuple[str, list[object], float]] = {
        "gpt2": ("gpt2", [], 2e-6),
        "gemma3": ("gemma3", [], 2e-6),
        "lora": ("qwen3", ["--lora.kind", "lora"], 2e-6),
        "lora of experts": ("qwen3_moe", ["--lora.kind", "lora"], 2e-6),
        "dora": ("qwen3", ["--lora.kind", "dora"], 2e-6),
        "whole modules": ("qwen3_moe", ["--lora.kind", "lora", "--lora.modules_to_save", "lm_head"], 2e-6),
        "tokens": ("qwen3", ["--model.add_tokens", "<a>", "<b>"], 2e-6),
        "tokens of an adapter": ("gemma3", ["--lora.kind", "lora", "--model.add_tokens", "<a>", "<b>"], 2e-6),
        "checkpointing": ("qwen3", ["--train.gradient_checkpointing", "true"], 2e-6),
        "answers": ("qwen3", [*held_out, "--train.eval_generate", 2], 2e-6),
        "bf16": ("qwen3", ["--train.precision", "bf16"], 2e-2),
        "bf16 pure": ("qwen3", ["--train.precision", "bf16_pure"], 5e-2),
        "early": ("qwen3", [*held_out, "--train.early_stop_patience", 1, "--optim.lr", 1.0], 2e-4),
    }
    if importlib.util.find_spec("bitsandbytes"):
        special["4 bits"] = ("qwen3", ["--lora.kind", "lora", "--lora.quantize", "nf4"], 2e-5)
    cases = {}
    for name, (model, words, _) in special.items():
        code, _, err = run(*command(folders[model], data, tmp_path / "one" / name, *words))
        assert code == 0, (name, err)
        extra = ["--train.parallel", "fsdp", "--train.sharded_checkpoints", "true"]
        cases[name] = {"words": command(folders[model], data, tmp_path / "two" / name, *words, *extra)}
    found = launch(2, cases, tmp_path)
    assert {name: result for name, result in found.items() if result} == {}
    for name, (_, _, tolerance) in special.items():
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert losses_of(two) == pytest.approx(losses_of(one), abs=tolerance), name
        assert weights_of(one).keys() == weights_of(two).keys(), name


def write_in_shards(folder: Path, tensors: dict[str, torch.Tensor], size: int) -> list[Path]:
    paths = []
    for rank in range(size):
        shards = {}
        for name, tensor in tensors.items():
            rows = -(-len(tensor) // size)
            part = tensor[rank * rows : (rank + 1) * rows]
            if len(part):
                shards[name] = Shard(part.contiguous(), rank * rows, tuple(tensor.shape))
        paths.append(folder / f"weights-{rank}.safetensors")
        write_shards(paths[-1], shards)
    return paths


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_any_rows_of_a_tensor_in_shards_can_be_read(tmp_path: Path, size: int) -> None:
    tensors = {"a": torch.randn(7, 3), "b": torch.arange(2), "c": torch.randn(5, 2, 2).bfloat16()}
    stored = ShardFiles(write_in_shards(tmp_path, tensors, size))
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(stored[name].read(), tensor)
        for start in range(len(tensor) + 1):
            for stop in range(start, len(tensor) + 1):
                assert torch.equal(stored[name].read(start, stop), tensor[start:stop])
                assert torch.equal(stored[name][start:stop], tensor[start:stop])
    assert torch.equal(stored["c"][1:4, :, 0:1], tensors["c"][1:4, :, 0:1])


def test_files_of_whole_tensors_are_read_alike(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6).view(3, 2), "n": torch.tensor(4.0)}, tmp_path / "x.safetensors")
    stored = ShardFiles([tmp_path / "x.safetensors"])
    assert stored["n"].read().item() == 4.0
    assert stored["a"].read(1, 3).tolist() == [[2, 3], [4, 5]]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = write_in_shards(tmp_path, {"a": torch.randn(6, 3)}, 3)
    with raises(TunesmithError, "shards-incomplete", "a"):
        ShardFiles([paths[0], paths[2]])


def test_groups_keep_a_block_together() -> None:
    sizes = {"embed": 50, **{f"layers.{i}.{name}": 10 for i in range(12) for name in ("a", "b", "c")}, "head": 50}
    groups = plan_groups(sizes, 70)
    assert [name for group in groups for name in group] == list(sizes)
    assert all(sum(sizes[name] for name in group) <= 70 for group in groups)
    for number in range(12):
        assert sum(any(name.startswith(f"layers.{number}.") for name in group) for group in groups) == 1


def test_a_model_saved_in_groups_opens_as_saved(tmp_path: Path, tokenizer: Any, encoder: Any) -> None:
    """Fused experts are saved as separate tensors, as transformers saves them."""
    folder = save_folder(tmp_path / "base", tiny_config("qwen3_moe"), tokenizer)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    paths = write_in_shards(tmp_path, dict(model.state_dict()), 2)
    groups = StoredGroups(ShardFiles(paths), 30_000)
    assert len(groups) > 2
    save_in_groups(model, encoder, "card", tmp_path / "saved", groups, len(groups))
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == len(groups)
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert any(".experts.0." in name for name in index["weight_map"])


def test_the_form_follows_from_memory() -> None:
    weights = [torch.zeros(1000)]  # 4 kB, and two averages
    assert not choose_form("auto", weights, 0.0, 16_000).in_shards
    assert choose_form("auto", weights, 0.0, 14_000).in_shards
    assert choose_form("auto", weights, 5_000.0, 16_000).in_shards
    assert not choose_form(False, weights, 0.0, 0).in_shards
    assert choose_form(True, weights, 0.0, 1e12).in_shards


class Worlds(ThreadWorld):
    def share(self, make: Callable[[], Any]) -> Any:
        return self._gather(make() if self.is_main else None)[0]


class Halves(Spread):
    """Each of two threads has half of the rows, as after fully_shard."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def shard(self, tensor: torch.Tensor) -> Shard | None:
        if not tensor.ndim:
            return super().shard(tensor) if self._rank == 0 else None
        start, stop = shard_rows(len(tensor), self._rank, 2)
        part = tensor.detach()[start:stop].clone()
        return Shard(part, start, tuple(tensor.shape)) if len(part) else None


def in_two(work: Callable[[int, ThreadWorld], Any]) -> list[Any]:
    """Results of two threads that stand for processes; an error of one is raised."""
    shared: dict[int, Any] = {}
    barrier, found, errors = threading.Barrier(2), {}, []

    def start(rank: int) -> None:
        try:
            found[rank] = work(rank, Worlds(rank, 2, shared, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [found[0], found[1]]


def save_twice(tmp_path: Path, encoder: Any, damage: Callable[[int, Path], None]) -> tuple[list[Any], RunFolder, Any]:
    """Save steps 1 and 2 in two threads; `damage` gets rank and hidden folder before step 2 is written."""
    run, model = RunFolder(tmp_path / "run"), build_model(tiny_config("qwen3", tie_word_embeddings=True))
    lm = SupervisedLM(model, True, "decoder")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()

    def work(rank: int, world: ThreadWorld) -> list[str]:
        saver = Saver(run, lm, encoder, {"g": 1}, 2, world, in_shards=True)  # type: ignore[arg-type]
        failures = []
        for step in (1, 2):
            snapshot = saver.take(optimizer, Halves(rank), {"cpu": torch.get_rng_state()}, {"step": step})
            assert isinstance(snapshot, ShardSnapshot)
            if step == 2:
                damage(rank, snapshot.partial)
            saver.save(snapshot, None)
            failures.append(saver.settle())
        return failures

    return in_two(work), run, (lm, optimizer)


def test_a_checkpoint_in_shards_has_everything(tmp_path: Path, encoder: Any) -> None:
    found, run, (lm, optimizer) = save_twice(tmp_path, encoder, lambda rank, partial: None)
    assert found == [["", ""], ["", ""]]
    checkpoints, damaged = list_checkpoints(run)
    assert [c.step for c in checkpoints] == [1, 2]
    assert not damaged
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-000001", "step-000002"}
    assert find_damage(checkpoints[1]) == ""
    stored = checkpoints[1].open_weights()
    assert stored is not None
    state = lm.model.state_dict()
    assert set(state) - set(stored) == {"lm_head.weight"}  # tied
    assert all(torch.equal(stored[name].read(), state[name]) for name in stored)
    restored = torch.optim.AdamW(lm.model.parameters())
    restore_optimizer(lm.model, restored, checkpoints[1].open_optimizer(), Spread())
    for parameter, entries in optimizer.state.items():
        assert all(torch.equal(value, restored.state[parameter][key]) for key, value in entries.items())
    with raises(ModelError, "checkpoint-in-shards"):
        section = ModelSection(path=str(checkpoints[1].folder))
        load_model(section, lm.model.config, torch.float32, 0)
    file = checkpoints[1].folder / "shards" / "optimizer-00001-of-00002.safetensors"
    damage = bytearray(file.read_bytes())
    damage[-1] ^= 1
    file.write_bytes(damage)
    valid, reasons = newest_valid(run)
    assert valid is not None
    assert valid.step == 1
    assert "optimizer-00001" in next(iter(reasons.values()))
    assert in_two(lambda rank, world: verify_together(run, world)) == ["step-000001", "step-000001"]


def test_shards_that_one_process_cannot_write_leave_no_checkpoint(tmp_path: Path, encoder: Any) -> None:
    def damage(rank: int, partial: Path) -> None:
        if rank == 1:
            (partial / "shards" / "weights-00001-of-00002.safetensors").mkdir()

    found, run, _ = save_twice(tmp_path, encoder, damage)
    assert found[0] == found[1]
    assert "process 1" in found[0][1]
    assert "step-000001" in found[0][1]
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-000001"}
