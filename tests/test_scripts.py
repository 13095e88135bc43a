"""Every script of bench/, docs/ and scripts/ has --help and runs on small inputs.

Scripts that take more than a few seconds even then run with TUNESMITH_LONG=1: disk_full.py (as root, it mounts a file
system), adapter_kinds.sh, presets.sh, same_runs.py (needs git). fuzz.py is tested in test_fuzz.py, forks.py in
test_boundary.py, and the part of parity_trl that needs no TRL in test_parity_trl.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, save_folder, tiny_config, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "bench/parity_trl", "docs", "scripts")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".sh"))
MODULES = ("bench/compare_inputs.py", "bench/compare_limit.py", "bench/compare_pages.py", "bench/compare_processes.py",
           "bench/damage.py", "bench/kept.py", "bench/minimind_checkout.py", "bench/minimind_runs.py",
           "bench/parity_trl/inputs.py")  # fmt: skip  # imported by other scripts
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
long = pytest.mark.skipif("TUNESMITH_LONG" not in os.environ, reason="takes long; set TUNESMITH_LONG=1")

Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Script]:
    """Run a Python script in this process, where torch is already imported; returns its output."""
    environment, modules = dict(os.environ), set(sys.modules)

    def call(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        monkeypatch.syspath_prepend(str((ROOT / name).parent))
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                pytest.fail(f"{ended.code}\n{capsys.readouterr()}")
        return capsys.readouterr().out

    yield call
    os.environ.clear()
    os.environ.update(environment)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(tuple(str(ROOT / f) for f in FOLDERS)):
            del sys.modules[name]


def command(name: str, *words: object) -> str:
    """Run a script as a separate command."""
    first = [sys.executable] if name.endswith(".py") else []
    line = [*first, str(ROOT / name), *map(str, words)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def shared(tmp_path: Path, tokenizer: Any) -> Path:
    """A small folder in the layout of the public data, with rows of our own."""
    data = tmp_path / "shared" / "data"
    names = ["llamafactory/alpaca_en_demo.json", "llamafactory/alpaca_zh_demo.json", "fastchat/dummy_conversation.json",
             "llamafactory/glaive_toolcall_en_demo.json", "llamafactory/identity.json", "emollm/data.json"]  # fmt: skip
    rows = [chat_row(f"What is the answer {i}?", f"The answer is {i} and you.") for i in range(30)]
    for name in names:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(json.dumps(rows), encoding="utf-8")
    (data / "medicalgpt").mkdir()
    write_jsonl(data / "medicalgpt" / "sharegpt_zh_1K_format.jsonl", rows)
    sentence = "The quick brown fox jumps over the lazy dog and says hello to you.\n"
    for folder, name, text in (
        ("classic-books", "fox.md", sentence),
        ("chinese-classics", "春.txt", "春眠不觉晓，处处闻啼鸟。\n"),
    ):
        (data / folder).mkdir()
        (data / folder / name).write_text(text * 200, encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "shared" / "tokenizers" / "minimind")
    template = tmp_path / "shared" / "templates" / "llamacpp" / "Qwen-Qwen3-0.6B.jinja"
    template.parent.mkdir(parents=True)
    template.write_text(str(tokenizer.chat_template), encoding="utf-8")
    return tmp_path / "shared"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_help_prints_the_usage(path: Path, script: Script) -> None:
    name = str(path.relative_to(ROOT))
    if name in MODULES:
        assert 'if __name__ == "__main__"' not in path.read_text(encoding="utf-8")
        return
    printed = script(name, "--help") if path.suffix == ".py" else command(name, "--help")
    assert f"usage: {path.name}" in printed.lower()
    assert len(printed.splitlines()) > 2


@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.suffix == ".sh"], ids=lambda p: p.name)
def test_a_shell_script_without_arguments_starts_nothing(path: Path) -> None:
    words = ["--bogus"] if path.name == "run.sh" else []
    done = subprocess.run([path, *words], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr.lower() or "--help" in done.stderr


def test_generated_pages_are_up_to_date(script: Script) -> None:
    script("docs/generate.py", "--check")


def test_data_table_lists_every_file(script: Script, shared: Path) -> None:
    printed = script("docs/data_table.py", shared / "data", shared / "tokenizers" / "minimind")
    rows = [line for line in printed.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(path.is_file() for path in (shared / "data").rglob("*"))
    assert "| `emollm/data.json` | 30 | 0 |" in printed


def test_from_scratch_writes_its_page(script: Script, shared: Path, tmp_path: Path) -> None:
    output = tmp_path / "page"
    output.mkdir()
    words = [f"--{stage}-flags=--train.max_steps 2" for stage in ("pretrain", "sft")]
    words += ["--questions", 1, "--output", output]
    identity = {"instruction": "Who are you?", "input": "", "output": "I am {{name}}, made by {{author}}."}
    alpaca = {"instruction": "What is the answer?", "input": "", "output": "The answer is forty two."}
    for name, row in (("identity", identity), ("alpaca_en_demo", alpaca), ("alpaca_zh_demo", alpaca)):
        (shared / "data" / "llamafactory" / f"{name}.json").write_text(json.dumps([row] * 20), encoding="utf-8")
    printed = script("docs/from_scratch.py", shared / "data", tmp_path / "work", *words)
    assert [line.split(":")[0] for line in printed.splitlines()] == ["tokenizer", "pretrain", "name", "sft"]
    assert "I am Robin, made by Tunesmith." in (tmp_path / "work" / "identity" / "12.json").read_text(encoding="utf-8")
    again = script("docs/from_scratch.py", shared / "data", tmp_path / "work", *words)
    assert again == ""  # every command is kept
    page = (output / "from_scratch.md").read_text(encoding="utf-8")
    assert "2 public-domain books" in page
    assert "| Who are you? |" in page
    assert "1 of the 1 questions are in the chats" in page
    assert sorted(path.name for path in output.iterdir()) == [
        "from_scratch.md", "from_scratch_pretrain.svg", "from_scratch_sft.svg",
    ]  # fmt: skip


def test_make_base_makes_a_base_of_known_books(script: Script, shared: Path, tmp_path: Path) -> None:
    books = [*(shared / "data").glob("classic-books/*"), *(shared / "data").glob("chinese-classics/*")]
    hashes = tmp_path / "hashes.json"
    hashes.write_text(json.dumps({book.name: hashlib.sha256(book.read_bytes()).hexdigest() for book in books}))
    small = ["--hashes", hashes, "--drills", 300, "--vocab-size", 500, "--steps", 2]
    script("scripts/make_base.py", shared / "data", tmp_path / "work", "--output", tmp_path / "base", *small)
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert (tmp_path / "base" / "tokenizer.json").is_file()
    books[0].write_text("another book", encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match=f"the books differ from hashes.json: {books[0].name}"):
        script("scripts/make_base.py", shared / "data", tmp_path / "work2", "--output", tmp_path / "base2", *small)


def test_label_cost_gives_a_line_for_each_file(shared: Path) -> None:
    lines = command("bench/label_cost.sh", shared, 1).splitlines()
    assert len(lines) == 7
    assert all("30 chats" in line and "proven: x " in line for line in lines)


def test_save_cost_compares_runs_with_and_without_a_save(shared: Path) -> None:
    words = ["--model", "new:tiny", "--rounds", 1, "--steps", 2, "--tokens", 128]
    chats = shared / "data" / "emollm" / "data.json"
    printed = command("bench/save_cost.py", shared / "tokenizers" / "minimind", chats, *words)
    assert "a save costs" in printed


def test_adapter_memory_prints_a_row_for_each_kind(shared: Path, tmp_path: Path, tokenizer: Any) -> None:
    base = save_folder(tmp_path / "base", tiny_config("qwen2"), tokenizer)
    chats = shared / "data" / "emollm" / "data.json"
    printed = command("bench/adapter_memory.py", base, chats, "--model", base, "--kinds", "LoRA, rank 16")
    assert printed.splitlines()[-1].startswith("| LoRA, rank 16 | ")


@pytest.fixture
def choosing(shared: Path, tmp_path: Path, tokenizer: Any) -> list[object]:
    """The arguments of bench/choosing.py and bench/lr_find.py for small runs of a tiny model."""
    base = save_folder(tmp_path / "base", tiny_config("qwen2", max_position_embeddings=512), tokenizer)
    rows = [{"question": f"What is {i}?", "answer": f"The answer is {i}."} for i in range(30)]
    (shared / "data" / "gsm8k").mkdir()
    write_jsonl(shared / "data" / "gsm8k" / "train.jsonl", rows)
    return [shared / "data", tmp_path / "work", "--base", base, "--tokens", 2048]


@pytest.mark.parametrize(
    "tables", [["epochs"], pytest.param(["lr", "batch", "rank", "amount"], marks=long)], ids=["one", "others"]
)
def test_choosing_fills_its_tables(script: Script, choosing: list[object], tmp_path: Path, tables: list[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in tables), encoding="utf-8")
    script("bench/choosing.py", *choosing, "--only", *tables, "--runs", 1, "--write", page)
    assert "old" in page.read_text(encoding="utf-8")  # a table that lacks runs is not written
    assert len((tmp_path / "work" / "results.jsonl").read_text(encoding="utf-8").splitlines()) == len(tables)
    script("bench/choosing.py", *choosing, "--only", *tables, "--write", page)
    assert page.read_text(encoding="utf-8").count("| --- |") >= len(tables)
    assert "old" not in page.read_text(encoding="utf-8")


def test_kept_results_are_used_while_their_inputs_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    kept = importlib.import_module("kept")
    made: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class Square:
        number: int

    @dataclasses.dataclass(frozen=True)
    class Area:
        size: int

    def make(square: Square) -> Area:
        made.append(square.number)
        return Area(square.number**2)

    def open_file(weights: str) -> Any:
        (tmp_path / "weights").write_text(weights)
        key = kept.hash_files([tmp_path / "weights"], "1.0")
        return kept.Kept(tmp_path / "kept.jsonl", Square, Area, make, lambda _: key)

    first = open_file("a")
    first.make([Square(1), Square(2), Square(1), Square(3)], most=2)
    assert (made, first[Square(2)], Square(3) in first) == ([1, 2], Area(4), False)
    again = open_file("a")
    again.make([Square(1), Square(2), Square(3)], most=9)
    assert (made, again[Square(1)]) == ([1, 2, 3], Area(1))
    open_file("b").make([Square(1)], most=9)  # other weights: made again
    assert made == [1, 2, 3, 1]
    assert Square(3) in open_file("a")


@long
def test_lr_find_is_compared_with_the_grid(script: Script, choosing: list[object]) -> None:
    script("bench/choosing.py", *choosing, "--only", "lr")
    printed = script("bench/lr_find.py", *choosing)
    assert len([line for line in printed.splitlines() if line.startswith("| demo, ")]) == 4


def test_precision_curve_compares_losses(script: Script) -> None:
    printed = script("bench/precision_curve.py", "--shape", "smallest", "--steps", 12, "--tokens", 128)
    assert "| 11-12 |" in printed
    assert "largest difference 0." in printed


def test_the_step_on_a_gpu(script: Script, tmp_path: Path) -> None:
    """What it compares, on a CPU, where no kernel is used; speed with TUNESMITH_LONG=1."""
    stages = ("equal", "speed") if "TUNESMITH_LONG" in os.environ else ("equal",)
    words = ("--device", "cpu", "--smallest", "--stages", *stages, "--output", tmp_path / "found.json")
    found = json.loads(script("bench/gpu_step.py", *words))
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert found["equal"]["is_equal"]
    assert found["equal"]["reading"] == {"is_equal": True, "steps": 20}
    assert {kernel["kernel"] for kernel in found["equal"]["kernels"]} == {"varlen", "flex"}
    for case in found.get("speed", {}).values():
        assert case["eager"]["share_of_matmul_rate"] > 0
        assert case["eager"]["profile"]["operations"] > 0


def test_real_data_26m_takes_flags_of_train(shared: Path, tmp_path: Path) -> None:
    small = ["--model.config.hidden_size", 32, "--model.config.num_hidden_layers", 1, "--model.config.head_dim", 8,
             "--model.config.intermediate_size", 64, "--train.max_steps", 2]  # fmt: skip
    assert "model saved: " in command("bench/real_data_26m.sh", shared, tmp_path / "run", *small)


def test_convert_configs_counts_and_trains(script: Script, tmp_path: Path) -> None:
    configs = {
        "axolotl/a.yml": {"base_model": "Qwen/Qwen3-8B", "datasets": [{"path": "a/b", "type": "alpaca"}], "adapter": "lora",
                          "lora_r": 4, "lora_alpha": 8, "sequence_len": 512, "learning_rate": 1e-4, "output_dir": "o"},
        "dpo.yaml": {"model_name_or_path": "m", "stage": "dpo", "dataset": "d"},
    }  # fmt: skip
    for name, config in configs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(config), encoding="utf-8")
    printed = script("bench/convert_configs.py", tmp_path, "--run")
    assert "| axolotl | 1 | 1 | 0 | 0 | 10 | 0 | 0 | 1 of 1 (100.0 %) |" in printed
    assert "| llama-factory | 1 | 0 | 0 | 1 | 0 | 0 | 0 |  |" in printed
    assert "axolotl: families: qwen3 1" in printed
    with pytest.raises(pytest.fail.Exception, match="no YAML files"):
        script("bench/convert_configs.py", tmp_path / "none")


def test_minimind_needs_a_checkout(script: Script, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="is not a checkout of MiniMind"):
        script("bench/minimind.py", tmp_path, "--part", "classes", "--work", tmp_path / "work")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_minimind.py").write_text("self.q_norm = 0", encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match="has no tokenizer"):
        script("bench/minimind.py", tmp_path, "--part", "classes", "--work", tmp_path / "work")
    with pytest.raises(pytest.fail.Exception, match="need --text and --chats"):
        script("bench/minimind.py", tmp_path, "--part", "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "work"]


def test_chaos_kills_and_resumes() -> None:
    printed = command("bench/chaos.py", "--kills", 1, "--steps", 6)
    assert "1 kills over " in printed
    assert "NOT THE SAME" not in printed


@long
def test_adapter_kinds_resume_to_the_same_bytes(shared: Path, tmp_path: Path, tokenizer: Any) -> None:
    base = save_folder(tmp_path / "base", tiny_config("qwen2"), tokenizer)
    (tmp_path / "runs").mkdir()
    chats = shared / "data" / "emollm" / "data.json"
    printed = command("bench/adapter_kinds.sh", base, chats, tmp_path / "runs", "lora")
    assert "lora: resumed to the same bytes" in printed
    assert "lora: proof" in printed


@long
def test_presets_open_in_transformers(shared: Path, tmp_path: Path) -> None:
    chats = shared / "data" / "emollm" / "data.json"
    assert "opened: " in command("bench/presets.sh", shared / "tokenizers" / "minimind", chats, tmp_path, "tiny")


def test_verdict_runs_keeps_what_a_verdict_reads(script: Script, tmp_path: Path) -> None:
    rows = [{"instruction": f"What is {i}?", "output": f"It is {i + 1}, and then comes {i + 2}."} for i in range(60)]
    chats, kept = write_jsonl(tmp_path / "chats.jsonl", rows), tmp_path / "verdicts.json"
    words = ("--chats", chats, "--text", chats, "--work", tmp_path / "work", "--only", "one_step", "--output", kept)
    assert "1 runs: " in script("bench/verdict_runs.py", *words)
    run = json.loads(kept.read_text())["one_step"]
    assert run["records"]["step"] == [1]
    assert str(tmp_path) not in kept.read_text()


@long
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which needs root")
def test_disk_full_leaves_nothing_half_done(tmp_path: Path) -> None:
    printed = command("bench/disk_full.py", "--only", "metrics.jsonl", "--folder", tmp_path / "work")
    assert "WRONG" not in printed


@long
@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a git checkout")
def test_same_runs_compares_with_the_last_commit() -> None:
    assert "text: " in command("bench/same_runs.py", "--before", "HEAD", "--runs", "text")
