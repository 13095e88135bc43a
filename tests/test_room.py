"""What a run says about the room that it needs is what it then writes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import save_folder, tiny_config
from tunesmith.run import start
from tunesmith.run.folder import measure

Run = Callable[..., tuple[int, str, str]]
FAST = ["--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--train.max_steps", 2]
LORA = ["--lora.kind", "lora", "--lora.rank", 8]
TOKENS = ["--model.add_tokens", "<one>", "<two>"]
KINDS: dict[str, list[Any]] = {
    "full": [],
    "full, tokens": TOKENS,
    "bf16": ["--train.precision", "bf16_pure"],
    "8-bit averages": ["--optim.name", "adamw_8bit"],
    "lora": LORA,
    "lora, tokens": [*LORA, *TOKENS],
    "lora, whole head": [*LORA, "--lora.modules_to_save", "lm_head"],
    "pissa": ["--lora.kind", "pissa", "--lora.rank", 8],
    "dora": ["--lora.kind", "dora", "--lora.rank", 8, "--lora.bias", "all"],
    "qlora": [*LORA, "--lora.quantize", "nf4"],
}

QUICK = ["full, tokens", "lora", "qlora"]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def wide(tmp_path: Path, tokenizer: Any) -> Path:
    """Wide enough for 8-bit averages; embedding and head are one weight."""
    config = tiny_config("qwen3", hidden_size=64, intermediate_size=256, tie_word_embeddings=True)
    return save_folder(tmp_path / "wide", config, tokenizer)


def train(run: Run, monkeypatch: pytest.MonkeyPatch, output: Path, *words: Any) -> Any:
    """What was measured before the run."""
    said: list[Any] = []

    def keep(path: Path, ready: Any) -> str:
        said.append(measure(ready, path))
        return real(path, ready)

    real = start.require_room
    monkeypatch.setattr(start, "require_room", keep)
    code, out, err = run("train", "--output", output, *FAST, *words)
    assert code == 0, err
    assert re.search(r"checkpoints of about [\d.]+ [KMG]iB each", out)
    assert not list(output.rglob(".size*"))
    return said[0]


def is_right(size: Any, output: Path) -> None:
    assert size.checkpoint == pytest.approx(size_of(output / "checkpoints" / "step-000002"), rel=0.05)
    saved = output / ("model" if (output / "model").is_dir() else "adapter")
    assert size.model == pytest.approx(size_of(saved), rel=0.05)


@pytest.mark.parametrize("kind", KINDS if os.environ.get("TUNESMITH_LONG") else QUICK)
def test_the_size_is_what_is_written(
    run: Run, wide: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if "adamw_8bit" in KINDS[kind] or "nf4" in KINDS[kind]:
        pytest.importorskip("bitsandbytes")
    output = tmp_path / "run"
    is_right(train(run, monkeypatch, output, "--model", wide, "--data", chats, *KINDS[kind]), output)


CODE = """from transformers import Qwen3Config, Qwen3ForCausalLM


class MyConfig(Qwen3Config):
    model_type = "mine"


class MyModel(Qwen3ForCausalLM):
    config_class = MyConfig
"""


def test_code_of_the_model_counts(
    run: Run, wide: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied code may be larger than the weights of an adapter."""
    (wide / "mine.py").write_text(CODE + "# many lines\n" * 50_000)
    config = json.loads((wide / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mine", "architectures": ["MyModel"]}
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (wide / "config.json").write_text(json.dumps(config), encoding="utf-8")
    output = tmp_path / "run"
    words = ["--model", wide, "--data", chats, "--model.trust_remote_code", "true"]
    is_right(train(run, monkeypatch, output, *words), output)
    assert (output / "model" / "mine.py").stat().st_size > 600_000
