"""Files written as if the power failed next: a new name, synced, then one rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.reading import open_file, read_text, require_regular


def sync_path(path: Path) -> None:
    """Push a file's bytes, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs only what it may write
    try:
        os.fsync(fd)
    except OSError:  # some network file systems cannot sync a folder; the rename is still atomic there
        if not path.is_dir():
            raise
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Every file and folder in it, then the folder itself."""
    for path in sorted(folder.rglob("*")):
        sync_path(path)
    sync_path(folder)


def require_written(path: Path, sha256: str) -> None:
    """Read a file back and compare it with what was meant.

    Raises:
        OSError: a write was lost without an error, as some libraries and network disks let happen.
    """
    if sha256_file(path) != sha256:
        raise lost_write(path)


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file and read it back; the SHA-256 of what was meant."""
    sha256 = hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    require_written(path, sha256)
    return sha256


def lost_write(path: Path) -> OSError:
    return OSError(errno.EIO, "was read back otherwise than it was written", str(path))


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader sees the old text or the new one, never a part.

    Where the path is a link, what it leads to is replaced.

    Raises:
        OSError: there is something else than a file, which a rename would destroy (/dev/null, a pipe).
    """
    path = Path(os.path.realpath(path))
    if os.path.lexists(path):
        require_regular(path, path.lstat().st_mode)
    data = text.encode("utf-8")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        require_written(partial, hashlib.sha256(data).hexdigest())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_path(path.parent)


def sealed(content: Mapping[str, Any]) -> str:
    """JSON that carries its own hash, under "sha256"; `read_sealed` knows when it was changed."""
    plain = json.loads(json.dumps(content))  # as it will be read: keys that are text
    return json.dumps({**plain, "sha256": seal_of(plain)}, indent=1)


def seal_of(content: Mapping[str, Any]) -> str:
    return sha256_text(json.dumps(content, sort_keys=True))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed` made; files of earlier versions have no hash.

    Raises:
        ValueError: it is no such object, or was changed since.
    """
    content = json.loads(read_text(path))
    if not isinstance(content, dict):
        raise ValueError("is no JSON object")
    seal = content.pop("sha256", None)
    if seal is not None and seal != seal_of(content):
        raise ValueError("was changed: its own hash does not fit")
    return content


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def _read_umask() -> int:
    mask = os.umask(0o022)  # there is no way to ask without setting it
    os.umask(mask)
    return mask


_UMASK = _read_umask()  # at import, while there is one thread


def usual_modes(folder: Path) -> None:
    """Every file as the person's umask wants it: safetensors leaves its own to their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~_UMASK)


@contextmanager
def atomic_directory(path: Path, seal: Callable[[Path], None] | None = None, replaces: bool = False) -> Iterator[Path]:
    """A folder that appears under `path` whole or not at all.

    Yields a hidden sibling to write into; on success its files are synced and it takes `path`'s name, on any
    exception it is removed.

    Args:
        seal: writes a last file into the folder once all others are synced.
        replaces: an existing folder at `path`, which is ours, goes; else only an empty one does.

    Raises:
        TunesmithError: there is such a folder, made by another process meanwhile.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        written = sorted(partial.rglob("*"))
        for file in written:
            sync_path(file)
        if seal:
            seal(partial)
            for file in sorted(set(partial.rglob("*")) - set(written)):
                sync_path(file)
        usual_modes(partial)
        sync_path(partial)
        if replaces and path.exists():  # rename cannot replace a folder that holds files
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
            sync_path(path.parent)
        else:
            take_name(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def take_name(made: Path, path: Path) -> None:
    """One rename, which replaces an empty folder and no other.

    Raises:
        TunesmithError: another process was faster.
    """
    try:
        if os.name == "nt" and path.is_dir():
            path.rmdir()
        made.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise TunesmithError(
            f"{path}: another process made it meanwhile. Give --output a new folder.", code="output-taken"
        ) from None
    sync_path(path.parent)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_ends(path: Path, size: int = 64 * 2**20) -> str:
    """Of a file's first and last bytes; of all of a file that is no longer than both."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        digest.update(file.read(size))
        length = file.seek(0, os.SEEK_END)
        file.seek(max(size, length - size))
        digest.update(file.read(size))
    return digest.hexdigest()


def system_error(error: BaseException) -> OSError | None:
    """The system's own error in what was raised; safetensors and tokenizers wrap it, with the number in their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found:
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return error if isinstance(error, OSError) else None


def is_no_room(error: BaseException) -> bool:
    """Whether a write failed because the disk is full or over quota."""
    found = system_error(error)
    return found is not None and found.errno in NO_ROOM


_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_?alloc|failed to allocate memory"
    r"|(CUBLAS|CUDNN|CUSPARSE|CUSOLVER)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_ON_GPU = re.compile(r"\b(CUDA|HIP|XPU|MPS|GPU|NPU)\b|STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU.

    torch, CUDA's libraries, safetensors and tokenizers say so in the text of a general error. An error of a narrower
    kind may quote a text of the person's that says the same.
    """
    refused = system_error(error)
    if isinstance(error, MemoryError) or (refused is not None and refused.errno == errno.ENOMEM):
        return True
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in kinds:  # torch's, by name: this is asked where torch was never imported
        return True
    is_general = type(error) in (Exception, RuntimeError) or bool(kinds & {"AcceleratorError", "SafetensorError"})
    return (is_general or (type(error) is OSError and error.errno is None)) and _NO_MEMORY.search(
        str(error)
    ) is not None


def lacking_memory(error: BaseException) -> str:
    """Whose memory it was that ran out: "the GPU" or "this machine"."""
    is_torchs = type(error).__name__ in ("OutOfMemoryError", "AcceleratorError")
    return "the GPU" if is_torchs or _ON_GPU.search(str(error)) else "this machine"
