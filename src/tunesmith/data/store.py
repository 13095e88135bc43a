"""Token store: all samples on disk, written once in order, read through memory maps.

A store is a folder with these files:
    tokens-00000.bin (uint32), loss_mask-00000.bin (uint8): samples one after another, in shards of SHARD_TOKENS tokens
        or a little more; a sample is never divided
    offsets.npy, num_targets.npy, file_numbers.npy, row_numbers.npy: the index, one entry a sample
    store.json: the names for the file numbers, and the tokens of each shard

Earlier versions wrote one tokens.bin and one loss_mask.bin, with the index in index.npz and the names in files.json;
`open_store` reads these too.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.files import lost_write, require_written, sync_path, write_bytes
from tunesmith.reading import open_file, read_text

SHARD_TOKENS = 1 << 24  # 64 MiB of ids
RECORD = "store.json"
_OLD_INDEX = "index.npz"
INDEX: dict[str, type] = {
    "offsets": np.int64,
    "num_targets": np.int32,
    "file_numbers": np.int32,
    "row_numbers": np.int64,
}
"""Arrays of the index, and their types on disk."""

Numbers = npt.NDArray[np.int64]
NOTHING: Mapping[str, Any] = MappingProxyType({})


def shard_names(number: int) -> tuple[str, str]:
    """Files of a shard: ids and loss_mask."""
    return f"tokens-{number:05}.bin", f"loss_mask-{number:05}.bin"


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Samples by their number.

    Attributes:
        shards: ids (uint32) and loss_mask (uint8) of each shard, in order.
        shard_starts: int64 [num_shards + 1], the first token of each shard.
        offsets: int64 [num_samples + 1], where each sample starts among all tokens.
        num_targets: integer [num_samples].
        file_numbers, row_numbers: integer [num_samples], source of each sample.
    """

    shards: Sequence[tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]]
    shard_starts: Numbers
    offsets: Numbers
    num_targets: npt.NDArray[Any]
    file_numbers: npt.NDArray[Any]
    row_numbers: npt.NDArray[Any]
    files: list[str]

    def __len__(self) -> int:
        return len(self.num_targets)

    def __getitem__(self, index: int) -> Sample:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        shard = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        if start == end or shard >= len(self.shards):
            return Sample(np.zeros(0, np.uint32), np.zeros(0, np.uint8))
        tokens, loss_mask = self.shards[shard]
        first = int(self.shard_starts[shard])
        return Sample(tokens[start - first : end - first], loss_mask[start - first : end - first])

    @property
    def lengths(self) -> Numbers:
        return np.diff(self.offsets)

    def lengths_of(self, samples: Numbers) -> Numbers:
        """Tokens of these samples."""
        lengths: Numbers = self.offsets[samples + 1] - self.offsets[samples]
        return lengths

    @property
    def row_ids(self) -> Numbers:
        """A number for each sample, equal for the samples of one row."""
        ids = self.file_numbers.astype(np.int64)
        ids *= self._largest_row + 1
        ids += self.row_numbers
        return ids

    @cached_property
    def _largest_row(self) -> int:
        return int(self.row_numbers.max())

    def where(self, index: int) -> str:
        """FILE:ROW of a sample, for messages."""
        return f"{self.files[self.file_numbers[index]]}:{self.row_numbers[index]}"


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Samples one after another, as a worker sends them and a store has them.

    Attributes:
        tokens, loss_mask: of all samples together.
        lengths, num_targets, file_numbers, row_numbers: integer [num_samples].
        files: names for the file numbers.
    """

    tokens: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.uint8]
    lengths: Numbers
    num_targets: npt.NDArray[np.int32]
    file_numbers: npt.NDArray[np.int32]
    row_numbers: Numbers
    files: list[str]


class StoreWriter:
    """Append samples to a store, which is readable after the `with` block.

    The files depend on the samples and their order alone: not on how many are added at once, and not on `state`.

    Args:
        folder: new, or one that a killed process wrote to.
        state: from the last `commit` of that process; what was written after it is removed.

    Attributes:
        sha256: file name -> hash of the written bytes; set after the block, once the files have been read back.

    Raises:
        OSError: the files are not as the state has them.
    """

    def __init__(self, folder: Path, state: Mapping[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=state is not None)
        self.folder = folder
        self.sha256: dict[str, str] = dict(state["closed"]) if state else {}
        kept = state["open"] if state else {}
        for name, sha256 in self.sha256.items():
            require_written(folder / name, sha256)
        self._files: dict[str, int] = {name: number for number, name in enumerate(state["files"])} if state else {}
        self._shards: list[int] = list(state["shards"]) if state else []  # tokens of the closed ones
        self._room = SHARD_TOKENS - int(state["tokens"] if state else 0)
        self._end = sum(self._shards) + SHARD_TOKENS - self._room
        self._index = {name: _Appended(folder / f"{name}.npy", kept, _HEADER_BYTES) for name in INDEX}
        self._tokens, self._mask = (_Appended(folder / name, kept) for name in shard_names(len(self._shards)))
        if not state:
            self._index["offsets"].append(np.zeros(1, np.int64).tobytes())

    def add(self, row: LabelledRow) -> None:
        """Append the samples of a row, one by one: there may be more of them than fit in memory."""
        file_numbers, row_numbers = np.zeros(1, np.int32), np.array([row.number], np.int64)
        for sample in row.samples:
            ids, mask = np.asarray(sample.input_ids, np.uint32), np.asarray(sample.loss_mask, np.uint8)
            lengths, num_targets = np.array([len(ids)], np.int64), np.array([sample.num_targets], np.int32)
            self.add_samples(Samples(ids, mask, lengths, num_targets, file_numbers, row_numbers, [row.file]))

    def add_samples(self, samples: Samples) -> None:
        numbers = np.array([self._files.setdefault(name, len(self._files)) for name in samples.files], np.int32)
        ends = np.cumsum(samples.lengths)
        first = begin = 0
        while first < len(ends):
            last = min(len(ends), int(np.searchsorted(ends, begin + self._room)) + 1)  # the one that fills the shard
            end = int(ends[last - 1])
            self._tokens.append(samples.tokens[begin:end].astype(np.uint32, copy=False).tobytes())
            self._mask.append(samples.loss_mask[begin:end].astype(np.uint8, copy=False).tobytes())
            self._room -= end - begin
            first, begin = last, end
            if self._room <= 0:
                self._roll()
        arrays: dict[str, npt.NDArray[Any]] = {
            "offsets": self._end + ends,
            "num_targets": samples.num_targets,
            "file_numbers": numbers[samples.file_numbers] if len(numbers) else samples.file_numbers,
            "row_numbers": samples.row_numbers,
        }
        for name, array in arrays.items():
            self._index[name].append(array.astype(INDEX[name], copy=False).tobytes())
        self._end += int(ends[-1]) if len(ends) else 0

    def _roll(self) -> None:
        """Close the full shard and begin the next."""
        for appended in (self._tokens, self._mask):
            self.sha256[appended.path.name] = appended.close()
        self._shards.append(SHARD_TOKENS - self._room)
        self._room = SHARD_TOKENS
        self._tokens, self._mask = (_Appended(self.folder / name) for name in shard_names(len(self._shards)))

    def commit(self) -> dict[str, Any]:
        """Make everything so far safe against a kill or a power failure; returns the state to continue from."""
        opened = (*self._index.values(), self._tokens, self._mask)
        sync_path(self.folder)
        return {
            "closed": dict(self.sha256),
            "open": {appended.path.name: appended.sync() for appended in opened},
            "files": list(self._files),
            "shards": self._shards,
            "tokens": SHARD_TOKENS - self._room,
        }

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for appended in (self._tokens, self._mask, *self._index.values()):
                appended.abandon()

    def _finish(self) -> None:
        if self._room < SHARD_TOKENS:
            self._roll()
        for appended in (self._tokens, self._mask):  # empty
            appended.abandon()
            appended.path.unlink(missing_ok=True)
        for name, appended in self._index.items():
            self.sha256[appended.path.name] = appended.close(INDEX[name])
        record = json.dumps({"files": list(self._files), "shards": self._shards}).encode()
        self.sha256[RECORD] = write_bytes(self.folder / RECORD, record)


_HEADER_BYTES = 128


def _header(dtype: type, length: int) -> bytes:
    """The beginning of an .npy file, of a fixed size, so that it can be written last."""
    text = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(text, fields)
    assert text.tell() == _HEADER_BYTES
    return text.getvalue()


class _Appended:
    """A growing file, and the hash of the bytes written after its header.

    Not `ndarray.tofile`, which silently drops data when the disk is full and continues once there is room again.

    Args:
        kept: file name -> (length, hash) of what an earlier process wrote; the file continues after that.
        header: bytes at the beginning that `close` writes.
    """

    def __init__(self, path: Path, kept: Mapping[str, Sequence[Any]] = NOTHING, header: int = 0) -> None:
        self.path, self._header = path, header
        self._digest = hashlib.sha256()
        length, sha256 = kept.get(path.name, (header, ""))
        self._file = path.open("r+b" if sha256 else "wb")
        if not sha256:
            self._file.write(bytes(header))
            return
        self._file.seek(header)
        left = length - header
        while left and (piece := self._file.read(min(left, 1 << 20))):
            self._digest.update(piece)
            left -= len(piece)
        if left or self._digest.hexdigest() != sha256:
            self._file.close()
            raise lost_write(path)
        self._file.seek(length)
        self._file.truncate()

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def sync(self) -> tuple[int, str]:
        """Bring what was written to the disk; returns the length of the file and the hash."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell(), self._digest.hexdigest()

    def close(self, dtype: type | None = None) -> str:
        """Read the file back, compare, and return the hash of the whole file.

        Args:
            dtype: of the array whose header is written now.
        """
        self._file.flush()
        if dtype is not None:
            length = (self._file.tell() - self._header) // np.dtype(dtype).itemsize
            self._file.seek(0)
            self._file.write(_header(dtype, length))
            self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if not self._header:
            require_written(self.path, self._digest.hexdigest())
            return self._digest.hexdigest()
        whole, body = hashlib.sha256(), hashlib.sha256()
        with open_file(self.path) as file:
            whole.update(file.read(self._header))
            while piece := file.read(1 << 20):
                body.update(piece)
                whole.update(piece)
        if body.digest() != self._digest.digest():
            raise lost_write(self.path)
        return whole.hexdigest()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # the earlier error is reported
            self._file.close()


def _map_shard(ids: Path, loss_mask: Path) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """The files of a shard; they may be renamed or removed afterwards."""
    with open_file(ids) as tokens, open_file(loss_mask) as mask:
        return np.asarray(np.memmap(tokens, np.uint32, "r")), np.asarray(np.memmap(mask, np.uint8, "r"))


def _map_index(path: Path) -> npt.NDArray[Any]:
    """An array of the index without reading it."""
    with open_file(path):  # not a pipe
        pass
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def has_store(folder: Path) -> bool:
    """Whether a folder holds a token store of this version or an earlier one."""
    return (folder / RECORD).is_file() or (folder / _OLD_INDEX).is_file()


def index_files(folder: Path) -> list[Path]:
    """Files that change whenever the store does."""
    return [folder / RECORD, folder / _OLD_INDEX]


def open_store(folder: Path) -> TokenStore:
    if (folder / _OLD_INDEX).exists():
        return _open_old(folder)
    record = json.loads(read_text(folder / RECORD))
    arrays = {name: _map_index(folder / f"{name}.npy") for name in INDEX}
    names = [shard_names(number) for number in range(len(record["shards"]))]
    shards = [_map_shard(folder / ids, folder / loss_mask) for ids, loss_mask in names]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(record["shards"], dtype=np.int64)])
    return TokenStore(shards, starts, **arrays, files=list(record["files"]))


def _open_old(folder: Path) -> TokenStore:
    """A store of an earlier version."""
    with open_file(folder / _OLD_INDEX) as file, np.load(file, allow_pickle=False) as index:
        arrays = {name: index[name] for name in index.files}
    files = json.loads(read_text(folder / "files.json"))
    size = int(arrays["offsets"][-1])
    # an empty file cannot be mapped
    shards = [_map_shard(folder / "tokens.bin", folder / "loss_mask.bin")] if size else []
    return TokenStore(shards, np.array([0, size][: len(shards) + 1], np.int64), **arrays, files=files)
