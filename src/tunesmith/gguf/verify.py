"""Say whether a GGUF file is as it was exported; reads the file only, without torch or llama.cpp."""

from __future__ import annotations

import logging
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.gguf.seal import find_seal, hash_unsealed

logger = logging.getLogger(__name__)


def verify_gguf(name: str) -> None:
    """Say whether a file is as `tunesmith export` wrote it, and whether that was proven.

    Raises:
        ModelError: it is not a GGUF file, not ours, or was changed since.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        what = "is not a file" if path.exists() else "no such file"
        raise ModelError(f"{name}: {what}. Give the .gguf file that tunesmith export wrote.", code="model-not-found")
    seal = find_seal(path)
    if seal is None:
        raise ModelError(
            f"{name}: has no seal: it was not written by tunesmith export, or another tool has rewritten it "
            "(llama-quantize does).",
            code="gguf-not-sealed",
        )
    if hash_unsealed(path, seal) != seal.sha256:
        raise ModelError(
            f"{name}: was changed after the export: its SHA-256 is not the one in its metadata. Export it again.",
            code="gguf-changed",
        )
    said = "proven: llama.cpp gave the model's ids and logits" if seal.is_proven else "NOT PROVEN by llama.cpp"
    logger.info(f"{name}: unchanged since the export; {said}")
