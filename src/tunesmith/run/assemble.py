"""Build what the loop needs from a session and its data: the probed model, and the feed of steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.adapters.adapter import add_adapter, cast_trained, quantization_config
from tunesmith.adapters.base import record_base
from tunesmith.config.schema import ModelSection
from tunesmith.data.dataset import Dataset, build_feed
from tunesmith.data.feed import Feed
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.model.head import choose_head_path
from tunesmith.model.isolation import Isolation, probe_isolation, use_packed_attention
from tunesmith.model.load import check_vocabulary, extend_vocabulary, freeze_zero_gates, load_config, load_model
from tunesmith.model.loss import SupervisedLM, require_router
from tunesmith.model.probe import probe_model
from tunesmith.model.source import ModelSource, find_model
from tunesmith.run.session import Session
from tunesmith.tensors import find_not_finite


@dataclass(frozen=True, slots=True)
class ReadyRun:
    """A run before its first step."""

    session: Session
    dataset: Dataset
    lm: SupervisedLM
    isolation: Isolation
    feed: Feed


def assemble(session: Session, dataset: Dataset, checkpoint: Path | None = None) -> ReadyRun:
    """Load the model and plan the steps.

    Args:
        checkpoint: with the weights of a resumed run, if all weights are trained.
    """
    config = session.config
    if session.is_adapter:
        require_real_base(config.model.path, session.model)
    model = load_weights(session, checkpoint)
    adapter = add_new_adapter(session, model) if session.is_adapter else None
    isolation, lm = wrap(session, model, adapter)
    feed = build_feed(dataset, config.train, session.lengths.capacity, lm.is_packed)
    return ReadyRun(session, dataset, lm, isolation, feed)


def require_real_base(path: str, source: ModelSource) -> None:
    """Check that an adapter trained on this base can be loaded later.

    Raises:
        ModelError: the base is itself an adapter, or has random weights that are not saved.
    """
    if source.adapter:
        raise ModelError(
            f"{path}: is already an adapter; peft and other tools cannot load a second adapter on top of it. Merge it "
            f"first: tunesmith merge {path} --output MERGED; then train on MERGED.",
            code="base-is-adapter",
        )
    if source.kind == "preset":
        raise ModelError(
            f"{path}: its random weights are not saved, so an adapter trained on them could never be loaded. Train the "
            "whole model first (--lora.kind none), then an adapter on the result.",
            code="base-not-saved",
        )


def load_weights(session: Session, checkpoint: Path | None) -> PreTrainedModel:
    """The model on its device, with embedding rows for added tokens, and finite weights."""
    config, tokenizer = session.config, session.encoder.tokenizer
    section, source, model_config = config.model, session.model, session.model_config
    if checkpoint is not None:
        section = ModelSection(path=str(checkpoint), trust_remote_code=config.model.trust_remote_code)
        source = find_model(section.path)
        model_config = load_config(section, tokenizer, source)
    dtype = weights_dtype(session)
    quantization = quantization_config(config.lora, dtype)
    model = cast(PreTrainedModel, load_model(section, model_config, dtype, config.train.seed, quantization, source))
    if checkpoint is None:  # a checkpoint already contains the added rows
        extend_vocabulary(model, tokenizer, session.new_tokens)
    check_vocabulary(model, tokenizer)
    if quantization is None and session.parallel != "fsdp":  # a GPU gets its shards alone
        nn.Module.to(model, session.device)  # transformers' `to` is untyped
    own_memory(model)
    refuse_not_finite(config.model.path, model)
    freeze_zero_gates(model)
    return model


def weights_dtype(session: Session) -> torch.dtype:
    precision = session.precision
    # frozen weights need no fp32 copy, since autocast uses half precision anyway
    return precision.autocast if session.is_adapter and precision.autocast else precision.weights


def add_new_adapter(session: Session, model: PreTrainedModel) -> Any:
    """peft's wrapper around the model; the adapter's initial weights depend only on the seed."""
    config, source = session.config, session.model
    torch.manual_seed(config.train.seed)
    new_ids = session.encoder.tokenizer.convert_tokens_to_ids(session.new_tokens)
    base = record_base(source.kind, source.name, config.model.revision)
    path = config.model.path
    name = str(Path(path).expanduser().resolve()) if source.kind == "local" else path  # for adapter_config.json
    adapter = add_adapter(model, config.lora, name, new_ids, config.model.revision, base)
    if session.precision.autocast:
        cast_trained(model, session.precision.weights)
    return adapter


def wrap(session: Session, model: PreTrainedModel, adapter: Any) -> tuple[Isolation, SupervisedLM]:
    """Probe the model, then configure it by the results."""
    config, lengths = session.config, session.lengths
    probe = probe_model(model)
    if session.config.lora.quantize == "none":
        nn.Module.to(probe, session.device)
    isolation = probe_isolation(probe, lengths.max_seq_len, lengths.capacity)
    own_attention = None
    if isolation.is_isolated:
        own_attention = model.config._attn_implementation
        use_packed_attention(probe)
        use_packed_attention(model)
    head_path = choose_head_path(probe, isolation.is_isolated)
    lm = SupervisedLM(model, isolation.is_isolated, head_path, adapter, config.train.router_loss, own_attention)
    require_router(config, lm.router)
    if config.train.gradient_checkpointing:
        try:
            model.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError:
            raise TunesmithError(
                f"train.gradient_checkpointing: {type(model).__name__} does not support it. Set it to false.",
                code="checkpointing-unsupported",
            ) from None
    if config.train.compile:
        model.get_decoder().compile(dynamic=True)
    return isolation, lm


def own_memory(model: PreTrainedModel) -> None:
    """Copy every weight into memory aligned by torch: mapped files may start anywhere, which changes rounding."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():  # others are quantized, and have other references to them
            tensor.data = tensor.data.clone()


def refuse_not_finite(name: str, model: PreTrainedModel) -> None:
    """Check that all weights are finite.

    Raises:
        ModelError: the model's weights contain NaN or infinity.
    """
    if found := find_not_finite(model.state_dict()):
        raise ModelError(
            f"{name}: its weights are not finite ({found} contains NaN or infinity), which training cannot repair. The "
            "file is damaged, or a failed run saved it.",
            code="model-not-finite",
        )
