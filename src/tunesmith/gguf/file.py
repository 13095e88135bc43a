"""Write a GGUF file, and read its tensors back."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.gguf.seal import EMPTY, PROVEN_KEY, SHA256_KEY
from tunesmith.gguf.tensors import GgufTensor

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's enum llama_ftype


def write_gguf(
    path: Path, arch: str, metadata: Mapping[str, Any], tensors: Sequence[GgufTensor], kind: str
) -> dict[str, str]:
    """Write a file without its seal; returns the SHA-256 of each tensor's bytes.

    Args:
        metadata: full keys; str, bool, int (uint32), float (float32) or a list of one of these.
        kind: type of the matrices.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = GGUFWriter(path, arch)
    writer.add_string(SHA256_KEY, EMPTY)
    writer.add_bool(PROVEN_KEY, False)
    writer.add_uint32("general.file_type", _FILE_TYPES[kind])
    writer.add_uint32("general.quantization_version", 2)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in tensors:
        raw = GGMLQuantizationType[tensor.type.upper()]
        writer.add_tensor_info(tensor.name, tensor.shape, _numpy_type(tensor.type), tensor.nbytes, raw_dtype=raw)
    hashes = {}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        for tensor in tensors:
            # not through writer.write_tensor_data, whose error on a full disk has no number
            writer.write_padding(file, file.tell())
            data = _bytes(tensor.encode())
            file.write(data)
            hashes[tensor.name] = hashlib.sha256(data).hexdigest()
        writer.write_padding(file, file.tell())
        file.flush()
        os.fsync(file.fileno())
    finally:
        for opened in writer.fout or ():
            opened.close()
    return hashes


def _bytes(array: Any) -> memoryview:
    return memoryview(array).cast("B")


def _numpy_type(kind: str) -> Any:
    import numpy as np

    return np.dtype({"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "q8_0": np.int8}[kind])


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, list(value))


def find_changed(path: Path, hashes: Mapping[str, str]) -> str | None:
    """The first tensor that reads back differently from what was written; None if there is none."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    found = {tensor.name: hashlib.sha256(_bytes(tensor.data)).hexdigest() for tensor in reader.tensors}
    return next((name for name in sorted({*hashes, *found}) if hashes.get(name) != found.get(name)), None)
