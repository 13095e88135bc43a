"""The cache folder: prepared stores by fingerprint, and the hashes of data files.

$TUNESMITH_CACHE, else $XDG_CACHE_HOME/tunesmith, else ~/.cache/tunesmith:
    prepared/KEY/tokens/      a token store, complete or not
    prepared/KEY/entry.json   makes it complete: hashes of the store's files, and the ledger
    prepared/KEY.lock         locked by the process that uses the entry; the lock ends with the process
    files/NAME.json           SHA-256 of a data file with the size, times and inode that it had

Beyond $TUNESMITH_CACHE_GB (default 50), the entries that were used the longest time ago are removed, except those that
are locked. Runs have copies of their own (hard links where the file system has them) and need no entry.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.files import (
    read_sealed,
    require_written,
    sha256_file,
    sha256_text,
    spell_sealed,
    sync_tree,
    write_text_atomic,
)
from tunesmith.reading import read_text

DEFAULT_GB = 50.0
_SMALL_BYTES = 8_000_000  # of a file that is hashed faster than a record of it is worth
_FRESH_NS = 2_000_000_000  # a file may change once more without another time, so soon after it was written
_OLD_S = 90 * 86_400  # hashes of files that nobody has asked for since
_LOOK_S = 0.2

Stamp = tuple[int, int, int, int]


class NoCache(Exception):
    """The cache folder cannot be used; the text says why."""


def cache_root() -> Path:
    """Raises:
    NoCache: there is no place for it.
    """
    if given := os.environ.get("TUNESMITH_CACHE"):
        return Path(given).expanduser().absolute()
    with contextlib.suppress(RuntimeError):  # no home folder
        base = os.environ.get("XDG_CACHE_HOME")
        return Path(base) / "tunesmith" if base and os.path.isabs(base) else Path.home() / ".cache" / "tunesmith"
    raise NoCache("there is no home folder; set TUNESMITH_CACHE to a folder")


def cache_limit() -> int:
    """Bytes that the prepared stores may have together.

    Raises:
        TunesmithError: TUNESMITH_CACHE_GB is not a number.
    """
    text = os.environ.get("TUNESMITH_CACHE_GB", "")
    try:
        size = float(text or DEFAULT_GB)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise TunesmithError(
            f"TUNESMITH_CACHE_GB: {text!r} is not a size. Give the cache's largest size in GB, such as 50.",
            code="cache-size",
        )
    return int(size * 1e9)


def stamp_of(path: Path) -> Stamp:
    """Changes whenever a file's content does, unless somebody sets the clock back."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def hash_data_file(path: Path) -> str:
    """SHA-256 of a file; one that has been hashed before and has not changed since is not read again."""
    stamp = stamp_of(path)
    if stamp[0] < _SMALL_BYTES:
        return sha256_file(path)
    try:
        record = cache_root() / "files" / f"{sha256_text(os.path.realpath(path))[:32]}.json"
    except NoCache:
        return sha256_file(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(read_text(record))
        if tuple(saved["stamp"]) == stamp:
            os.utime(record)
            return str(saved["sha256"])
    sha256 = sha256_file(path)
    if stamp_of(path) == stamp and time.time_ns() - max(stamp[1], stamp[2]) > _FRESH_NS:
        with contextlib.suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(record, json.dumps({"path": str(path), "stamp": stamp, "sha256": sha256}))
    return sha256


@dataclass(frozen=True, slots=True)
class Entry:
    """A prepared store in the cache, locked for this process."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "tokens"

    @property
    def _record(self) -> Path:
        return self.folder / "entry.json"

    @property
    def _stamps(self) -> Path:
        return self.folder / "stamps.json"

    def read(self) -> tuple[dict[str, str], Any] | None:
        """Hashes of a complete store's files, and its ledger as saved; None if it is not complete.

        Raises:
            ValueError: a file has changed.
        """
        if not self._record.exists():
            return None
        try:
            saved = read_sealed(self._record)
            sha256: dict[str, str] = saved["files"]
            stamps = json.loads(read_text(self._stamps)) if self._stamps.exists() else {}
            for name, expected in sha256.items():
                path = self.store / name
                is_known = tuple(stamps.get(name, ())) == stamp_of(path)
                if not is_known and sha256_file(path) != expected:
                    raise ValueError(f"{name} has changed")
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None
        return sha256, saved["ledger"]

    def complete(self, sha256: Mapping[str, str], ledger: Mapping[str, Any]) -> None:
        """Make the entry valid; its store has been written and read back."""
        sync_tree(self.store)
        write_text_atomic(self._record, spell_sealed({"files": dict(sha256), "ledger": ledger}))

    def hand_over(self, folder: Path, sha256: Mapping[str, str]) -> None:
        """Give a run its own copy of the store: links to the same files where the file system allows that."""
        folder.mkdir(parents=True)
        for name, expected in sha256.items():
            try:
                os.link(self.store / name, folder / name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(self.store / name, folder / name)
                require_written(folder / name, expected)
        with contextlib.suppress(OSError):  # a cache that can only be read
            stamps = {name: stamp_of(self.store / name) for name in sha256}  # a link has changed a time
            write_text_atomic(self._stamps, json.dumps(stamps))

    def clear(self) -> None:
        """Remove all that was prepared."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def open_entry(key: str, on_wait: Callable[[str], None]) -> Iterator[Entry]:
    """Lock an entry, which need not exist yet; waits while another process has it.

    Args:
        on_wait: called once with what is waited for.

    Raises:
        NoCache: the folder cannot be written to, or its file system has no locks.
    """
    folder = cache_root() / "prepared"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder / f"{key}.lock", on_wait)
    except OSError as error:
        raise NoCache(f"{folder}: {error.strerror or error}") from None
    assert handle is not None
    try:
        entry = Entry(folder / key)
        entry.folder.mkdir(exist_ok=True)
        os.utime(entry.folder)  # when it was used last
        yield entry
    finally:
        os.close(handle)


def _lock(path: Path, on_wait: Callable[[str], None] | None) -> int | None:
    """The handle of a lock file once it is ours; None where another process has it and nobody waits."""
    import fcntl

    has_told = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:  # nobody has removed it meanwhile
                os.truncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        except BlockingIOError:
            if on_wait is None:
                os.close(handle)
                return None
            if not has_told:
                owner = os.pread(handle, 20, 0).decode(errors="replace") or "?"
                on_wait(f"process {owner} is preparing the same data; waiting for it")
                has_told = True
            time.sleep(_LOOK_S)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def trim_cache(limit: int, kept: str) -> None:
    """Remove entries beyond the limit, the one that was used the longest time ago first.

    Args:
        limit: bytes of all entries together.
        kept: key of an entry that stays in any case.
    """
    folder = cache_root() / "prepared"
    found = []
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            if entry.is_dir():
                size = sum(path.stat().st_blocks * 512 for path in entry.rglob("*"))
                found.append((entry.stat().st_mtime_ns, size, entry))
    total = sum(size for _, size, _ in found)
    for _, size, entry in sorted(found):
        if total <= limit:
            break
        lock = folder / f"{entry.name}.lock"
        if entry.name == kept or (handle := _lock(lock, None)) is None:
            continue
        try:
            shutil.rmtree(entry, ignore_errors=True)
            lock.unlink(missing_ok=True)
            total -= size
        finally:
            os.close(handle)
    for record in (cache_root() / "files").glob("*.json"):
        with contextlib.suppress(OSError):
            if time.time() - record.stat().st_mtime > _OLD_S:
                record.unlink()
