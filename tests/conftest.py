"""Shared fixtures: tiny real models, tokenizers and files. Nothing is mocked or downloaded."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # train.precision auto is fp32 on every CPU

import pytest
import torch
import transformers

from tunesmith.cli import main, run_command
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import TunesmithError
from tunesmith.model.bpe import train_tokenizer
from tunesmith.model.isolation import Isolation, probe_isolation, use_packed_attention
from tunesmith.model.probe import probe_model
from tunesmith.model.tokenizer import build_encoder
from tunesmith.report import replies

NUM_SAMPLES, REPLY_TOKENS = replies.NUM_SAMPLES, replies._REPLY_TOKENS

SHARED = Path(__file__).resolve().parents[2] / "shared"
WORDS = (
    "the quick brown fox jumps over the lazy dog and says hello to you and me\n"
    "What is the answer? The answer is forty two. Who are you? I am a small model.\n"
    "你好，世界。春眠不觉晓，处处闻啼鸟。\n### Instruction:\n### Response:\nsystem user assistant\n"
)

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside this checkout")


@pytest.fixture(scope="session", autouse=True)
def _one_thread_pool() -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["TUNESMITH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _short_replies() -> Iterator[None]:
    """One sample reply of a few tokens in each run's report: they take longer than the runs of most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replies, "NUM_SAMPLES", 1)
        patch.setattr(replies, "_REPLY_TOKENS", 3)
        yield


@pytest.fixture
def full_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample replies as users get them, for tests of the report."""
    monkeypatch.setattr(replies, "NUM_SAMPLES", NUM_SAMPLES)
    monkeypatch.setattr(replies, "_REPLY_TOKENS", REPLY_TOKENS)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer([WORDS] * 20, vocab_size=400)


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    """A tokenizer that llama.cpp reads alike: GPT-2's expression, ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tunesmith.chat_template.template import load_built_in

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(["the quick brown fox jumps over the lazy dog, 12 34 and you"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = load_built_in("chatml", add_bos=False)
    return tokenizer


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    import copy
    import datetime

    return build_encoder(copy.deepcopy(tokenizer), None, {}, datetime.datetime(2026, 1, 2))


ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "gpt2": transformers.GPT2Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
}


def tiny_config(name: str, vocab_size: int = 400, **overrides: Any) -> Any:
    """A two-layer config of an architecture, with grouped heads where it supports them."""
    if name == "gpt2":
        values: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        values |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        values = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 64,
            "max_position_embeddings": 512,
        }
    if name in ("qwen2_moe", "qwen3_moe"):
        values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        values |= {"shared_expert_intermediate_size": 16} if name == "qwen2_moe" else {}
        values |= {"experts_implementation": "eager"}  # the default kernel does not support float64
    if name in ("gemma2", "gemma3"):
        # two layers: one sliding with a window shorter than the documents, one full
        values |= {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        }
    # larger weights than usual, so that a leak between documents is far above rounding
    values |= {
        "vocab_size": vocab_size,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return ARCHITECTURES[name](**(values | overrides))


def build_model(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    import copy

    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: Any) -> Path:
    """A small Qwen3 model with its tokenizer, as from_pretrained reads it."""
    return save_folder(tmp_path / "model", tiny_config("qwen3", initializer_range=0.02), tokenizer)


def set_up_attention(model: Any, max_seq_len: int, micro_batch_tokens: int) -> Isolation:
    """Probe packed attention, and switch the model to it if it is safe, as run/assemble.py does."""
    isolation = probe_isolation(probe_model(model), max_seq_len, micro_batch_tokens)
    if isolation.is_isolated:
        use_packed_attention(model)
    return isolation


def save_folder(folder: Path, config: Any, tokenizer: Any) -> Path:
    build_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_apart(code: str, *words: object) -> str:
    """Run Python code in a process of its own, whose ru_maxrss is its own; returns its output.

    A child begins with the peak of the process that starts it, which for pytest is that of all tests before: so a
    shell starts it.
    """
    shell = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(shell, capture_output=True, text=True, check=True).stdout


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@contextmanager
def raises(kind: type[Exception], code: str, *facts: str) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expect an error of a class and a code whose message names these facts (files, rows, keys, counts)."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, caught.value  # type: ignore[attr-defined]
    for fact in facts:
        assert fact in str(caught.value)


def chat_row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def killed_after(finished: Path, step: int, to: Path) -> Path:
    """A copy of the run as a kill after the checkpoint of a step leaves it: later lines, the last one truncated."""
    shutil.copytree(finished, to)
    for name in ("model", "adapter"):
        shutil.rmtree(to / name, ignore_errors=True)
    (to / "report.html").unlink()
    for folder in (to / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    half = to / "checkpoints" / ".step-000099.0a.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with (to / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    return to


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of a given size, in tmpfs notation ("400k")."""
    folder = tmp_path / "disk"

    def make(size: str) -> Path:
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        mounted = subprocess.run(words, capture_output=True, check=False)
        if mounted.returncode:
            pytest.skip(f"mounts are not allowed here: {mounted.stderr.decode().strip()}")
        return folder

    yield make
    if folder.is_mount():
        gc.collect()  # files that a failed run mapped, whose error refers to itself
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Forty short chats."""
    rows = [chat_row(f"What is the answer {i}?", f"The answer is {i} and you.") for i in range(40)]
    return write_jsonl(tmp_path / "chats.jsonl", rows)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process; returns exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., TunesmithError]:
    """The error that ends a command, before it is printed and turned into an exit code."""

    def call(*words: object) -> TunesmithError:
        capsys.readouterr()
        with pytest.raises(TunesmithError) as caught:
            run_command([str(word) for word in words])
        return caught.value

    return call
