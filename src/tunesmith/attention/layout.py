"""The layout of a batch as attention kernels need it, made once a batch on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tunesmith.plans.tree import Tree

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
BLOCK = 128  # queries and keys of one block of FlexAttention's mask
# window, softcap?, sinks?, head_dim, dtype: layers that are alike in these use the same kernels
LayerKind = tuple[int | None, bool, bool, int, torch.dtype]


class Consecutive(Protocol):
    """Documents of a pack, or strands of prefix trees (`Tree`)."""

    @property
    def lens(self) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Kernels of a run.

    Attributes:
        kernels: for each kind of layer, names in order of preference; the loop over documents is always the last.
    """

    kernels: Mapping[LayerKind, tuple[str, ...]] = field(default_factory=dict)

    def uses(self, name: str) -> bool:
        return any(name in names for names in self.kernels.values())

    def flex_windows(self, is_tree: bool) -> set[int | None]:
        """Windows of the layers that will use FlexAttention."""
        found = (kind[0] for kind, names in self.kernels.items() if "flex" in (names if is_tree else names[:1]))
        return set(found)


LOOP_ONLY = AttentionPlan()


class PackedLayout:
    """A class rather than a dataclass, so that torch.compile guards only what a layer reads.

    Attributes:
        source: the documents or trees.
        sizes: int64 on the CPU, their lengths and then zeros, for the loop as one operation.
        cu_seqlens: int32 on the device, where each document begins, and the end; the end is repeated up to a size that
            does not change with each batch. None where no layer uses varlen.
        max_len: at least the longest document; rounded up to a power of two.
        masks: FlexAttention's block masks by window.
        spans: what the masks read, on the device.
        recorder: during the check at start, gets what each layer asks for; see choose.py.
    """

    __slots__ = ("cu_seqlens", "masks", "max_len", "plan", "recorder", "sizes", "source", "spans")

    def __init__(self, source: Consecutive, plan: AttentionPlan = LOOP_ONLY) -> None:
        self.source, self.plan = source, plan
        lens = source.lens
        self.sizes = torch.zeros(_padded(len(lens)), dtype=torch.int64)
        self.sizes[: len(lens)] = torch.tensor(lens)
        self.cu_seqlens: Any = None
        self.max_len = 0
        self.masks: dict[int | None, BlockMask] = {}
        self.spans: tuple[Tensor, ...] = ()
        self.recorder: Any = None

    def tensors(self) -> Iterator[Tensor]:
        """All that are on the device."""
        yield from self.spans
        if self.cu_seqlens is not None:
            yield self.cu_seqlens
        for mask in self.masks.values():
            yield from (value for value in mask.as_tuple() if isinstance(value, Tensor))

    @property
    def lens(self) -> list[int]:
        return self.source.lens

    @property
    def is_tree(self) -> bool:
        return isinstance(self.source, Tree)


def make_layout(source: Consecutive, device: torch.device, plan: AttentionPlan) -> PackedLayout:
    """The layout of a batch; nothing of it makes the host wait for the device."""
    layout = PackedLayout(source, plan)
    if plan.uses("varlen") and not layout.is_tree:
        layout.cu_seqlens = to_device(cu_seqlens_of(source.lens), device)
        layout.max_len = _power_of_two(max(source.lens), 16)
    if windows := plan.flex_windows(layout.is_tree):
        ends, depths = spans_of(source)
        on_device = to_device(ends, device), to_device(depths, device)
        layout.spans = on_device
        layout.masks = {window: _block_mask(ends, depths, window, *on_device) for window in windows}
    return layout


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def cu_seqlens_of(lens: Sequence[int]) -> npt.NDArray[np.int32]:
    """0, the ends of the documents, and the last end again: documents of no tokens."""
    bounds = np.cumsum([0, *lens])
    return np.pad(bounds, (0, _padded(len(bounds)) - len(bounds)), mode="edge").astype(np.int32)


def _padded(number: int) -> int:
    """At least `number`: few sizes for many batches. Odd, or torch.compile could take it for that of a head."""
    return 1 + _power_of_two(number - 1, 32)


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def spans_of(source: Consecutive) -> tuple[Ints, Ints]:
    """For each token, the end of what may see it, and its depth in its document or tree.

    A token k is seen by q where k <= q < end[k]: by the rest of its document, or by what descends from it, since the
    tokens of a tree lie in preorder.
    """
    if isinstance(source, Tree):
        return source.spans()
    lens = source.lens
    bounds = np.cumsum([0, *lens])
    return np.repeat(bounds[1:], lens), np.arange(bounds[-1]) - np.repeat(bounds[:-1], lens)


def _block_mask(
    ends: Ints, depths: Ints, window: int | None, ends_on_device: Tensor, depths_on_device: Tensor
) -> BlockMask:
    """FlexAttention's mask, from which blocks see which; it would find that by computing the whole mask."""
    partial, full = classify_blocks(ends, depths, window)
    device, length, width = ends_on_device.device, len(ends), window or 0

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends_on_device[k])

    def sees_in_window(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(batch, head, q, k) & (depths_on_device[q] - depths_on_device[k] < width)

    some, every = ([to_device(array, device) for array in _list_blocks(blocks)] for blocks in (partial, full))
    mask: BlockMask = BlockMask.from_kv_blocks(
        some[0], some[1], every[0], every[1], BLOCK_SIZE=BLOCK,
        mask_mod=sees_in_window if window else sees, seq_lengths=(length, length),
    )  # fmt: skip
    return mask


def classify_blocks(ends: Ints, depths: Ints, window: int | None) -> tuple[Bools, Bools]:
    """[query blocks, key blocks]: which see each other in part (at most), and which wholly."""
    starts = np.arange(0, len(ends), BLOCK)
    stops = np.minimum(starts + BLOCK, len(ends))
    is_below = starts[:, None] > starts[None]
    some = np.maximum.reduceat(ends, starts)[None] > starts[:, None]
    every = np.minimum.reduceat(ends, starts)[None] >= stops[:, None]
    some, every = some & (is_below | np.eye(len(starts), dtype=bool)), every & is_below
    if window is not None:
        least, most = np.minimum.reduceat(depths, starts), np.maximum.reduceat(depths, starts)
        some &= least[:, None] - most[None] < window
        every &= most[:, None] - least[None] < window
    every &= (stops - starts == BLOCK)[:, None]  # a last, shorter block is masked token by token
    return some & ~every, every


def _list_blocks(blocks: Bools) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """[1, 1, query blocks] counts, and [1, 1, query blocks, key blocks] numbers, the visible ones first."""
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return blocks.sum(1, dtype=np.int32)[None, None], order[None, None]
