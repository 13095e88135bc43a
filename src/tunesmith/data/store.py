"""The token store: all samples on disk, written once in order, read back through memory maps.

A store is a folder with tokens.bin (uint32), loss_mask.bin (uint8), index.npz (for each sample: offset, number of
targets, file and row it came from) and files.json (the names behind the file numbers).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Samples by number.

    Attributes:
        offsets: int64 [num_samples + 1], where each sample starts in the token file.
        num_targets: int64 [num_samples].
        file_numbers, row_numbers: int64 [num_samples], the row that each sample was made of.
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

    def where(self, index: int) -> str:
        """file:row of a sample, for messages."""
        return f"{self.files[self.file_numbers[index]]}:{self.row_numbers[index]}"


class StoreWriter:
    """Appends samples; the store is readable once the `with` block has ended."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._tokens = (folder / "tokens.bin").open("wb")
        self._mask = (folder / "loss_mask.bin").open("wb")
        self._offsets = [0]
        self._num_targets: list[int] = []
        self._file_numbers: list[int] = []
        self._row_numbers: list[int] = []
        self._files: dict[str, int] = {}

    def add(self, row: LabelledRow) -> None:
        file_number = self._files.setdefault(row.file, len(self._files))
        for sample in row.samples:
            sample.input_ids.tofile(self._tokens)
            sample.loss_mask.tofile(self._mask)
            self._offsets.append(self._offsets[-1] + len(sample.input_ids))
            self._num_targets.append(sample.num_targets)
            self._file_numbers.append(file_number)
            self._row_numbers.append(row.number)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._mask.close()
        if kind is None:
            np.savez(
                self.folder / "index.npz",
                offsets=np.array(self._offsets, dtype=np.int64),
                num_targets=np.array(self._num_targets, dtype=np.int64),
                file_numbers=np.array(self._file_numbers, dtype=np.int64),
                row_numbers=np.array(self._row_numbers, dtype=np.int64),
            )
            (self.folder / "files.json").write_text(json.dumps(list(self._files)), encoding="utf-8")


def open_store(folder: Path) -> TokenStore:
    with np.load(folder / "index.npz", allow_pickle=False) as index:
        arrays = {name: index[name] for name in index.files}
    files = json.loads((folder / "files.json").read_text(encoding="utf-8"))
    if arrays["offsets"][-1] == 0:  # an empty file cannot be mapped
        empty = np.zeros(0, np.uint32), np.zeros(0, np.uint8)
        return TokenStore(*empty, **arrays, files=files)
    tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
    loss_mask = np.memmap(folder / "loss_mask.bin", dtype=np.uint8, mode="r")
    return TokenStore(tokens, loss_mask, **arrays, files=files)
