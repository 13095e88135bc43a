"""Write a model folder that other tools can open: weights, tokenizer, template, stop tokens, model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from tunesmith.adapters.adapter import write_adapter
from tunesmith.encode.encoder import Encoder
from tunesmith.files import atomic_directory
from tunesmith.model.reopen import require_reads_as
from tunesmith.model.tokenizer import write_tokenizer
from tunesmith.older_keys import add_older_keys
from tunesmith.tensors import require_tensors

_WEIGHTS = "model.safetensors"


def write_trained(
    model: nn.Module, adapter: Any, encoder: Encoder, folder: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write what a run trains: the adapter in PEFT form if there is one, else the model; with the tokenizer.

    Args:
        weights: state dict of the trained weights, instead of the current ones.
    """
    if adapter is None:
        write_model(model, encoder, folder, weights)
    else:
        write_adapter(adapter, folder, weights)
        _write_beside_adapter(model, encoder, folder)


def _write_beside_adapter(model: nn.Module, encoder: Encoder, folder: Path) -> None:
    """Write tokenizer, template and the trained stop token, for the model into which the adapter will be merged."""
    write_tokenizer(encoder, folder)
    set_stop_token(model, encoder)
    generation_config: Any = model.generation_config
    generation_config.save_pretrained(folder)


def save_adapter(
    model: nn.Module,
    adapter: Any,
    encoder: Encoder,
    card: str,
    folder: Path,
    initial: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter's folder atomically.

    Args:
        initial: folder with the initial matrices of PiSSA or OLoRA.
        weights: of the adapter, instead of the current ones; without `initial` only.
    """
    with atomic_directory(folder, replaces=True) as partial:
        write_adapter(adapter, partial, weights, initial)
        _write_beside_adapter(model, encoder, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        require_reads_as(partial, folder.name, encoder, model, is_adapter=True)


def save_model(
    model: nn.Module, encoder: Encoder, card: str, folder: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model's folder atomically.

    Args:
        weights: state dict to write, instead of the model's own.
    """
    with atomic_directory(folder, replaces=True) as partial:
        write_model(model, encoder, partial, weights)
        (partial / "README.md").write_text(card, encoding="utf-8")
        require_reads_as(partial, folder.name, encoder, model)


def write_model(model: Any, encoder: Encoder, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the files of a model.

    Args:
        weights: state dict to write, instead of the model's own.
    """
    set_stop_token(model, encoder)
    logging.disable_progress_bar()  # it would interfere with our progress bar
    meant = dict(weights) if weights is not None else model.state_dict()
    model.save_pretrained(folder, state_dict=dict(meant))
    add_older_keys(folder, type(model.config))
    _compare_saved(model, meant, folder)
    write_tokenizer(encoder, folder)


def save_in_groups(
    model: Any, encoder: Encoder, card: str, folder: Path, groups: Iterable[Mapping[str, Tensor]], number: int
) -> None:
    """Write the model's folder atomically, with a file for each group of weights, so that no more than a group is in
    memory at once.

    Args:
        groups: parts of the state dict; weights that the model saves as one are in one group.
        number: of groups.
    """
    with atomic_directory(folder, replaces=True) as partial:
        write_model(model, encoder, partial, {})
        (partial / _WEIGHTS).unlink(missing_ok=True)  # without tensors
        files: dict[str, str] = {}
        total = 0
        for place, group in enumerate(groups, 1):
            name = _WEIGHTS if number == 1 else f"model-{place:05}-of-{number:05}.safetensors"
            with tempfile.TemporaryDirectory(dir=partial, prefix=".group.") as made:
                model.save_pretrained(made, state_dict=dict(group), max_shard_size=2**62)
                _compare_saved(model, group, Path(made))
                (Path(made) / _WEIGHTS).rename(partial / name)
            with safe_open(partial / name, "pt") as file:
                files |= dict.fromkeys(file.keys(), name)
            total += sum(tensor.numel() * tensor.element_size() for tensor in group.values())
        if number > 1:
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (partial / f"{_WEIGHTS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        (partial / "README.md").write_text(card, encoding="utf-8")
        require_reads_as(partial, folder.name, encoder, model)


def _compare_saved(model: Any, meant: Mapping[str, Tensor], folder: Path) -> None:
    """Compare each tensor in the files with the one in memory.

    Raises:
        OSError: a write was lost without an error.
    """
    files = sorted(folder.glob("model*.safetensors"))
    others = [file for file in files if require_tensors(file, meant) - set(meant)]
    if others:  # transformers splits fused experts into separate tensors
        turned = revert_weight_conversion(model, dict(meant))
        for file in others:
            require_tensors(file, turned)


def set_stop_token(model: Any, encoder: Encoder) -> None:
    """Put the trained stop token first in generation_config, before those that the model had."""
    config: Any = model.generation_config
    had = config.eos_token_id
    had = had if isinstance(had, list) else [] if had is None else [had]
    stops = list(dict.fromkeys([*encoder.stop_ids, *had, *([encoder.eos_id] if encoder.eos_id is not None else [])]))
    config.eos_token_id = stops if len(stops) > 1 else stops[0]
    if config.pad_token_id is None:
        pad = encoder.tokenizer.pad_token_id
        config.pad_token_id = pad if pad is not None else stops[0]
    try:
        config.validate(strict=True)
    except ValueError:  # transformers loads such settings of hub models but refuses to save them
        kept = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**kept)
