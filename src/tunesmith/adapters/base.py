"""Record the base of an adapter (config and SHA-256 of weight files) and compare it later.

An adapter on a different base than its own is a different model, and comparing logits cannot detect it, since both
sides would use the wrong base. Files are compared by contents, never by location.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.files import sha256_file
from tunesmith.older_keys import OLDER_KEYS

BASE_RECORD = "base.json"
FORMAT = 1
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "attn_implementation", "use_cache")


def describe_base(folder: Path, commit: str | None = None, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Config and weight files of a model folder, as JSON.

    Args:
        commit: of a hub model.
        known: an earlier record; files unchanged since then by size and time are not hashed again.

    Raises:
        ModelError: a file cannot be read.
    """
    try:
        files = [*weight_files(folder), *sorted(folder.glob("*.py"))]
        before = (known or {}).get("files") or {}
        with ThreadPoolExecutor(4) as pool:
            entries = list(pool.map(lambda path: _describe(path, before.get(path.name)), files))
        config = _read_config(folder)
    except OSError as error:
        raise ModelError(
            f"{error.filename}: cannot be read: {error.strerror}. Check the file's permissions.", code="file-unreadable"
        ) from None
    named = {path.name: entry for path, entry in zip(files, entries, strict=True)}
    return {"format": FORMAT, "commit": commit, "config": config, "files": named}


def weight_files(folder: Path) -> list[Path]:
    """Files from which from_pretrained reads the weights.

    Raises:
        ModelError: the weight index is damaged.
    """
    for single, index in zip(_SINGLES, _INDEXES, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return [folder / name for name in read_index(folder / index)]
    return []


def read_index(path: Path) -> list[str]:
    """Names of the files that contain a model's tensors.

    Raises:
        ModelError: the index is damaged, or names files outside its folder.
    """
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        is_whole = all(Path(name).name == name for name in names)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ModelError(
            f"{path}: cannot be read. Download or copy the model again.", code="weight-index-unreadable"
        ) from None
    if not is_whole:
        raise ModelError(
            f"{path}: names files outside its folder. Download or copy the model again.", code="weight-index-outside"
        )
    return names


def _describe(path: Path, before: Any) -> dict[str, Any]:
    stat = path.stat()
    entry: dict[str, Any] = {"size": stat.st_size, "untouched": [stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]}
    if isinstance(before, Mapping) and {**before, "sha256": ""} == {**entry, "sha256": ""}:
        return {**entry, "sha256": before["sha256"]}
    return {**entry, "sha256": sha256_file(path)}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {key: value for key, value in content.items() if key not in _VOLATILE and not key.startswith("_")}
    except (ValueError, AttributeError):
        raise ModelError(
            f"{folder / 'config.json'}: cannot be read. Download or copy the model again.",
            code="model-config-unreadable",
        ) from None


def hub_folder(name: str, revision: str | None) -> Path | None:
    """Folder of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str | os.PathLike) else None


def hub_commit(name: str, revision: str | None) -> str | None:
    """Commit of a model in the hub's cache, from the name of its snapshot."""
    folder = hub_folder(name, revision)
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def record_base(kind: str, name: str, revision: str | None) -> dict[str, Any] | None:
    """The base record for an adapter trained on a loaded local or hub model."""
    if kind == "local":
        return describe_base(Path(name))
    folder = hub_folder(name, revision)
    if folder is None:
        return None
    return describe_base(folder, hub_commit(name, revision))


def write_record(record: Mapping[str, Any] | None, adapter: Path) -> None:
    if record is not None:
        (adapter / BASE_RECORD).write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")


def read_record(adapter: Path) -> dict[str, Any] | None:
    """The base record of an adapter; None if another tool saved it.

    Raises:
        ModelError: the record is damaged.
    """
    path = adapter / BASE_RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_ours = (
            record["format"] <= FORMAT and isinstance(record["config"], dict) and isinstance(record["files"], dict)
        )
        is_ours = is_ours and all(isinstance(entry["sha256"], str) for entry in record["files"].values())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        is_ours = False
    if not is_ours:
        raise ModelError(
            f"{path}: cannot be read; it is the record of the adapter's base. Copy the adapter's folder again.",
            code="base-record-unreadable",
        )
    return record


def find_changes(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences between a base and the recorded one, as phrases for a message."""
    was, config = record["config"], now["config"]
    changes = [
        f"config.json has {key} {_short(config.get(key))} instead of {_short(was.get(key))}"
        for key in sorted(set(was) | set(config))
        if was.get(key) != config.get(key) and not _is_repeated(key, was, config)
    ]
    hashes = {name: entry["sha256"] for name, entry in record["files"].items()}
    for name, entry in now["files"].items():
        if name not in hashes:
            changes.append(f"{name} is new")
        elif entry["sha256"] != hashes[name]:
            changes.append(f"{name} has different contents")
    return changes + [f"{name} is missing" for name in hashes if name not in now["files"]]


def _is_repeated(key: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether only one of the configs repeats under an older name what both have under the new one."""
    newer = OLDER_KEYS.get(key)
    return newer is not None and newer in was and newer in now and (key in was) != (key in now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def require_base(
    adapter: Path, base: Path, is_allowed: bool, advice: str, reads_all: bool = False, shown: str = ""
) -> str:
    """Compare a base with the one that the adapter was trained on; returns a remark to print.

    Args:
        is_allowed: report differences only in the remark.
        advice: how to allow them.
        reads_all: hash all files again, whatever their size and time.
        shown: the base's name in messages, if it is not the folder.

    Raises:
        ModelError: it is a different base.
    """
    record = read_record(adapter)
    if record is None:
        return f"{adapter} has no record of its base's weights; only names and shapes can be compared"
    changes = find_changes(record, describe_base(base, known=None if reads_all else record))
    if not changes:
        return ""
    name, said = shown or base, "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
    if is_allowed:
        return f"{name} is not the base that {adapter} was trained on ({said}); used because changes are allowed"
    raise ModelError(
        f"{adapter}: was trained on a different base than {name}: {said}. Restore the base that it was trained on. "
        f"{advice}",
        code="base-changed",
    )


def same_base(adapter: Path, record: Mapping[str, Any] | None) -> Sequence[str]:
    """Changes of the base since the adapter in a folder was saved; empty without a record."""
    before = read_record(adapter)
    return find_changes(before, record) if before and record else []
