"""The arguments of the Python API as sections of a config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError
from tunesmith.sources.memory import is_rows

Name = str | os.PathLike[str]
Rows = dict[str, Any]


def read_arguments(
    model: Any, data: Any, tokenizer: Any, eval_data: Any, sections: Mapping[str, Any]
) -> tuple[dict[str, Any], Rows]:
    """The arguments as sections of a config, and the rows among them by their key of the data section."""
    tree: dict[str, Any] = {
        name: dict(below) if isinstance(below, Mapping) else below for name, below in sections.items()
    }
    tree |= {"model": dict(model)} if isinstance(model, Mapping) else {}
    tree |= {"data": dict(data)} if isinstance(data, Mapping) else {}
    if model is not None and not isinstance(model, Mapping):
        section_of(tree, "model")["path"] = os.fspath(model)
    if tokenizer is not None:
        section_of(tree, "model")["tokenizer"] = os.fspath(tokenizer)
    if data is not None and not isinstance(data, Mapping):
        section_of(tree, "data")["train"] = data
    if eval_data is not None:
        section_of(tree, "data")["eval"] = eval_data
    tree = _texts(tree)
    rows: Rows = {}
    below = tree["data"] if isinstance(tree.get("data"), dict) else {}
    for key in ("train", "eval"):
        if is_rows(below.get(key)):
            rows[key] = below[key]
            below[key] = [f"rows:{key}"]
        elif key in below:
            below[key] = _names(below[key])
    return tree, rows


def section_of(tree: dict[str, Any], name: str) -> dict[str, Any]:
    below = tree.setdefault(name, {})
    if not isinstance(below, dict):
        raise ConfigError("the arguments", [f"{name}: is a section; give a dict of its keys"])
    return below


def _texts(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with every path as text; rows stay as they are."""
    changed: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            changed[name] = _texts(value)
        else:
            changed[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return changed


def _names(given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return [os.fspath(name) if isinstance(name, os.PathLike) else name for name in given]
    return given


def as_path(name: Name | None) -> Path | None:
    return Path(name) if name is not None else None
