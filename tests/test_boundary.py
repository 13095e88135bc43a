"""Failures at the boundary: one message, the right exit code, no traceback; commands that write files stop."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import tunesmith
from conftest import chat_row, save_folder, tiny_config, write_jsonl
from tunesmith import boundary
from tunesmith.boundary import explain

FORKS = Path(__file__).parents[1] / "bench" / "forks.py"


class Forks:
    """bench/forks.py as a server that runs each command in a forked process."""

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
    return copy  # its runs continue with their original model and data, which are outside the folder


def plainly(done: dict[str, Any], *words: str, codes: tuple[int, ...] = (1,)) -> str:
    """Expect one message that says what is wrong, and nothing that looks like a bug."""
    text = done["out"] + done["err"]
    assert done["code"] in codes, done
    for bad in ("Traceback", "UNCAUGHT", "Exception ignored", "report it as a bug"):
        assert bad not in text, text
    assert done["err"].count("error: ") <= 1, done["err"]
    assert len(done["err"]) < 20_000
    for word in words:
        assert word in text, text
    return text


def thinned(variants: list[Any], kept: int) -> list[Any]:
    """All of them with TUNESMITH_LONG=1, else the first ones."""
    return variants if os.environ.get("TUNESMITH_LONG") else variants[:kept]


# --- standard output


@pytest.mark.parametrize("stdout", thinned(["leaving", "/dev/full", "closed"], 2))
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
    # file descriptor 1 was free: output must not be written to a file of the run
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
            plainly(done, "cannot write standard output: No space left on device", codes=(4,))
    plainly(forks("check", *given, "--json", stdout="/dev/full"), "cannot write standard output", codes=(4,))
    plainly(forks("check", *given, "--json", stdout="leaving"), codes=(0,))
    plainly(forks("--help", stdout="/dev/full"), "cannot write standard output", codes=(4,))


def test_errors_end_with_their_code_where_nobody_reads_them(forks: Forks) -> None:
    for stderr in ("/dev/full", "closed"):
        assert forks("preview", "--data", "nope.jsonl", "--model", "nope", stderr=stderr)["code"] == 1
        assert forks("preview", "--bogus", stderr=stderr)["code"] == 2


BETWEEN = """
import sys
from tunesmith.streams import lasting_streams
with lasting_streams():
    print(input() + "x" * 300_000, flush=True)
    print("e" * 300_000, file=sys.stderr)
    print("end")
"""


def test_streams_that_are_set_not_to_wait_are_waited_for() -> None:
    """O_NONBLOCK, as set by node and some CI runners: a full or empty pipe is no error."""
    (stdin, given), (printed, stdout), (said, stderr) = os.pipe(), os.pipe(), os.pipe()
    for number in (stdin, stdout, stderr):
        os.set_blocking(number, False)
    child = subprocess.Popen([sys.executable, "-c", BETWEEN], stdin=stdin, stdout=stdout, stderr=stderr)
    for number in (stdin, stdout, stderr):
        os.close(number)
    time.sleep(0.5)  # first the pipe is empty, then full
    os.write(given, b"in\n")
    os.close(given)
    time.sleep(0.3)
    with os.fdopen(printed) as out, os.fdopen(said) as err:
        assert out.read(300_003) == "in" + "x" * 300_000 + "\n"
        assert err.read() == "e" * 300_000 + "\n"
        assert out.read() == "end\n"
    assert child.wait(timeout=30) == 0


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
    at = f"{tmp_path}/run/run.json?finished_at_step"
    done = forks(*train_words(inputs, tmp_path / "run"), interrupt_at=at, full_replies=True)
    text = plainly(done, codes=(3,))
    assert "nothing was left behind" not in text
    assert f"{tmp_path / 'run'} is finished" in text
    assert "report" in text
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# --- paths that are not regular files


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


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


ODD = thinned([make_fifo, make_bytes, make_loop, make_folder, make_null, make_zero, make_empty, make_nothing], 3)
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
        # transformers does not need tokenizer_config.json
        plainly(done, codes=(0, 1) if name == "tokenizer_config.json" else (1,))
        path = folder / "model" / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(kept)
    replace(folder / "model" / "model.safetensors", make)
    plainly(forks(*train_words(folder, folder / "new"), limit_s=30))
    assert not (folder / "new").exists()


@pytest.mark.parametrize("make", [make_folder, make_fifo, make_loop, make_dangling])
def test_files_of_a_tokenizer_that_are_none_are_named(forks: Forks, folder: Path, make) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "special_tokens_map.json"):
        copy = folder / name
        shutil.copytree(folder / "model", copy)
        replace(copy / name, make)
        text = plainly(forks("preview", "--model", copy, "--data", folder / "chats.jsonl"), f"{copy / name}: is a ")
        assert "..." not in text


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
    for name in ("run.json", "data_ledger.json", "metrics.jsonl", "config.yaml", "tokens/offsets.npy", "tokens/store.json",
                 "tokens/tokens-00000.bin", f"{newest}/manifest.json", f"{newest}/state.json"):  # fmt: skip
        run = folder / "copy"
        shutil.copytree(folder / "full", run)
        replace(run / name, make)
        done = forks("resume", run, "--train.max_steps", 3, limit_s=30)
        # invalid checkpoints are skipped; system errors within a run end it with exit code 4
        plainly(done, codes=(0, 1, 4))
        shutil.rmtree(run)


WRONG = ['{"step": "x"}', "[]", "null", "3", '"x"', "{}", '{"step": null, "loss": []}', '{"step": 1e400}', "[[[[1]]]]"]


@pytest.mark.parametrize("text", thinned(WRONG, 2))
def test_wrong_types_in_the_files_of_a_run(forks: Forks, folder: Path, text: str) -> None:
    for name in ("run.json", "data_ledger.json", "metrics.jsonl", "tokens/store.json", "config.yaml"):
        run = folder / "copy"
        shutil.copytree(folder / "full", run)
        (run / name).write_text(text + "\n")
        plainly(forks("resume", run, "--train.max_steps", 3), codes=(0, 1))
        shutil.rmtree(run)


@pytest.mark.parametrize("text", thinned(['{"temperature": "hot", "do_sample": true}', "[]", "{", "null",
    '{"eos_token_id": "x"}', '{"eos_token_id": [[1]]}', '{"top_k": -3, "do_sample": true}'], 2))  # fmt: skip
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
    assert "note: " in text
    assert "chats.jsonl" in text
    text = plainly(forks("resume", folder / "own", "--train.max_steps", 4, "--data.train_on", "all", "--allow", "data"))
    assert "chats.jsonl" in text


def test_links_that_lead_to_themselves_in_the_base_of_a_run(forks: Forks, folder: Path) -> None:
    done = forks(*train_words(folder, folder / "own"))
    assert done["code"] == 0
    replace(folder / "model" / "model.safetensors", make_loop)
    plainly(forks("resume", folder / "own", "--train.max_steps", 3), "model.safetensors: ")


# --- names


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """A pipe, and a device node of our own: a failing test must not replace one of the machine's."""
    os.mkfifo(tmp_path / "fifo")
    try:
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except OSError:
        os.mkfifo(tmp_path / "null")
    return tmp_path


@pytest.mark.parametrize("name", thinned(["null", "/proc/1/x", "fifo", "~nosuchuser/x", "null/x", "/sys/x", "x" * 300, "",
                                          "a\udcffb"], 4))  # fmt: skip
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


@pytest.mark.parametrize("name", thinned(["fifo", "/dev/zero", "x" * 300, "/proc/self/mem", "~nosuchuser/x", "/dev/null",
                                          "/dev/stdin", "", "a\udcffb", "/proc/1/fd"], 4))  # fmt: skip
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


# --- memory, and unexpected errors


def test_memory_that_ends(forks: Forks, inputs: Path, tmp_path: Path) -> None:
    """A model that no setting makes fit is refused before anything is allocated."""
    done = forks("train", "--model", "new:tiny", "--model.config.hidden_size", 65536, "--model.config.intermediate_size", 65536,
                 "--tokenizer", inputs / "model", "--data", inputs / "chats.jsonl", "--output", tmp_path / "run")  # fmt: skip
    plainly(done, "memory")
    assert not (tmp_path / "run").exists()


GPU, MACHINE = "out of memory on the GPU", "out of memory on this machine"
ASKED = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
LACKING = [
    (torch.OutOfMemoryError(ASKED), GPU),
    (RuntimeError("CUDA error: out of memory"), GPU),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), GPU),
    (RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"), GPU),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"), MACHINE),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate"),
     MACHINE),
    (RuntimeError("unable to mmap 179440 bytes from file <model.safetensors>: Cannot allocate memory (12)"), MACHINE),
    (SafetensorError("Error while deserializing: I/O error: Cannot allocate memory (os error 12)"), MACHINE),
    (RuntimeError("std::bad_alloc"), MACHINE),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), MACHINE),
    (MemoryError(), MACHINE),
]  # fmt: skip


@pytest.mark.parametrize(("error", "said"), LACKING, ids=lambda value: str(value)[:40])
def test_memory_that_ends_by_whatever_name(error: BaseException, said: str) -> None:
    text, code = explain(error, ["train"])
    assert code == 4
    assert said in text


def test_a_text_that_speaks_of_memory_is_no_lack_of_it() -> None:
    for error in (ValueError("row 3: 'CUDA out of memory' is no number"), KeyError("std::bad_alloc")):
        assert "report it as a bug" in explain(error, ["train"])[0]


def raised_in(module: str, source: str, **given: object) -> BaseException:
    """The error of a source text that runs as a module of that name."""
    try:
        exec(source, {"__name__": f"tunesmith.{module}", **given})
    except BaseException as error:
        return error
    raise AssertionError("raised nothing")


OURS = [
    ("use.preview", "open('/dev/null', 'w', encoding='utf-8').write('a\\ud800b')"),  # our own error while writing
    ("sources.jsontext", "'\\ud800'.encode()"),
    ("chat_template.template", "import jinja2; jinja2.Template('{{ a.b.c }}').render()"),
    ("encode.encoder", "raise Exception('left over')"),
    ("train.loop", "raise Exception('left over')"),
    ("train.loop", "def again(): again()\nagain()"),
    ("run.start", "import json; json.loads('{')"),
    ("train.loop", "raise OSError('ours')"),
    ("model.save", "from safetensors.numpy import save; save({'a': 3})"),
]


@pytest.mark.parametrize(("module", "source"), OURS, ids=lambda value: value[:40])
def test_what_nothing_explains_is_called_a_bug(module: str, source: str) -> None:
    text, code = explain(raised_in(module, source), ["train"])
    assert code == 4
    assert "report it as a bug: " in text
    assert "TUNESMITH_DEBUG=1" in text


def test_modules_that_read_files_exist() -> None:
    package = Path(tunesmith.__file__).parent
    for name in boundary._READING:
        assert (package / name.removeprefix("tunesmith.").replace(".", "/")).with_suffix(".py").is_file(), name
    assert {path.name for path in package.iterdir() if path.is_dir()} >= set(boundary._STAGES)


READ = [
    ("model.reopen", "from tokenizers import Tokenizer; Tokenizer.from_file(str(path))", "EOF while parsing"),
    ("tensors", "from safetensors.numpy import load_file; load_file(path)", "header"),
    ("sources.jsontext", "import json; json.loads(path.read_text())", "JSONDecodeError"),
    ("sources.excel", "import zipfile; zipfile.ZipFile(path)", "not a zip file"),
    ("sources.containers", "import gzip; gzip.open(path).read()", "Not a gzipped file"),
    ("sources.read", "import json; json.loads('[' * 100_000)", "nested too deep"),
    (
        "model.reopen",
        "from tokenizers import Tokenizer; Tokenizer.from_file(str(path) + 'x')",
        "No such file or directory",
    ),
    ("tensors", "raise FileNotFoundError('No such file or directory: x.safetensors')", "x.safetensors"),
]


@pytest.mark.parametrize(("module", "source", "said"), READ, ids=lambda value: value[:40])
def test_a_damaged_file_is_named(tmp_path: Path, module: str, source: str, said: str) -> None:
    path = tmp_path / "odd"
    path.write_text("{")
    text, code = explain(raised_in(module, source, path=path), ["train"])
    assert code == 1
    assert said in text
    assert text.startswith(f"error: {path}: "), text


def test_a_file_that_is_not_known_has_its_stage_named() -> None:
    error = raised_in("model.reopen", "raise Exception('No such file or directory (os error 2)')")
    assert explain(error, [])[0].startswith("error: the model or its tokenizer: No such file or directory. ")
    error = raised_in("sources.read", "import io; raise OSError('the block is torn')")
    text, code = explain(error, [])
    assert code == 1
    assert "the data: OSError: the block is torn" in text


def test_a_network_that_fails_is_no_disk() -> None:
    refused = "import socket; socket.create_connection(('127.0.0.1', 9), 5)"
    for source in (refused, "import huggingface_hub as hub; hub.HfApi('http://127.0.0.1:9').model_info('a/b')", "raise TimeoutError('timed out')",
                   "import errno; raise OSError(errno.EHOSTUNREACH, 'No route to host')",
                   "import socket; raise socket.gaierror(-2, 'Name or service not known')"):  # fmt: skip
        text, code = explain(raised_in("model.source", source), ["train"])
        assert code == 4, text
        assert "Check the network" in text
        assert "disk" not in text
        assert "the model or its tokenizer" in text


def test_debug_shows_where(forks: Forks) -> None:
    done = forks("preview", "--data", "nope.jsonl", "--model", "nope", environment={"TUNESMITH_DEBUG": "1"})
    assert done["code"] == 1
    assert "Traceback" in done["err"]
    assert done["err"].rstrip().splitlines()[-1].startswith("error: ")
