"""One data file: its bytes, its text in the configured encoding, its lines in bounded memory."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tunesmith.config.data_keys import explain_encoding
from tunesmith.errors import DataError
from tunesmith.sources.rowsize import BYTES_PER_MB, RowTooLarge, count_bytes

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".xlsx", ".txt", ".md")
_PIECE = 1 << 20
_HEAD = 4096
_MARKED_LINES = 256
_DAMAGED = (OSError, EOFError, zlib.error)
_UNDECODED = "\udfff"  # a lone surrogate, which no codec produces; marks undecodable bytes


def container_of(path: Path) -> str | None:
    """The suffix that names the format of a file, without .gz; None if unknown."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else None


class Meter:
    """Counts the bytes of the data files that have been read, for a progress bar."""

    def __init__(self) -> None:
        self._before = 0  # bytes of the files before the current one
        self._file: IO[bytes] | None = None

    def begin_file(self, file: IO[bytes]) -> None:
        """A file is read from its start, perhaps not for the first time."""
        self._file = file

    def finish_file(self, size: int) -> None:
        """The file has been read to its end."""
        self._before, self._file = self._before + size, None

    @property
    def bytes_read(self) -> int:
        """Of files as they are on disk; one that is not read from start to end (Parquet, Excel) counts at its end."""
        try:
            return self._before + (self._file.tell() if self._file is not None else 0)
        except (OSError, ValueError):  # it is closed
            return self._before


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file with its encoding and row limit."""

    path: Path
    encoding: str
    max_row_mb: float
    meter: Meter | None = None

    @property
    def container(self) -> str | None:
        return container_of(self.path)

    @property
    def max_row_bytes(self) -> int:
        return int(self.max_row_mb * BYTES_PER_MB)

    @property
    def is_gzip(self) -> bool:
        with self.path.open("rb") as file:
            return file.read(2) == b"\x1f\x8b"

    @property
    def holds_small_rows_only(self) -> bool:
        """Whether the whole file is smaller than the row limit; UTF-16 can grow by half in UTF-8."""
        return 2 * self.path.stat().st_size <= self.max_row_bytes and not self.is_gzip

    def open_bytes(self) -> IO[bytes]:
        if self.is_gzip:
            unpacked = gzip.GzipFile(self.path, "rb")
            if self.meter is not None:
                self.meter.begin_file(unpacked.fileobj)  # type: ignore[arg-type]
            return unpacked  # type: ignore[return-value]
        file = self.path.open("rb")
        if self.meter is not None:
            self.meter.begin_file(file)
        return file

    def open_text(self, newline: str | None = None, errors: str = "strict") -> io.TextIOWrapper:
        """The text without its byte order mark."""
        problem = explain_encoding(self.encoding)
        if problem:
            raise DataError(f"data.encoding: {problem}", code="unknown-encoding")
        file = self.open_bytes()
        mark = _byte_order_mark(self.encoding)
        head = file.peek(_HEAD)[:_HEAD]  # type: ignore[attr-defined]
        if mark and head.startswith(mark):
            file.read(len(mark))
        elif (wide := _wide_encoding(head)) and len("a".encode(self.encoding)) == 1:
            file.close()
            raise DataError(_not_text(self, f"its first bytes are those of {wide}", [wide]), code="wrong-encoding")
        return io.TextIOWrapper(file, encoding=self.encoding, errors=errors, newline=newline)

    def read_lines(self) -> Iterator[str | RowTooLarge]:
        """Every line; a line above the limit is a RowTooLarge."""
        with self.open_text() as file:
            while line := self._read_line(file):
                yield line

    def read_lines_from(self, place: int) -> Iterator[tuple[str | RowTooLarge, int | None]]:
        """Every line from a place in the file on; each 256th line with the place where it begins.

        Args:
            place: 0, or one that was yielded: opaque, from `TextIOBase.tell`.
        """
        with self.open_text() as file:
            if place:
                file.seek(place)
            for count in itertools.count():
                begins = None if count % _MARKED_LINES else file.tell()
                line = self._read_line(file)
                if not line:
                    return
                yield line, begins

    def _read_line(self, file: io.TextIOWrapper) -> str | RowTooLarge:
        """The next line; a marker where it is above the limit; "" at the end."""
        bound = self.max_row_bytes
        line = file.readline(bound + 1)
        if 4 * len(line) <= bound or (size := count_bytes(line)) <= bound:
            return line
        while not line.endswith("\n") and (line := file.readline(_PIECE)):
            size += count_bytes(line)
        return RowTooLarge(size, self.max_row_mb)


def _byte_order_mark(encoding: str) -> bytes:
    """The mark that the codec would leave in the text."""
    try:
        return "\ufeff".encode(encoding)
    except UnicodeError:
        return b""


@contextlib.contextmanager
def explain_errors(file: DataFile, last_row: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a DataError.

    Args:
        last_row: number of the last row that was read.
    """
    path = file.path
    try:
        yield
    except UnicodeError as error:
        raise explain_undecodable(file, error) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        place = f" after row {last_row()}" if last_row() else ""
        raise DataError(
            f"{path}: unreadable{place} (damaged gzip: {error}). Download or copy the file again.", code="file-damaged"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}. Check the file's permissions.", code="file-unreadable"
        ) from None
    except MemoryError:
        raise DataError(
            f"{path}: does not fit into memory. Split the file or save it as JSON Lines.", code="out-of-memory"
        ) from None


def explain_undecodable(file: DataFile, error: UnicodeError) -> DataError:
    """The error for a file that is not text in its encoding: where it fails, and the likely encodings."""
    number, line = _find_undecodable(file)
    place = f" in line {number}" if number else ""
    byte = f"byte 0x{error.object[error.start]:02x}" if isinstance(error, UnicodeDecodeError) else str(error)
    return DataError(_not_text(file, byte + place, _likely_encodings(file, line)), code="wrong-encoding")


def _not_text(file: DataFile, why: str, likely: list[str]) -> str:
    flags = " or ".join(f"--data.encoding {name}" for name in likely)
    advice = f"Try {flags}, or save the file as UTF-8." if flags else "Save the file as UTF-8."
    return f"{file.path}: is not {file.encoding.upper()} text ({why}). {advice}"


def _find_undecodable(file: DataFile) -> tuple[int, bytes]:
    """Number and bytes (bounded) of the first line that cannot be decoded; number 0 where there is none."""
    codecs.register_error("tunesmith.mark", _mark_undecoded)
    try:
        with file.open_text(newline="\n", errors="tunesmith.mark") as text:
            number = 1
            while line := text.readline(_PIECE):
                if _UNDECODED in line:
                    return number, _nth_line(file, number)
                number += line.endswith("\n")
    except (*_DAMAGED, UnicodeError):
        pass
    return 0, b""


def _mark_undecoded(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _UNDECODED, error.end


def _nth_line(file: DataFile, number: int) -> bytes:
    with file.open_bytes() as lines:
        found = 1
        while line := lines.readline(_PIECE):
            if found == number:
                return line
            found += line.endswith(b"\n")
    return b""


def _likely_encodings(file: DataFile, line: bytes) -> list[str]:
    """Other encodings that can decode the line that failed, the likeliest first."""
    head = b""
    with contextlib.suppress(*_DAMAGED), file.open_bytes() as opened:
        head = opened.read(_HEAD)
    wide = _wide_encoding(head)
    if wide:
        return [wide] if wide != file.encoding.lower() else []
    texts = {name: _decode(line, name) for name in ("utf-8", "gb18030", "cp1252") if name != file.encoding.lower()}
    likely = [name for name, text in texts.items() if text is not None]
    if texts.get("gb18030") and not _is_mostly_chinese(texts["gb18030"]):
        likely.sort(key=lambda name: name == "gb18030")
    return likely


def _wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32 where the first bytes show it; else ""."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if head.count(0) * 4 <= len(head):  # Latin text has a zero in every other byte
        return ""
    return "utf-16-be" if head[::2].count(0) > head[1::2].count(0) else "utf-16-le"


def _decode(line: bytes, encoding: str) -> str | None:
    """The line decoded, None where it is not text in this encoding; it may end inside a character."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(line)
    except UnicodeError:
        return None


def _is_mostly_chinese(text: str | None) -> bool:
    foreign = [char for char in text or "" if not char.isascii()]
    chinese = [
        char for char in foreign if "\u4e00" <= char <= "\u9fff" or "\u3000" <= char <= "\u303f" or char > "\uff00"
    ]
    return 2 * len(chinese) > len(foreign)
