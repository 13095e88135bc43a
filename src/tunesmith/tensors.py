"""Write safetensors files and verify them: each tensor is read back and compared bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.files import lost_write

_GROUP = 2**27  # bytes that are read back together
_PART = 2**22  # numbers that are looked at together: isfinite takes seven bytes for each


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file and read it back.

    Raises:
        OSError: a write was lost without an error.
    """
    save_file(dict(tensors), path, dict(metadata) if metadata else None)
    if require_tensors(path, tensors) != set(tensors):
        raise lost_write(path)


def require_tensors(path: Path, meant: Mapping[str, Tensor]) -> set[str]:
    """Compare the tensors in `meant` with those in a file; returns all names in the file.

    Raises:
        OSError: a tensor differs from what was written.
    """
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    for group in _groups({name: meant[name] for name in sorted(names & set(meant))}):
        if not _has_tensors(path, {name: meant[name] for name in group}):
            raise lost_write(path)
    return names


def _has_tensors(path: Path, meant: Mapping[str, Tensor]) -> bool:
    """Whether a file has these values; opened anew for it: what is read stays in memory until the file is closed."""
    try:
        with safe_open(path, "pt") as file:
            return all(is_same_bits(file.get_tensor(name), tensor) for name, tensor in meant.items())
    except SafetensorError:  # replaced meanwhile
        return False


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors that have _GROUP bytes together, or more by the last of them."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        group.append(name)
        size += tensor.numel() * tensor.element_size()
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def is_same_bits(one: Tensor, other: Tensor) -> bool:
    """Like torch.equal, but NaN equals itself and 0 differs from -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


def find_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name of a tensor with NaN or infinite values; "" if all are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all(map(_is_finite, tensor.detach().reshape(-1).split(_PART))):
            return name
    return ""


def _is_finite(part: Tensor) -> bool:
    return bool(torch.isfinite(part.float() if part.element_size() == 1 else part).all())  # not there for all of 8 bits
