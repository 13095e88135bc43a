"""What to export, and options that an export does not read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.config.schema import ModelSection
from tunesmith.errors import UsageError

_FILE_NAME = re.compile(r"\w[\w.\- ]{0,59}")
Lines = list[tuple[str, str]]
"""What the command prints of an export: (subject, text)."""


@dataclass(frozen=True, slots=True)
class Export:
    """What to export.

    Attributes:
        name: a RUN, model folder, hub id, adapter or .pth.
        generation: of MiniMind's files; None: the newest that the architecture allows.
        weight: begin of the file's name, as MiniMind's `--weight`.
        base: the base of a LoRA .pth.
        type: of a GGUF file's matrices; None: the model's own.
        allow: differences that a GGUF file may have: tokens, template.
    """

    name: str
    output: str
    format: str
    generation: str | None = None
    weight: str | None = None
    tokenizer: str | None = None
    base: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    type: str | None = None
    allow: Sequence[str] = ()

    def section(self, path: str) -> ModelSection:
        values = {"tokenizer": self.tokenizer, "config": dict(self.config), "trust_remote_code": self.trust_remote_code}
        return ModelSection(path=path, **values)  # type: ignore[arg-type]


def refuse_unused(export: Export, is_lora: bool) -> None:
    """Refuse options that this export does not read.

    Raises:
        UsageError: names each.
    """
    is_minimind = export.format.startswith("minimind")
    problems = []
    if export.generation and not is_minimind:
        problems.append("--generation: is for --format minimind and minimind-lora")
    if export.weight and not is_minimind:
        problems.append("--weight: is for --format minimind and minimind-lora")
    if export.type and export.format != "gguf":
        problems.append("--type: is for --format gguf")
    if export.allow and export.format != "gguf":
        problems.append("--allow: is for --format gguf")
    if export.base and not is_lora:
        problems.append("--base: is for a LoRA .pth, which does not name its base")
    if is_lora and export.format == "gguf":
        problems.append("--format: the file is a LoRA .pth of MiniMind; make an adapter of it first with --format hf")
    if is_lora and is_minimind:
        problems.append("--format: the file is a LoRA .pth of MiniMind already; --format hf makes an adapter of it")
    if is_lora and not export.base and not problems:
        problems.append(f"--base: {export.name} holds LoRA matrices; give the model that they were trained on")
    if export.weight is not None and not _FILE_NAME.fullmatch(export.weight):
        problems.append(f"--weight: {export.weight[:60]!r} cannot begin a file's name; use letters, digits, - and _")
    if problems:
        raise UsageError("\n".join(["tunesmith export:", *(f"  {line}" for line in problems)]), code="unused-option")
