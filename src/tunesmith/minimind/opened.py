"""A .pth as a Hugging Face folder, made for this process: everything that opens models reads it from there."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.display import format_bytes
from tunesmith.errors import ModelError, RunError, TunesmithError
from tunesmith.files import is_no_room, system_error
from tunesmith.minimind.names import Shape, from_minimind
from tunesmith.minimind.read import find_shape, read_tensors
from tunesmith.minimind.settings import Settings, find_settings
from tunesmith.staging import locked
from tunesmith.tensors import find_not_finite, write_tensors

_PREFIX = "tunesmith-pth-"
_YOUNG_S = 600.0


@dataclass(frozen=True, slots=True)
class Opened:
    """A file under transformers' names.

    Attributes:
        folder: config.json and model.safetensors; removed when the process ends.
    """

    file: Path
    folder: Path
    shape: Shape
    settings: Settings

    def describe(self) -> str:
        """Generation, sizes, and what was assumed."""
        kind = f"a mixture of {self.shape.experts} experts, " if self.shape.experts else ""
        text = f"MiniMind {self.shape.generation.removeprefix('minimind-')}, {kind}hidden_size {self.shape.hidden}, "
        text += f"{self.shape.layers} layers, as {self.settings.model_type}"
        if not self.settings.assumed:
            return text
        assumed = ", ".join(f"{name} {value:g}" for name, value in self.settings.assumed.items())
        return f"{text}; not in the file, so MiniMind's own: {assumed} (model.config.* sets them)"


_opened: dict[tuple[Any, ...], Opened] = {}
_ended = contextlib.ExitStack()
atexit.register(_ended.close)


def open_weights(file: Path, given: Mapping[str, Any]) -> Opened:
    """Convert a file, once a process.

    Args:
        given: model.config, for what the file does not say.

    Raises:
        ModelError, ConfigError: it is not a file of MiniMind, or the given fields do not fit it.
        RunError: no room in the folder for temporary files.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}.", code="file-unreadable") from None
    key = (str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ino, repr(sorted(given.items())))
    if key not in _opened:
        state = read_tensors(file)
        shape = find_shape(file, state)
        _require_finite(file, state)
        is_tied = _is_tied(state)
        settings = find_settings(file, shape, given, is_tied)
        values = settings.values
        turned = from_minimind(state, shape, values["num_attention_heads"], values["num_key_value_heads"], is_tied)
        _opened[key] = Opened(file, _write(file, turned, settings), shape, settings)
    return _opened[key]


def _is_tied(state: Mapping[str, Tensor]) -> bool:
    embedding = state.get("model.embed_tokens.weight", state.get("tok_embeddings.weight"))
    head = state.get("lm_head.weight", state.get("output.weight"))
    return head is None or (embedding is not None and torch.equal(embedding, head))


def _require_finite(file: Path, state: Mapping[str, Tensor]) -> None:
    if name := find_not_finite(state):
        raise ModelError(
            f"{file}: {name} has NaN or infinite values; its training failed, or half precision could not hold it. "
            "Give an earlier file.",
            code="pth-not-finite",
        )


def _write(file: Path, state: Mapping[str, Tensor], settings: Settings) -> Path:
    from transformers import AutoConfig

    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    config = AutoConfig.for_model(settings.model_type, **settings.values, dtype=dtype)
    size = sum(tensor.nbytes for tensor in state.values())
    _remove_abandoned(Path(tempfile.gettempdir()))
    own = contextlib.ExitStack()
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        own.callback(_remove, folder, os.getpid())
        own.enter_context(locked(folder))
        write_tensors(folder / "model.safetensors", _stored_apart(state), {"format": "pt"})
        config.architectures = [_ARCHITECTURES[settings.model_type]]
        config.save_pretrained(folder)
    except BaseException as error:
        own.close()
        refused = system_error(error)
        if refused is None:
            raise
        reason = "no space left on the disk" if is_no_room(error) else refused.strerror or str(refused)
        raise RunError(
            f"{file}: {tempfile.gettempdir()}, the folder for temporary files, cannot hold its {format_bytes(size)} "
            f"under transformers' names: {reason}. Set TMPDIR to a folder with room.",
            code="no-temporary-room",
        ) from None
    _ended.push(own)
    return folder


def _remove(folder: Path, maker: int) -> None:
    """Delete a folder, unless this process is a fork of its maker, which still reads from it."""
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)


def _stored_apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors need them: a file may hold one tensor under several names."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        own = tensor.contiguous()
        if own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip


def _remove_abandoned(parent: Path) -> None:
    """Delete folders of killed processes; those of running ones are locked."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, TunesmithError):
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or folder in {o.folder for o in _opened.values()}:
                continue  # the folder for temporary files is everybody's: a pipe of that name would block
            if time.time() - status.st_mtime < _YOUNG_S:
                continue  # another process has just made it, and not locked it yet
            with locked(folder, required=True):
                shutil.rmtree(folder, ignore_errors=True)
