"""Write files so that a crash or power failure leaves the old or the new version: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.reading import open_file, read_text, require_regular


def sync_path(path: Path) -> None:
    """fsync a file, or a folder's list of entries."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows can only fsync writable files
    try:
        os.fsync(fd)
    except OSError:  # some network file systems cannot sync a folder; the rename is still atomic there
        if not path.is_dir():
            raise
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder in a folder, then the folder itself."""
    for path in sorted(folder.rglob("*")):
        sync_path(path)
    sync_path(folder)


def require_written(path: Path, sha256: str) -> None:
    """Read a file back and compare its hash.

    Raises:
        OSError: the contents differ; some libraries and network disks lose writes without an error.
    """
    if sha256_file(path) != sha256:
        raise lost_write(path)


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file and read it back; returns the SHA-256 of the data."""
    sha256 = hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    require_written(path, sha256)
    return sha256


def lost_write(path: Path) -> OSError:
    return OSError(errno.EIO, "reads back differently from what was written", str(path))


def write_text_atomic(path: Path, text: str | Iterable[str]) -> None:
    """Replace `path` by `text` atomically: readers see the old text or the new one.

    If the path is a link, its target is replaced.

    Args:
        text: whole, or in pieces that need not be in memory together.

    Raises:
        OSError: the path is not a file (/dev/null, a pipe) and a rename would destroy it.
    """
    path = Path(os.path.realpath(path))
    if os.path.lexists(path):
        require_regular(path, path.lstat().st_mode)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            for piece in [text] if isinstance(text, str) else text:
                data = piece.encode("utf-8")
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())
        require_written(partial, digest.hexdigest())
        partial.replace(path)
    except OSError as error:
        if error.filename == str(partial):  # a name that nobody has given
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync_path(path.parent)


def sealed(content: Mapping[str, Any]) -> str:
    """JSON that contains its own hash under "sha256", which `read_sealed` verifies."""
    plain = json.loads(json.dumps(content))  # as it will be read back, with keys as text
    return json.dumps({**plain, "sha256": seal_of(plain)}, indent=1)


def spell_sealed(content: Mapping[str, Any]) -> Iterator[str]:
    """The text of `sealed` in pieces, for content with long sequences of any type (data_ledger.json)."""
    assert "sha256" not in content
    digest = hashlib.sha256()
    for piece in spell_json(content, None):
        digest.update(piece.encode("utf-8"))
    yield from spell_json({**content, "sha256": digest.hexdigest()}, 1)


_PIECE = 1024  # items of a sequence that are spelled together


def spell_json(value: Any, indent: int | None, level: int = 0) -> Iterator[str]:
    """The text of json.dumps in pieces; with indent None, keys are sorted.

    Unlike json, it takes sequences of any type and never holds the text of a long one.

    Args:
        level: how deep the value is nested.
    """
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        if not isinstance(value, Mapping) or not value:
            yield json.dumps(value, sort_keys=indent is None)
            return
        texts = {_as_key(key): below for key, below in value.items()}
        pairs = ((f"{json.dumps(key)}: ", texts[key]) for key in (sorted(texts) if indent is None else texts))
        yield from _spell_items("{}", pairs, indent, level)
    elif not len(value):
        yield "[]"
    elif type(value[0]) is int:
        yield from _spell_numbers(value, indent, level)
    else:
        yield from _spell_items("[]", (("", item) for item in value), indent, level)


def _as_key(key: Any) -> str:
    """A key as JSON has it: True as true, 1 as 1."""
    return key if isinstance(key, str) else str(next(iter(json.loads(json.dumps({key: 0})))))


def _spell_items(brackets: str, items: Iterable[tuple[str, Any]], indent: int | None, level: int) -> Iterator[str]:
    border, end = _borders(indent, level)
    lead = brackets[0] + border.lstrip(",").lstrip(" " if indent is None else "")
    for head, item in items:
        yield lead + head
        yield from spell_json(item, indent, level + 1)
        lead = border
    yield end + brackets[1]


def _spell_numbers(numbers: Sequence[Any], indent: int | None, level: int) -> Iterator[str]:
    """A list that begins with a whole number."""
    border, end = _borders(indent, level)
    lead = "[" + border.lstrip(",").lstrip(" " if indent is None else "")
    items = iter(numbers)
    while piece := list(itertools.islice(items, _PIECE)):
        if all(type(item) is int for item in piece):
            yield lead + border.join(map(str, piece))
        else:
            yield lead + border.join("".join(spell_json(item, indent, level + 1)) for item in piece)
        lead = border
    yield end + "]"


def _borders(indent: int | None, level: int) -> tuple[str, str]:
    """What stands between two items, and before the closing bracket."""
    if indent is None:
        return ", ", ""
    return ",\n" + " " * indent * (level + 1), "\n" + " " * indent * level


def seal_of(content: Mapping[str, Any]) -> str:
    return sha256_text(json.dumps(content, sort_keys=True))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read JSON written by `sealed`; files of earlier versions have no hash.

    Raises:
        ValueError: it is not a JSON object, or its hash does not match.
    """
    content = json.loads(read_text(path))
    if not isinstance(content, dict):
        raise ValueError("is not a JSON object")
    seal = content.pop("sha256", None)
    if seal is not None and seal != seal_of(content):
        raise ValueError("was changed: its own hash does not match")
    return content


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def _read_umask() -> int:
    mask = os.umask(0o022)  # it can only be read by setting it
    os.umask(mask)
    return mask


_UMASK = _read_umask()  # at import, while there is only one thread


def usual_modes(folder: Path) -> None:
    """Give every file the permissions of the user's umask: safetensors makes files readable only by their owner."""
    usual = 0o666 & ~_UMASK
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != usual:
            path.chmod(usual)


@contextmanager
def atomic_directory(path: Path, seal: Callable[[Path], None] | None = None, replaces: bool = False) -> Iterator[Path]:
    """Write a folder atomically.

    Yields a hidden folder next to `path`. On success its files are synced and it is renamed to `path`; on any exception
    it is removed.

    Args:
        seal: writes a last file into the folder after all others are synced.
        replaces: replace an existing folder at `path`, which must be ours; otherwise only an empty one is replaced.

    Raises:
        TunesmithError: another process created the folder meanwhile.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        complete_directory(partial, path, seal, replaces)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def complete_directory(
    partial: Path, path: Path, seal: Callable[[Path], None] | None = None, replaces: bool = False
) -> None:
    """Sync all files of a hidden folder next to `path` and rename it; arguments as in `atomic_directory`.

    Raises:
        TunesmithError: another process created the folder meanwhile.
    """
    written = sorted(partial.rglob("*"))
    for file in written:
        sync_path(file)
    if seal:
        seal(partial)
        for file in sorted(set(partial.rglob("*")) - set(written)):
            sync_path(file)
    usual_modes(partial)
    sync_path(partial)
    if replaces and path.exists():  # rename cannot replace a folder that is not empty
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
        sync_path(path.parent)
    else:
        take_name(partial, path)


def take_name(made: Path, path: Path) -> None:
    """Rename a folder; only an empty folder may be replaced.

    Raises:
        TunesmithError: another process created the folder meanwhile.
    """
    try:
        if os.name == "nt" and path.is_dir():
            path.rmdir()
        made.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise TunesmithError(
            f"{path}: another process created it meanwhile. Give --output a new folder.", code="output-taken"
        ) from None
    sync_path(path.parent)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_ends(path: Path, size: int = 64 * 2**20) -> str:
    """SHA-256 of the first and last `size` bytes of a file; of the whole file if it is no longer than both."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        digest.update(file.read(size))
        length = file.seek(0, os.SEEK_END)
        file.seek(max(size, length - size))
        digest.update(file.read(size))
    return digest.hexdigest()


def system_error(error: BaseException) -> OSError | None:
    """The OSError behind an exception; safetensors and tokenizers wrap it, with the error number in their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found:
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return error if isinstance(error, OSError) else None


def is_no_room(error: BaseException) -> bool:
    """Whether an error means that the disk is full or a quota is exceeded."""
    found = system_error(error)
    return found is not None and found.errno in NO_ROOM


_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_?alloc|failed to allocate memory"
    r"|(CUBLAS|CUDNN|CUSPARSE|CUSOLVER)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_ON_GPU = re.compile(r"\b(CUDA|HIP|XPU|MPS|GPU|NPU)\b|STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the machine or a GPU.

    torch, CUDA libraries, safetensors and tokenizers report this in the text of a general exception. More specific
    exceptions may quote user text that says the same, so they do not count.
    """
    refused = system_error(error)
    if isinstance(error, MemoryError) or (refused is not None and refused.errno == errno.ENOMEM):
        return True
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in kinds:  # torch's class, by name, since torch may not be imported
        return True
    is_general = type(error) in (Exception, RuntimeError) or bool(kinds & {"AcceleratorError", "SafetensorError"})
    return (is_general or (type(error) is OSError and error.errno is None)) and _NO_MEMORY.search(
        str(error)
    ) is not None


def lacking_memory(error: BaseException) -> str:
    """Where memory ran out: "the GPU" or "this machine"."""
    is_torchs = type(error).__name__ in ("OutOfMemoryError", "AcceleratorError")
    return "the GPU" if is_torchs or _ON_GPU.search(str(error)) else "this machine"
