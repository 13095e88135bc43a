"""Promise 4: an interrupted run continues to exactly the weights of an uninterrupted one. Promise 5: a checkpoint is
valid or does not exist."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import chat_row, killed_after, save_folder, tiny_config, write_jsonl
from tunesmith.monitor.pace import Pace
from tunesmith.runfolder import RunFolder
from tunesmith.training.checkpoint import MANIFEST, find_damage, newest_valid, read_checkpoint, write_manifest
from tunesmith.training.interrupt import StopRequest
from tunesmith.training.progress import Progress

ROOT = Path(__file__).parents[1]
FAST = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--optim.lr", 3e-3)
BUSY = (*FAST, "--train.grad_accum_steps", 2, "--data.eval_split", 0.1, "--train.eval_steps", 5, "--train.max_steps", 12,
        "--train.save_steps", 2, "--train.log_steps", 3, "--train.keep_checkpoints", 20)  # fmt: skip
Run = Callable[..., tuple[int, str, str]]


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for clock in ("tokens_per_s", "memory_gb", "eval_s", "time"):
            line.pop(clock, None)
    return lines


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def straight(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> Path:
    """An uninterrupted run of 12 steps with all its checkpoints."""
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", tmp_path / "straight", *BUSY)
    assert code == 0, err
    return tmp_path / "straight"


ARCHITECTURES = {
    "qwen3": {},
    "gpt2": {"resid_pdrop": 0.2, "attn_pdrop": 0.2, "embd_pdrop": 0.2},
    "qwen3_moe": {},
    "llama": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_resumed_anywhere_the_weights_are_the_same(
    run: Run, tokenizer: Any, chats: Path, tmp_path: Path, name: str
) -> None:
    """With packing, accumulation, dropout, evaluation and half-full log windows."""
    model = save_folder(tmp_path / "model", tiny_config(name, initializer_range=0.1, **ARCHITECTURES[name]), tokenizer)
    whole = tmp_path / "whole"
    code, _, err = run("train", "--model", model, "--data", chats, "--output", whole, *BUSY)
    assert code == 0, err
    for step in (2, 4, 10) if name == "gpt2" else (4,):
        part = killed_after(whole, step, tmp_path / f"from-{step}")
        code, out, err = run("resume", part)
        assert code == 0, err
        assert f"from step-{step:06d}: {12 - step} steps to go" in out
        assert weights(part) == weights(whole)
        assert records(part) == records(whole)
        assert not list((part / "checkpoints").glob(".*"))
        last = load_file(part / "checkpoints" / "step-000012" / "optimizer.safetensors")
        wanted = load_file(whole / "checkpoints" / "step-000012" / "optimizer.safetensors")
        assert all(torch.equal(last[key], wanted[key]) for key in wanted)


def test_without_a_checkpoint_it_begins_at_step_0(run: Run, straight: Path, tmp_path: Path) -> None:
    part = killed_after(straight, 0, tmp_path / "part")
    code, out, err = run("resume", part)
    assert code == 0, err
    assert "has no checkpoint yet; it starts at step 0" in out
    assert (weights(part), records(part)) == (weights(straight), records(straight))


def test_killed_between_the_last_checkpoint_and_the_model(run: Run, straight: Path, tmp_path: Path) -> None:
    part = killed_after(straight, 12, tmp_path / "part")
    code, _, err = run("resume", part)
    assert code == 0, err
    assert (weights(part), records(part)) == (weights(straight), records(straight))


def test_best_model_and_patience_survive(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    code, out, err = run("train", "--model", model_folder, "--data", chats, "--output", whole, *FAST, "--optim.lr", 0.2,
                         "--data.eval_split", 0.1, "--train.eval_steps", 1, "--train.early_stop_patience", 4, "--train.max_steps",
                         60, "--train.save_steps", 1, "--train.keep_checkpoints", 60)  # fmt: skip
    assert code == 0, err
    assert "stopped early" in out
    assert "best eval_loss" in out
    last = records(whole)[-1]["step"]
    for step in (last - 2, last):
        part = killed_after(whole, step, tmp_path / f"part-{step}")
        code, out, err = run("resume", part)
        assert code == 0, err
        assert "stopped early" in out
        assert (weights(part), records(part)) == (weights(whole), records(whole))


def test_a_finished_run_is_left_alone_or_made_longer(
    run: Run, fails: Any, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    words = ("--model", model_folder, "--data", chats, *FAST, "--optim.schedule", "constant", "--optim.warmup_steps", 2)
    for name, steps in (("short", 4), ("long", 9)):
        assert run("train", *words, "--output", tmp_path / name, "--train.max_steps", steps)[0] == 0
    short, long = tmp_path / "short", tmp_path / "long"
    before = weights(short)
    code, out, _ = run("resume", short)
    assert code == 0
    assert "is finished (4 steps); nothing to do" in out
    assert weights(short) == before
    assert str(fails("resume", short, "--train.parallel", "ddpp")).startswith(f"resume {short}:")  # not its config.yaml
    assert fails("resume", short, "--train.max_steps", 3).code == "steps-already-done"
    code, out, err = run("resume", short, "--train.max_steps", 9)
    assert code == 0, err
    assert weights(short) == weights(long)
    assert records(short) == records(long)


def test_a_longer_run_is_not_finished_before_its_model_is(
    run: Run, fails: Any, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Killed between the extension's last checkpoint and its model, while the earlier model is still there."""
    from tunesmith.run import finish

    words = ("--model", model_folder, "--data", chats, *FAST, "--optim.schedule", "constant")
    for name, steps in (("short", 2), ("long", 4)):
        assert run("train", *words, "--output", tmp_path / name, "--train.max_steps", steps)[0] == 0

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finish, "save_model", killed)
        assert run("resume", tmp_path / "short", "--train.max_steps", 4)[0] == 3
    code, out, err = run("resume", tmp_path / "short")
    assert code == 0, err
    assert "nothing to do" not in out
    assert weights(tmp_path / "short") == weights(tmp_path / "long")
    shutil.rmtree(tmp_path / "long" / "checkpoints")
    before = weights(tmp_path / "long")
    assert fails("resume", tmp_path / "long", "--train.max_steps", 9).code == "no-checkpoint"
    assert weights(tmp_path / "long") == before


def test_train_on_an_interrupted_run_says_what_to_type(
    run: Run, straight: Path, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    part = killed_after(straight, 4, tmp_path / "part")
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", part)
    assert code == 1
    assert f"tunesmith resume {part}" in err


# changes that alter training are refused and named


def change_data(model: Path, chats: Path) -> None:
    chats.write_text(chats.read_text().replace("answer 3", "answer is 3"))


def change_template(model: Path, chats: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("user", "User") + "{# other #}")


def change_tokenizer(model: Path, chats: Path) -> None:
    path = model / "tokenizer.json"
    loaded = json.loads(path.read_text())
    loaded["model"]["merges"].pop()
    path.write_text(json.dumps(loaded))


def change_model(model: Path, chats: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def change_weights(model: Path, chats: Path) -> None:
    from safetensors.torch import save_file

    path = model / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("model", change_weights, "model.safetensors "),
        ("data", change_data, "chats.jsonl "),
        ("template", change_template, "the chat template "),
        ("tokenizer", change_tokenizer, "the tokenizer "),
        ("model", change_model, "the model's config "),
    ],
)
def test_changed_surroundings_are_refused_and_named(
    run: Run, straight: Path, model_folder: Path, chats: Path, tmp_path: Path, part: str, change: Any, words: str
) -> None:
    killed = killed_after(straight, 4, tmp_path / "part")
    before = (killed / "config.yaml").read_bytes(), records(straight)
    change(model_folder, chats)
    code, _, err = run("resume", killed)
    assert code == 1
    assert f"  {part}: " in err
    assert words in err
    assert f"tunesmith resume {killed} --allow {part}" in err
    assert (killed / "config.yaml").read_bytes() == before[0]
    code, out, err = run("resume", killed, "--allow", part)
    assert code == 0, err
    assert (f"labelling the data again because of changed {part}" in out) == (part != "model")
    assert [r["step"] for r in records(killed)] == [r["step"] for r in before[1]]


@pytest.mark.parametrize(
    ("part", "flags"),
    [
        ("optimizer", ("--optim.lr", 1e-4)),
        ("schedule", ("--optim.schedule", "linear")),
        ("batch", ("--train.grad_accum_steps", 1)),
        ("seed", ("--train.seed", 7)),
        ("precision", ("--train.precision", "bf16")),
        ("data", ("--data.train_on", "all")),
    ],
)
def test_changed_settings_are_refused_and_named(
    run: Run, straight: Path, tmp_path: Path, part: str, flags: tuple[Any, ...]
) -> None:
    killed = killed_after(straight, 4, tmp_path / "part")
    code, _, err = run("resume", killed, *flags)
    assert code == 1
    assert f"  {part}: {flags[0][2:]} " in err
    assert f"-> {flags[1]}" in err
    if part in ("optimizer", "data"):
        assert run("resume", killed, *flags, "--allow", part)[0] == 0


def test_other_versions_are_refused_by_their_minor_number(run: Run, straight: Path, tmp_path: Path) -> None:
    for version, wanted in (("2.1.0", 1), (None, 0)):
        killed = killed_after(straight, 4, tmp_path / f"part-{wanted}")
        newest, _ = newest_valid(RunFolder(killed))
        assert newest
        ours = newest.guard["versions"]["torch"]
        patch = ".".join([*ours.split(".")[:2], "99"])
        guard = {**newest.guard, "versions": {**newest.guard["versions"], "torch": version or patch}}
        write_manifest(newest.folder, newest.step, guard)
        code, out, err = run("resume", killed)
        assert code == wanted, err
        assert (f"versions: torch 2.1.0 -> {ours}" in err) or (f"torch {patch} -> {ours}: a patch release" in out)


def test_what_changes_nothing_is_taken_over(run: Run, straight: Path, tmp_path: Path) -> None:
    killed = killed_after(straight, 4, tmp_path / "part")
    code, out, err = run("resume", killed, "--train.log_steps", 1, "--train.keep_checkpoints", 1)
    assert code == 0, err
    assert "note: accepted: train.log_steps 3 -> 1" in out
    assert weights(killed) == weights(straight)
    assert [r["step"] for r in records(killed) if "loss" in r] == [3, *range(5, 13)]
    assert checkpoints(killed) == [f"step-{step:06d}" for step in sorted({best_step(killed), 12})]


def best_step(folder: Path) -> int:
    evaluated = [record for record in records(folder) if "eval_loss" in record and record["step"]]
    return int(min(evaluated, key=lambda record: record["eval_loss"])["step"])


def test_more_steps_only_where_the_schedule_allows(run: Run, fails: Any, straight: Path, tmp_path: Path) -> None:
    killed = killed_after(straight, 4, tmp_path / "part")
    error = fails("resume", killed, "--train.max_steps", 20)
    assert (error.code, error.exit_code, "step 5" in str(error)) == ("schedule-changed", 1, True)
    assert run("resume", killed, "--train.max_steps", 20, "--allow", "schedule")[0] == 0


def test_names_are_read_from_where_they_were_meant(
    run: Run, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A run started with relative names continues from another folder, and after being moved."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train", "--model", model_folder.name, "--data", chats.name, "--output", "run", *BUSY)
    assert code == 0, err
    killed = killed_after(tmp_path / "run", 4, tmp_path / "elsewhere" / "part")
    monkeypatch.chdir(killed.parent)
    code, out, err = run("resume", "part")
    assert code == 0, err
    assert "talk to it: tunesmith chat part" in out
    assert weights(killed) == weights(tmp_path / "run")
    shutil.copy(chats, killed.parent / "mine.jsonl")
    killed = killed_after(tmp_path / "run", 4, tmp_path / "elsewhere" / "again")
    code, _, err = run("resume", "again", "--data", "mine.jsonl")
    assert (code, "\n  data: " in err) == (1, True)
    code, _, err = run("resume", "again", "--data", "mine.jsonl", "--allow", "data")
    assert code == 0, err
    assert run("resume", "again", "--output", "other")[0] == 1


@pytest.mark.parametrize("name", ["run.json", "data_ledger.json"])
@pytest.mark.parametrize("text", [None, "{", "[]", '{"date": 1}'])
def test_damaged_files_of_a_run(fails: Any, straight: Path, tmp_path: Path, name: str, text: str | None) -> None:
    killed = killed_after(straight, 4, tmp_path / "part")
    (killed / name).unlink()
    if text is not None:
        (killed / name).write_text(text)
    error = fails("resume", killed)
    missing = "not-a-run" if name == "run.json" else "run-file-unreadable"
    assert (error.code, error.exit_code) == ("run-file-damaged" if text else missing, 1)
    assert name in str(error)


def test_what_is_no_run(run: Run, fails: Any, tmp_path: Path, model_folder: Path) -> None:
    assert fails("resume", tmp_path / "none").code == "run-not-found"
    assert fails("resume", model_folder).code == "not-a-run"
    code, _, err = run("resume", tmp_path, "--train.max_step", 3)
    assert code in (1, 2)
    assert "Traceback" not in err


# a checkpoint is valid or does not exist


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def become_folder(path: Path) -> None:
    """Unreadable even for root, whom permissions do not stop."""
    path.unlink()
    path.mkdir()


def age(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 3}))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated": ("model.safetensors", lambda p: os.truncate(p, 1000), "model.safetensors has 1,000 bytes instead of"),
    "flipped bit": ("model.safetensors", flip, "model.safetensors is changed: its SHA-256 does not match"),
    "flipped bit in the optimizer": ("optimizer.safetensors", flip, "optimizer.safetensors is changed"),
    "missing": ("state.json", Path.unlink, "state.json is missing"),
    "foreign": ("more.bin", lambda p: p.write_bytes(b"x"), "more.bin is not part of the checkpoint"),
    "unreadable": ("random.safetensors", become_folder, "random.safetensors cannot be read: is a folder, not a file"),
    "newer": (MANIFEST, age, "manifest.json is of format 3; this tunesmith reads up to 2"),
    "no manifest": (MANIFEST, Path.unlink, "manifest.json is missing"),
    "torn manifest": (MANIFEST, lambda p: os.truncate(p, 100), "manifest.json is damaged"),
    "changed manifest": (MANIFEST, lambda p: p.write_text(p.read_text().replace('"step": 6', '"step": 7')), "its own hash"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_older_checkpoint_taken(run: Run, straight: Path, tmp_path: Path, kind: str) -> None:
    killed = killed_after(straight, 6, tmp_path / "part")
    file, damage, words = DAMAGE[kind]
    damage(killed / "checkpoints" / "step-000006" / file)
    code, out, err = run("resume", killed)
    assert code == 0, err
    assert f"damaged: step-000006: {words}" in out or words in out
    assert "continuing from the newest valid checkpoint, step-000005" in out
    assert weights(killed) == weights(straight)


def test_where_no_checkpoint_verifies_nothing_starts_again_by_itself(
    fails: Any, straight: Path, tmp_path: Path
) -> None:
    killed = killed_after(straight, 2, tmp_path / "part")
    flip(killed / "checkpoints" / "step-000002" / "model.safetensors")
    error = fails("resume", killed)
    assert error.code == "no-valid-checkpoint"
    assert "damaged: step-000002: model.safetensors" in str(error)
    assert str(killed / "checkpoints") in str(error)


def test_damaged_tokens_are_found(fails: Any, straight: Path, tmp_path: Path) -> None:
    killed = killed_after(straight, 4, tmp_path / "part")
    flip(killed / "tokens" / "tokens-00000.bin")
    error = fails("resume", killed)
    assert (error.code, error.exit_code) == ("tokens-damaged", 1)
    assert f"{killed / 'tokens' / 'tokens-00000.bin'}: " in str(error)


def test_the_order_of_writing(run: Run, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """write -> fsync of the files -> manifest -> fsync -> fsync of the folder -> rename -> fsync of its parent."""
    seen: list[tuple[str, str]] = []
    fsync, rename, write_text = os.fsync, Path.rename, Path.write_text

    def traced_fsync(fd: int) -> None:
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def traced_rename(self: Path, target: Any) -> Path:
        seen.append(("rename", f"{self} -> {target}"))
        return rename(self, target)

    def traced_write(self: Path, *args: Any, **kwargs: Any) -> int:
        seen.append(("write", str(self)))
        return write_text(self, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "rename", traced_rename)
    monkeypatch.setattr(Path, "write_text", traced_write)
    output = tmp_path / "run"
    code, _, err = run(
        "train", "--model", model_folder, "--data", chats, "--output", output, *FAST, "--train.max_steps", 2
    )
    assert code == 0, err
    folder = output / "checkpoints" / "step-000002"
    [renamed] = [i for i, (what, where) in enumerate(seen) if what == "rename" and where.endswith(f"-> {folder}")]
    partial = seen[renamed][1].split(" -> ")[0]
    manifest = seen.index(("write", f"{partial}/{MANIFEST}"))
    synced = {where: i for i, (what, where) in enumerate(seen) if what == "fsync"}
    files = [path.name for path in folder.iterdir() if path.name != MANIFEST]
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= set(files)
    assert all(synced[f"{partial}/{name}"] < manifest for name in files)
    assert manifest < synced[f"{partial}/{MANIFEST}"] < synced[partial] < renamed
    assert ("fsync", str(output / "checkpoints")) in seen[renamed:]


def test_the_newest_is_verified_before_an_older_one_goes(
    run: Run, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A disk that writes other bytes than given."""
    from tunesmith.training import saver

    def damaging(*args: Any) -> Path:
        folder = write(*args)
        if folder.name == "step-000004":
            flip(folder / "model.safetensors")
        return folder

    write = saver.write_checkpoint
    monkeypatch.setattr(saver, "write_checkpoint", damaging)
    output = tmp_path / "run"
    code, out, err = run("train", "--model", model_folder, "--data", chats, "--output", output, *FAST, "--train.max_steps", 6,
                         "--train.save_steps", 2, "--train.keep_checkpoints", 1)  # fmt: skip
    assert code == 0, err
    assert "checkpoint of step 4 does not verify (model.safetensors is changed" in out
    assert checkpoints(output) == ["step-000006"]


def test_every_checkpoint_verifies_and_opens(straight: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert checkpoints(straight) == [f"step-{step:06d}" for step in (2, 4, 5, 6, 8, 10, 12)]
    for folder in (straight / "checkpoints").iterdir():
        assert find_damage(read_checkpoint(folder)) == ""
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)


# signals, disks, and losses that are not finite


def test_what_a_kill_left_while_preparing_is_removed(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    from tunesmith.staging import locked

    left, in_use = tmp_path / ".run.0a0a0a0a.partial", tmp_path / ".run.0b0b0b0b.partial"
    for folder in (left, in_use):
        (folder / "tokens").mkdir(parents=True)
    with locked(in_use):
        code, _, err = run(
            "train",
            "--model",
            model_folder,
            "--data",
            chats,
            "--output",
            tmp_path / "run",
            *FAST,
            "--train.max_steps",
            1,
        )
    assert code == 0, err
    assert (left.exists(), in_use.exists()) == (False, True)


def test_checkpoints_by_the_clock(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", tmp_path / "run", *FAST, "--train.max_steps",
                       3, "--train.save_minutes", 0.00001, "--train.keep_checkpoints", 9)  # fmt: skip
    assert code == 0, err
    assert checkpoints(tmp_path / "run") == ["step-000001", "step-000002", "step-000003"]


def test_two_processes_never_train_one_run(fails: Any, straight: Path, tmp_path: Path) -> None:
    from tunesmith.staging import locked

    killed = killed_after(straight, 4, tmp_path / "part")
    with locked(killed):
        error = fails("resume", killed)
    assert (error.code, error.exit_code) == ("run-in-use", 1)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(1)  # in case the handler is not called at once


def test_the_second_signal_stops_at_once() -> None:
    with StopRequest() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_made
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    with StopRequest(), pytest.raises(KeyboardInterrupt):  # nothing to finish yet
        send(signal.SIGTERM)


def test_signals_are_as_before_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_state() -> Any:
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return handlers, wakeup, threading.enumerate(), len(os.listdir("/proc/self/fd"))

    def interrupted(number: int) -> Any:
        if number == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGINT)  # its handler is ours already
            time.sleep(1)
        return getsignal(number)

    before, getsignal = find_state(), signal.getsignal
    monkeypatch.setattr(signal, "getsignal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        StopRequest().__enter__()
    monkeypatch.undo()
    assert find_state() == before
    monkeypatch.setattr(threading.Thread, "start", lambda _: os.open("/no/such/file", os.O_RDONLY))
    with pytest.raises(FileNotFoundError):
        StopRequest().__enter__()
    monkeypatch.undo()
    assert find_state() == before
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    with StopRequest():
        os.close(read)
        os.close(write)  # by a caller that ends its event loop
    assert find_state() == before


def test_a_closed_terminal_saves_the_run_however_often_it_is_told() -> None:
    with StopRequest() as stop:
        stop.defer()
        send(signal.SIGHUP)
        assert stop.is_made
        send(signal.SIGHUP)
        assert not stop.is_urgent
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopRequest() as stop:
            stop.defer()
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not stop.is_made
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_signals_that_reach_the_main_thread_as_one() -> None:
    """Python calls the handler once for both where the main thread was busy in C."""
    with StopRequest() as stop:
        stop.defer()
        stop._hear()
        stop._hear()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(2)
        assert stop.is_urgent


def test_a_busy_main_thread_is_ended_by_the_second_signal(tmp_path: Path) -> None:
    """It sees no signal at all here, as in a long call of C code."""
    script = (
        "import os, signal, threading, time\n"
        "from tunesmith.cli import printed_messages\n"
        "from tunesmith.training.interrupt import StopRequest\n"
        "def press():\n"
        "    for _ in range(2):\n"
        "        time.sleep(0.3); os.kill(os.getpid(), signal.SIGINT)\n"
        "with printed_messages(), StopRequest() as stop:\n"
        "    stop.defer(lambda: 'stopping after this', lambda: 'last words')\n"
        "    threading.Thread(target=press).start()\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "    import ctypes; ctypes.CDLL(None).sleep(60)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr.splitlines() == ["stopping after this", "last words"]
    assert time.monotonic() - began < 15


class Presses:
    """A first Ctrl-C, as the loop sees it, at the nth question."""

    def __init__(self, at: int) -> None:
        self.left = at

    @property
    def is_made(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_stop_between_two_forwards_changes_no_bit(
    run: Run, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that was given up is made again from its beginning, dropout included."""
    words = ["--model", model_folder, "--data", chats, "--data.max_seq_len", 64, "--train.micro_batch_tokens", 64,
             "--train.grad_accum_steps", 4, "--train.max_steps", 4, "--train.log_steps", 1,
             "--lora.kind", "lora", "--lora.rank", 4, "--lora.dropout", 0.3]  # fmt: skip
    whole = tmp_path / "whole"
    code, _, err = run("train", *words, "--output", whole)
    assert code == 0, err
    for at in (0, 3, 5, 13):
        part, presses = tmp_path / f"part-{at}", Presses(at)
        with monkeypatch.context() as patched:
            asked = property(lambda _, presses=presses: presses.is_made, lambda *_: None)
            patched.setattr(StopRequest, "is_made", asked, raising=False)
            code, _, err = run("train", *words, "--output", part)
        assert code == 3
        steps = (at + 1) // 4  # 3 questions within a step of 4 forwards, 1 after it
        assert [path.name for path in (part / "checkpoints").glob("*")] == ([f"step-{steps:06d}"] if steps else [])
        assert (f"step-{steps:06d}" if steps else "No checkpoint yet") in err
        assert f"tunesmith resume {part}" in err
        code, _, err = run("resume", part)
        assert code == 0, err
        ours, others = (folder / "adapter" / "adapter_model.safetensors" for folder in (part, whole))
        assert ours.read_bytes() == others.read_bytes()
        assert records(part) == records(whole)


@pytest.mark.parametrize(("name", "kills"), [("KILL", 5), ("TERM", 2)])
def test_chaos(tmp_path: Path, name: str, kills: int) -> None:
    """Real processes killed at random moments; see bench/chaos.py for what is compared."""
    words = [sys.executable, ROOT / "bench" / "chaos.py", "--kills", str(kills), "--signal", name, "--steps", "24"]
    done = subprocess.run(
        [*words, "--folder", tmp_path], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # spinning threads slow down short processes
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout.splitlines()[-1]
    if name == "TERM":
        logs = "".join(path.read_text() for path in tmp_path.glob("run-*.log"))
        assert "Continue with: tunesmith resume" in logs


@pytest.fixture
def small_disk(make_disk: Any) -> Path:
    return make_disk("4m")


def fill_up(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(handle, b"x" * 4096)
    os.close(handle)


_FILLING_STEPS = 200


@pytest.mark.parametrize("room_comes_back", [True, False])
def test_a_disk_that_fills_up_at_a_save(
    model_folder: Path, chats: Path, small_disk: Path, tmp_path: Path, run: Run, room_comes_back: bool
) -> None:
    """The run continues, says so on each line, retries, and ends with exit code 4 only if the last save fails."""
    output, ballast = small_disk / "run", small_disk / "ballast"
    words = ["train", "--model", model_folder, "--data", chats, "--output", output, *FAST, "--train.max_steps", _FILLING_STEPS,
             "--train.save_steps", 10, "--optim.schedule", "constant"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stderr
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step ") and not ballast.exists() and newest_valid(RunFolder(output))[0]:
            fill_up(ballast)
        if room_comes_back and "no room for the checkpoint" in line:
            os.truncate(ballast, 0)
    code, err = process.wait(), process.stderr.read()
    warned = [line for line in lines if "no room for the checkpoint of step" in line]
    assert warned, lines
    assert "; the last good one is step-" in warned[0]
    assert code == (0 if room_comes_back else 4), err
    if not room_comes_back:
        assert "the last checkpoint could not be saved" in err
        assert "Last good checkpoint: " in err
        assert f"Continue with: tunesmith resume {output}" in err
        ballast.unlink()
        code, _, err = run("resume", output)
        assert code == 0, err
    assert [r["step"] for r in records(output)] == list(range(1, _FILLING_STEPS + 1))
    straight = tmp_path / "straight"
    assert run("train", "--model", model_folder, "--data", chats, "--output", straight, *FAST, "--train.max_steps",
               _FILLING_STEPS, "--train.save_steps", 10, "--optim.schedule", "constant")[0] == 0  # fmt: skip
    assert weights(output) == weights(straight)


def test_a_disk_that_takes_no_writes(
    run: Run, straight: Path, model_folder: Path, chats: Path, small_disk: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed_after(straight, 2, tmp_path / "part"), small_disk / "run")
    killed = small_disk / "run"
    remounted = subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True, check=False)
    if remounted.returncode:
        pytest.skip("mounts cannot be made read-only here")
    code, _, err = run("resume", killed)
    assert code in (1, 4)
    assert "ead-only file system" in err or "the disk is full" in err
    assert "Traceback" not in err
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", small_disk / "new", *FAST)
    assert code == 1
    assert "Read-only file system" in err


def test_room_is_known_before_step_1(run: Run, model_folder: Path, chats: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 3_700_000)
    code, _, err = run(
        "train", "--model", model_folder, "--data", chats, "--output", small_disk / "run", *FAST, "--train.max_steps", 1
    )
    assert code == 1
    assert re.search(r"a checkpoint and the model take about 7\d\d KiB, and 4\d\d KiB are free there", err)
    assert not (small_disk / "run").exists()


@pytest.fixture
def poisoned(tmp_path: Path, tokenizer: Any) -> Path:
    """A model in which the embedding of one token gives a loss that is not finite."""
    config = tiny_config("gpt2", initializer_range=0.02, tie_word_embeddings=False)
    folder = save_folder(tmp_path / "poisoned", config, tokenizer)
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    [token] = tokenizer("~")["input_ids"]
    tensors["transformer.wte.weight"][token] = 3e38  # the mean of a vector of it is infinite
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_loss_that_is_not_finite_is_left_out_on_demand(run: Run, fails: Any, poisoned: Path, tmp_path: Path) -> None:
    rows = [chat_row(f"What is the answer {'~' if i == 7 else i}?", f"The answer is {i} and you.") for i in range(20)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    words = ("--model", poisoned, "--data", data, "--data.max_seq_len", 64, "--train.micro_batch_tokens", 64)
    error = fails("train", *words, "--output", tmp_path / "stop", "--train.epochs", 2)
    assert (error.code, error.exit_code) == ("loss-not-finite", 4)
    assert f"{data}:8" in str(error)
    code, out, err = run(
        "train", *words, "--output", tmp_path / "skip", "--train.epochs", 2, "--train.on_nonfinite", "skip"
    )
    assert code == 0, err
    left_out = [record for record in records(tmp_path / "skip") if "skipped" in record]
    assert [record["skipped"] for record in left_out] == [1, 2]
    assert all(f"{data}:8" in record["rows"] for record in left_out)
    assert "2 steps were skipped" in out
    trained = load_file(tmp_path / "skip" / "model" / "model.safetensors")
    assert torch.isfinite(trained["lm_head.weight"]).all()


def test_losses_that_stay_not_finite_end_the_run(fails: Any, poisoned: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row(f"~ {i}?", "The answer.") for i in range(40)])
    error = fails("train", "--model", poisoned, "--data", data, "--output", tmp_path / "run", "--data.max_seq_len", 64,
                  "--train.micro_batch_tokens", 64, "--train.epochs", 3, "--train.on_nonfinite", "skip")  # fmt: skip
    assert (error.code, error.exit_code, "10 steps" in str(error)) == ("loss-not-finite", 4, True)


def test_a_jump_of_the_gradient_norm_is_seen() -> None:
    """Where the loss jumps too, or the norm is extreme: norms alone jump all the time."""
    progress = Progress()
    assert [progress.jump(1.0 + i / 100, 2.0 + i % 2 / 10) for i in range(30)] == [None] * 30
    assert progress.jump(9.0, 2.1) is None
    assert progress.jump(9.0, 2.5) == pytest.approx(9.0 / (sum(progress.grad_norms[:31]) / 31))
    assert progress.jump(1.1, 9.0) is None
    assert progress.jump(200.0, 2.0) == pytest.approx(200.0 / (sum(progress.grad_norms[:33]) / 33))


def test_a_checkpoint_without_losses_is_read() -> None:
    """Earlier versions kept gradient norms alone."""
    progress = Progress(step=30, grad_norms=[1.0] * 30)
    saved = {key: value for key, value in progress.to_json().items() if key != "losses"}
    assert Progress.from_json(saved) == progress


def test_a_stop_says_what_it_waits_for() -> None:
    pace = Pace()
    with pace.of("forward", 2):
        assert "current batch;" in pace.explain(0, None)  # nothing to save, and nothing known of its time
        assert "checkpoint" not in pace.explain(3, 3)
        assert "current batch and a checkpoint;" in pace.explain(3, 2)
    pace.save_s = 240.0
    with pace.of("forward", 2):
        assert "current batch (about 1 s) and a checkpoint (about 4 min);" in pace.explain(3, 2)
    with pace.of("evaluation"):
        assert "evaluation and a checkpoint" in pace.explain(3, 3)  # that step is still to be saved
    pace.is_at_end = True
    assert "model is being saved" in pace.explain(9, 9)
