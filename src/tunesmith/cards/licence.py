"""The licence of a model, as its own card or config states it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.cards.card import hub_id
from tunesmith.model.source import ModelSource
from tunesmith.reading import read_text

CARD = "README.md"
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_LONGEST = 2**16  # characters of metadata


@dataclass(frozen=True, slots=True)
class Licence:
    """Attributes:
    id: as the hub names it: apache-2.0, mit, gemma, other.
    name, link: of a licence whose id is other.
    """

    id: str
    name: str = ""
    link: str = ""

    @property
    def shown(self) -> str:
        return self.name if self.id == "other" and self.name else self.id

    def to_front(self) -> dict[str, str]:
        """Its keys in the metadata of a card."""
        values = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in values.items() if value}


def split_front(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card; no metadata where it has none, or where it is damaged."""
    found = _FRONT.match(card)
    if found is None or len(found[1]) > _LONGEST:
        return {}, card
    try:
        front = yaml.safe_load(found[1])
    except Exception:  # yaml: besides its own errors those of values that do not fit a tag, as in "!!bool x"
        return {}, card
    return (front, card[found.end() :]) if isinstance(front, dict) else ({}, card)


def read_licence(front: Mapping[str, Any]) -> Licence | None:
    """The licence in a card's metadata, or in a config.json."""
    found = front.get("license")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, str) or not found.strip():
        return None
    more = {key: front.get(f"license_{key}") for key in ("name", "link")}
    return Licence(found.strip(), **{key: value for key, value in more.items() if isinstance(value, str)})


def find_licence(folder: Path) -> Licence | None:
    """The licence that a model's folder states in its README.md, else in its config.json; None if it states none."""
    front: Mapping[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        front = split_front(read_text(folder / CARD, errors="replace"))[0]
    if found := read_licence(front):
        return found
    try:
        config = json.loads(read_text(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return None
    return read_licence(config) if isinstance(config, dict) else None


def base_licence(source: ModelSource) -> Licence | None:
    """The licence of a run's base as far as it is known on this machine: from its folder, or the hub's cache."""
    if source.kind == "local" and not source.file:
        return find_licence(Path(source.name))
    name, revision = hub_id(source)
    return cached_licence(name, revision) if name else None


def cached_licence(name: str, revision: str | None) -> Licence | None:
    """The licence of a hub model whose card was downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for file in (CARD, "config.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str | os.PathLike) and (licence := find_licence(Path(found).parent)):
            return licence
    return None
