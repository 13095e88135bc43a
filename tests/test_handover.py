"""The hand-overs of docs/handover.md, run as they are written there, each in an environment of its own.

TUNESMITH_LONG=1 runs them. Those of MiniMind need a checkout of it: TUNESMITH_MINIMIND=FOLDER.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from conftest import save_folder, tiny_config, write_jsonl
from tunesmith.cli import main

Run = Callable[..., tuple[int, str, str]]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("TUNESMITH_LONG"), reason="takes minutes; TUNESMITH_LONG=1 runs it"),
]
DOCS = Path(__file__).resolve().parents[1] / "docs" / "handover.md"
MINIMIND = os.environ.get("TUNESMITH_MINIMIND", "")


def script(name: str) -> str:
    """A block of the page that begins with its name."""
    found = re.search(rf"```python\n# {re.escape(name)}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found, name
    return found[1]


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with TRL beside the packages of this one."""
    folder = tmp_path_factory.mktemp("trl")
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", folder], check=True)
    python = folder / "bin" / "python"
    where = "import site; print(site.getsitepackages()[0])"
    packages = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    (packages / "beside.pth").write_text("\n".join(site.getsitepackages()))
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "trl==1.16.*"]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install TRL: {installed.stderr.strip().splitlines()[-1:]}")
    return python


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder as the page assumes it: runs/mine, runs/lora, preferences.jsonl, prompts.jsonl."""
    folder = tmp_path_factory.mktemp("work")
    base = save_folder(folder / "base", tiny_config("qwen3", vocab_size=len(tokenizer)), tokenizer)
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(40)
    ]
    data = write_jsonl(folder / "chats.jsonl", chats)
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"{n}?"}],
            "chosen": [{"role": "assistant", "content": f"{n}!"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for n in range(24)
    ]
    write_jsonl(folder / "preferences.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": pair["prompt"]} for pair in pairs])
    words = ("--model", base, "--data", data, "--train.max_steps", 3, "--data.max_seq_len", 64)
    for name, more in (("mine", ()), ("lora", ("--lora.kind", "lora"))):
        assert main([str(word) for word in ("train", *words, "--output", folder / "runs" / name, *more)]) == 0
    return folder


def run_script(python: Path, name: str, work: Path) -> str:
    """Run a block of the page with few steps on the CPU."""
    code = re.sub(r"max_steps=\d+", "max_steps=3, use_cpu=True, report_to=[], logging_steps=1", script(name))
    code = code.replace(
        "max_completion_length=256", "max_completion_length=16, num_generations=4, per_device_train_batch_size=4"
    )
    (work / name).write_text(code, encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([python, name], cwd=work, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def has_changed(before: Path, after: Path) -> bool:
    one, other = load_file(before), load_file(after)
    assert {name: tensor.shape for name, tensor in one.items()} == {
        name: tensor.shape for name, tensor in other.items()
    }
    return any(not torch.equal(one[name], other[name].to(one[name].dtype)) for name in one)


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_trl_trains_a_model_on(run: Run, trl: Path, work: Path, name: str) -> None:
    run_script(trl, f"{name}.py", work)
    result = work / "runs" / name / "model"
    assert has_changed(work / "runs/mine/model/model.safetensors", result / "model.safetensors")
    code, _, err = run("chat", result, "--prompt", "5?", "--max-new-tokens", 8)
    assert (code, err) == (0, "")
    ids = [tunesmith.load(folder).prompt_ids("5? <|im_end|>") for folder in (result, work / "runs" / "mine")]
    assert ids[0] == ids[1]
    stops = [tunesmith.load(folder).speaker.stop_ids for folder in (result, work / "runs" / "mine")]
    assert stops[1] <= stops[0]


def test_trl_trains_an_adapter_on(run: Run, trl: Path, work: Path) -> None:
    run_script(trl, "dpo_adapter.py", work)
    before, result = work / "runs/lora/adapter", work / "runs/dpo-lora/adapter"
    assert has_changed(before / "adapter_model.safetensors", result / "adapter_model.safetensors")
    for file in ("base.json", "generation_config.json"):
        shutil.copy(before / file, result)
    code, _, err = run("chat", result, "--prompt", "5?", "--max-new-tokens", 8)
    assert (code, err) == (0, "")
    assert tunesmith.load(result).speaker.stop_ids == tunesmith.load(before).speaker.stop_ids


def test_trl_trains_an_adapter_with_grpo(run: Run, trl: Path, work: Path) -> None:
    """The page says: for an adapter, `model` as for DPO."""
    code = script("grpo.py").replace(
        'AutoModelForCausalLM.from_pretrained("runs/mine/model")',
        'AutoPeftModelForCausalLM.from_pretrained("runs/lora/adapter", is_trainable=True)',
    )
    code = code.replace(
        "from transformers import AutoModelForCausalLM,",
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import",
    )
    code = code.replace("runs/grpo/model", "runs/grpo-lora/adapter").replace('runs/grpo"', 'runs/grpo-lora"')
    page = DOCS.read_text(encoding="utf-8")
    assert "For an adapter, `model` as above." in page
    code = re.sub(
        r"max_steps=\d+",
        "max_steps=3, use_cpu=True, report_to=[], num_generations=4, per_device_train_batch_size=4",
        code,
    )
    (work / "grpo_adapter.py").write_text(
        code.replace("max_completion_length=256", "max_completion_length=16"), encoding="utf-8"
    )
    ran = subprocess.run([trl, "grpo_adapter.py"], cwd=work, capture_output=True, text=True, check=False,
                         env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = work / "runs/grpo-lora/adapter"
    assert has_changed(work / "runs/lora/adapter/adapter_model.safetensors", result / "adapter_model.safetensors")
    assert run("chat", result, "--prompt", "5?", "--max-new-tokens", 8)[0] == 0


def test_ids_for_another_engine_keep_text_as_text(work: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.chdir(work)
    names: dict[str, Any] = {}
    exec(script("ids.py"), names)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert names["ids"].count(stop) == 1  # that of the turn
    assert "<|im_end|> mean" in tokenizer.decode(names["ids"])


@pytest.fixture(scope="module")
def minimind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a checkout of MiniMind, to which its scripts may write."""
    if not (Path(MINIMIND) / "trainer" / "train_dpo.py").is_file() or not MINIMIND:
        pytest.skip("no checkout of MiniMind: TUNESMITH_MINIMIND=FOLDER names one")
    folder = tmp_path_factory.mktemp("minimind")
    for part in ("dataset", "model", "trainer"):
        shutil.copytree(Path(MINIMIND) / part, folder / part)
    for name in ("out", "checkpoints"):
        (folder / name).mkdir()
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    wrong = [turns[0], {"role": "assistant", "content": "3"}]
    write_jsonl(folder / "dataset" / "dpo.jsonl", [{"chosen": turns, "rejected": wrong}] * 12)
    write_jsonl(folder / "dataset" / "sft.jsonl", [{"conversations": turns}] * 12)
    return folder


def run_minimind(folder: Path, name: str, *words: object) -> None:
    words = (*words, "--device", "cpu", "--num_workers", 0, "--batch_size", 4, "--epochs", 1, "--max_seq_len", 64)
    ran = subprocess.run([sys.executable, name, *map(str, words)], cwd=folder / "trainer", capture_output=True,
                         text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_minimind_trains_on_through_its_weight_files(run: Run, minimind: Path, tmp_path: Path) -> None:
    sizes = [f"--model.config.{key}={value}" for key, value in
             {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256, "head_dim": 8}.items()]  # fmt: skip
    for name in ("mine", "teacher"):
        code, _, err = run("train", "--model", "new:minimind-64m", *sizes, "--tokenizer", minimind / "model", "--data",
                           minimind / "dataset" / "sft.jsonl", "--output", tmp_path / name, "--train.max_steps", 3,
                           "--data.max_seq_len", 64, "--train.seed", len(name))  # fmt: skip
        assert code == 0, err
    for name, weight in (("mine", "full_sft"), ("teacher", "teacher")):
        code, out, err = run(
            "export", tmp_path / name, "--format", "minimind", "--weight", weight, "--output", tmp_path / f"for-{name}"
        )
        assert code == 0, err
        assert "set in MiniMind's config class" not in out, out
        shutil.copy(tmp_path / f"for-{name}" / f"{weight}_64.pth", minimind / "out")
    run_minimind(minimind, "train_dpo.py", "--hidden_size", 64, "--num_hidden_layers", 2, "--from_weight", "full_sft",
                 "--learning_rate", 1e-4, "--data_path", "../dataset/dpo.jsonl")  # fmt: skip
    run_minimind(minimind, "train_distillation.py", "--student_hidden_size", 64, "--student_num_layers", 2,
                 "--from_student_weight", "full_sft", "--teacher_hidden_size", 64, "--teacher_num_layers", 2,
                 "--teacher_use_moe", 0, "--from_teacher_weight", "teacher", "--learning_rate", 1e-4,
                 "--data_path", "../dataset/sft.jsonl")  # fmt: skip
    began = torch.load(minimind / "out" / "full_sft_64.pth")
    for weight in ("dpo", "full_dist"):
        file = minimind / "out" / f"{weight}_64.pth"
        ended = torch.load(file)
        assert set(ended) >= set(began)
        assert any(not torch.equal(began[name], ended[name]) for name in began)
        code, _, err = run("chat", file, "--tokenizer", minimind / "model", "--prompt", "1+1?", "--max-new-tokens", 4)
        assert (code, err) == (0, ""), err
