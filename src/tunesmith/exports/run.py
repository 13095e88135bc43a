"""`tunesmith export`: a model in another tool's files, read back and compared before they appear."""

from __future__ import annotations

import logging
from pathlib import Path

from tunesmith.errors import RunError
from tunesmith.exports.hf import write_hf, write_peft
from tunesmith.exports.minimind import write_lora, write_minimind
from tunesmith.exports.request import Export, refuse_unused
from tunesmith.files import atomic_directory, is_no_room
from tunesmith.minimind.read import is_weight_file, lora_names, read_tensors
from tunesmith.model.source import find_model, open_path
from tunesmith.use.merge_output import is_ours, resolve_target

logger = logging.getLogger(__name__)


def run_export(export: Export) -> Path:
    """Write, read back, compare, save; returns the folder.

    Raises:
        ModelError: the model cannot be opened, or has no place in that format.
        RunError: what was written differs, or the disk is full; no files are left.
    """
    path = open_path(export.name)
    if is_weight_file(path) and not path.exists():
        find_model(export.name)  # raises an error that names a similar file
    is_lora = is_weight_file(path) and bool(lora_names(read_tensors(path)))
    refuse_unused(export, is_lora)
    if export.format == "gguf":
        from tunesmith.exports.gguf import export_gguf

        return export_gguf(export)
    folder = resolve_target(export.output)
    write = {"hf": write_hf, "minimind": write_minimind, "minimind-lora": write_lora}[export.format]
    if is_lora:
        write = write_peft
    try:
        with atomic_directory(folder) as partial:
            lines = write(export, partial)
    except Exception as error:
        if is_no_room(error):
            raise RunError(
                f"{export.output}: no space left on the disk. No files were written.", code="disk-full"
            ) from None
        if isinstance(error, OSError) and is_ours(error.filename, folder):
            raise RunError(
                f"{export.output}: cannot be written: {error.strerror}. No files were written.",
                code="output-not-writable",
            ) from None
        raise
    for name, text in lines:
        logger.info(f"{name:<10} {text}")
    logger.info(f"exported: {export.output}")
    return folder
