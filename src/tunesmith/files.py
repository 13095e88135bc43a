"""Files written as if the power failed next: a new name, synced, then one rename. YAML read without surprises."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """YAML, but a key that stands twice is an error instead of a silent win of the second, and dates stay text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Checked here, because later `<<: *other` has put the other's keys among the mapping's own."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return node


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


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader sees the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_path(path.parent)


@contextmanager
def atomic_directory(path: Path, seal: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A folder that appears under `path` whole or not at all.

    Yields a hidden sibling to write into; on success its files are synced and it takes `path`'s name, on any
    exception it is removed. An existing folder at `path` is replaced.

    Args:
        seal: writes a last file into the folder once all others are synced.
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
        sync_path(partial)
        if path.exists():  # rename cannot replace a folder that holds files
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
        sync_path(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_ends(path: Path, size: int = 64 * 2**20) -> str:
    """Of a file's first and last bytes; of all of a file that is no longer than both."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(size))
        length = file.seek(0, os.SEEK_END)
        file.seek(max(size, length - size))
        digest.update(file.read(size))
    return digest.hexdigest()


def is_no_room(error: BaseException) -> bool:
    """Whether a write failed because the disk is full, over quota or read-only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if isinstance(error, OSError):
        return error.errno in codes
    # safetensors and tokenizers wrap the system's error in one of their own, with the number in its text
    return any(f"(os error {code})" in str(error) for code in codes)
