"""Load models from a folder, a RUN or the hub, or create them from a preset."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from tunesmith.adapters.adapter import find_zero_gates, keep_differentiable
from tunesmith.adapters.base import hub_folder, require_base, weight_files
from tunesmith.adapters.open_adapter import merge_adapter, open_adapter
from tunesmith.config.schema import ROUTER_COEFFICIENT, ModelSection, is_dropout
from tunesmith.errors import ModelError
from tunesmith.model.presets import build_preset_config, explain_overrides, zero_gates
from tunesmith.model.source import ModelSource, explain_load_error, find_model

LOADING = threading.Lock()  # from_pretrained patches torch while it loads; two concurrent calls would leave it patched

NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def load_config(section: ModelSection, tokenizer: Any, source: ModelSource | None = None) -> PretrainedConfig:
    """The transformers config; cheap to load, so that its errors are raised before any data is read.

    Args:
        source: result of find_model(section.path), if already known.
    """
    source = source or find_model(section.path, section.config)
    if source.kind == "preset":
        preset = build_preset_config(source.name, section.config, tokenizer)
        _avoid_grouped_products(preset)
        return preset
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source.name, revision=source.revision or section.revision, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:
        raise explain_load_error(section.path, "its config", error) from None
    if not isinstance(config.get_text_config(), PretrainedConfig):  # a key that this architecture does not know
        raise ModelError(
            f"{section.path}: its config.json has parts of several models (text_config, decoder), which "
            f"{config.model_type} does not have. Remove those keys, or correct model_type.",
            code="model-not-loadable",
        )
    if source.file is None:
        _set_overrides(section, config)
    else:
        _require_own_tokenizer(section, config, tokenizer)
    _refuse_odd_dropout(section.path, config)
    _avoid_grouped_products(config)
    return config


def _avoid_grouped_products(config: PretrainedConfig) -> None:
    """Compute experts one by one where torch's grouped products cannot: their rows must be multiples of 16 bytes."""
    text: Any = config.get_text_config()
    sizes = [getattr(text, name, None) or 0 for name in ("hidden_size", "moe_intermediate_size", "intermediate_size")]
    if any(hasattr(text, name) for name in NUM_EXPERTS) and any(size % 8 for size in sizes):
        config._experts_implementation = "eager"


def _set_overrides(section: ModelSection, config: PretrainedConfig) -> None:
    """The values that model.config sets (dropout, coefficient of the router loss); they are saved with the model, and
    so with every checkpoint.

    Raises:
        ModelError: the model has no such value.
    """
    text: Any = config.get_text_config()
    for name, value in section.config.items():
        if name == ROUTER_COEFFICIENT and not hasattr(text, name):
            continue  # 0; see require_router
        if not hasattr(text, name):
            own = ", ".join(key for key in text.to_dict() if is_dropout(key)) or "none"
            raise ModelError(
                f"{section.path}: the model has no {name} (model.config.{name}); its dropouts: {own}.",
                code="no-such-dropout",
            )
        try:
            setattr(text, name, value)
        except StrictDataclassFieldValidationError:  # no int (0) where a float is meant
            setattr(text, name, float(value))


def _require_own_tokenizer(section: ModelSection, config: PretrainedConfig, tokenizer: Any) -> None:
    """Check the number of tokens: a .pth comes without a tokenizer, and one of another size belongs to another model.

    Raises:
        ModelError: the tokenizer is smaller; a larger one is refused where the embedding is known.
    """
    rows, ids = int(config.vocab_size), max(tokenizer.get_vocab().values()) + 1
    if ids < rows:
        raise ModelError(
            f"{section.tokenizer}: has {ids} tokens; the embedding of {section.path} has {rows} rows. Give the "
            "tokenizer that the model was trained with (MiniMind's is in its folder model/).",
            code="tokenizer-does-not-match",
        )


def _refuse_odd_dropout(name: str, config: PretrainedConfig) -> None:
    """Refuse an invalid dropout, which transformers accepts and fails on in the first forward or training step.

    Raises:
        ModelError: a dropout of the config is not a probability.
    """
    for key, value in config.get_text_config().to_dict().items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key.endswith(("dropout", "pdrop")) and is_number and not 0 <= value < 1:
            raise ModelError(
                f"{name}: config.json has {key} {value}; it must be at least 0 and below 1.", code="bad-config-value"
            )


def find_class(config: PretrainedConfig) -> type | None:
    """transformers' class of the model; None if the model's folder has its code."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kind: type = found[0] if isinstance(found, tuple) else found
    return kind


def load_model(
    section: ModelSection,
    config: PretrainedConfig,
    dtype: torch.dtype,
    seed: int,
    quantization: Any = None,
    source: ModelSource | None = None,
    extra: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load weights on the CPU in `dtype`; for an adapter, those of its base with the adapter merged.

    Args:
        config: from load_config; copied, because the attention implementation is written to it.
        seed: for the random weights of a new:PRESET model.
        quantization: transformers' quantization config for 4 or 8 bits.
        source: result of find_model(section.path), if already known.
        extra: further arguments of from_pretrained.
    """
    source = source or find_model(section.path, section.config)
    logging.disable_progress_bar()
    if source.kind == "preset":
        torch.manual_seed(seed)
        try:
            new: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
            return zero_gates(source.name, new)
        except Exception as error:  # most often, the model is larger than the memory
            raise explain_overrides(source.name, section.config, error) from None
    folder = (
        Path(source.name) if source.kind == "local" else hub_folder(source.name, source.revision or section.revision)
    )
    if folder is not None:
        require_weights(section.path, folder)
    try:
        with LOADING:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.name,
                config=copy.deepcopy(config),
                dtype=dtype,
                revision=source.revision or section.revision,
                trust_remote_code=section.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below by name, unlike transformers' error
                **({"quantization_config": quantization} if quantization is not None else {}),
                **(extra or {}),
            )
    except Exception as error:
        raise explain_load_error(section.path, "its weights", error) from None
    model: Any
    model, report = loaded
    require_all_weights(section.path, report)
    require_token_ids(section.path, model.generation_config)
    if quantization is not None:
        keep_differentiable(model)
    if source.adapter:
        require_own_base(source, False, _ON_CHANGED)
        return merge_adapter(open_adapter(model, source.adapter)).requires_grad_(True)
    result: nn.Module = model
    return result


def require_weights(path: str, folder: Path) -> None:
    """Check the files from which from_pretrained reads the weights.

    Raises:
        ModelError: their index is damaged, which transformers does not name, or the folder is a checkpoint in shards.
    """
    if not weight_files(folder) and (folder / "shards").is_dir():
        raise ModelError(
            f"{path}: is a checkpoint in shards (train.sharded_checkpoints), which only tunesmith resume opens. Finish "
            "the run: its model/ is a model folder. Or resume it with --train.sharded_checkpoints false: its next "
            "checkpoint is one.",
            code="checkpoint-in-shards",
        )


def require_all_weights(path: str, report: Any) -> None:
    """Check that all weights were loaded.

    Raises:
        ModelError: transformers' loading report lists tensors that are missing or have other shapes.
    """
    if report["mismatched_keys"]:
        key, found, wanted = min(report["mismatched_keys"])
        raise ModelError(
            f"{path}: {len(report['mismatched_keys'])} tensors have shapes that differ from config.json: {key} is "
            f"{list(found)}, expected {list(wanted)}. The config.json belongs to another model.",
            code="wrong-shapes",
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{path}: the weights lack {len(missing)} tensors that the model needs ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); training would start from random values there. The folder is "
            "incomplete, or its config.json belongs to another model.",
            code="weights-missing",
        )


def require_token_ids(path: str, generation_config: Any) -> None:
    """Check the token ids in generation_config.json, which transformers does not until a reply ends.

    Raises:
        ModelError: one of them is not a token id.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(generation_config, name, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(number) is int and number >= 0 for number in ids):
            raise ModelError(
                f"{path}: generation_config.json: {name} is {str(value)[:80]!r}, not a token id. Correct it or "
                "remove the file.",
                code="bad-token-id",
            )


_ON_CHANGED = "To use this base anyway, merge first: tunesmith merge ADAPTER --allow-changed-base --output MERGED."


def require_own_base(source: ModelSource, is_allowed: bool, advice: str) -> str:
    """Check that an adapter's base is the one that it was trained on; returns a remark to print.

    Raises:
        ModelError: it is a different base.
    """
    assert source.adapter is not None
    folder = Path(source.name) if source.kind == "local" else hub_folder(source.name, source.revision)
    return require_base(source.adapter, folder, is_allowed, advice, shown=source.shown) if folder else ""


@torch.no_grad()
def extend_vocabulary(model: Any, tokenizer: Any, tokens: list[str]) -> list[int]:
    """Give new tokens rows in the embedding, each the mean of all earlier rows; returns the tokens' ids.

    Args:
        tokens: those that the tokenizer has just been given; the row of an older token is trained already.
    """
    if not tokens:
        return []
    ids = tokenizer.convert_tokens_to_ids(tokens)
    embeddings = {id(layer.weight): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    means = [layer.weight.float().mean(0) for layer in embeddings.values()]
    if max(ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    layers = {id(layer.weight): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    for layer, mean in zip(layers.values(), means, strict=True):
        layer.weight[ids] = mean.to(layer.weight.dtype)
    return list(ids)


def freeze_zero_gates(model: nn.Module) -> None:
    """Keep gates that are zero in all layers as they are: trained, they would change the architecture."""
    for gate in find_zero_gates(model).values():
        gate.requires_grad_(False)


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Check that every token id has a row in the embedding."""
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {largest}, but the model's embedding has {rows} rows; they do not match. Use "
            "the model's own tokenizer.",
            code="tokenizer-does-not-match",
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of all and of trainable parameters; tied weights count once, 4-bit weights by their unpacked size."""
    sizes = [(_numel(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def _numel(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
