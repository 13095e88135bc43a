"""The seal of a GGUF file: its own SHA-256, and whether the file was proven.

Both are metadata (`tunesmith.sha256`, `tunesmith.proven`). The hash reads as empty when it is computed; it covers
everything else, also whether the file was proven.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.reading import open_file

SHA256_KEY, PROVEN_KEY = "tunesmith.sha256", "tunesmith.proven"
EMPTY = "0" * 64
_MAGIC = b"GGUF"
_HEAD = 1 << 16  # the seal is among the first keys
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Seal:
    """Where a file keeps its hash and whether it was proven, and what these places hold."""

    sha256_at: int
    proven_at: int
    sha256: str
    is_proven: bool


def find_seal(path: Path) -> Seal | None:
    """The seal of a file; None if it has none."""
    with open_file(path) as file:
        head = file.read(_HEAD)
    if head[:4] != _MAGIC:
        raise ModelError(f"{path}: is not a GGUF file.", code="not-gguf")
    # a string: length of the key (8 bytes), key, type (4), length of the value (8), value; a bool: ..., type, 1 byte
    seal_at, proven_at = _behind(head, SHA256_KEY, 12), _behind(head, PROVEN_KEY, 4)
    if seal_at is None or proven_at is None or len(head) < max(seal_at + 64, proven_at + 1):
        return None
    written = head[seal_at : seal_at + 64].decode("ascii", "replace")
    return Seal(seal_at, proven_at, written, head[proven_at] == 1)


def _behind(head: bytes, key: str, more: int) -> int | None:
    name = len(key).to_bytes(8, "little") + key.encode()
    at = head.find(name)
    return None if at < 0 else at + len(name) + more


def hash_unsealed(path: Path, seal: Seal) -> str:
    """SHA-256 of the file with an empty hash."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        head = bytearray(file.read(_HEAD))
        head[seal.sha256_at : seal.sha256_at + 64] = EMPTY.encode()
        digest.update(head)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_seal(path: Path, is_proven: bool) -> None:
    """Note whether the file was proven, then its hash."""
    seal = find_seal(path)
    assert seal is not None
    _write_at(path, seal.proven_at, b"\x01" if is_proven else b"\x00")
    _write_at(path, seal.sha256_at, hash_unsealed(path, seal).encode())


def _write_at(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
