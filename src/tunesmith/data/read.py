"""Files, folders, globs and hub ids -> rows with their place. The container is told from name and first bytes."""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tunesmith.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".md")
TEXT_SUFFIXES = (".txt", ".md")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))??(?::(?P<split>[\w.+\[\]%-]+))?")
_SPLIT_FILE = re.compile(r"(^|[-_.])(train|test|validation|valid|dev|eval)([-_.]|$)")


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the file holds it. `number` is 1-based: the line of a JSON Lines or CSV file, else the item."""

    file: str
    number: int
    value: Any

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True, slots=True)
class Sources:
    """What the names given by a person stand for.

    Attributes:
        files: files to read, in order.
        hub: (path or id, config, split) for `datasets`, read after the files.
        passed_over: files of a folder that hold no rows (pictures, licences).
    """

    files: list[Path] = field(default_factory=list)
    hub: list[tuple[str, str | None, str]] = field(default_factory=list)
    passed_over: list[Path] = field(default_factory=list)


def find_sources(names: Iterable[str]) -> Sources:
    """Look up every name before a row is read.

    Raises:
        DataError: a name stands for nothing; similar names nearby are offered.
    """
    sources = Sources()
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            _add_folder(path, sources)
        elif path.exists():
            sources.files.append(path)
        elif any(mark in name for mark in "*?["):
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            if not found:
                raise DataError(f"{name}: no file matches this pattern. Check the folder and the ending.")
            sources.files.extend(found)
        else:
            hub = _HUB_ID.fullmatch(name)
            if not hub or _looks_like_path(name):
                raise DataError(f"{name}: no such file or folder.{_similar(path)} A hub data set is named owner/name.")
            sources.hub.append((hub["id"], hub["config"], hub["split"] or "train"))
    return sources


def _looks_like_path(name: str) -> bool:
    stem = name.removesuffix(".gz")
    return name.startswith((".", "/", "~")) or stem.endswith(SUFFIXES) or Path(name).parent.is_dir()


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.6)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _add_folder(folder: Path, sources: Sources) -> None:
    if _has_hub_layout(folder):
        sources.hub.append((str(folder), None, "train"))
        return
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _is_hidden(p, folder)]
    data = [p for p in files if _container(p) and not p.stem.upper().startswith(("README", "LICENSE", "LICENCE"))]
    if not data:
        raise DataError(f"{folder}: the folder holds no data file ({', '.join(SUFFIXES)}, plain or .gz).")
    sources.files.extend(data)
    sources.passed_over.extend(p for p in files if p not in data)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _has_hub_layout(folder: Path) -> bool:
    """A clone of a hub data set: its README names the files, or the files are named after splits.

    Such a folder holds test splits that must not be trained on, so `datasets` decides what is in it.
    """
    card = folder / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace")[:20_000]
        if head.startswith("---") and re.search(r"^(configs|dataset_info):", head, re.MULTILINE):
            return True
    files = [p for p in folder.rglob("*") if p.is_file() and _container(p) and not _is_hidden(p, folder)]
    splits = {m[2] for p in files if (m := _SPLIT_FILE.search(p.name.lower()))}
    return "train" in splits and len(splits) > 1


def _container(path: Path) -> str | None:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in SUFFIXES else None


def read_rows(sources: Sources) -> Iterator[RawRow]:
    """Every row in order.

    Raises:
        DataError: a file that is unreadable, empty, broken or of unknown kind ends the reading at once.
    """
    for path in sources.files:
        yield from _read_file(path)
    for hub_id, config, split in sources.hub:
        yield from _read_hub(hub_id, config, split)


def _read_file(path: Path) -> Iterator[RawRow]:
    container = _container(path)
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".tsv": _read_csv, ".txt": _read_text, ".md": _read_text}
    if container is None:
        raise DataError(f"{path}: unknown kind of file. Known: {', '.join(SUFFIXES)}, plain or .gz.")
    count = 0
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty.")
        for row in readers.get(container, _read_json)(path):
            count += 1
            yield row
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x}{_line_of(path, error)}). "
            "Save the file as UTF-8."
        ) from None
    except (OSError, EOFError) as error:  # gzip raises EOFError for a file cut short
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if count == 0:
        raise DataError(f"{path}: the file holds no rows.")


def _line_of(path: Path, error: UnicodeDecodeError) -> str:
    """Where the bad byte stands; the decoder itself only knows the place in its current block."""
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError:
                    return f" in line {number}"
    except OSError:
        return ""
    return ""


def _open_bytes(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if is_gzip else path.open("rb")  # type: ignore[return-value]


def _open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline=newline)


def _read_json(path: Path) -> Iterator[RawRow]:
    """A JSON array, or JSON Lines whatever the file is called."""
    with _open_text(path) as file:
        first = ""
        while not first.strip():
            line = file.readline()
            if not line:
                return
            first = line
    if first.lstrip().startswith("["):
        yield from _read_json_array(path)
        return
    if first.lstrip().startswith("{") and not _is_json(first) and not path.name.removesuffix(".gz").endswith("l"):
        yield from _read_json_object(path)
        return
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield RawRow(str(path), number, _parse_line(path, number, line))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        shown = line.strip()
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise DataError(
            f"{path}:{number}: broken JSON ({error.msg} at column {error.colno}): {shown}\n"
            "Each line must be one whole JSON object. Mend or remove the line."
        ) from None


def _load_json(path: Path) -> Any:
    with _open_text(path) as file:
        text = file.read()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: broken JSON ({error.msg} at column {error.colno}). Mend the file from there on."
        ) from None


def _read_json_array(path: Path) -> Iterator[RawRow]:
    rows = _load_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {type(rows).__name__}, not a list of rows.")
    for number, value in enumerate(rows, 1):
        yield RawRow(str(path), number, value)


def _read_json_object(path: Path) -> Iterator[RawRow]:
    """One object over several lines: a single row, unless its rows hide below a key."""
    loaded = _load_json(path)
    lists = [key for key, value in loaded.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(loaded) == 1 and lists and lists[0] not in ("messages", "conversations", "conversation"):
        raise DataError(
            f"{path}: holds one object with the rows below the key {lists[0]!r}. Save that list alone, as a JSON "
            "array or as JSON Lines."
        )
    yield RawRow(str(path), 1, loaded)


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(1 << 30)
    with _open_text(path, newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max("\t" if _container(path) == ".tsv" else ",", ";", "\t", key=header.count)
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    found = len(row) if None not in row else len(reader.fieldnames or []) + len(row[None])
                    raise DataError(
                        f"{path}:{reader.line_num}: the row does not have the {len(reader.fieldnames or [])} fields "
                        f"of the header ({found} found or some missing). Quote fields that hold {delimiter!r}."
                    )
                yield RawRow(str(path), reader.line_num, row)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: broken CSV ({error}).") from None


def _read_text(path: Path) -> Iterator[RawRow]:
    """A text file is one document; it is split to max_seq_len later, without loss."""
    with _open_text(path, newline="") as file:
        yield RawRow(str(path), 1, {"text": file.read()})


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa  # slow to import, needed by few
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(str(path), number, value)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _read_hub(hub_id: str, config: str | None, split: str) -> Iterator[RawRow]:
    """A data set of the hub, or a folder laid out like one, through `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    name = f"{hub_id}:{split}"
    try:
        rows = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # the library raises a dozen kinds; its first line says which
        raise DataError(_explain_hub(hub_id, split, error)) from None
    for number, value in enumerate(rows, 1):
        yield RawRow(name, number, value)


def _explain_hub(hub_id: str, split: str, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "gated" in first.lower():
        return f"{hub_id}: a gated data set. Accept its terms on its page, then log in with: hf auth login"
    if "Config name is missing" in first:
        return f"{hub_id}: {first} Name one as {hub_id}:CONFIG:{split}"
    if "split" in first.lower():
        return f"{hub_id}: {first} Name one as {hub_id}:SPLIT"
    if Path(hub_id).is_dir():
        return f"{hub_id}: cannot be read as a data set folder: {first}"
    return (
        f"{hub_id}: not a local file or folder, and the hub could not give it: {first}\n"
        "Check the name, the network, and for a private data set: hf auth login"
    )
