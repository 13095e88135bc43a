"""Keys and values of rows: one row's own while its prompt is read, then a place on a shelf with rows of like length.

A shelf holds its rows in one tensor per layer, so that a decoding step attends to all of them in one call. Shelves come
in sizes (256, 512, 1,024 ... tokens): a long row makes neither the memory nor the attention of short rows larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST = 256  # tokens


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys and values of a token in one layer: [heads, key_dim] and [heads, value_dim]."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_a_token(self) -> int:
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(slots=True)
class Layout:
    """The attention modules of a model in the order in which they run, and their shapes."""

    index: dict[nn.Module, int] = field(default_factory=dict)
    shapes: list[LayerShape] = field(default_factory=list)

    def add(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Note a module by keys and values as it computes them: [1, heads, tokens, dim]."""
        assert module not in self.index, "an attention module runs once in a forward"
        self.index[module] = len(self.shapes)
        self.shapes.append(LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device))

    @property
    def bytes_a_token(self) -> int:
        return sum(shape.bytes_a_token for shape in self.shapes)


class RowCache:
    """Keys and values of one row: per layer [heads, capacity, dim]."""

    def __init__(self, layout: Layout, capacity: int) -> None:
        self.capacity = capacity
        self.num_bytes = capacity * layout.bytes_a_token
        self.keys: list[Tensor] = [_empty(shape, shape.key_dim, shape.heads, capacity) for shape in layout.shapes]
        self.values: list[Tensor] = [_empty(shape, shape.value_dim, shape.heads, capacity) for shape in layout.shapes]

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]

    def copy_from(self, source: Sequence[tuple[Tensor, Tensor]], length: int) -> None:
        """Take the first tokens of another row's keys and values."""
        for layer, (keys, values) in enumerate(source):
            self.keys[layer][:, :length] = keys[:, :length]
            self.values[layer][:, :length] = values[:, :length]


class Shelf:
    """Keys and values of rows of like length: per layer [places, heads, capacity, dim]; `rows` take the first places.

    Memory beyond a row's length is zero or finite, never nan: attention multiplies it by a weight of 0.
    """

    def __init__(self, layout: Layout, capacity: int) -> None:
        self.capacity, self.places = capacity, 0
        self.rows: list[Any] = []
        self._layout = layout
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def bytes_a_place(self) -> int:
        return self.capacity * self._layout.bytes_a_token

    @property
    def num_bytes(self) -> int:
        return self.places * self.bytes_a_place

    def resize(self, places: int) -> None:
        """Have this many places, at least those in use; layer by layer, so that one layer at a time is there twice."""
        assert places >= len(self.rows)
        if not self.keys:
            shapes = self._layout.shapes
            self.keys = [_empty(shape, shape.key_dim, places, shape.heads, self.capacity) for shape in shapes]
            self.values = [_empty(shape, shape.value_dim, places, shape.heads, self.capacity) for shape in shapes]
        else:
            for kind in (self.keys, self.values):
                for layer, old in enumerate(kind):
                    kind[layer] = torch.zeros(places, *old.shape[1:], dtype=old.dtype, device=old.device)
                    kind[layer][: len(self.rows)] = old[: len(self.rows)]
        self.places = places

    def add(self, row: Any, source: Sequence[tuple[Tensor, Tensor]], length: int) -> None:
        """Put a row with its keys and values on the first free place."""
        place = len(self.rows)
        assert place < self.places
        for layer, (keys, values) in enumerate(source):
            self.keys[layer][place, :, :length] = keys[:, :length]
            self.values[layer][place, :, :length] = values[:, :length]
        self.rows.append(row)

    def of(self, row: Any) -> list[tuple[Tensor, Tensor]]:
        """A row's keys and values, each [heads, capacity, dim]."""
        place = self.rows.index(row)
        return [(keys[place], values[place]) for keys, values in zip(self.keys, self.values, strict=True)]

    def remove(self, row: Any, is_damaged: bool = False) -> None:
        """Take a row off; the last one takes its place."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if place != last:
            length = self.rows[last].computed
            for kind in (self.keys, self.values):
                for tensor in kind:
                    tensor[place, :, :length] = tensor[last, :, :length]
                    if is_damaged:
                        tensor[place, :, length:] = 0
        elif is_damaged:
            for tensor in (*self.keys, *self.values):
                tensor[place] = 0
        self.rows[place] = self.rows[last]
        self.rows.pop()


def _empty(shape: LayerShape, dim: int, *sizes: int) -> Tensor:
    return torch.zeros(*sizes, dim, dtype=shape.dtype, device=shape.device)


def size_of_shelf(tokens: int, longest: int) -> int:
    """Capacity of the smallest shelf that holds so many tokens; the largest one holds exactly `longest`."""
    size = _SMALLEST
    while size < tokens:
        size *= 2
    return min(size, max(longest, tokens))
