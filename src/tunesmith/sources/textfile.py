"""Read a text file as one document, in blocks where it is too long to hold in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.sources.datafile import DataFile, explain_errors

HEAD = 1 << 22  # characters; a longer document is a LongText
_BLOCK = 1 << 18  # characters


@dataclass(frozen=True, slots=True)
class LongText:
    """The text of a file that is not held in memory. Each call of `blocks` reads the file again.

    Attributes:
        head: the first HEAD characters.
    """

    file: DataFile
    head: str

    def blocks(self) -> Iterator[str]:
        """The whole text in order.

        Raises:
            DataError: the file cannot be read or decoded.
        """
        with explain_errors(self.file), self.file.open_text(newline="") as text:
            while block := text.read(_BLOCK):
                yield block

    def read(self) -> str:
        """The whole text in memory."""
        return "".join(self.blocks())

    def __str__(self) -> str:
        return self.head


def read_text(file: DataFile) -> Iterator[tuple[int, dict[str, str | LongText]]]:
    """A text file is one document; it is later split into samples of max_seq_len tokens."""
    with file.open_text(newline="") as text:
        head = text.read(HEAD)
        block = text.read(_BLOCK)
        if block and not head.strip():  # nothing would be known of the text
            head, block = head + block + text.read(), ""
    yield 1, {"text": LongText(file, head) if block else head}


def find_long_text(row: Any) -> LongText | None:
    """The long document of a row; None where the row is in memory."""
    text = row.get("text") if isinstance(row, Mapping) else None
    return text if isinstance(text, LongText) else None
