"""Checkpoints in shards, and weights taken group by group, for models larger than one host's memory.

Each process writes its shards into a hidden folder, and a note with their hashes; the first one waits for all notes,
writes the manifest and renames the folder. Nothing here waits in a collective, so it runs beside the next steps.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.display import format_bytes
from tunesmith.distributed.load import write_names
from tunesmith.distributed.shards import Shard, ShardFiles, write_shards
from tunesmith.distributed.spread import Spread
from tunesmith.distributed.world import World
from tunesmith.encode.encoder import Encoder
from tunesmith.files import complete_directory, sync_path, write_text_atomic
from tunesmith.model.loss import SupervisedLM
from tunesmith.model.save import write_trained
from tunesmith.runfolder import RunFolder
from tunesmith.tensors import write_tensors
from tunesmith.training.checkpoint import (
    RANDOM,
    SHARDS,
    STATE,
    DamagedError,
    describe_file,
    find_damage,
    list_checkpoints,
    optimizer_tensors,
    placed_weights,
    read_checkpoint,
    write_manifest,
)

GROUP_BYTES = 4 * 2**30  # of a model's weights that are whole in memory at once
_MARGIN = 1.25
_POLL_S = 0.05
_BLOCK = re.compile(r".*?\.\d+\.")


@dataclass(frozen=True, slots=True)
class Form:
    """How checkpoints are saved.

    Attributes:
        line: the reason, for the summary; "" where there is no choice.
    """

    in_shards: bool = False
    line: str = ""


WHOLE = Form()


def choose_form(setting: bool | str, trained: Sequence[Tensor], taken_first: float, free: float) -> Form:
    """Whole checkpoints where the first process has memory for what it gathers, else shards.

    Args:
        setting: train.sharded_checkpoints.
        taken_first: bytes that training will take of `free` before anything is gathered.
        free: bytes of the first process's host.
    """
    needed = 3 * sum(p.numel() * p.element_size() for p in trained)  # weights and AdamW's two averages
    sizes = f"{format_bytes(needed)} on the first process, where {format_bytes(max(0.0, free - taken_first))} are free"
    in_shards = _MARGIN * needed > free - taken_first if setting == "auto" else bool(setting)
    if in_shards:
        return Form(True, f"in shards, each process writes its own; whole, they would take {sizes}")
    return Form(False, f"whole: gathered, they take {sizes}")


@dataclass(frozen=True, slots=True)
class ShardSnapshot:
    """What this process saves of a step: its shards of weights and optimizer.

    Attributes:
        partial: the hidden folder that all processes write to.
        random, state: as in `Snapshot`; those of the first process are saved.
    """

    partial: Path
    weights: dict[str, Shard]
    optimizer: dict[str, Shard]
    random: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def _untied_weights(lm: SupervisedLM) -> dict[str, Tensor]:
    found: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    for name, tensor, place in placed_weights(lm):
        found.setdefault(place if tensor.numel() else (name,), (name, tensor))
    return dict(found.values())


def copy_shards(
    lm: SupervisedLM, optimizer: torch.optim.Optimizer, spread: Spread
) -> tuple[dict[str, Shard], dict[str, Shard]]:
    """What this process has of the weights and of the optimizer's state, copied to the CPU; tied weights once."""
    weights = {name: spread.shard(tensor) for name, tensor in _untied_weights(lm).items()}
    state = {name: spread.shard(tensor) for name, tensor in optimizer_tensors(lm.model, optimizer)}
    own = [{name: shard for name, shard in found.items() if shard is not None} for found in (weights, state)]
    return own[0], own[1]


def begin_shards(run: RunFolder, step: int) -> Path:
    """Create the hidden folder that all processes write their shards of a step to."""
    folder = run.checkpoint(step)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    (partial / SHARDS).mkdir(parents=True)
    return partial


def write_own_shards(snapshot: ShardSnapshot, rank: int, size: int) -> None:
    """Write what this process saves, and then a note with size and hash of each file, as read back from the disk."""
    files = {}
    for kind, shards in (("weights", snapshot.weights), ("optimizer", snapshot.optimizer)):
        name = f"{SHARDS}/{kind}-{rank:05}-of-{size:05}.safetensors"
        write_shards(snapshot.partial / name, shards)
        sync_path(snapshot.partial / name)
        files[name] = describe_file(snapshot.partial / name)
    write_text_atomic(_note(snapshot.partial, rank), json.dumps(files))


def _note(partial: Path, rank: int) -> Path:
    return partial / f".written-{rank:05}.json"


def verify_together(run: RunFolder, world: World) -> str:
    """Name of the newest checkpoint that is valid, "" if there is none; each process reads a part of the files."""
    names = world.share(lambda: [found.folder.name for found in reversed(list_checkpoints(run)[0])])
    for name in names:
        if not world.agree(_has_damage(run.checkpoints / name, world)):
            return str(name)
    return ""


def _has_damage(folder: Path, world: World) -> bool:
    try:
        checkpoint = read_checkpoint(folder)
    except DamagedError:
        return True
    by_size = sorted(checkpoint.files, key=lambda name: (int(checkpoint.files[name]["size"]), name))
    return bool(find_damage(checkpoint, by_size[world.rank :: world.size]))


class AbandonedError(Exception):
    """Another process could not write its shards."""


def finish_shards(
    run: RunFolder,
    snapshot: ShardSnapshot,
    lm: SupervisedLM,
    encoder: Encoder,
    guard: Mapping[str, Any],
    size: int,
    is_abandoned: threading.Event,
) -> Path:
    """The first process: write all other files, wait for the shards of all processes, and make it a checkpoint.

    Raises:
        AbandonedError: some will not come.
    """
    partial, folder = snapshot.partial, run.checkpoint(snapshot.step)
    write_trained(lm.model, None, encoder, partial, {})
    (partial / "model.safetensors").unlink(missing_ok=True)  # without tensors
    write_names(partial / SHARDS, lm.model)
    write_tensors(partial / RANDOM, snapshot.random)
    (partial / STATE).write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")
    notes = [_note(partial, rank) for rank in range(size)]
    while not all(note.exists() for note in notes):
        if is_abandoned.wait(_POLL_S):
            raise AbandonedError
    known: dict[str, Any] = {}
    for note in notes:
        known |= json.loads(note.read_text(encoding="utf-8"))
        note.unlink()
    complete_directory(partial, folder, lambda place: write_manifest(place, snapshot.step, guard, known), replaces=True)
    return folder


def plan_groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Weights of a model in groups of about `limit` bytes; a transformer block is never divided, since transformers
    may save several of its weights as one, or one as several."""
    groups: list[list[str]] = []
    total = 0
    blocks: dict[str, list[str]] = {}
    for name in sizes:
        found = _BLOCK.match(name)
        blocks.setdefault(found[0] if found else name, []).append(name)
    for names in blocks.values():
        size = sum(sizes[name] for name in names)
        if not groups or total + size > limit:
            groups.append([])
            total = 0
        groups[-1] += names
        total += size
    return groups


class WeightGroups:
    """The trained weights, whole, a group at a time; only the first process gets them.

    Args:
        limit: bytes of a group, about.
    """

    def __init__(self, lm: SupervisedLM, spread: Spread, limit: int) -> None:
        self._weights, self._spread = _untied_weights(lm), spread
        self._groups = plan_groups({name: t.numel() * t.element_size() for name, t in self._weights.items()}, limit)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Every process goes through all groups."""
        for names in self._groups:
            yield {name: self._spread.whole(self._weights[name]) for name in names}


class StoredGroups:
    """The same of a checkpoint in shards; one process reads it."""

    def __init__(self, stored: ShardFiles, limit: int) -> None:
        self._stored = stored
        sizes = {name: tensor.read(0, 1).element_size() * tensor.shape.numel() for name, tensor in stored.items()}
        self._groups = plan_groups(sizes, limit)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for names in self._groups:
            yield {name: self._stored[name].read().clone() for name in names}
