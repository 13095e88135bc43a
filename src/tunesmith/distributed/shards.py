"""Tensors in safetensors files that several processes write, each its shards.

A file's header has the first row and the whole shape of each of its shards, so files of any number of processes can be
read by any other number. A file without such a header has whole tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith.errors import TunesmithError
from tunesmith.tensors import write_tensors

_PLACES = "tunesmith_shards"


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive rows of a tensor.

    Attributes:
        start: the first row.
        shape: of the whole tensor.
    """

    tensor: Tensor
    start: int
    shape: tuple[int, ...]


def write_shards(path: Path, shards: Mapping[str, Shard]) -> None:
    """Write a safetensors file and read it back.

    Raises:
        OSError: a write was lost without an error.
    """
    places = {name: [shard.start, *shard.shape] for name, shard in shards.items()}
    write_tensors(path, {name: shard.tensor for name, shard in shards.items()}, {_PLACES: json.dumps(places)})


class StoredTensor:
    """A tensor in files, of which any rows can be read; transformers loads it like a slice of safetensors."""

    def __init__(self, name: str, shape: Sequence[int]) -> None:
        self.name, self.shape = name, torch.Size(shape)
        self._shards: list[tuple[int, int, Any]] = []

    def add(self, start: int, stop: int, file: Any) -> None:
        self._shards.append((start, stop, file))
        self._shards.sort(key=lambda shard: shard[0])

    @property
    def is_whole(self) -> bool:
        """Whether the shards have every row once."""
        if not self.shape:
            return len(self._shards) == 1
        stops = [0, *(stop for _, stop, _ in self._shards)]
        return [start for start, _, _ in self._shards] == stops[:-1] and stops[-1] == self.shape[0]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the tensor, which may share memory with a mapped file."""
        if not self.shape:
            scalar: Tensor = self._shards[0][2].get_tensor(self.name)
            return scalar
        stop = self.shape[0] if stop is None else stop
        parts = []
        for first, last, file in self._shards:
            if max(first, start) < min(last, stop):
                parts.append(file.get_slice(self.name)[max(first, start) - first : min(last, stop) - first])
        if not parts:
            first_shard = self._shards[0][2].get_slice(self.name)[0:0]
            return first_shard.reshape(0, *self.shape[1:])  # type: ignore[no-any-return]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __getitem__(self, index: Any) -> Tensor:
        rows, *others = index if isinstance(index, tuple) else (index,)
        if rows is Ellipsis or not self.shape:
            return self.read()
        start, stop, _ = rows.indices(self.shape[0])
        return self.read(start, max(start, stop))[(slice(None), *others)]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return str(self._shards[0][2].get_slice(self.name).get_dtype())


class ShardFiles(Mapping[str, StoredTensor]):
    """The tensors of several files, by name; nothing is read before it is asked for.

    Raises:
        TunesmithError: rows of a tensor are missing.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        for path in paths:
            opened: Any = safe_open(path, "pt")
            file = opened.__enter__()  # mapped until nothing refers to it
            places = json.loads((file.metadata() or {}).get(_PLACES, "{}"))
            for name in file.keys():  # noqa: SIM118  # not a dict
                own = file.get_slice(name).get_shape()
                start, *shape = places.get(name, [0, *own])
                stored = self._tensors.setdefault(name, StoredTensor(name, shape))
                stored.add(start, start + (own[0] if own else 1), file)
        if lacking := [name for name, stored in self._tensors.items() if not stored.is_whole]:
            raise TunesmithError(
                f"{paths[0].parent}: rows of {lacking[0]} are missing. The folder is not complete; use another "
                "checkpoint.",
                code="shards-incomplete",
            )

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
