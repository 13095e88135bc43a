"""`tunesmith convert-config`: print or write the run file of another tool's config or command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tunesmith.errors import UsageError
from tunesmith.files import write_text_atomic
from tunesmith.foreign.convert import convert_file
from tunesmith.foreign.minimind import convert_command


def take_command(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """Split off the command of another tool after --, which convert-config --from reads; None where there is none.

    Raises:
        UsageError: --from without it, or it without --from.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    words = argv[end + 1 :] if "--" in argv else None
    is_from = any(word.partition("=")[0] == "--from" for word in argv[:end])
    example = "tunesmith convert-config --from minimind -- python train_full_sft.py --dim 512"
    if is_from and words is None and not {"-h", "--help"} & set(argv):
        raise UsageError(f"convert-config --from: needs -- before the command, as in\n  {example}", code="no-command")
    if words is not None and not is_from:
        raise UsageError(f"convert-config: a command after -- needs --from, as in\n  {example}", code="flag-missing")
    return argv[:end], words


def run_convert_config(options: argparse.Namespace, words: list[str] | None) -> None:
    path, output = options.file, options.output
    if words is not None:
        if path is not None or options.dataset_info is not None:
            raise UsageError(
                "convert-config --from: takes a command, no file and no --dataset-info", code="flag-conflict"
            )
        _convert_command(words, options)
        return
    if path is None:
        raise UsageError("convert-config: needs a YAML file, or --from minimind -- COMMAND", code="flag-missing")
    if options.generation is not None:
        raise UsageError("convert-config --generation: is for --from minimind", code="flag-conflict")
    converted = convert_file(path, output, options.dataset_info)
    for remark in converted.remarks():
        print(remark, file=sys.stderr)
    if output is None:
        for name in converted.templates:
            print(f"correct by hand: data.chat_template: {name} is part of {path}; --output writes it", file=sys.stderr)
        print(converted.text, end="")
        return
    for file, text in ((output, converted.text), *((Path(n), text) for n, text in converted.templates.items())):
        write_text_atomic(file, text)
        print(f"written: {file}")


def _convert_command(words: list[str], options: argparse.Namespace) -> None:
    """Print the run file, or write it; for a script that talks to a model, print the command."""
    converted = convert_command(words, options.generation, options.output)
    for remark in converted.remarks():
        print(remark, file=sys.stderr)
    if options.output is None:
        print(converted.text or f"{converted.command}\n", end="")
        return
    write_text_atomic(options.output, converted.text)
    print(f"written: {options.output}\ntrain it: {converted.command}")
