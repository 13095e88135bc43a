"""A checkout of MiniMind, copied to a work folder: its generation, its model class, and its scripts as commands.

Four layouts are known: `first` (2024, `model/model.py` with Transformer), `2024` (MiniMindLM), `2025` (Hugging Face
names) and `minimind-3`. Nothing in the checkout is changed.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEFT_OUT = shutil.ignore_patterns(".git", "images", "out", "checkpoints", "*.jsonl", "*.pth", "__pycache__")


@dataclass(frozen=True, slots=True)
class Checkout:
    """A copy of a checkout.

    Attributes:
        kind: first, 2024, 2025 or minimind-3.
        trainer, chat, server: scripts, relative to the folder; "" where there is none that takes sizes as flags.
    """

    folder: Path
    kind: str
    tokenizer: Path
    trainer: str
    chat: str
    server: str

    @property
    def generation(self) -> str:
        """As `tunesmith export --generation` names it."""
        return "2024" if self.kind == "first" else self.kind

    @property
    def out(self) -> Path:
        return self.folder / "out"


def find_kind(folder: Path) -> str:
    """Exits where the folder is not a checkout."""
    newer, older = folder / "model" / "model_minimind.py", folder / "model" / "model.py"
    if newer.is_file():
        return "minimind-3" if "q_norm" in newer.read_text(encoding="utf-8") else "2025"
    if older.is_file():
        text = older.read_text(encoding="utf-8")
        for name, kind in (("class MiniMindLM", "2024"), ("class Transformer", "first")):
            if name in text:
                return kind
    sys.exit(
        f"{folder}: is not a checkout of MiniMind: it has neither model/model_minimind.py nor model/model.py with "
        "MiniMindLM or Transformer. Clone https://github.com/jingyaogong/minimind and give its folder."
    )


def copy_checkout(source: Path, work: Path) -> Checkout:
    """Copy the scripts and the tokenizer, without weights and data."""
    kind = find_kind(source)
    folder = work / "minimind"
    shutil.rmtree(folder, ignore_errors=True)

    def left_out(place: str, names: list[str]) -> set[str]:
        own = {name for name in names if Path(place, name) == work}  # a work folder inside the checkout
        return own | LEFT_OUT(place, names)

    shutil.copytree(source.absolute(), folder, ignore=left_out)
    (folder / "out").mkdir()
    old = folder / "model" / "minimind_tokenizer"
    tokenizer = old if old.is_dir() else folder / "model"
    if not (tokenizer / "tokenizer.json").is_file():
        sys.exit(f"{source}: has no tokenizer ({tokenizer.relative_to(folder)}/tokenizer.json). Clone it again.")
    names = ("trainer/train_full_sft.py", "train_full_sft.py"), ("eval_llm.py", "eval_model.py")
    trainer, chat = (next((name for name in pair if (folder / name).is_file()), "") for pair in names)
    server = "scripts/serve_openai_api.py"
    return Checkout(folder, kind, tokenizer, trainer, chat, server if (folder / server).is_file() else "")


def build(checkout: Checkout, hidden: int | None, layers: int | None, is_moe: bool) -> Any:
    """A model of the checkout's own class; None means its default size."""
    if str(checkout.folder) not in sys.path:
        sys.path.insert(0, str(checkout.folder))
    is_old = checkout.generation == "2024"
    names = ("dim", "n_layers") if is_old else ("hidden_size", "num_hidden_layers")
    sizes = {name: value for name, value in zip(names, (hidden, layers), strict=True) if value}
    if is_old:
        config = importlib.import_module("model.LMConfig").LMConfig(**sizes, use_moe=is_moe)
        module = importlib.import_module("model.model")
        return (module.Transformer if checkout.kind == "first" else module.MiniMindLM)(config).eval()
    module = importlib.import_module("model.model_minimind")
    return module.MiniMindForCausalLM(module.MiniMindConfig(**sizes, use_moe=is_moe)).eval()


def width_of(model: Any) -> int:
    return int(getattr(model.config, "hidden_size", 0) or model.params.dim)


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """Weights with which every part matters: MiniMind's own start is near 0, where models hardly differ."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.copy_(1 + 0.1 * torch.randn_like(weight))
        else:
            weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)


@torch.no_grad()
def log_probs(checkout: Checkout | None, model: Any, ids: Tensor) -> Tensor:
    """[length, vocabulary] for ids [length]; without a checkout the model is of transformers."""
    is_first = checkout is not None and checkout.kind == "first"
    out = (
        model(ids[None], ids[None]) if is_first else model(ids[None])
    )  # the first one gives all positions with targets
    return torch.log_softmax(out.logits[0].float(), -1)


def run_script(
    checkout: Checkout, script: str, flags: Mapping[str, object], above: Sequence[Path] = (), given: str = ""
) -> str:
    """Run a script of the checkout in its own folder with the flags that it has; returns what it printed.

    Args:
        above: folders for PYTHONPATH.
        given: standard input.
    """
    line = script_line(checkout, script, flags)
    place = (checkout.folder / script).parent
    done = subprocess.run(
        line, cwd=place, env=environment(above), input=given, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(line[1:])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}")
    return done.stdout


def script_line(checkout: Checkout, script: str, flags: Mapping[str, object]) -> list[str]:
    path = checkout.folder / script
    text = path.read_text(encoding="utf-8")
    line = [sys.executable, path.name]
    for flag, value in flags.items():
        if f"{flag}'" in text or f'{flag}"' in text:
            line += [flag, str(value)]
    return line


def environment(above: Sequence[Path] = ()) -> dict[str, str]:
    """That of this process: CPU only, and without a network for models and data."""
    paths = [str(path) for path in above] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return found | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def size_flags(model: Any, is_moe: bool) -> dict[str, object]:
    """The flags of a size, under every name that a script has had for them."""
    config = model.params if hasattr(model, "params") else model.config
    hidden, layers = width_of(model), getattr(config, "num_hidden_layers", None) or config.n_layers
    flags: dict[str, object] = {
        "--hidden_size": hidden, "--dim": hidden, "--num_hidden_layers": layers, "--n_layers": layers, "--device": "cpu",
    }  # fmt: skip
    return flags | ({"--use_moe": 1} if is_moe else {})


def make_work(name: str | None) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """The work folder, and what keeps it until the end where it is temporary."""
    if name is None:
        held = tempfile.TemporaryDirectory(prefix="minimind-")
        return Path(held.name), held
    work = Path(name).absolute()
    work.mkdir(parents=True, exist_ok=True)
    return work, None
