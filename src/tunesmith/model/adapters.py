"""LoRA and its relatives, through peft: put into a model, saved in PEFT form, opened again.

peft changes the model in place, so the rest of the house keeps working with the model that it knows; the PeftModel
around it is asked only for what to train and what to save.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.config import LoraSection
from tunesmith.errors import ConfigError, ModelError
from tunesmith.reading import open_file

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INITS: dict[str, Any] = {"pissa": "pissa", "olora": "olora"}
_EXPERTS = re.compile(r"mlp\.experts\.(gate_up_proj|down_proj)$")


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """peft and bitsandbytes warn about what we check ourselves."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def require_quantization(lora: LoraSection) -> None:
    """Fail before any work where bitsandbytes is not installed."""
    if lora.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "lora.quantize",
            [f"{lora.quantize} needs bitsandbytes, which is not installed: pip install 'tunesmith[qlora]'"],
        )


def quantization_config(lora: LoraSection, compute_dtype: torch.dtype) -> Any:
    """What from_pretrained needs to load quantised weights; None without lora.quantize."""
    if lora.quantize == "none":
        return None
    from transformers import BitsAndBytesConfig

    if lora.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=lora.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_differentiable(model: nn.Module) -> None:
    """No packing for fast inference: bitsandbytes repacks 4-bit weights in the first evaluation on newer CPUs, and its
    kernel for them has no gradient, which would then be lost in silence for all layers below."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_adapter(
    model: nn.Module, lora: LoraSection, base_name: str, new_ids: Sequence[int] = (), revision: str | None = None
) -> Any:
    """Freeze the model and put an adapter into it; returns peft's PeftModel around it.

    Args:
        base_name: written into adapter_config.json, where peft looks for the base.
        new_ids: added tokens, whose rows of embedding and head are trained.
        revision: of a hub base, kept for those who open the adapter.

    Raises:
        ConfigError: a target that stands for nothing, or a kind that the model's layers do not take.
    """
    from peft import LoraConfig, get_peft_model

    targets, parameters = choose_targets(model, lora)
    problem = _find_problem(model, lora, targets, parameters)
    if changes_base(lora) and (lora.modules_to_save or lora.bias != "none" or new_ids):
        problem = f"kind: {lora.kind} is saved as matrices only, without modules_to_save, bias and add_tokens; use lora"
    if problem:
        raise ConfigError("lora", [problem])
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.scale_alpha) if float(lora.scale_alpha).is_integer() else lora.scale_alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        target_parameters=parameters or None,
        modules_to_save=lora.modules_to_save,
        trainable_token_indices=_token_rows(model, lora, new_ids),
        bias=lora.bias,
        use_rslora=lora.kind == "rslora",
        use_dora=lora.kind == "dora",
        init_lora_weights=_INITS.get(lora.kind, True),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        ensure_weight_tying=bool(lora.modules_to_save) and bool(model.config.get_text_config().tie_word_embeddings),
    )
    with quiet_peft():
        try:
            wrapped = get_peft_model(model, config)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise ConfigError("lora", [f"peft cannot put it into this model: {error}"]) from None
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    wrapped.peft_config["default"].revision = revision
    return wrapped


def _token_rows(model: nn.Module, lora: LoraSection, new_ids: Sequence[int]) -> dict[str, list[int]] | None:
    """Which rows of which embeddings are trained; a tied head follows its embedding."""
    layers = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        layers.append(model.get_output_embeddings())
    names = {
        name.rpartition(".")[2] for name, module in model.named_modules() if any(module is layer for layer in layers)
    }
    rows = {name: list(new_ids) for name in sorted(names - set(lora.modules_to_save or []))}
    return rows if rows and new_ids else None


def choose_targets(model: nn.Module, lora: LoraSection) -> tuple[Any, list[str]]:
    """(module names or one regex, as peft takes them; names of parameters that are no modules)."""
    parameters = list(lora.target_parameters or [])
    if lora.target_modules != ["all-linear"]:
        is_regex = len(lora.target_modules) == 1 and not re.fullmatch(r"[\w.]+", lora.target_modules[0])
        return (lora.target_modules[0] if is_regex else lora.target_modules), parameters
    head = model.get_output_embeddings()
    linear = [
        name for name, m in model.named_modules() if _is_linear(m) and m is not head and not is_router(name, model)
    ]
    if lora.target_parameters is None and lora.kind in ("lora", "rslora") and not lora.dropout:
        experts = [found[0] for name, _ in model.named_parameters() if (found := _EXPERTS.search(name))]
        parameters = sorted(set(experts))
    return sorted({name.rpartition(".")[2] for name in linear}), parameters


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def is_router(name: str, model: nn.Module) -> bool:
    """The linear layer that chooses a mixture's experts; training it lightly unbalances them."""
    config = model.config.get_text_config()
    is_mixture = bool(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None))
    return is_mixture and name.rpartition(".")[2] in ("gate", "router", "shared_expert_gate")


def _find_problem(model: nn.Module, lora: LoraSection, targets: Any, parameters: list[str]) -> str:
    names = [name for name, _ in model.named_modules()]
    known = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)})
    advice = f"the model's linear layers are {', '.join(known)}"
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in names):
            return f"target_modules {targets!r} matches no module; {advice}"
    else:
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                return f"target_modules {target!r} matches no module; {advice}"
    for name in lora.modules_to_save or []:
        if not any(module == name or module.endswith(f".{name}") for module in names):
            return f"modules_to_save {name!r} matches no module of this model"
    for parameter in parameters:
        if not any(name.endswith(parameter) for name, _ in model.named_parameters()):
            return f"target_parameters {parameter!r} matches no weight of this model"
    if changes_base(lora) and any(isinstance(module, Conv1D) for module in model.modules()):
        return f"kind: peft cannot begin {lora.kind} in GPT-2's transposed layers; use lora, rslora or dora"
    if parameters and lora.dropout:
        return f"dropout: peft knows none for weights that are no modules ({parameters[0]}); set it to 0"
    if parameters and lora.kind == "dora":
        return f"kind: dora does not reach weights that are no modules ({parameters[0]}); use lora"
    return ""


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """What is trained is kept in `dtype`, whatever the frozen weights are in."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def adapter_weights(wrapped: Any) -> dict[str, Tensor]:
    """The adapter's state dict under the names of its file, apart from the model."""
    from peft import get_peft_model_state_dict

    with quiet_peft():
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def load_adapter_weights(wrapped: Any, weights: Mapping[str, Tensor]) -> None:
    """What `adapter_weights` took, back into the same adapter."""
    from peft import set_peft_model_state_dict

    with quiet_peft():
        result = set_peft_model_state_dict(wrapped, dict(weights))
    if result.unexpected_keys:
        raise ModelError(f"the adapter's weights hold {result.unexpected_keys[0]}, which this model has no place for.")


def write_adapter(
    wrapped: Any, folder: Path, weights: Mapping[str, Tensor] | None = None, initial: Path | None = None
) -> None:
    """adapter_config.json and adapter_model.safetensors.

    Args:
        weights: from `adapter_weights`, instead of the adapter's own.
        initial: where PiSSA's or OLoRA's first matrices lie; with them the adapter is saved as a plain LoRA of twice
            the rank, which fits the base as everybody has it (peft's conversion).
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with quiet_peft():
        if initial is not None:
            wrapped.save_pretrained(
                folder, path_initial_model_for_weight_conversion=str(initial), save_embedding_layers=False
            )
            (folder / "README.md").unlink(missing_ok=True)
            return
        config = wrapped.peft_config["default"]
        was, config.inference_mode = config.inference_mode, True
        config.save_pretrained(folder)
        config.inference_mode = was
    save_file(
        dict(weights) if weights is not None else adapter_weights(wrapped), folder / ADAPTER_WEIGHTS, {"format": "pt"}
    )


def save_initial(wrapped: Any, folder: Path) -> None:
    """The first matrices of PiSSA or OLoRA, for the conversion at the end."""
    config = wrapped.peft_config["default"]
    was, config.init_lora_weights = config.init_lora_weights, True
    write_adapter(wrapped, folder)
    config.init_lora_weights = was


def describe_adapter(wrapped: Any) -> str:
    """In words, for the summary."""
    config = wrapped.peft_config["default"]
    targets = config.target_modules
    shown = targets if isinstance(targets, str) else " ".join(sorted(targets))
    more = [f"experts {' '.join(config.target_parameters)}"] if config.target_parameters else []
    more += [f"whole {' '.join(config.modules_to_save)}"] if config.modules_to_save else []
    kind = "dora" if config.use_dora else "rslora" if config.use_rslora else config.init_lora_weights
    kind = "lora" if kind is True else kind
    return f"{kind}, rank {config.r}, alpha {config.lora_alpha:g}, on {', '.join([shown, *more])}"


def changes_base(lora: LoraSection) -> bool:
    """PiSSA and OLoRA take their first matrices out of the base's weights."""
    return lora.kind in _INITS


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder.

    Raises:
        ModelError: it cannot be read, or is no LoRA adapter.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{folder}: its {ADAPTER_CONFIG} cannot be read. The adapter was not saved whole.") from None
    if kind != "LORA":
        raise ModelError(f"{folder}: is a {kind} adapter; tunesmith knows LoRA and its relatives.")
    return dict(config)


def find_adapter(path: Path) -> Path | None:
    """The PEFT folder that a path stands for (itself, or RUN/adapter), if any."""
    for folder in (path, path / "adapter"):
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            return folder
    return None


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Raises:
    ModelError: the file is missing or cut short.
    """
    try:
        open_file(folder / ADAPTER_WEIGHTS).close()  # a pipe would be waited for
        return load_file(folder / ADAPTER_WEIGHTS)
    except FileNotFoundError:
        raise ModelError(f"{folder}: has no {ADAPTER_WEIGHTS}.") from None
    except Exception as error:
        raise ModelError(
            f"{folder / ADAPTER_WEIGHTS}: cannot be read: {error}. The file is cut short or damaged."
        ) from None


def rows_needed(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> int:
    """Rows of the embedding that an adapter with added tokens takes; 0 where it leaves the embedding alone."""
    indices = config.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    rows = [max(ids) + 1 for ids in lists if ids]
    rows += [
        len(t) for key, t in weights.items() if key.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))
    ]
    return max(rows, default=0)


def open_adapter(model: nn.Module, folder: Path, name: str = "default", onto: Any = None) -> Any:
    """Put a saved adapter into its base, frozen.

    Args:
        onto: the PeftModel to add it to under `name`, where the model has one already.

    Raises:
        ModelError: it belongs to another base, or is damaged.
    """
    from peft import PeftModel, get_peft_model_state_dict

    config, weights = read_adapter_config(folder), read_adapter_weights(folder)
    rows = rows_needed(config, weights)
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with quiet_peft():
            if onto is None:
                wrapped = PeftModel.from_pretrained(model, folder, adapter_name=name)
            else:
                onto.load_adapter(folder, adapter_name=name)
                wrapped = onto
            placed = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    except Exception as error:
        text = " ".join(str(error).split())
        raise ModelError(
            f"{folder}: does not fit this base ({config.get('base_model_name_or_path')} was its own): {text[:300]}"
        ) from None
    lost = [key for key, tensor in weights.items() if key not in placed or placed[key].shape != tensor.shape]
    if lost:
        raise ModelError(
            f"{folder}: does not fit this base ({config.get('base_model_name_or_path')} was its own): it has no place "
            f"for {lost[0]}."
        )
    return wrapped
