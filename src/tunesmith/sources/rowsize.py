"""The size limit of a row. A larger row is never parsed or rendered; a marker takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_MAX_ROW_MB = 16.0
BYTES_PER_MB = 1_000_000


@dataclass(frozen=True, slots=True)
class RowTooLarge:
    """Marker for a row that is larger than data.max_row_mb; its contents are not kept.

    Attributes:
        size_bytes: its size in UTF-8; counting may stop above the limit.
        max_row_mb: the limit.
    """

    size_bytes: int
    max_row_mb: float

    @property
    def reason(self) -> str:
        size_mb = self.size_bytes / BYTES_PER_MB
        return (
            f"is larger than data.max_row_mb {self.max_row_mb:g} (at least {size_mb:.3g} MB). Split it into several "
            "rows or raise data.max_row_mb"
        )


def count_bytes(text: str) -> int:
    """Size of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def bound_row(value: Any, max_row_mb: float) -> Any:
    """The value of a row, or a RowTooLarge if it exceeds the limit."""
    size = measure_row(value, int(max_row_mb * BYTES_PER_MB))
    return RowTooLarge(size, max_row_mb) if size > max_row_mb * BYTES_PER_MB else value


def measure_row(value: Any, max_bytes: int) -> int:
    """Size in bytes of a row's texts and numbers; counting stops above max_bytes."""
    size = 0
    left = [value]
    while left and size <= max_bytes:
        item = left.pop()
        if isinstance(item, str):
            size += count_bytes(item)
        elif isinstance(item, dict):
            left.extend(item.values())
            size += sum(map(len, map(str, item)))
        elif isinstance(item, list):
            left.extend(item)
        else:
            size += len(item) if isinstance(item, bytes) else 8
    return size
