"""Open what will be published as those will who download it: every weight, the config, the tokenizer."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith.adapters.adapter_config import ADAPTER_WEIGHTS
from tunesmith.adapters.base import weight_files
from tunesmith.adapters.deltas import Delta
from tunesmith.config.schema import ModelSection
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError
from tunesmith.model.load import check_vocabulary, load_config, load_model
from tunesmith.model.reopen import find_reopened_differences, require_one_reading
from tunesmith.model.source import ModelSource
from tunesmith.model.tokenizer import TokenizerSource, build_encoder, load_tokenizer
from tunesmith.tensors import find_not_finite

_TOKENIZER = "tokenizer_config.json"


def check_model(folder: Path, trust_remote_code: bool) -> str:
    """Load a model's folder; returns a description of what was found.

    Raises:
        ModelError: a tensor is missing, not finite or has another shape, or the tokenizer would be read differently.
    """
    section = ModelSection(path=str(folder), trust_remote_code=trust_remote_code)
    encoder = _encoder(section, TokenizerSource(str(folder), None, is_models=True))
    source = ModelSource("local", str(folder))
    config = load_config(section, encoder.tokenizer, source)
    require_one_reading(section, encoder, config)
    count = 0
    for file in weight_files(folder):
        count += _require_finite(file)
    model: Any = load_model(section, config, _dtype_of(folder), seed=0, source=source)
    check_vocabulary(model, encoder.tokenizer)
    return f"{count:,} tensors load, all finite; {_tokens(encoder)}"


def check_adapter(folder: Path) -> str:
    """The same for an adapter, whose base need not be at hand.

    Raises:
        ModelError: its file is damaged, or its tokenizer would be read differently.
    """
    Delta(folder)
    count = _require_finite(folder / ADAPTER_WEIGHTS)
    if not (folder / _TOKENIZER).is_file():
        return f"{count:,} tensors load, all finite; without a tokenizer"
    section = ModelSection(path=str(folder), tokenizer=str(folder))
    source = TokenizerSource(str(folder), None, is_models=False)
    encoder = _encoder(section, source)
    if differences := find_reopened_differences(encoder, None, trust=False):
        raise ModelError(
            f"{folder}: its tokenizer is reopened as a different one: {', '.join(differences)}. Save the folder again.",
            code="tokenizer-reopens-differently",
        )
    return f"{count:,} tensors load, all finite; {_tokens(encoder)}"


def _encoder(section: ModelSection, source: TokenizerSource) -> Encoder:
    tokenizer = load_tokenizer(section, source)
    return build_encoder(tokenizer, None if tokenizer.chat_template else "none", {}, datetime.datetime.now())


def _tokens(encoder: Encoder) -> str:
    template = "with a chat template" if encoder.template else "without a chat template"
    return f"tokenizer of {len(encoder.tokenizer):,} tokens, {template}, reopens as it is"


def _require_finite(file: Path) -> int:
    """Number of tensors in a file.

    Raises:
        ModelError: one of them has values that are not finite, as after training that diverged.
    """
    count = 0
    for name, tensor in _read(file):
        count += 1
        if find_not_finite({name: tensor}):
            raise ModelError(
                f"{file}: {name} has values that are not finite. Take an earlier checkpoint, or train again.",
                code="weights-not-finite",
            )
    return count


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no dict
                yield name, opened.get_tensor(name)
    except Exception as error:
        raise ModelError(
            f"{file}: cannot be read ({' '.join(str(error).split())[:200]}). Copy or save it again.",
            code="weights-unreadable",
        ) from None


def _dtype_of(folder: Path) -> torch.dtype:
    """Of the first tensor, so that loading takes no more memory than the files."""
    with safe_open(weight_files(folder)[0], "pt") as opened:
        first: Tensor = opened.get_tensor(next(iter(opened.keys())))
    return first.dtype if first.is_floating_point() else torch.float32
