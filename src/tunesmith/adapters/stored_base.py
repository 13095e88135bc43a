"""Base weights inside an adapter's file: peft stores resized or targeted embeddings and heads there.

peft's save_embedding_layers="auto" writes them along with the matrices, under the names of its wrappers. The adapter
was trained on them, so they replace the base's weights before the adapter is added.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.adapters.adapter_config import AdapterConfig
from tunesmith.errors import ModelError

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
_WRAPPERS = (".token_adapter.base_layer.", ".original_module.", ".base_layer.")
_COPY = ".modules_to_save."


@dataclass(frozen=True)
class SplitWeights:
    """The tensors of an adapter file, by kind.

    Attributes:
        own: tensors of the adapter itself, by their keys in the file.
        stored: base weights, by their names in the model.
    """

    own: dict[str, Tensor]
    stored: dict[str, Tensor]


def split_weights(config: AdapterConfig, weights: Mapping[str, Tensor]) -> SplitWeights:
    own: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = key.removeprefix(PREFIX)
        wrapper = next((mark for mark in _WRAPPERS if mark in name), None)
        if ".lora_" in name or (config.bias != "none" and name.endswith(".bias")):
            own[key] = tensor
        elif name.endswith(ROWS):
            if not _is_copy(name, weights, config):
                own[key] = tensor
        elif _COPY in name and key.replace(_COPY, ".") in weights:
            continue  # the weight is written under both names
        elif wrapper:
            stored[name.replace(wrapper, ".")] = tensor
        elif _is_trained_whole(name, config):
            own[key] = tensor
        else:
            stored[name] = tensor
    return SplitWeights(own, stored)


def _is_trained_whole(name: str, config: AdapterConfig) -> bool:
    if config.ensure_weight_tying and config.modules_to_save:  # the tied embedding or head is written as well
        return True
    return any(f".{module}." in f".{name}" for module in config.modules_to_save or [])


def _is_copy(name: str, weights: Mapping[str, Tensor], config: AdapterConfig) -> bool:
    """Whether a tensor is the rows of a tied head, stored a second time under its own name."""
    if f"{PREFIX}{name.replace(ROWS, '.token_adapter.base_layer.weight')}" not in weights:
        return False
    named = config.trainable_token_indices
    last = name.removesuffix(ROWS).rpartition(".")[2]
    is_head = last not in named if isinstance(named, dict) else last in ("lm_head", "embed_out")
    return is_head and any(
        key.endswith(ROWS) and key != f"{PREFIX}{name}" and torch.equal(rows, weights[f"{PREFIX}{name}"])
        for key, rows in weights.items()
    )


def fit_stored(
    split: SplitWeights, folder: Path, embedding: str, head: str | None, is_tied: bool, rows: int
) -> dict[str, Tensor]:
    """Weights that replace those of the base; embedding and head both where they are tied.

    Args:
        embedding, head: names of these modules in the base.
        rows: number of rows of the base's embedding.

    Raises:
        ModelError: the base needs a weight that the file lacks, or the file has two different weights for a tied one.
    """
    stored = dict(split.stored)
    ends = [f"{embedding}.weight", *([f"{head}.weight"] if head else [])]
    there = [name for name in ends if name in stored]
    if len({len(stored[name]) for name in there}) > 1:
        raise ModelError(
            f"{folder}: has an embedding and a head of different lengths ({', '.join(there)}). Save the adapter "
            "again from the resized model.",
            code="stored-base-lengths",
        )
    if is_tied and there:
        if len(there) > 1 and not torch.equal(stored[there[0]], stored[there[1]]):
            raise ModelError(
                f"{folder}: has different weights for {there[0]} and {there[1]}, which are one weight in this base. "
                "It was trained on a base with an untied head: give that base, or merge it where it was trained.",
                code="stored-base-untied",
            )
        stored |= dict.fromkeys(ends, stored[there[0]])
    elif there and len(stored[there[0]]) != rows:
        _require_both(split, stored, folder, ends, rows, len(stored[there[0]]))
    return stored


def _require_both(
    split: SplitWeights, stored: Collection[str], folder: Path, ends: list[str], rows: int, wanted: int
) -> None:
    if lacking := [name for name in ends if name not in stored and f"{PREFIX}{name}" not in split.own]:
        raise ModelError(
            f"{folder}: was trained on an embedding and head of {wanted:,} rows; the base has {rows:,}, and the file "
            f"has no {lacking[0]} of that length. Resize the base as in training, save it and give it with --base.",
            code="stored-base-rows",
        )
