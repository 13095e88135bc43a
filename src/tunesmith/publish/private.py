"""Keep what belongs to this machine out of what is published: folders, users, rows of the data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from tunesmith.config.plainyaml import dump
from tunesmith.config.runfile import read_yaml
from tunesmith.runfolder import RunFolder

_OWN_NAMES = (  # where older libraries kept the folder that was loaded, and its files
    "_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file",
)  # fmt: skip
_ROWS = ("rows",)  # of metrics.jsonl: names of rows, as FILE:ROW
_PATH = re.compile(r"(?<![\w./~:-])(?:~|(?:/[\w.@+-]+){2,}|[A-Za-z]:\\[\w.@+\\-]+)[\w./@+-]*")
_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|md|parquet|arrow|xlsx?|ya?ml|jinja|pth|gz|zst|xz|bz2|zip)(:\d+)?$")
_SYSTEM = ("/bin", "/dev", "/etc", "/lib", "/opt", "/proc", "/sbin", "/sys", "/usr")
_LONGEST, _MOST = 2**21, 1000  # characters of a text, paths in it


def is_path(name: str) -> bool:
    """Whether a name says where something is on a machine, and not only what it is called."""
    if name.startswith("/"):
        return name.count("/") > 1 or os.path.lexists(name)  # /no_think is none
    return PureWindowsPath(name).is_absolute() or name.startswith(("~/", "./", "../"))


def last_part(name: str) -> str:
    return PureWindowsPath(name).name if "\\" in name else os.path.basename(name.rstrip("/"))


def without_own_path(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config, with those in it, without the folder that it was loaded from; None if it names none."""
    kept: dict[str, Any] = {}
    for key, value in content.items():
        if key in _OWN_NAMES and isinstance(value, str) and _is_own(value):
            continue
        changed = without_own_path(value) if isinstance(value, Mapping) else None
        kept[key] = value if changed is None else changed
    return kept if kept != content else None


def _is_own(name: str) -> bool:
    """Whether a name that a library kept is of this machine, and not a hub id."""
    return is_path(name) or name.count("/") > 1 or "\\" in name or ("/" in name and _is_here(name, Path()))


def run_cwd(record: Mapping[str, Any]) -> Path:
    """The folder to which names in a run's config and ledger are relative."""
    found = record.get("cwd")
    return Path(found) if isinstance(found, str) else Path()


def without_paths(value: Any, cwd: Path) -> Any:
    """Values of a config or record with files and folders by their last part.

    Args:
        cwd: to which relative names refer.
    """
    if isinstance(value, Mapping):
        return {key: without_paths(below, cwd) for key, below in value.items()}
    if isinstance(value, list):
        return [without_paths(item, cwd) for item in value]
    if isinstance(value, str) and (is_path(value) or ("/" in value[1:] and _is_here(value, cwd))):
        return last_part(value)
    return value


def _is_here(name: str, cwd: Path) -> bool:
    """Whether a relative name is of a file or in a folder of this machine; a hub id is not."""
    try:
        there = cwd / name
        return os.path.lexists(there) or there.parent.is_dir() or bool(_FILE.search(name))
    except (OSError, ValueError):
        return False


def plain_config(run: RunFolder, cwd: Path) -> bytes:
    """RUN/config.yaml without folders of this machine."""
    return dump(without_paths(read_yaml(run.config), cwd)).encode()


def plain_metrics(run: RunFolder, cwd: Path) -> Iterator[bytes]:
    """The lines of RUN/metrics.jsonl, without the names of rows."""
    for line in run.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            kept = {key: without_paths(value, cwd) for key, value in record.items() if key not in _ROWS}
            yield json.dumps(kept).encode() + b"\n"


def find_paths(text: str) -> list[str]:
    """Files and folders of this machine that a text names, each once; those of the system do not count."""
    return list(_find(text[:_LONGEST]))[:3]


def _find(text: str) -> Iterable[str]:
    home = str(Path.home())
    for name in list(dict.fromkeys(match.group() for match in _PATH.finditer(text)))[:_MOST]:
        whole = home + name[1:] if name.startswith("~") else name
        if name.startswith("~") and not name.startswith("~/"):
            continue
        if not whole.startswith(_SYSTEM) and os.path.lexists(whole.rstrip(".,;:")):
            yield name
