"""Checkpoints that are either complete and verified or do not exist.

A checkpoint is a model folder with the optimizer, the random states and the run's progress. It is written under a
temporary name in the same folder: files, fsync of each, then manifest.json with size and SHA-256 of every file, fsync,
fsync of the folder, rename, fsync of the parent folder. A folder without a manifest that matches its files is not a
checkpoint.

A checkpoint has one of two forms. Whole: the first process gathers weights and optimizer, and writes a model folder. In
shards (a model larger than one host's memory): each process writes its shards below shards/; the first one waits for
the files of all, and then writes the manifest (sharded.py). Both can be resumed by any number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.adapters.adapter import adapter_tensors
from tunesmith.adapters.adapter_config import ADAPTER_WEIGHTS
from tunesmith.distributed.shards import ShardFiles, StoredTensor
from tunesmith.distributed.spread import Spread
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import TunesmithError
from tunesmith.files import atomic_directory, seal_of, sealed, sha256_file
from tunesmith.model.loss import SupervisedLM
from tunesmith.model.save import write_trained
from tunesmith.reading import open_file, read_text
from tunesmith.runfolder import RunFolder
from tunesmith.tensors import write_tensors
from tunesmith.training.progress import TrainState

FORMAT, FORMAT_IN_SHARDS = 1, 2
_NUMBER = "#number"
MANIFEST = "manifest.json"
SHARDS = "shards"
OPTIMIZER, RANDOM, STATE = "optimizer.safetensors", "random.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of everything that training changes, at the end of a step.

    Attributes:
        weights: the trained weights, in training precision: the model's state dict (tied tensors share one copy) or an
            adapter's.
        optimizer: "parameter/key" -> tensor.
        random: states of torch's generators.
        state: TrainState as JSON, at the end of that step.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with a readable manifest; `find_damage` compares its files with it."""

    folder: Path
    step: int
    files: Mapping[str, Mapping[str, Any]]
    guard: Mapping[str, Any]

    def load_state(self) -> TrainState:
        """The saved TrainState.

        Raises:
            TunesmithError: a field is missing, so another version wrote it.
        """
        try:
            return TrainState.from_json(json.loads(read_text(self.folder / STATE)))
        except KeyError as error:
            raise TunesmithError(
                f"{self.folder / STATE}: has no {error}; another version of tunesmith wrote it. Resume with that "
                "version.",
                code="state-incomplete",
            ) from None

    def load_random(self) -> dict[str, Tensor]:
        return load_file(self.folder / RANDOM)

    def load_adapter(self) -> dict[str, Tensor]:
        return load_file(self.folder / ADAPTER_WEIGHTS)

    def open_optimizer(self) -> ShardFiles:
        """The optimizer's state, to be read tensor by tensor."""
        shards = sorted((self.folder / SHARDS).glob("optimizer-*.safetensors"))
        return ShardFiles(shards or [self.folder / OPTIMIZER])

    def open_weights(self) -> ShardFiles | None:
        """The weights of a checkpoint in shards; None for one in whole form, which is a model folder."""
        shards = weight_shards(self.folder)
        return ShardFiles(shards) if shards else None


def weight_shards(folder: Path | None) -> list[Path]:
    """Files with the weights of a checkpoint in shards; none for any other."""
    return sorted((folder / SHARDS).glob("weights-*.safetensors")) if folder else []


def copy_weights(lm: SupervisedLM, spread: Spread) -> dict[str, Tensor]:
    """The trained weights, whole, copied to the CPU; tensors that share memory still do."""
    if lm.adapter is not None:
        with spread.whole_adapter(lm):
            return {name: spread.whole(tensor).contiguous() for name, tensor in adapter_tensors(lm.adapter).items()}
    copies: dict[tuple[Any, ...], Tensor] = {}
    weights = {}
    for name, tensor, place in placed_weights(lm):
        if place not in copies or not (tensor.numel() or hasattr(tensor, "ds_id")):
            copies[place] = spread.whole(tensor)
        weights[name] = copies[place]
    return weights


def placed_weights(lm: SupervisedLM) -> Iterator[tuple[str, Tensor, tuple[Any, ...]]]:
    """Name, tensor, and what is the same for tensors that share memory; in the same order in all processes."""
    for name, tensor in lm.model.state_dict(keep_vars=True).items():
        place: tuple[Any, ...] = (id(tensor),)  # of a shard, which may be empty: all processes must see the same tying
        if not isinstance(tensor, DTensor) and not hasattr(tensor, "ds_id"):  # DeepSpeed's mark of a shard
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        yield name, tensor, place


def copy_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, spread: Spread) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, so that it can be restored in any order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, key, value in spread.copy_state(optimizer):
        kind = "" if isinstance(value, Tensor) else _NUMBER  # bitsandbytes keeps its step count as a Python number
        tensors[f"{names[id(parameter)]}/{key}{kind}"] = torch.as_tensor(value).contiguous()
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            kind = "" if isinstance(value, Tensor) else _NUMBER  # bitsandbytes keeps its step count as a Python number
            yield f"{names[id(parameter)]}/{key}{kind}", torch.as_tensor(value)


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, StoredTensor], spread: Spread
) -> None:
    """Load what `copy_optimizer` or `copy_shards` saved into a new optimizer of the same parameters."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        if key.endswith(_NUMBER):
            optimizer.state[parameter][key.removesuffix(_NUMBER)] = tensor.read().item()
        else:
            spread.set_state(optimizer, parameter, key, tensor)


def write_checkpoint(
    run: RunFolder, snapshot: Snapshot, lm: SupervisedLM, encoder: Encoder, guard: Mapping[str, Any]
) -> Path:
    """Write checkpoints/step-NNNNNN atomically.

    Args:
        lm: for configs and names of the saved weights; its weights are not read.
        guard: the run's fingerprint as JSON (run/records.py), kept in the manifest.
    """
    folder = run.checkpoint(snapshot.step)

    def seal(partial: Path) -> None:
        write_manifest(partial, snapshot.step, guard)

    with atomic_directory(folder, seal, replaces=True) as partial:
        write_trained(lm.model, lm.adapter, encoder, partial, snapshot.weights)
        write_tensors(partial / OPTIMIZER, snapshot.optimizer)
        write_tensors(partial / RANDOM, snapshot.random)
        (partial / STATE).write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")
    return folder


def write_manifest(folder: Path, step: int, guard: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> None:
    """Args:
    known: size and hash of the files that other processes have described; they are in shards.
    """
    described = known or {}
    files = {name: described.get(name) or describe_file(folder / name) for name in _names(folder)}
    content = {"format": FORMAT_IN_SHARDS if known else FORMAT, "step": step, "files": files, "guard": guard}
    (folder / MANIFEST).write_text(sealed(content), encoding="utf-8")


def describe_file(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _names(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


class DamagedError(Exception):
    """Why a folder is not a valid checkpoint."""


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, by its manifest.

    Raises:
        DamagedError: the manifest is missing, unreadable, changed, or of a later format.
    """
    try:
        content = json.loads(read_text(folder / MANIFEST))
        seal = content.pop("sha256")
        if content["format"] > FORMAT_IN_SHARDS:
            raise DamagedError(
                f"{MANIFEST} is of format {content['format']}; this tunesmith reads up to {FORMAT_IN_SHARDS}"
            )
        is_whole = seal_of(content) == seal
        checkpoint = Checkpoint(folder, content["step"], content["files"], content["guard"])
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DamagedError(f"{MANIFEST} is damaged") from None
    if not is_whole:
        raise DamagedError(f"{MANIFEST} is damaged: its own hash does not match")
    return checkpoint


def find_damage(checkpoint: Checkpoint, names: Collection[str] | None = None) -> str:
    """The first file that does not match the manifest, with the reason; "" if all match.

    Args:
        names: the files to read; all by default. Of the others, the size is compared.
    """
    for name, wanted in checkpoint.files.items():
        path = checkpoint.folder / name
        try:
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
            if size != wanted["size"]:
                return f"{name} has {size:,} bytes instead of {wanted['size']:,}"
            if (names is None or name in names) and sha256_file(path) != wanted["sha256"]:
                return f"{name} is changed: its SHA-256 does not match"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    foreign = sorted(set(_names(checkpoint.folder)) - set(checkpoint.files))
    return f"{foreign[0]} is not part of the checkpoint; remove it" if foreign else ""


def list_checkpoints(run: RunFolder) -> tuple[list[Checkpoint], dict[Path, str]]:
    """Checkpoints with a readable manifest, oldest first, and the other folders with the reason for each."""
    found, damaged = [], {}
    root = run.checkpoints
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_dir() and not folder.name.startswith("."):
            try:
                found.append(read_checkpoint(folder))
            except DamagedError as error:
                damaged[folder] = str(error)
    return sorted(found, key=lambda checkpoint: checkpoint.step), damaged


def newest_valid(run: RunFolder, verified: str = "") -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest valid checkpoint, and the reason for each invalid one.

    Args:
        verified: name of one that is known to be valid.
    """
    found, damaged = list_checkpoints(run)
    for checkpoint in reversed(found):
        damage = "" if checkpoint.folder.name == verified else find_damage(checkpoint)
        if not damage:
            return checkpoint, damaged
        damaged[checkpoint.folder] = damage
    return None, damaged


def prune_checkpoints(run: RunFolder, keep: int, best_step: int | None, newest_step: int) -> None:
    """Delete the oldest checkpoints beyond `keep`, counting up to the one just verified; the best one stays.

    Later ones are damaged (otherwise the run would have continued from them) and will be overwritten.
    """
    found = [checkpoint for checkpoint in list_checkpoints(run)[0] if checkpoint.step <= newest_step]
    for old in found[:-keep]:
        if old.step != best_step:
            remove_folder(old.folder)


def remove_folder(folder: Path) -> None:
    """Rename, then delete, so that a kill in between leaves no partial folder under the old name."""
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def leftovers(run: RunFolder) -> Iterator[Path]:
    """Hidden files and folders left by a killed process."""
    for root in (run.path, run.checkpoints):
        for pattern in (".*.partial", ".*.old"):
            yield from root.glob(pattern)
