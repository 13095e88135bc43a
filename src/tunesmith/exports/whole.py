"""Open a model for export: in fp32, with its tokenizer, an adapter merged into its base."""

from __future__ import annotations

import datetime
from typing import Any

import torch

from tunesmith.config.schema import ModelSection
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError
from tunesmith.model.load import check_vocabulary, load_config, load_model
from tunesmith.model.source import ModelSource, find_model
from tunesmith.model.tokenizer import build_encoder, load_tokenizer

ON_CHANGED = "To use this base anyway, merge first: tunesmith merge ADAPTER --allow-changed-base --output MERGED."


def open_whole(section: ModelSection) -> tuple[ModelSource, Encoder, Any]:
    """A model in fp32 with its tokenizer; an adapter is merged into its base."""
    source = find_model(section.path, section.config)
    if source.kind == "preset":
        raise random_weights(section.path)
    encoder = load_export_encoder(section)
    config = load_config(section, encoder.tokenizer, source)
    model = load_model(section, config, torch.float32, seed=0, source=source)
    check_vocabulary(model, encoder.tokenizer)
    return source, encoder, model.eval().requires_grad_(False)


def random_weights(name: str) -> ModelError:
    return ModelError(f"{name}: has random weights. Train it first.", code="random-weights")


def load_export_encoder(section: ModelSection) -> Encoder:
    tokenizer = load_tokenizer(section)
    return build_encoder(tokenizer, None if tokenizer.chat_template else "none", {}, datetime.datetime.now())
