"""Whatever goes wrong, and wherever: one message, the right exit code, no traceback, and work that makes files ends it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, save_folder, tiny_config, write_jsonl

FORKS = Path(__file__).parents[1] / "bench" / "forks.py"


class Forks:
    """bench/forks.py as a server: each command is a process of its own."""

    def __init__(self) -> None:
        self._server = subprocess.Popen([sys.executable, FORKS], stdin=-1, stdout=-1, text=True)

    def __call__(self, *words: object, **options: Any) -> dict[str, Any]:
        request = {"words": [str(word) for word in words], "limit_s": 60, **options}
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(timeout=30)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer, forks: Forks) -> Path:
    """A model, chats, and two finished runs: one of the whole model, one of an adapter."""
    folder = tmp_path_factory.mktemp("inputs")
    save_folder(folder / "model", tiny_config("qwen3", initializer_range=0.02), tokenizer)
    write_jsonl(folder / "chats.jsonl", [chat_row(f"Who {i}?", f"The fox {i}.") for i in range(12)])
    for name, flags in (("full", []), ("adapter", ["--lora.kind", "lora", "--lora.rank", 2])):
        done = forks(*train_words(folder, folder / name), *flags)
        assert done["code"] == 0, done
    return folder


def train_words(inputs: Path, output: Path, steps: int = 2) -> list[object]:
    return ["train", "--model", inputs / "model", "--data", inputs / "chats.jsonl", "--output", output,
            "--data.max_seq_len", 64, "--train.micro_batch_tokens", 64, "--train.max_steps", steps,
            "--train.save_steps", 1]  # fmt: skip


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "work"
    shutil.copytree(inputs, copy)
    return copy  # its runs go on with the model and data that they were made of, which are not in it


def plainly(done: dict[str, Any], *words: str, codes: tuple[int, ...] = (1,)) -> str:
    """One message that says what is wrong; nothing that looks like a bug."""
    text = done["out"] + done["err"]
    assert done["code"] in codes, done
    for bad in ("Traceback", "UNCAUGHT", "Exception ignored", "should not"):
        assert bad not in text, text
    assert done["err"].count("error: ") <= 1, done["err"]
    assert len(done["err"]) < 20_000
    for word in words:
        assert word in text, text
    return text


# --- standard output


@pytest.mark.parametrize("stdout", ["leaving", "/dev/full", "closed"])
def test_work_goes_on_without_its_output(forks: Forks, inputs: Path, tmp_path: Path, stdout: str) -> None:
    out = tmp_path / "out"
    for words, made in (
        (train_words(inputs, out / "run"), "run/model/model.safetensors"),
        (["merge", inputs / "adapter", "--output", out / "merged"], "merged/model.safetensors"),
        (["tokenizer", "--data", inputs / "chats.jsonl", "--vocab-size", 300, "--output", out / "t"], "t/tokenizer.json"),
        (["preview", "--model", inputs / "model", "--data", inputs / "chats.jsonl", "--html", tmp_path / "p.html"], "../p.html"),
        (["check", "--model", inputs / "model", "--data", inputs / "chats.jsonl", "--html", tmp_path / "c.html"], "../c.html"),
    ):  # fmt: skip
        done = forks(*words, stdout=stdout)
        plainly(done, codes=(0,))
        assert (out / made).stat().st_size > 100, words
    with (out / "run" / "run.json").open() as file:
        assert json.load(file)["finished_at_step"] == 2
    shutil.rmtree(out / "run" / "model")
    done = forks("resume", out / "run", "--train.max_steps", 3, "--allow", "schedule", stdout=stdout)
    plainly(done, codes=(0,))
    assert (out / "run" / "model" / "model.safetensors").is_file()


def test_everything_closed(forks: Forks, inputs: Path, tmp_path: Path) -> None:
    done = forks(*train_words(inputs, tmp_path / "run"), stdin="closed", stdout="closed", stderr="closed")
    assert done["code"] == 0
    assert (tmp_path / "run" / "model").is_dir()
    # file 1 was free: what is printed must not land in a file of the run
    assert "training" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    done = forks("chat", inputs / "full", stdin="closed")
    plainly(done, codes=(0,))


def test_a_printer_ends_with_its_reader_and_tells_of_a_full_disk(forks: Forks, inputs: Path) -> None:
    given = ["--model", inputs / "model", "--data", inputs / "chats.jsonl"]
    for words in (["recipes"], ["preview", *given, "--json"], ["chat", inputs / "full", "--prompt", "Hi"],
                  ["convert-config", "/dev/null"]):  # fmt: skip
        code = 1 if words[0] == "convert-config" else 0
        plainly(forks(*words, stdout="leaving"), codes=(code,))
        done = forks(*words, stdout="/dev/full")
        if code == 0:
            plainly(done, "standard output cannot be written: No space left on device", codes=(4,))
    plainly(forks("check", *given, "--json", stdout="/dev/full"), "standard output cannot be written", codes=(4,))
    plainly(forks("check", *given, "--json", stdout="leaving"), codes=(0,))
    plainly(forks("--help", stdout="/dev/full"), "standard output cannot be written", codes=(4,))


def test_errors_end_with_their_code_where_nobody_reads_them(forks: Forks) -> None:
    for stderr in ("/dev/full", "closed"):
        assert forks("preview", "--data", "nope.jsonl", "--model", "nope", stderr=stderr)["code"] == 1
        assert forks("preview", "--bogus", stderr=stderr)["code"] == 2


# --- interrupts


def test_ctrl_c_ends_every_command_with_one_line(forks: Forks, inputs: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "many.jsonl", [chat_row(f"Who {i}?", "The fox. " * 20) for i in range(20_000)])
    given = ["--model", inputs / "model", "--data", tmp_path / "many.jsonl"]
    commands: list[tuple[list[object], str]] = [
        (["check", *given], ""),
        (["tokenizer", "--data", tmp_path / "many.jsonl", "--output", tmp_path / "t"], ""),
        (["preview", *given, "--rows", 20_000, "--json"], '{"file"'),
        ([*train_words(inputs, tmp_path / "run", 1000)], "step 1/"),
        (["chat", inputs / "full", "--max-new-tokens", 400, "--prompt", "Tell"], ""),
    ]
    for words, at in commands:
        for number in (2, 15):
            done = forks(*words, interrupt_at=at, interrupt_after_s=30 if at else 0.15, number=number)
            assert done["code"] == 3, (words, done)
            plainly(done, "interrupted", codes=(3,))
            assert done["err"].count("\n") == 1 or "step" in at, done["err"]
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl"]


def test_ctrl_c_while_the_report_is_made_tells_that_the_model_stands(
    forks: Forks, inputs: Path, tmp_path: Path
) -> None:
    done = forks(*train_words(inputs, tmp_path / "run"), interrupt_at=f"{tmp_path}/run/run.json?finished_at_step")
    text = plainly(done, codes=(3,))
    assert "nothing was left behind" not in text
    assert f"{tmp_path / 'run'} is finished" in text
    assert "report" in text
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# --- files that are none


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_null(path: Path) -> None:
    path.symlink_to("/dev/null")


def make_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_bytes(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_nothing(path: Path) -> None:
    pass


ODD = [make_fifo, make_folder, make_loop, make_null, make_zero, make_bytes, make_empty, make_nothing]
odd = pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__.removeprefix("make_"))


def replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink(missing_ok=True)
    make(path)


@odd
def test_odd_files_in_a_model_folder(forks: Forks, folder: Path, make) -> None:
    given = ["--model", folder / "model", "--data", folder / "chats.jsonl"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        kept = (folder / "model" / name).read_bytes()
        replace(folder / "model" / name, make)
        done = forks("preview", *given, limit_s=30)
        # transformers does without tokenizer_config.json
        plainly(done, codes=(0, 1) if name == "tokenizer_config.json" else (1,))
        path = folder / "model" / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(kept)
    replace(folder / "model" / "model.safetensors", make)
    plainly(forks(*train_words(folder, folder / "new"), limit_s=30))
    assert not (folder / "new").exists()


@odd
def test_odd_files_of_data_and_run_files(forks: Forks, folder: Path, make) -> None:
    for name in ("chats.jsonl", "chats.parquet", "chats.csv", "chats.json.gz", "run.yaml"):
        replace(folder / name, make)
        if name == "run.yaml":
            plainly(forks("convert-config", folder / name, limit_s=30))
            words = ["preview", folder / name]
        else:
            words = ["preview", "--model", folder / "model", "--data", folder / name]
        plainly(forks(*words, limit_s=30))
    (folder / "set").mkdir()
    write_jsonl(folder / "set" / "a.jsonl", [chat_row("Q", "A")])
    make(folder / "set" / "dataset_info.json")
    plainly(forks("preview", "--model", folder / "model", "--data", folder / "set", limit_s=30), codes=(0, 1))


@odd
def test_odd_files_in_a_run(forks: Forks, folder: Path, make) -> None:
    newest = "checkpoints/step-000002"
    for name in ("run.json", "data_ledger.json", "metrics.jsonl", "config.yaml", "tokens/index.npz", "tokens/files.json",
                 "tokens/tokens.bin", f"{newest}/manifest.json", f"{newest}/state.json"):  # fmt: skip
        run = folder / "copy"
        shutil.copytree(folder / "full", run)
        replace(run / name, make)
        done = forks("resume", run, "--train.max_steps", 3, limit_s=30)
        # a checkpoint that does not verify is passed over; the system's errors within a run end it with 4
        plainly(done, codes=(0, 1, 4))
        shutil.rmtree(run)


WRONG = ["null", "[]", "3", '"x"', "{}", '{"step": "x"}', '{"step": null, "loss": []}', '{"step": 1e400}', "[[[[1]]]]"]


@pytest.mark.parametrize("text", WRONG)
def test_wrong_types_in_the_files_of_a_run(forks: Forks, folder: Path, text: str) -> None:
    for name in ("run.json", "data_ledger.json", "metrics.jsonl", "tokens/files.json", "config.yaml"):
        run = folder / "copy"
        shutil.copytree(folder / "full", run)
        (run / name).write_text(text + "\n")
        plainly(forks("resume", run, "--train.max_steps", 3), codes=(0, 1))
        shutil.rmtree(run)


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [[1]]}',
                                  '{"temperature": "hot", "do_sample": true}', '{"top_k": -3, "do_sample": true}'])  # fmt: skip
def test_a_bad_generation_config(forks: Forks, folder: Path, text: str) -> None:
    for place in ("model", "full/model"):
        (folder / place / "generation_config.json").write_text(text)
    plainly(forks("chat", folder / "full", "--prompt", "Who?", "--max-new-tokens", 4), codes=(0, 1))
    done = forks(*train_words(folder, folder / "new"))
    plainly(done, codes=(0, 1))
    assert (folder / "new").exists() == (done["code"] == 0)


def test_a_data_file_that_is_gone_at_resume(forks: Forks, folder: Path) -> None:
    assert forks(*train_words(folder, folder / "own"))["code"] == 0
    (folder / "chats.jsonl").unlink()
    text = plainly(forks("resume", folder / "own", "--train.max_steps", 3), codes=(0,))
    assert "is gone; the run's own copy of its tokens is used" in text
    text = plainly(forks("resume", folder / "own", "--train.max_steps", 4, "--data.train_on", "all", "--allow", "data"))
    assert "chats.jsonl" in text


def test_links_that_lead_to_themselves_in_the_base_of_a_run(forks: Forks, folder: Path) -> None:
    done = forks(*train_words(folder, folder / "own"))
    assert done["code"] == 0
    replace(folder / "model" / "model.safetensors", make_loop)
    plainly(forks("resume", folder / "own", "--train.max_steps", 3), "Symlink loop")


# --- names


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """A pipe, and a device of our own: whoever replaces a device by a file must not find the machine's."""
    os.mkfifo(tmp_path / "fifo")
    try:
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except OSError:
        os.mkfifo(tmp_path / "null")
    return tmp_path


@pytest.mark.parametrize("name", ["~nosuchuser/x", "null", "null/x", "/proc/1/x", "/sys/x", "x" * 300, "", "a\udcffb",
                                  "fifo"])  # fmt: skip
def test_odd_names_of_outputs(forks: Forks, inputs: Path, odd_folder: Path, name: str) -> None:
    given = ["--model", inputs / "model", "--data", inputs / "chats.jsonl"]
    for words in (
        train_words(inputs, Path("."))[:5],
        ["merge", inputs / "adapter"],
        ["tokenizer", *given[2:]],
        ["demo"],
    ):
        plainly(forks(*words, "--output", name, cwd=str(odd_folder), limit_s=30), codes=(1, 2, 4))
    for words in (["preview", *given], ["check", *given]):
        done = forks(*words, "--html", name, cwd=str(odd_folder), limit_s=30)
        plainly(done, codes=(1, 2, 4))
    assert not (odd_folder / "null").is_file()
    assert sorted(path.name for path in odd_folder.iterdir()) == ["fifo", "null"]


@pytest.mark.parametrize("name", ["~nosuchuser/x", "/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "x" * 300, "",
                                  "a\udcffb", "fifo", "/proc/1/fd"])  # fmt: skip
def test_odd_names_of_inputs(forks: Forks, inputs: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    model, data = ["--model", inputs / "model"], ["--data", inputs / "chats.jsonl"]
    for words in (["preview", name], ["convert-config", name], ["preview", *model, "--data", name],
                  ["preview", *data, "--model", name], ["preview", *model, *data, "--tokenizer", name],
                  ["preview", *model, *data, "--data.chat_template", name], ["chat", name, "--prompt", "x"],
                  ["merge", name, "--output", "m"], ["merge", inputs / "adapter", "--base", name, "--output", "m"],
                  ["resume", name], ["tokenizer", "--data", name, "--output", "t"]):  # fmt: skip
        plainly(forks(*words, cwd=str(tmp_path), limit_s=30), codes=(1, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo"]


def test_a_full_disk_under_what_merge_preview_and_tokenizer_write(forks: Forks, inputs: Path, make_disk) -> None:
    disk = make_disk("4k")
    (disk / "other").write_bytes(bytes(4096))
    given = ["--model", inputs / "model", "--data", inputs / "chats.jsonl"]
    for words in (["merge", inputs / "adapter", "--output", disk / "m"], ["tokenizer", *given[2:], "--output", disk / "t"],
                  ["preview", *given, "--rows", 100, "--html", disk / "p.html"], ["demo", "--output", disk / "d"]):  # fmt: skip
        plainly(forks(*words), codes=(4,))
        assert [path.name for path in disk.iterdir()] == ["other"], words
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for words in (["merge", inputs / "adapter", "--output", disk / "m"], ["tokenizer", *given[2:], "--output", disk / "t"],
                  ["preview", *given, "--html", disk / "p.html"], ["demo", "--output", disk / "d"],
                  train_words(inputs, disk / "r")):  # fmt: skip
        plainly(forks(*words), codes=(1, 2, 4))


# --- memory, and what nothing explains


def test_memory_that_ends(forks: Forks, inputs: Path, tmp_path: Path) -> None:
    """Kept by the system as a container keeps it: allocations are refused."""
    done = forks("train", "--model", "new:tiny", "--model.config.hidden_size", 65536, "--model.config.intermediate_size", 65536,
                 "--tokenizer", inputs / "model", "--data", inputs / "chats.jsonl", "--output", tmp_path / "run")  # fmt: skip
    plainly(done, "memory", codes=(4,))
    assert not (tmp_path / "run").exists()


def test_what_nothing_explains_is_called_a_bug(forks: Forks, capsys: pytest.CaptureFixture[str]) -> None:
    from tunesmith.boundary import explain

    text, code = explain(KeyError("attention"), ["train"])
    assert code == 4
    assert "tunesmith failed in a way it should not: KeyError: 'attention'" in text
    assert "TUNESMITH_DEBUG=1" in text


def test_debug_shows_where(forks: Forks) -> None:
    done = forks("preview", "--data", "nope.jsonl", "--model", "nope", environment={"TUNESMITH_DEBUG": "1"})
    assert done["code"] == 1
    assert "Traceback" in done["err"]
    assert done["err"].rstrip().splitlines()[-1].startswith("error: ")
