"""Token store: all samples on disk, written once in order, read through memory maps.

A store is a folder with tokens.bin (uint32), loss_mask.bin (uint8), index.npz (per sample: offset, number of
targets, file and row it came from) and files.json (the names for the file numbers).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow
from tunesmith.files import require_written, write_bytes
from tunesmith.reading import open_file, read_text


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Samples by their number.

    Attributes:
        offsets: int64 [num_samples + 1], where each sample starts in the token file.
        num_targets: int64 [num_samples].
        file_numbers, row_numbers: int64 [num_samples], source of each sample.
    """

    tokens: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    num_targets: npt.NDArray[np.int64]
    file_numbers: npt.NDArray[np.int64]
    row_numbers: npt.NDArray[np.int64]
    files: list[str]

    def __len__(self) -> int:
        return len(self.num_targets)

    def __getitem__(self, index: int) -> Sample:
        start, end = self.offsets[index], self.offsets[index + 1]
        return Sample(self.tokens[start:end], self.loss_mask[start:end])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def lengths_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of these samples."""
        lengths: npt.NDArray[np.int64] = self.offsets[samples + 1] - self.offsets[samples]
        return lengths

    @property
    def row_ids(self) -> npt.NDArray[np.int64]:
        """A number for each sample, equal for the samples of one row."""
        ids: npt.NDArray[np.int64] = self.file_numbers * (int(self.row_numbers.max()) + 1) + self.row_numbers
        return ids

    def where(self, index: int) -> str:
        """FILE:ROW of a sample, for messages."""
        return f"{self.files[self.file_numbers[index]]}:{self.row_numbers[index]}"


class StoreWriter:
    """Append samples to a store, which is readable after the `with` block.

    Attributes:
        sha256: file name -> hash of the written bytes; set after the block, once the files have been read back.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.sha256: dict[str, str] = {}
        self._tokens = _Appended(folder / "tokens.bin")
        self._mask = _Appended(folder / "loss_mask.bin")
        self._offsets = [0]
        self._num_targets: list[int] = []
        self._file_numbers: list[int] = []
        self._row_numbers: list[int] = []
        self._files: dict[str, int] = {}

    def add(self, row: LabelledRow) -> None:
        file_number = self._files.setdefault(row.file, len(self._files))
        for sample in row.samples:
            self._tokens.append(np.asarray(sample.input_ids, np.uint32).tobytes())
            self._mask.append(np.asarray(sample.loss_mask, np.uint8).tobytes())
            self._offsets.append(self._offsets[-1] + len(sample.input_ids))
            self._num_targets.append(sample.num_targets)
            self._file_numbers.append(file_number)
            self._row_numbers.append(row.number)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._tokens.abandon()
            self._mask.abandon()

    def _finish(self) -> None:
        index = io.BytesIO()
        np.savez(
            index,
            offsets=np.array(self._offsets, dtype=np.int64),
            num_targets=np.array(self._num_targets, dtype=np.int64),
            file_numbers=np.array(self._file_numbers, dtype=np.int64),
            row_numbers=np.array(self._row_numbers, dtype=np.int64),
        )
        for appended in (self._tokens, self._mask):
            self.sha256[appended.path.name] = appended.close()
        names = json.dumps(list(self._files)).encode()
        for name, data in (("index.npz", index.getvalue()), ("files.json", names)):
            self.sha256[name] = write_bytes(self.folder / name, data)


class _Appended:
    """A growing file, and the hash of the bytes written.

    Not `ndarray.tofile`, which silently drops data when the disk is full and continues once there is room again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        """Read the file back, compare, and return the hash."""
        self._file.close()
        require_written(self.path, self._digest.hexdigest())
        return self._digest.hexdigest()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # the earlier error is reported
            self._file.close()


def open_store(folder: Path) -> TokenStore:
    with open_file(folder / "index.npz") as file, np.load(file, allow_pickle=False) as index:
        arrays = {name: index[name] for name in index.files}
    files = json.loads(read_text(folder / "files.json"))
    if arrays["offsets"][-1] == 0:  # an empty file cannot be memory-mapped
        empty = np.zeros(0, np.uint32), np.zeros(0, np.uint8)
        return TokenStore(*empty, **arrays, files=files)
    with open_file(folder / "tokens.bin") as ids, open_file(folder / "loss_mask.bin") as mask:
        tokens = np.memmap(ids, dtype=np.uint32, mode="r")
        loss_mask = np.memmap(mask, dtype=np.uint8, mode="r")
    return TokenStore(tokens, loss_mask, **arrays, files=files)
