"""Fingerprint of a run (data, tokenizer, model, config, versions). Resume refuses changes that would alter training.

Changes that do not (log_steps, trackers, save_steps and the like) are accepted.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.choices import FREE_KEYS, NAME_KEYS, part_of
from tunesmith.config.plainyaml import show
from tunesmith.config.runfile import leaf_fields, resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.config.sources import amounts_of
from tunesmith.data.dataset import DataSources, StoreHashes
from tunesmith.errors import TunesmithError
from tunesmith.files import sha256_ends
from tunesmith.hashes import describe_weights, hash_config, hash_template, hash_tokenizer
from tunesmith.preparation.cache import hash_data_file
from tunesmith.run.records import Fingerprint
from tunesmith.run.session import Session
from tunesmith.runfolder import RunFolder

RELABELS = ("data", "template", "tokenizer")  # parts that decide the tokens on disk
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin")
_PACKAGES = ("torch", "transformers", "tokenizers", "peft")
_ENDS = 1 << 20  # bytes
_FREE = ("train.output_dir", *FREE_KEYS)  # keys that do not alter training
_BY_HASH = (*NAME_KEYS, "model.add_tokens", "model.config")  # compared by content


def take_fingerprint(session: Session, files: FileRecords, store: StoreHashes) -> Fingerprint:
    """The fingerprint of a run.

    Args:
        files: from `describe_files`.
        store: hashes of its token stores.
    """
    return Fingerprint(
        data={part: [dict(entry) for entry in entries] for part, entries in files.items()},
        template=hash_template(session.encoder),
        tokenizer=hash_tokenizer(session.encoder),
        model=hash_config(session.model_config),
        weights=describe_weights(session.model, session.config.model.revision),
        config=session.config.model_dump(mode="json"),
        threads=torch.get_num_threads(),
        processes=session.world.size,
        precision=session.precision.name,
        has_copies=session.precision.has_copies,
        versions={name: _version(name) for name in _PACKAGES},
        store={folder: dict(hashes) for folder, hashes in store.items()},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


FileRecords = Mapping[str, Sequence[Mapping[str, Any]]]


def describe_files(data: DataSources, is_stream: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Every data file, in order, with its size, time and SHA-256; hub data by name.

    Args:
        is_stream: take the SHA-256 of the ends of each file, since reading all of it may take hours.
    """
    described: dict[str, list[dict[str, Any]]] = {}
    for part, sources in (("train", data.train), ("eval", data.eval)):
        described[part] = [_describe_file(path, sources.name_of(path), is_stream) for path in sources.files]
        described[part] += [{"hub": list(name)} for name in sources.hub]
    return described


def _describe_file(path: Path, name: str, is_stream: bool) -> dict[str, Any]:
    stat = path.stat()
    sha256 = {"ends": sha256_ends(path, _ENDS)} if is_stream else {"sha256": hash_data_file(path)}
    return {
        "path": str(Path(name).resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        **sha256,
    }


def compare_files(before: FileRecords, sources: DataSources | None) -> tuple[list[str], list[str]]:
    """Data files that have changed since the run began: reasons to refuse, and remarks.

    A file with the same size and time is not hashed again. A missing file causes only a remark, since the run has its
    own tokens.

    Args:
        sources: the files that the names match now; None if one is missing.
    """
    refusals, notes = [], []
    for part in ("train", "eval"):
        for entry in before[part]:
            if "hub" in entry:
                continue
            path = Path(entry["path"])
            if not path.is_file() and "ends" in entry:
                refusals.append(f"data: {path} no longer exists, and the run streams it")
                continue
            if not path.is_file():
                notes.append(f"{path} no longer exists; the run's own copy of its tokens is used")
                continue
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["mtime_ns"]):
                continue
            if stat.st_size != entry["size"] or not _has_content(path, entry):
                refusals.append(f"data: {path} has changed since the run began")
    parts = (("train", sources.train), ("eval", sources.eval)) if sources else ()
    given = {(part, str(path.resolve())) for part, found in parts for path in found.files}
    had = {(part, entry["path"]) for part in ("train", "eval") for entry in before[part] if "path" in entry}
    if given and given != {(part, path) for part, path in had if Path(path).exists()}:
        part, other = (sorted(given - had) or sorted(had - given))[0]
        refusals.append(f"data: the list of files differs from that at the start of the run (data.{part}: {other})")
    return refusals, notes


def _has_content(path: Path, entry: Mapping[str, Any]) -> bool:
    if "ends" in entry:
        return bool(sha256_ends(path, _ENDS) == entry["ends"])
    return bool(hash_data_file(path) == entry["sha256"])


def compare_runs(before: Fingerprint, now: Fingerprint) -> tuple[list[str], list[str]]:
    """(reasons to refuse, each starting with the part of the fingerprint: "template: ..."; remarks)."""
    refusals = list(_compare_weights(before.weights, now.weights))
    notes: list[str] = []
    if before.processes != now.processes:
        plural = "" if now.processes == 1 else "es"
        notes.append(f"{now.processes} process{plural} instead of {before.processes}: sums are rounded differently")
    for part in ("template", "tokenizer", "model"):
        if getattr(before, part) != getattr(now, part):
            what = {"template": "the chat template", "tokenizer": "the tokenizer", "model": "the model's config"}[part]
            refusals.append(f"{part}: {what} has changed since the run began")
    # a key that is missing before is younger than the run, which then had its default
    old, new = _default_values() | flatten(before.config), flatten(now.config)
    for key in sorted(set(old) | set(new)):
        if old.get(key) == new.get(key) or any(f"{key}.".startswith(f"{name}.") for name in _BY_HASH):
            continue
        if key == "data.share_prefix" and new[key] == before.shares_prefixes:  # auto had decided the same
            continue
        change = f"{key} {_show(old.get(key))} -> {_show(new.get(key))}"
        if key in _FREE:
            if key not in ("train.output_dir", "train.epochs", "train.max_steps"):
                notes.append(f"accepted: {change}")
        else:
            refusals.append(f"{part_of(key)}: {change}")
    amounts = [amounts_of(config["data"]["train"]) for config in (before.config, now.config)]
    if amounts[0] != amounts[1] and any(any(item) for item in (*amounts[0], *amounts[1])):
        refusals.append("data: the weights, epochs or limits of the sources in data.train have changed")
    for name, version in before.versions.items():
        current = now.versions.get(name)
        if _minor(version) != _minor(current):
            refusals.append(f"versions: {name} {version} -> {current}")
        elif version != current:
            notes.append(f"{name} {version} -> {current}: a patch release, accepted")
    return refusals, notes


def find_changes(config: RunConfig, folder: RunFolder) -> dict[str, object]:
    """Keys that differ from RUN/config.yaml, which resume takes.

    Raises:
        TunesmithError: a key differs that decides what is trained.
    """
    before = flatten(resolve_config(RunConfig, folder.config, {}).model_dump(mode="json"))
    now = flatten(config.model_dump(mode="json"))
    changed = {key for key in now.keys() | before.keys() if now.get(key) != before.get(key)} - {"train.output_dir"}
    others = sorted(changed - set(FREE_KEYS))
    if others:
        key = others[0]
        raise TunesmithError(
            f"{config.train.output_dir}: contains another run: {key} is {show(before.get(key))} there, and "
            f"{show(now.get(key))} here. Give --output a new folder, or restore the key.",
            code="output-taken",
        )
    return {key: now.get(key) for key in sorted(changed)}


def _default_values() -> dict[str, Any]:
    fields = leaf_fields(RunConfig).items()
    return {key: field.get_default(call_default_factory=True) for key, field in fields if not field.is_required()}


def _compare_weights(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Compare by content: the model's folder may have moved."""
    names = {os.path.basename(name) for name in now}
    for name, was in before.items():
        if isinstance(was, Mapping):
            if was not in now.values():
                is_there = os.path.basename(name) in names
                what = "has changed since the run began" if is_there else "is missing from the model"
                yield f"model: {name} {what}"
        elif was is not None and now.get(name) != was:  # None: earlier versions did not record a hub model's commit
            yield f"model: {name} has changed since the run began (restore it with --model.revision {was})"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} -> {"train.seed": 0}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _minor(version: str | None) -> str | None:
    return ".".join(version.split(".")[:2]) if version else None


def _show(value: Any) -> str:
    return "unset" if value is None else str(value)


def refuse_changes(refusals: Sequence[str], allowed: Sequence[str], run: Path, again: str) -> list[str]:
    """Check the changes; returns the changed parts that are allowed.

    Args:
        again: the command as typed.

    Raises:
        TunesmithError: for all changes that are not allowed.
    """
    forbidden = [line for line in refusals if line.split(":")[0] not in allowed]
    if forbidden:
        parts = " ".join(dict.fromkeys(line.split(":")[0] for line in forbidden))
        lines = "\n".join(f"  {line}" for line in forbidden)
        raise TunesmithError(
            f"{run}: resume would alter training, since:\n{lines}\n"
            f"Restore what has changed, or allow it: {again} --allow {parts}",
            code="run-changed",
        )
    return sorted({line.split(":")[0] for line in refusals})


def run_id(output: Path, date: datetime.datetime) -> str:
    """A run id for trackers; a resumed run keeps it."""
    return hashlib.sha256(f"{os.fspath(output)}{date.isoformat()}".encode()).hexdigest()[:12]
