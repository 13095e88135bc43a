"""Failures of disk, memory or other processes, and kills: a run continues from intact files or says why it cannot, and
nothing wrong is reported as finished."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import chat_row, killed_after, raises, save_folder, tiny_config
from tunesmith.config.schema import RunConfig
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.data.store import StoreWriter, open_store
from tunesmith.errors import RunError, TunesmithError
from tunesmith.files import atomic_directory, require_written, write_text_atomic
from tunesmith.run.console import ConsoleReporter
from tunesmith.run.failures import explained_failures
from tunesmith.runfolder import RunFolder
from tunesmith.staging import staged_folder
from tunesmith.tensors import is_same_bits, require_tensors, write_tensors
from tunesmith.training.metrics import OutsideTracker
from tunesmith.training.progress import Progress

FAST = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--optim.lr", 3e-3)
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., TunesmithError]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 512):
                pass
        except OSError:
            return


# --- a disk that is full for a moment


def test_a_disk_full_for_a_moment_loses_no_token(make_disk: Any) -> None:
    """Observed: a disk that was full for 0.3 s left thousands of zeros among the token ids."""
    disk = make_disk("200k")
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 400, 37).astype(np.uint32) for _ in range(2000)]
    rows = [
        LabelledRow("f", i, "used", "text", samples=(Sample(one, np.ones(37, np.uint8)),)) for i, one in enumerate(ids)
    ]
    failed: OSError | None = None
    try:
        with StoreWriter(disk / "tokens") as writer:
            for number, row in enumerate(rows):
                if number == 100:
                    fill_up(disk / "ballast")
                if number == 800:
                    (disk / "ballast").unlink()
                writer.add(row)
    except OSError as error:
        failed = error
    if failed is None:  # it fitted after all, so all of it must be there
        store = open_store(disk / "tokens")
        assert np.array_equal(np.concatenate([ids for ids, _ in store.shards]), np.concatenate(ids))
    else:
        assert failed.strerror == "No space left on device"


def test_the_store_is_read_back(tmp_path: Path, monkeypatch: Any) -> None:
    """A disk that loses a write without an error: the bytes change while the file is open."""
    sample = Sample(np.arange(1, 9, dtype=np.uint32), np.ones(8, np.uint8))
    writer = StoreWriter(tmp_path / "tokens")
    writer.add(LabelledRow("f", 1, "used", "text", samples=(sample,)))
    writer._tokens._file.flush()
    (tmp_path / "tokens" / "tokens-00000.bin").write_bytes(bytes(32))
    with pytest.raises(OSError, match="reads back differently"):
        writer.__exit__(None, None, None)


def test_tensors_and_texts_are_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.0, float("nan"), -0.0]), "b": torch.tensor(3), "c": torch.ones(2, 3).T}
    write_tensors(tmp_path / "t.safetensors", {**tensors, "c": tensors["c"].contiguous()})
    assert require_tensors(tmp_path / "t.safetensors", tensors) == {"a", "b", "c"}
    with pytest.raises(OSError, match="reads back differently"):
        require_tensors(tmp_path / "t.safetensors", {**tensors, "a": torch.tensor([1.0, float("nan"), 0.0])})
    assert not is_same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    write_text_atomic(tmp_path / "x", "text")
    with pytest.raises(OSError, match="reads back differently"):
        require_written(tmp_path / "x", hashlib.sha256(b"other").hexdigest())


# --- kills and extensions


@pytest.mark.parametrize("stops_early", [False, True])
def test_a_killed_extension_goes_on(
    run: Run, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any, stops_early: bool
) -> None:
    """Finished, extended, killed before the first checkpoint of the extension."""
    from tunesmith.run import resume as resuming

    words = ["--model", model_folder, "--data", chats, *FAST, "--train.max_steps", 4]  # with the cosine schedule
    if stops_early:
        words += [
            "--data.eval_split",
            0.1,
            "--train.eval_steps",
            1,
            "--train.early_stop_patience",
            1,
            "--optim.lr",
            0.5,
        ]
        words += ["--train.max_steps", 20]
    code, out, err = run("train", *words, "--output", tmp_path / "a")
    assert code == 0, err
    assert ("stopped early" in out) == stops_early
    last = json.loads((tmp_path / "a" / "run.json").read_text())["finished_at_step"]
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    longer = ("--train.max_steps", 26, "--train.early_stop_patience", 100) if stops_early else ("--train.max_steps", 9)
    code, _, err = run("resume", tmp_path / "a", *longer)
    assert code == 0, err

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    for flags in (longer, ()):  # twice: the second time without repeating the number of steps
        with monkeypatch.context() as patched:
            patched.setattr(resuming, "train_to_end", killed)
            assert run("resume", tmp_path / "b", *flags)[0] == 3
    code, out, err = run("resume", tmp_path / "b")
    assert code == 0, err
    assert f"{26 - last if stops_early else 5} steps to go" in out
    assert weights(tmp_path / "b") == weights(tmp_path / "a")
    assert "nothing to do" in run("resume", tmp_path / "b")[1]


def test_data_that_is_gone_is_not_needed(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    words = ("--model", model_folder, "--data", chats, *FAST, "--train.max_steps", 6, "--train.save_steps", 2,
             "--train.keep_checkpoints", 9)  # fmt: skip
    assert run("train", *words, "--output", tmp_path / "whole")[0] == 0
    part = killed_after(tmp_path / "whole", 2, tmp_path / "part")
    chats.unlink()
    code, out, err = run("resume", part)
    assert code == 0, err
    assert f"note: {chats} " in out
    assert weights(part) == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", ["run.json", "data_ledger.json"])
def test_a_changed_file_of_a_run_is_known(
    run: Run, fails: Any, model_folder: Path, chats: Path, tmp_path: Path, name: str
) -> None:
    output = tmp_path / "run"
    assert (
        run("train", "--model", model_folder, "--data", chats, "--output", output, *FAST, "--train.max_steps", 1)[0]
        == 0
    )
    text = (output / name).read_text()
    (output / name).write_text(text.replace('"tokens"', '"token"', 1))
    error = fails("resume", output, "--train.max_steps", 2)
    assert error.code == "run-file-damaged"
    assert f"{output / name}: " in str(error)


def test_a_file_that_changes_while_it_is_read(
    fails: Any, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from tunesmith.preparation import write

    def slow(*args: Any, **options: Any) -> Any:
        for number, row in enumerate(real(*args, **options)):
            if number == 3:
                with chats.open("a") as file:
                    file.write(json.dumps(chat_row("more", "and more")) + "\n")
            yield row

    real = write.read_rows
    monkeypatch.setattr(write, "read_rows", slow)
    error = fails("train", "--model", model_folder, "--data", chats, "--output", tmp_path / "r", *FAST)
    assert (error.code, str(chats) in str(error)) == ("file-changed", True)
    assert not (tmp_path / "r").exists()


def test_no_run_takes_its_own_files_for_data(
    run: Run, fails: Fails, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(chats, here / "chats.jsonl")
    monkeypatch.chdir(here)
    words = ("--model", model_folder, "--data", ".", *FAST, "--train.max_steps", 2)
    code, out, err = run("train", *words, "--output", "./train")
    assert code == 0, err
    code, _, err = run("resume", "train", "--train.max_steps", 3)
    assert code == 0, err
    code, out, err = run("train", *words, "--output", "train-2")
    assert code == 0, err
    assert "of 1 file:" in out
    assert "passed over: train" in out
    assert (
        fails("train", "--model", model_folder, "--data", "train", *FAST, "--output", "train-3").code == "run-as-data"
    )


def test_damaged_tokens_are_made_again(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    """The advice in the refusal works as printed; unchanged data gives exactly the same run."""
    words = ("--model", model_folder, "--data", chats, *FAST, "--train.max_steps", 6, "--train.save_steps", 2,
             "--train.keep_checkpoints", 9)  # fmt: skip
    assert run("train", *words, "--output", tmp_path / "whole")[0] == 0
    part = killed_after(tmp_path / "whole", 2, tmp_path / "part")
    (part / "tokens" / "tokens-00000.bin").unlink()
    code, _, err = run("resume", part, "--train.log_steps", 2)
    assert (code, "tokens-00000.bin: " in err) == (1, True)
    advice = err.strip().rpartition(": tunesmith ")[2].split()
    assert advice == ["resume", str(part), "--train.log_steps", "2", "--allow", "data"]
    code, out, err = run(*advice)
    assert code == 0, err
    assert "labelling the data again because of " in out
    assert weights(part) == weights(tmp_path / "whole")


def test_a_model_that_lies_elsewhere_now(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    words = ("--model", model_folder, "--data", chats, *FAST, "--train.max_steps", 4, "--train.save_steps", 2,
             "--train.keep_checkpoints", 9)  # fmt: skip
    assert run("train", *words, "--output", tmp_path / "whole")[0] == 0
    part = killed_after(tmp_path / "whole", 2, tmp_path / "part")
    moved = model_folder.rename(tmp_path / "moved")
    code, _, err = run("resume", part)
    assert (code, f"tunesmith resume {part} --model FOLDER" in err) == (1, True)
    other = shutil.copytree(moved, tmp_path / "other")
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    code, _, err = run("resume", part, "--model", other)
    assert (code, f"--model.path {other} --allow model" in err) == (1, True)
    code, _, err = run("resume", part, "--model", moved)
    assert code == 0, err
    assert weights(part) == weights(tmp_path / "whole")
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    code, _, err = run("resume", part, "--model", other, "--train.max_steps", 5)
    assert (code, f"{file}: links to {tmp_path / 'gone'}" in err) == (1, True)


# --- the output folder


def test_a_folder_that_somebody_made_meanwhile_stays(tmp_path: Path) -> None:

    def write() -> None:
        with atomic_directory(tmp_path / "out") as partial:
            (partial / "ours").write_text("x")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("precious")

    with raises(TunesmithError, "output-taken", str(tmp_path / "out")):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "theirs").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as partial:
        (partial / "ours").write_text("x")
    assert (tmp_path / "empty" / "ours").exists()


def test_names_that_begin_alike_are_two_runs(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "exp.0") as first, staged_folder(tmp_path / "exp") as second:
        assert first.is_dir()
        assert second.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp", "exp.0"]


def test_two_runs_into_one_new_folder(
    fails: Fails, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    output = tmp_path / "run"

    def other_is_faster(reporter: ConsoleReporter, lines: Any) -> None:
        output.mkdir()
        (output / "run.json").write_text("{}")

    monkeypatch.setattr(ConsoleReporter, "summary", other_is_faster)
    error = fails("train", "--model", model_folder, "--data", chats, "--output", output, *FAST)
    assert (error.code, error.exit_code) == ("output-taken", 1)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert [p.name for p in output.iterdir()] == ["run.json"]


def test_a_second_process_that_prepares_the_same_run(
    fails: Fails, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    with staged_folder(tmp_path / "run") as staging:
        (staging / "tokens").mkdir()
        error = fails("train", "--model", model_folder, "--data", chats, "--output", tmp_path / "run", *FAST)
        assert (error.code, error.exit_code) == ("output-taken", 1)
        assert [path for path in tmp_path.iterdir() if path.name.endswith(".partial")] == [staging]
    assert (tmp_path / "run").is_dir()


def test_an_empty_folder_whose_run_was_killed(
    run: Run, model_folder: Path, chats: Path, tmp_path: Path, make_disk: Any
) -> None:
    """Killed while preparing the data, and while moving the parts into a folder that is a mount point."""
    words = [str(w) for w in ("--model", model_folder, "--data", chats, *FAST, "--train.max_steps", 1)]
    (tmp_path / "empty").mkdir()
    for place, output in (("print_summary", tmp_path / "empty"), ("_move_in", make_disk("8m"))):
        script = (
            "import os, sys, tunesmith.run.console as console, tunesmith.staging as folder\n"
            "from tunesmith.cli import main\n"
            "def half(staging, output):\n"
            "    rename = type(staging).rename\n"
            "    def once(self, to):\n"
            "        rename(self, to)\n"
            "        if to.parent == output: os._exit(9)\n"
            "    type(staging).rename = once\n"
            "    real(staging, output)\n"
            "real = folder._move_in\n"
            f"if {place!r} == '_move_in': folder._move_in = half\n"
            "else: console.print_summary = lambda lines: os._exit(9)\n"
            f"main({['train', *words, '--output', str(output)]!r})"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 9, done.stderr
        code, _, err = run("train", *words, "--output", output)
        assert code == 0, err
        left = {p.name for p in output.iterdir()}
        assert left == {"checkpoints", "config.yaml", "data_ledger.json", "metrics.jsonl", "model", "report.html",
                        "run.json", "sample_replies.json", "tokens"}  # fmt: skip
        assert not [p for p in output.parent.iterdir() if p.name.endswith(".partial")]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_every_file_has_the_mode_that_the_umask_gives(
    model_folder: Path, chats: Path, tmp_path: Path, mask: int, mode: int
) -> None:
    words = ["train", "--model", model_folder, "--data", chats, "--output", tmp_path / "run", *FAST, "--train.max_steps", 1,
             "--lora.kind", "pissa", "--lora.rank", 2]  # fmt: skip
    subprocess.run([sys.executable, "-m", "tunesmith", *map(str, words)], umask=mask, check=True, timeout=120)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {oct(mode)}
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".bin", ".jsonl", ".yaml"}


# --- weights that cannot be trained, saved or loaded


def test_weights_that_are_not_finite_are_never_saved(
    fails: Fails, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    words = ("--model", model_folder, "--data", chats, *FAST, "--optim.schedule", "constant", "--optim.warmup_steps", 0)
    error = fails("train", *words, "--optim.lr", 1e38, "--train.max_steps", 1, "--output", tmp_path / "run")
    assert (error.code, error.exit_code, "optim.lr" in str(error)) == ("weights-not-finite", 4, True)
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_model_that_is_not_finite_is_not_trained(fails: Any, chats: Path, tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_folder(tmp_path / "poisoned", tiny_config("qwen3"), tokenizer)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = fails("train", "--model", folder, "--data", chats, "--output", tmp_path / "run", *FAST)
    assert (error.code, "model.norm.weight" in str(error)) == ("model-not-finite", True)
    assert not (tmp_path / "run").exists()


def test_memory_that_is_not_enough(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "data": {"train": ["d"]}, "train": {"output_dir": str(tmp_path)}}
    )
    for hungry in (lambda: torch.empty(10**15), lambda: bytearray(10**17)):
        with pytest.raises(RunError, match=r"this machine.*train\.micro_batch_tokens 1024") as info:
            with explained_failures(RunFolder(tmp_path), config, 2048, Progress()):
                hungry()
        assert (info.value.code, info.value.exit_code) == ("out-of-memory", 4)


def test_what_the_system_refuses_is_named(tmp_path: Path, model_folder: Path, chats: Path) -> None:
    """A limit on file sizes stands for any disk error other than a full disk."""
    words = [
        "train",
        "--model",
        model_folder,
        "--data",
        chats,
        "--output",
        tmp_path / "run",
        *FAST,
        "--train.max_steps",
        2,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *map(str, words)], capture_output=True, text=True, timeout=120, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert "file too large" in done.stderr.lower()
    assert f"tunesmith resume {tmp_path / 'run'}" in done.stderr


def test_a_data_file_that_cannot_be_read(run: Run, model_folder: Path, tmp_path: Path) -> None:
    """/proc/self/mem gives EIO, as a failing disk does."""
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("needs Linux")
    (tmp_path / "data.jsonl").symlink_to("/proc/self/mem")
    code, _, err = run(
        "train", "--model", model_folder, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "r", *FAST
    )
    assert code in (1, 4)
    assert str(tmp_path / "data.jsonl") in err
    assert "Traceback" not in err
    assert not (tmp_path / "r").exists()


def test_a_tracker_that_fails_does_not_end_the_run(caplog: Any) -> None:
    caplog.set_level("INFO", logger="tunesmith")

    class Broken:
        def log(self, record: Any) -> None:
            raise ConnectionError("no route to the server")

        sync = finish = log

    tracker = OutsideTracker("wandb", Broken())  # type: ignore[arg-type]
    tracker.log({"step": 1})
    tracker.log({"step": 2})
    tracker.finish()
    [message] = caplog.messages
    assert "wandb failed" in message
    assert "no route to the server" in message
