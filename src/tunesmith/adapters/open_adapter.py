"""Open a saved adapter on its base, unmerged or merged in memory, and verify its logits.

peft gets the module names that occur in the weights, never a pattern from a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tunesmith.adapters.adapter import find_embedding_names, quiet_peft
from tunesmith.adapters.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterConfig,
    PatternError,
    read_adapter_config,
    resolve_pattern,
    select_modules,
)
from tunesmith.adapters.stored_base import PREFIX, SplitWeights, fit_stored, split_weights
from tunesmith.errors import ModelError
from tunesmith.reading import open_file

# allowed rounding error of a dtype, relative to the largest logit
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_PARTS = (".lora_A", ".lora_embedding_A")
_HAS_STORED = "_has_base_of_its_file"
SEVERAL_STORED = (
    "contains the embedding or head of its base (peft's save_embedding_layers), so it cannot be used together with "
    "other adapters. If the base was not resized, save it again with save_embedding_layers=False; otherwise merge it "
    "first, alone."
)


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of an adapter's weight file.

    Raises:
        ModelError: the file is missing, truncated or damaged, or has tensors that cannot be weights.
    """
    path = folder / ADAPTER_WEIGHTS
    try:
        open_file(path).close()  # a pipe would block
        weights = load_file(path)
    except FileNotFoundError:
        raise ModelError(
            f"{folder}: has no {ADAPTER_WEIGHTS}. Give the folder of a saved adapter.", code="adapter-weights-missing"
        ) from None
    except Exception as error:
        raise ModelError(
            f"{path}: cannot be read: {error}. The file is truncated or damaged; copy or save it again.",
            code="adapter-weights-damaged",
        ) from None
    if not weights:
        raise ModelError(
            f"{path}: has no tensors; the adapter is incomplete. Copy or save it again.", code="adapter-weights-damaged"
        )
    for name, tensor in weights.items():
        if tensor.dtype not in TOLERANCE:
            raise ModelError(
                f"{path}: {name} is {_dtype(tensor)}; expected float32, bfloat16 or float16.",
                code="adapter-dtype-unknown",
            )
        if not tensor.isfinite().all():
            raise ModelError(
                f"{path}: {name} has NaN or infinite values. Its training failed, or the file is damaged.",
                code="adapter-not-finite",
            )
    return weights


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def rows_needed(config: AdapterConfig, weights: Mapping[str, Tensor]) -> int:
    """Number of embedding rows that an adapter with added tokens needs; 0 if it does not change the embedding."""
    rows = [max(numbers) + 1 for numbers in config.all_token_indices() if numbers]
    rows += [
        len(t) for key, t in weights.items() if key.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))
    ]
    return max(rows, default=0)


def open_adapter(
    model: nn.Module, folder: Path, name: str = "default", onto: Any = None, is_weightless: bool = False
) -> Any:
    """Add a saved adapter to its base, frozen.

    Args:
        onto: an existing PeftModel around the model, to which the adapter is added under `name`.
        is_weightless: the base has placeholders instead of weights; base weights in the adapter's file are refused.

    Raises:
        ModelError: the adapter belongs to another base, or is damaged.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = read_adapter_config(folder)
    split = split_weights(config, read_adapter_weights(folder))
    weights = split.own
    unfit = f"{folder}: does not fit this base (it was trained on {config.base_model_name_or_path})"
    if split.stored or getattr(onto, _HAS_STORED, False):
        if onto is not None or is_weightless:
            raise ModelError(f"{folder}: {SEVERAL_STORED}", code="several-stored-weights")
        _replace_stored(model, split, folder, unfit)
    _add_rows(model, config, weights, unfit)
    try:
        made = build_config(config, weights, model)
    except PatternError as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: {error}.", code="bad-pattern") from None
    except KeyError as error:
        raise ModelError(f"{unfit}: the base has no {error.args[0]}.", code="adapter-does-not-fit") from None
    try:
        with quiet_peft():
            if onto is None:
                wrapped = get_peft_model(model, made, adapter_name=name, low_cpu_mem_usage=is_weightless)
            else:
                onto.add_adapter(name, made, low_cpu_mem_usage=is_weightless)
                wrapped = onto
            set_peft_model_state_dict(wrapped, dict(weights), adapter_name=name, low_cpu_mem_usage=is_weightless)
            placed = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    except Exception as error:
        raise ModelError(f"{unfit}: {' '.join(str(error).split())[:300]}", code="adapter-does-not-fit") from None
    lost = [key for key, tensor in weights.items() if key not in placed or placed[key].shape != tensor.shape]
    if lost:
        raise ModelError(f"{unfit}: the base has no {lost[0]}.", code="adapter-does-not-fit")
    lacking = sorted(set(placed) - set(weights))
    if lacking:
        raise ModelError(
            f"{folder}: {ADAPTER_WEIGHTS} lacks {len(lacking)} tensors that its config requires ({lacking[0]}). It was "
            "not saved whole, or belongs to another base.",
            code="adapter-incomplete",
        )
    wrapped.peft_config[name].base_model_name_or_path = config.base_model_name_or_path
    if split.stored:
        setattr(wrapped, _HAS_STORED, True)
    wrapped.eval()
    return wrapped


def _add_rows(model: Any, config: AdapterConfig, weights: Mapping[str, Tensor], unfit: str) -> None:
    """Resize the embedding for the tokens that were added when the adapter was trained."""
    rows, had = rows_needed(config, weights), model.get_input_embeddings().num_embeddings
    if rows <= had:
        return
    added = [number for numbers in config.all_token_indices() for number in numbers if number >= had]
    if added and max(added) >= had + len(set(added)):  # added tokens have consecutive ids
        raise ModelError(
            f"{unfit}: it trains row {max(added):,}, but the base has {had:,} rows.", code="adapter-does-not-fit"
        )
    model.resize_token_embeddings(rows, mean_resizing=False)


@torch.no_grad()
def _replace_stored(model: Any, split: SplitWeights, folder: Path, unfit: str) -> None:
    """Replace base weights with those stored in the adapter's file."""
    pair = find_embedding_names(model)
    rows = model.get_input_embeddings().num_embeddings
    stored = fit_stored(split, folder, pair.embedding, pair.head, pair.is_tied, rows)
    for name, tensor in stored.items():
        if name.rpartition(".")[0] not in (pair.embedding, pair.head):
            raise ModelError(f"{unfit}: the base has no {PREFIX}{name}.", code="adapter-does-not-fit")
        if name.endswith(".weight") and len(tensor) != model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tensor), mean_resizing=False)
    for name, tensor in stored.items():
        module = model.get_submodule(name.rpartition(".")[0])
        parameter = module._parameters.get(name.rpartition(".")[2])
        if parameter is None or parameter.shape != tensor.shape or parameter.dtype not in TOLERANCE:
            raise ModelError(f"{unfit}: the base has no {PREFIX}{name}.", code="adapter-does-not-fit")
        parameter.copy_(tensor)


def build_config(config: AdapterConfig, weights: Mapping[str, Tensor], model: nn.Module) -> Any:
    """peft's config with every pattern replaced by the names that it matches.

    Raises:
        PatternError: a pattern in the file takes too long to match.
        KeyError: the weights belong to a module that this model lacks, or that the config does not list.
    """
    from peft import LoraConfig

    modules = _bare_names(name for name, _ in model.named_modules())
    found = {module: key for key in weights if (module := module_of(key)) and not _is_parameter(module, config)}
    if strange := sorted(set(found) - set(modules)):
        raise KeyError(found[strange[0]])
    excluded = set(select_modules(config.exclude_modules, modules)) if config.exclude_modules else set()
    targets = sorted(set(select_modules(config.target_modules, modules)) - excluded)
    targets = _in_layers(targets, config)
    if config.target_modules in (None, "all-linear"):  # chosen by peft
        targets = sorted(found)
    if extra := sorted(set(found) - set(targets)):
        raise KeyError(found[extra[0]])
    parameters = [name for name, _ in model.named_parameters()]
    names = [*modules, *parameters]
    alpha: Any = config.lora_alpha
    bias: Any = config.bias
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        target_parameters=config.target_parameters,
        modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
        trainable_token_indices=config.trainable_token_indices,
        bias=bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fan_in_fan_out=config.fan_in_fan_out,
        ensure_weight_tying=config.ensure_weight_tying,
        rank_pattern=resolve_pattern(config.rank_pattern, names),
        alpha_pattern=resolve_pattern(config.alpha_pattern, names),
        inference_mode=True,
    )


def module_of(key: str) -> str | None:
    """The module whose A matrix this tensor of the adapter file is; None for other tensors."""
    for part in _PARTS:
        if part in key:
            return key.removeprefix(PREFIX).partition(part)[0]
    return None


def _is_parameter(module: str, config: AdapterConfig) -> bool:
    """Whether a module has fused experts, whose adapter matrices are named after the module."""
    holders = {name.rpartition(".")[0] for name in config.target_parameters or []}
    plain = module.removesuffix(".base_layer")
    return any(plain == holder or plain.endswith(f".{holder}") for holder in holders)


def _bare_names(names: Iterable[str]) -> list[str]:
    """Names of the model's own modules, without those added by adapters."""
    marks = (".base_layer", ".lora_", ".modules_to_save", ".original_module", ".token_adapter")
    return [name for name in names if name and not any(mark in f".{name}" for mark in marks)]


def _in_layers(targets: list[str], config: AdapterConfig) -> list[str]:
    """Modules of the layers in layers_to_transform."""
    if config.layers_to_transform is None:
        return targets
    chosen = config.layers_to_transform
    numbers = {str(number) for number in (chosen if isinstance(chosen, list) else [chosen])}
    return [name for name in targets if next((p for p in name.split(".") if p.isdigit()), None) in numbers]


def merge_adapter(wrapped: Any) -> nn.Module:
    """The model with the adapter merged into its weights.

    Embedding and head that share a weight are untied first, so that merging into one does not change the other. They
    are tied again if they are still equal.

    Raises:
        ModelError: the logits differ from those of base and adapter.
    """
    model = wrapped.get_base_model()
    ids = torch.arange(16, device=next(model.parameters()).device)[None]
    ids = ids % model.config.get_text_config().vocab_size
    wanted = _logits(model, ids)
    was_tied = _untie(model)
    with quiet_peft():
        merged: Any = wrapped.merge_and_unload(safe_merge=True)
    if was_tied:
        _retie_if_equal(merged)
    found = _logits(merged, ids)
    dtype = next(p.dtype for p in merged.parameters() if p.dtype in TOLERANCE)
    difference = ((wanted - found).abs().max() / wanted.abs().max()).item()
    if not difference <= TOLERANCE[dtype]:
        raise ModelError(
            f"merged in memory, the logits differ from those of base and adapter by {difference:.1e} of the largest "
            f"logit; rounding explains only {TOLERANCE[dtype]:.0e}. Merge it with tunesmith merge and use the result.",
            code="merged-logits-differ",
        )
    result: nn.Module = merged
    return result


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    return logits


def _untie(model: nn.Module) -> bool:
    """Give each module that shares a weight its own copy; returns whether any weight was shared."""
    holders: dict[int, list[nn.Embedding | nn.Linear]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and isinstance(module, (nn.Embedding, nn.Linear)):
            holders.setdefault(id(weight), []).append(module)
    shared = [modules for modules in holders.values() if len(modules) > 1]
    for modules in shared:
        for copied in modules[1:]:
            copied.weight = nn.Parameter(copied.weight.detach().clone(), requires_grad=copied.weight.requires_grad)
    return bool(shared)


def _retie_if_equal(model: Any) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_one = embedding.weight.shape == head.weight.shape and torch.equal(embedding.weight, head.weight)
    if is_one:
        head.weight = embedding.weight
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = is_one
