"""Read a .pth of MiniMind: its tensors without running code, its generation and its sizes."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.config.schema import PTH_SUFFIXES
from tunesmith.errors import ModelError
from tunesmith.minimind.names import Shape, expected_shapes, rename_old
from tunesmith.reading import open_file

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_BUFFERS = re.compile(r"(.*\.)?(pos_cis|freqs_cis|freqs_cos|freqs_sin|mask|rotary_emb\.inv_freq)")
_LORA = ".lora."
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_weight_file(path: Path) -> bool:
    """Whether a name is that of a file in torch's own format."""
    return path.name.lower().endswith(PTH_SUFFIXES) and not path.is_dir()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name; buffers that are computed anew are left out.

    Raises:
        ModelError: it is damaged, holds anything but tensors, or code.
    """
    content = _load(path)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping) and "optimizer" in content:
        content = content["model"]  # {weight}_resume.pth: the state of a training
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        raise ModelError(
            f"{path}: holds no tensors by name ({type(content).__name__}), so it is not a state dict of MiniMind. Give "
            "the .pth that its training saved (out/full_sft_512.pth).",
            code="pth-not-weights",
        )
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        name = key
        while name.startswith(_WRAPPERS):
            name = name.removeprefix(_WRAPPERS[0]).removeprefix(_WRAPPERS[1])
        if _BUFFERS.fullmatch(name):
            continue
        if kind := _odd_kind(value):
            raise ModelError(
                f"{path}: {key} is {kind}, not a tensor of weights. Give the .pth that MiniMind's training saved.",
                code="pth-not-weights",
            )
        if name in state:
            raise ModelError(
                f"{path}: has {name} twice, as {key} too. Save the state dict of one model.", code="pth-not-weights"
            )
        state[name] = value.detach()
    return state


def _odd_kind(value: Any) -> str:
    """What an entry is instead of a plain tensor of weights; "" if it is one."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.dtype not in _DTYPES:
        return str(value.dtype).removeprefix("torch.")
    if value.is_meta:
        return "on the meta device, without values"
    return "" if value.layout == torch.strided and not value.is_nested else "a sparse or nested tensor"


def _load(path: Path) -> Any:
    """Raises:
    ModelError: the file cannot be read as tensors.
    """
    try:
        open_file(path).close()  # a pipe would block
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}.", code="file-unreadable") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
            raise ModelError(
                f"{path}: holds Python objects besides tensors, which could run code when they are opened; it is "
                "refused. Save only the state dict: torch.save(model.state_dict(), FILE).",
                code="pth-has-code",
            ) from None
        raise _damaged(path) from None
    except MemoryError:
        raise
    except Exception:  # torch raises various classes for damaged files
        raise _damaged(path) from None


def _damaged(path: Path) -> ModelError:
    return ModelError(
        f"{path}: is not a whole file of torch.save: truncated, damaged, or of another kind. Copy or save it again.",
        code="pth-damaged",
    )


def lora_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of LoRA layers."""
    return [name for name in state if _LORA in name]


def find_shape(path: Path, state: Mapping[str, Tensor]) -> Shape:
    """Generation and sizes; every tensor is one that they need, in its shape.

    Raises:
        ModelError: it is a file of another project, of LoRA matrices, or incomplete.
    """
    if lora := lora_names(state):
        advice = f"To open it: tunesmith export {path} --base full_sft_512.pth --format hf --output ADAPTER"
        if len(lora) < len(state):
            advice = "Save the model without them, or merged with them."
        raise ModelError(f"{path}: holds LoRA matrices ({lora[0]}). {advice}", code="pth-is-lora")
    shape = _guess(state)
    if shape is None:
        raise _foreign(path, state, "")
    expected = expected_shapes(shape)
    unknown = sorted(set(state) - set(expected))
    # a tied head may be left out
    missing = sorted(set(expected) - set(state) - {"lm_head.weight", "output.weight"})
    if unknown or missing:
        said = [f"{verb} {_few(names)}" for verb, names in (("has", unknown), ("lacks", missing)) if names]
        raise _foreign(path, state, f" As a file of generation {shape.generation} it {' and '.join(said)}.")
    for name, tensor in state.items():
        if tuple(tensor.shape) != expected[name]:
            raise ModelError(
                f"{path}: {name} is {list(tensor.shape)}; by the other tensors it should be {list(expected[name])}. "
                "The file is damaged, or of another project.",
                code="pth-wrong-shapes",
            )
    return shape


def _few(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _foreign(path: Path, state: Mapping[str, Tensor], more: str) -> ModelError:
    names = ", ".join(sorted(state)[:3])
    return ModelError(
        f"{path}: is not a model of MiniMind (it begins with {names}).{more} Of other projects, give the folder with "
        "config.json and safetensors that their export writes.",
        code="pth-of-another-project",
    )


def _guess(state: Mapping[str, Tensor]) -> Shape | None:
    """Sizes by the tensors of the first layer; None if one that every generation has is missing."""
    is_old = "tok_embeddings.weight" in state
    named = {rename_old(name) if is_old else name: tensor for name, tensor in state.items()}
    layers = {int(found[1]) for name in named if (found := re.match(r"model\.layers\.([0-9]{1,9})\.", name))}
    try:
        embedding = named["model.embed_tokens.weight"]
        prefix = "model.layers.0."
        first = {name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)}
        q_size, kv_size = len(first["self_attn.q_proj.weight"]), len(first["self_attn.k_proj.weight"])
        counts = {
            kind: len({name.split(".")[2] for name in first if name.startswith(f"mlp.{kind}.")})
            for kind in ("experts", "shared_experts")
        }
        mlp = "mlp.experts.0." if counts["experts"] else "mlp."
        inner = len(first[f"{mlp}gate_proj.weight"])
        vocab, hidden = embedding.shape
        norm = first.get("self_attn.q_norm.weight")
        head_dim = 0 if norm is None else len(norm)
    except (KeyError, ValueError, TypeError):  # TypeError: a tensor without dimensions
        return None
    if min(vocab, hidden, q_size, kv_size, inner) < 1 or (norm is not None and not 1 <= head_dim <= kv_size):
        return None
    generation = "2024" if is_old else "2025" if norm is None else "minimind-3"
    return Shape(
        generation, vocab, hidden, len(layers), head_dim, q_size, kv_size, inner,
        counts["experts"], counts["shared_experts"],
    )  # fmt: skip
