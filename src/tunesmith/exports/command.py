"""`tunesmith export` on the command line: an export, or a look at a file that one has written."""

from __future__ import annotations

import argparse

from tunesmith.errors import UsageError
from tunesmith.importing import import_libraries

_OF_AN_EXPORT = {
    "output": "--output", "format": "--format", "type": "--type", "allow": "--allow", "generation": "--generation",
    "weight": "--weight", "tokenizer": "--tokenizer", "base": "--base", "model_config": "--model.config",
    "trust_remote_code": "--trust-remote-code",
}  # fmt: skip


def run_export_command(options: argparse.Namespace) -> None:
    """Export, or verify a GGUF file, which needs neither torch nor llama.cpp.

    Raises:
        UsageError: a flag is missing, or is not for what is asked.
    """
    if options.verify:
        from tunesmith.gguf.verify import verify_gguf

        unused = [flag for name, flag in _OF_AN_EXPORT.items() if getattr(options, name)]
        if unused:
            lines = [f"  {flag}: --verify reads the file alone; leave it out" for flag in unused]
            raise UsageError("\n".join(["tunesmith export:", *lines]), code="unused-option")
        verify_gguf(options.model)
        return
    missing = [flag for flag, value in (("--output", options.output), ("--format", options.format)) if value is None]
    if missing:
        raise UsageError(f"tunesmith export: give {' and '.join(missing)}.", code="missing-flag")
    import_libraries()
    from tunesmith.exports.request import Export
    from tunesmith.exports.run import run_export

    run_export(
        Export(
            options.model,
            options.output,
            options.format,
            options.generation,
            options.weight,
            options.tokenizer,
            options.base,
            options.model_config,
            options.trust_remote_code,
            options.type,
            tuple(options.allow),
        )
    )
