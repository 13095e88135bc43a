"""Compact lists of row numbers: a few bytes a row, however many rows a ledger lists."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload


class RowNumbers(Sequence[int]):
    """Row numbers in the order in which they were added, held as runs of consecutive numbers.

    >>> numbers = RowNumbers([1, 2, 3, 7])
    >>> numbers.to_runs(), len(numbers)
    ([1, 3, 7, 7], 4)
    """

    __slots__ = ("_ends", "_length", "_starts", "unlisted")

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._starts, self._ends = array("q"), array("q")  # each run includes its end
        self._length = self.unlisted = 0
        for number in numbers:
            self.append(number)

    def append(self, number: int) -> None:
        self.add_run(number, number)

    def add_run(self, start: int, end: int) -> None:
        """Append all numbers from `start` to `end`, both included."""
        if self._ends and start == self._ends[-1] + 1:
            self._ends[-1] = end
        else:
            self._starts.append(start)
            self._ends.append(end)
        self._length += end - start + 1

    def extend(self, numbers: Iterable[int]) -> None:
        if isinstance(numbers, RowNumbers):
            for start, end in numbers._runs():
                self.add_run(start, end)
            self.count_unlisted(numbers.unlisted)
            return
        for number in numbers:
            self.append(number)

    def bound(self, max_runs: int) -> None:
        """Forget all but the first runs; the length still counts all numbers (`unlisted` of them are forgotten)."""
        dropped = zip(self._starts[max_runs:], self._ends[max_runs:], strict=True)
        self.unlisted += sum(end - start + 1 for start, end in dropped)
        del self._starts[max_runs:], self._ends[max_runs:]

    def count_unlisted(self, count: int) -> None:
        """Count numbers that were forgotten before."""
        self.unlisted += count
        self._length += count

    def to_runs(self) -> list[int]:
        """Start and end of each run, one after the other."""
        return [number for run in self._runs() for number in run]

    @classmethod
    def from_runs(cls, runs: Sequence[int]) -> RowNumbers:
        numbers = cls()
        for start, end in zip(runs[::2], runs[1::2], strict=True):
            numbers.add_run(start, end)
        return numbers

    def _runs(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        for start, end in self._runs():
            yield from range(start, end + 1)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        """A slice costs what its end costs: ledgers show the first few rows."""
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            return list(islice(self, start, stop, step)) if step > 0 else list(self)[index]
        place = index + self._length if index < 0 else index
        for start, end in self._runs():
            if 0 <= place <= end - start:
                return start + place
            place -= end - start + 1
        raise IndexError(index)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        more = f", ... {self._length:,} in all" if self._length > 8 else ""
        return f"RowNumbers([{', '.join(map(str, self[:8]))}{more}])"

    def __getstate__(self) -> Any:
        return self._starts, self._ends, self._length, self.unlisted

    def __setstate__(self, state: Any) -> None:
        self._starts, self._ends, self._length, self.unlisted = state


class CutRecords(Sequence[dict[str, int]]):
    """The rows of a CutRows as they are in data_ledger.json, each made on demand."""

    def __init__(self, cuts: CutRows) -> None:
        self._cuts = cuts

    def __len__(self) -> int:
        return len(self._cuts)

    @overload
    def __getitem__(self, index: int) -> dict[str, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, int]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, int] | list[dict[str, int]]:
        if isinstance(index, slice):
            return [{"row": row, "tokens_lost": lost} for row, lost in self._cuts[index]]
        row, lost = self._cuts[index]
        return {"row": row, "tokens_lost": lost}


class CutRows(Sequence[tuple[int, int]]):
    """Rows that were truncated, each with the tokens that it lost."""

    __slots__ = ("_lost", "_rows", "unlisted")

    def __init__(self, cuts: Iterable[tuple[int, int]] = ()) -> None:
        self._rows, self._lost, self.unlisted = array("q"), array("q"), 0
        self.extend(cuts)

    def append(self, cut: tuple[int, int]) -> None:
        self._rows.append(cut[0])
        self._lost.append(cut[1])

    def extend(self, cuts: Iterable[tuple[int, int]]) -> None:
        if isinstance(cuts, CutRows):
            self._rows.extend(cuts._rows)
            self._lost.extend(cuts._lost)
            self.unlisted += cuts.unlisted
            return
        for cut in cuts:
            self.append(cut)

    def bound(self, max_rows: int) -> None:
        """Forget all but the first rows; the length still counts all (`unlisted` of them are forgotten)."""
        self.unlisted += len(self._rows[max_rows:])
        del self._rows[max_rows:], self._lost[max_rows:]

    def count_unlisted(self, count: int) -> None:
        """Count rows that were forgotten before."""
        self.unlisted += count

    @property
    def records(self) -> CutRecords:
        return CutRecords(self)

    def __len__(self) -> int:
        return len(self._rows) + self.unlisted

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(index, slice):
            return list(zip(self._rows[index], self._lost[index], strict=True))
        return self._rows[index], self._lost[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"CutRows({len(self)} rows)"

    def __getstate__(self) -> Any:
        return self._rows, self._lost, self.unlisted

    def __setstate__(self, state: Any) -> None:
        self._rows, self._lost, self.unlisted = state
