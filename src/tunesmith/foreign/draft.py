"""A run file while it is converted from another tool's config: our keys, and what became of theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config.plainyaml import show

Tree = dict[str, Any]


@dataclass
class Draft:
    """Attributes:
    tool: "axolotl", "llama-factory" or "trl".
    theirs: the file, without empty values.
    folder: where the file is; names in it may be relative to that.
    dataset_info: LLaMA-Factory's data folder, where the user names one.
    template_file: name for a chat template that the file contains.
    ours: dotted key -> value.
    rows: rows of one of their batches.
    notes: what a reader should know about a key that was converted or needs no counterpart.
    left_out: why -> keys that need no counterpart.
    lost: keys whose meaning the run file does not have.
    comments: settings of other processes, kept as comments of the run file.
    templates: file name -> chat template to write beside the run file.
    seen: their keys that are accounted for.
    origins: our key -> their key that it was converted from.
    """

    tool: str
    theirs: Mapping[str, Any]
    folder: Path
    dataset_info: Path | None = None
    template_file: str = "chat_template.jinja"
    ours: Tree = field(default_factory=dict)
    rows: int = 1
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    templates: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    origins: dict[str, str] = field(default_factory=dict)

    def note(self, key: str, text: str) -> None:
        self.notes.append(f"{key}: {text}")

    def leave_out(self, key: str, why: str) -> None:
        self.left_out.setdefault(why, []).append(key)

    def lose(self, key: str, value: Any, why: str) -> None:
        self.lost.append(f"{key}: {show(value, 80)}; {why}")

    def share_of_epochs(self, per_epoch: float, key: str) -> float | None:
        """N times an epoch as a share of all steps; None where the end of the run is enough, or it cannot be said."""
        epochs = self.ours.get("train.epochs", 1.0)
        if not is_number(epochs) or epochs <= 0:
            self.lose(key, per_epoch, f"the number of epochs is {show(epochs, 40)}")
            return None
        if self.ours.get("train.max_steps"):
            self.lose(key, per_epoch, "with max_steps the length of an epoch is not known; set the steps by hand")
            return None
        share = 1 / (per_epoch * epochs)
        return round(share, 6) if share < 1 else None


def number(value: Any) -> Any:
    """A number that YAML reads as text (1e-4); other values as they are."""
    if isinstance(value, str):
        text = value.replace("_", "")
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_on(value: Any) -> bool:
    """true, "true", 1; a text that is not a negation."""
    return bool(value) and str(value).lower() not in ("false", "no", "off", "none", "0")
