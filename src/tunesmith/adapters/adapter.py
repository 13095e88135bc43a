"""Create, save and reopen LoRA adapters and variants with peft.

peft changes the model in place, so all other code keeps using the model itself; the PeftModel around it is only used to
find out what to train and what to save.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.adapters.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PatternError, is_name, select_modules
from tunesmith.adapters.base import write_record
from tunesmith.config.schema import LoraSection
from tunesmith.errors import ConfigError, ModelError
from tunesmith.tensors import write_tensors

_INITS: dict[str, Any] = {"pissa": "pissa", "olora": "olora"}
_EXPERTS = re.compile(r"mlp\.experts\.(gate_up_proj|down_proj)$")


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence warnings of peft and bitsandbytes about things that we check ourselves."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def require_quantization(lora: LoraSection) -> None:
    """Fail early if lora.quantize needs bitsandbytes and it is not installed."""
    if lora.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "lora.quantize",
            [f"{lora.quantize} needs bitsandbytes, which is not installed: pip install 'tunesmith[qlora]'"],
        )


def quantization_config(lora: LoraSection, compute_dtype: torch.dtype) -> Any:
    """The quantization_config of from_pretrained (NF4: Dettmers et al. 2023); None without lora.quantize."""
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
    """Disable packing for fast inference: on newer CPUs, bitsandbytes repacks 4-bit weights in the first evaluation,
    and the kernel for these has no gradient, so that all layers below would silently get none."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def add_adapter(
    model: nn.Module,
    lora: LoraSection,
    base_name: str,
    new_ids: Sequence[int] = (),
    revision: str | None = None,
    base_record: Mapping[str, Any] | None = None,
) -> Any:
    """Freeze the model and add an adapter; returns peft's PeftModel around it.

    Args:
        base_name: base_model_name_or_path of adapter_config.json, where peft looks for the base.
        new_ids: ids of added tokens; their rows of embedding and head are trained.
        revision: of a hub base, written to adapter_config.json.
        base_record: from adapters/base.py, saved along with the adapter.

    Raises:
        ConfigError: a target matches nothing, or the model's layers do not support the kind of adapter.
    """
    from peft import LoraConfig, get_peft_model

    try:
        targets, parameters = choose_targets(model, lora)
    except PatternError as error:
        raise ConfigError("lora", [f"target_modules: {error}"]) from None
    problem = find_problem(model, lora, targets, parameters) or find_tying_problem(model, lora, targets, bool(new_ids))
    if problem:
        raise ConfigError("lora", [problem])
    whole, is_tied = choose_full_modules(model, lora)
    alpha: Any = int(lora.scale_alpha) if float(lora.scale_alpha).is_integer() else lora.scale_alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        target_parameters=parameters or None,
        modules_to_save=list(whole) or None,
        trainable_token_indices=_token_rows(model, whole, new_ids),
        bias=lora.bias,
        use_rslora=lora.kind == "rslora",
        use_dora=lora.kind == "dora",
        init_lora_weights=_INITS.get(lora.kind, True),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        ensure_weight_tying=is_tied,
    )
    with quiet_peft():
        try:
            wrapped: Any = get_peft_model(model, config)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise ConfigError("lora", [f"peft cannot add this adapter to the model: {error}"]) from None
    made = wrapped.peft_config["default"]
    made.base_model_name_or_path, made.revision = base_name, revision
    made.target_modules, made.modules_to_save = set(targets), list(whole) or None  # peft stores them in its own form
    wrapped.base_record = base_record
    return wrapped


@dataclass(frozen=True)
class EmbeddingNames:
    """Names of the embedding and the head, and whether they are tied (one weight)."""

    embedding: str
    head: str | None
    is_tied: bool

    def among(self, chosen: Iterable[str]) -> set[str]:
        """Which of the two are among the given names (full names, or ends of names)."""
        pair = [name for name in (self.embedding, self.head) if name]
        return set(select_modules(list(chosen), pair))


def find_embedding_names(model: Any) -> EmbeddingNames:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    is_tied = head is not None and bool(model.config.get_text_config().tie_word_embeddings)
    return EmbeddingNames(names[id(embedding)], names.get(id(head)), is_tied)


def choose_full_modules(model: nn.Module, lora: LoraSection) -> tuple[list[str], bool]:
    """(modules to train in full; whether embedding and head among them stay tied).

    peft finds weights to tie by the names lm_head and embed_tokens, so the head stands for both where the embedding is
    named otherwise (GPT-2's wte).
    """
    pair, whole = find_embedding_names(model), list(lora.modules_to_save or [])
    if not (pair.is_tied and pair.head and pair.among(whole)):
        return whole, False
    others = [name for name in whole if not pair.among([name])]
    knows = pair.embedding.rpartition(".")[2] == "embed_tokens"
    return [*others, pair.embedding if knows else pair.head], True


def _token_rows(model: nn.Module, whole: Sequence[str], new_ids: Sequence[int]) -> dict[str, list[int]] | None:
    """Rows to train of each embedding; a tied head follows its embedding."""
    pair = find_embedding_names(model)
    trained = pair.among(whole)
    if not new_ids or (pair.is_tied and trained):
        return None
    names = {pair.embedding} if pair.is_tied or not pair.head else {pair.embedding, pair.head}
    return {name.rpartition(".")[2]: list(new_ids) for name in sorted(names - trained)} or None


def choose_targets(model: nn.Module, lora: LoraSection) -> tuple[list[str], list[str]]:
    """(names of modules, or ends of names; names of parameters that are not modules).

    Raises:
        PatternError: a regular expression cannot be compiled, or takes too long to match.
    """
    parameters = list(lora.target_parameters or [])
    if lora.target_modules != ["all-linear"]:
        is_regex = len(lora.target_modules) == 1 and not is_name(lora.target_modules[0])
        return (_names_for(lora.target_modules[0], model) if is_regex else list(lora.target_modules)), parameters
    head = cast("Any", model).get_output_embeddings()
    linear = {
        name for name, m in model.named_modules() if _is_linear(m) and m is not head and not is_router(name, model)
    }
    if lora.target_parameters is None and lora.kind in ("lora", "rslora") and not lora.dropout:
        experts = [found[0] for name, _ in model.named_parameters() if (found := _EXPERTS.search(name))]
        parameters = sorted(set(experts))
    return _shortened(linear, model), parameters


def _names_for(pattern: str, model: nn.Module) -> list[str]:
    """Modules that a regular expression matches."""
    return _shortened(set(select_modules(pattern, [name for name, _ in model.named_modules() if name])), model)


def _shortened(chosen: set[str], model: nn.Module) -> list[str]:
    """Modules by the last part of their names; in full where that part also names others (`altup.0`, `layers.0`)."""
    names = [name for name, _ in model.named_modules() if name]
    short = {name.rpartition(".")[2] for name in chosen}
    clear = {part for part in short if set(select_modules([part], names)) <= chosen}
    return sorted(clear | {name for name in chosen if name.rpartition(".")[2] not in clear})


def _is_linear(module: nn.Module) -> bool:
    if type(module).__name__ in ("Linear4bit", "Linear8bitLt") or isinstance(module, Conv1D):
        return True
    return isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or _acts_linear(module))


@torch.no_grad()
def _acts_linear(module: nn.Linear) -> bool:
    """Whether a class with a forward of its own computes x W' + b; DeepSeek V4's grouped o_a_proj does not, and peft's
    two matrices do not fit it."""
    size, weight = module.in_features, module.weight
    inputs = torch.linspace(-1, 1, 2 * size, dtype=weight.dtype, device=weight.device).view(1, 2, size)
    try:
        outputs = module(inputs)
    except Exception:  # takes other shapes
        return False
    expected = nn.functional.linear(inputs, weight, module.bias)
    is_alike = isinstance(outputs, Tensor) and outputs.shape == expected.shape  # Llama 4's router returns a tuple
    return is_alike and torch.allclose(outputs, expected, rtol=1e-2, atol=1e-2)


def is_router(name: str, model: nn.Module) -> bool:
    """Whether a module is the router of a mixture of experts, which adapters do not change."""
    config = cast("Any", model).config.get_text_config()
    is_mixture = bool(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None))
    return is_mixture and name.rpartition(".")[2] in ("gate", "router", "shared_expert_gate")


def find_zero_gates(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of the shared experts' gates, by name, if they are zero in all layers; otherwise none.

    Such a gate is sigmoid(0) = 0.5 for every token. MiniMind's shared expert, which has no gate, is so in Qwen2-MoE's
    form, with its down projection doubled.
    """
    gates = {name: p for name, p in model.named_parameters() if name.endswith(".shared_expert_gate.weight")}
    is_plain = all(gate.is_floating_point() and not gate.is_meta for gate in gates.values())  # not quantized
    return gates if is_plain and not any(gate.any() for gate in gates.values()) else {}


def find_problem(model: nn.Module, lora: LoraSection, targets: Sequence[str], parameters: Sequence[str]) -> str:
    """Why the settings do not fit the model's layers; "" if they fit."""
    names = [name for name, _ in model.named_modules()]
    known = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)})
    advice = f"the model's linear layers are {', '.join(known)}"
    if not targets and not parameters:
        return f"target_modules {lora.target_modules[0]!r} matches no module; {advice}"
    for target in targets:
        if not is_name(target):
            return f"target_modules {target!r} is not the name of a module; give names, or one regular expression alone"
        chosen = select_modules([target], names)
        if not chosen:
            return f"target_modules {target!r} matches no module; {advice}"
        module = model.get_submodule(min(chosen))
        if isinstance(module, nn.Linear) and not _is_linear(module):
            return f"target_modules {target!r} is a layer that peft cannot adapt ({type(module).__name__}); {advice}"
    for name in lora.modules_to_save or []:
        if not is_name(name) or not select_modules([name], names):
            return f"modules_to_save {name!r} matches no module of this model"
    for parameter in parameters:
        if not any(name.endswith(parameter) for name, _ in model.named_parameters()):
            return f"target_parameters {parameter!r} matches no weight of this model"
    for gate in find_zero_gates(model):
        if _trains(gate, targets, lora.modules_to_save or [], parameters):
            return (
                f"{gate} would be trained, but is zero in all layers: MiniMind's shared expert has no gate. Leave it "
                "out"
            )
    if changes_base(lora) and any(isinstance(module, Conv1D) for module in model.modules()):
        return f"kind: peft cannot initialize {lora.kind} in GPT-2's transposed layers; use lora, rslora or dora"
    if changes_base(lora) and (narrow := _find_narrow(model, lora.rank, select_modules(targets, names))):
        return f"rank: {lora.kind} takes its matrices from the weights, so the rank is at most {narrow}"
    if parameters and lora.dropout:
        return f"dropout: peft has no dropout for weights that are not modules ({parameters[0]}); set it to 0"
    if parameters and lora.kind == "dora":
        return f"kind: dora does not support weights that are not modules ({parameters[0]}); use lora"
    return ""


def _find_narrow(model: nn.Module, rank: int, names: Sequence[str]) -> str:
    """The layer with the fewest rows or columns, if these are fewer than the rank."""
    weights = {name: getattr(model.get_submodule(name), "weight", None) for name in names}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items() if weight is not None and weight.ndim == 2}
    least = min(shapes, key=lambda name: min(shapes[name]), default="")
    if not least or min(shapes[least]) >= rank:
        return ""
    return f"{min(shapes[least])}, as {least} is {list(shapes[least])}"


def _trains(weight: str, targets: Sequence[str], whole: Sequence[str], parameters: Sequence[str]) -> bool:
    """Whether an adapter with these targets changes a weight of a module."""
    parts = weight.split(".")[:-1]
    modules = [".".join(parts[: end + 1]) for end in range(len(parts))]  # the module and those that it is a part of
    is_target = select_modules(targets, modules[-1:]) or select_modules(whole, modules)
    return bool(is_target) or any(weight.endswith(parameter) for parameter in parameters)


def find_tying_problem(model: nn.Module, lora: LoraSection, targets: Sequence[str], has_new: bool) -> str:
    """Why embedding and head cannot be trained as configured; "" if they can.

    Configurations refused here can be trained with peft, but reopen as a different model or not at all.
    """
    pair, kind = find_embedding_names(model), lora.kind
    names = [name for name, _ in model.named_modules()]
    low, whole = pair.among(targets), pair.among(lora.modules_to_save or [])
    both = set(select_modules(targets, names)) & set(select_modules(lora.modules_to_save or [], names))
    if changes_base(lora) and (lora.modules_to_save or lora.bias != "none" or has_new):
        return f"kind: {kind} is saved as matrices only, without modules_to_save, bias and add_tokens; use lora"
    if both:
        return f"modules_to_save and target_modules both name {min(both)}; keep it in one of the two"
    if pair.is_tied and low and whole:
        return (
            f"{pair.embedding} and {pair.head} are one weight in this model (tied); name it in modules_to_save or in "
            "target_modules, not in both"
        )
    if has_new and low:
        return (
            f"target_modules names {min(low)}, whose rows model.add_tokens trains in full; name it in modules_to_save "
            "instead, or leave it out"
        )
    if pair.embedding in low and kind in ("dora", "pissa", "olora"):
        return f"kind: {kind} does not support embeddings ({pair.embedding}); use lora or rslora, or modules_to_save"
    if pair.is_tied and low and kind in ("dora", "pissa", "olora"):
        return (
            f"kind: {kind} cannot untie {pair.head} from {pair.embedding}, which are one weight in this model (tied); "
            "use lora or rslora, or modules_to_save"
        )
    return ""


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep trained weights in `dtype`, whatever the dtype of the frozen weights."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def adapter_tensors(wrapped: Any) -> dict[str, Tensor]:
    """The adapter's state dict under the names of its file."""
    from peft import get_peft_model_state_dict

    with quiet_peft():
        state: dict[str, Tensor] = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return state


def adapter_weights(wrapped: Any) -> dict[str, Tensor]:
    """Copy of the adapter's state dict under the names of its file."""
    state = adapter_tensors(wrapped)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def load_adapter_weights(wrapped: Any, weights: Mapping[str, Tensor]) -> None:
    """Load the result of `adapter_weights` into the same adapter."""
    from peft import set_peft_model_state_dict

    with quiet_peft():
        result: Any = set_peft_model_state_dict(wrapped, dict(weights))
    if result.unexpected_keys:
        raise ModelError(
            f"the adapter has {result.unexpected_keys[0]}, which this model does not have. Use the model that it was "
            "trained on.",
            code="adapter-does-not-fit",
        )


def write_adapter(
    wrapped: Any, folder: Path, weights: Mapping[str, Tensor] | None = None, initial: Path | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        weights: from `adapter_weights`, instead of the adapter's own.
        initial: folder with the initial matrices of PiSSA or OLoRA; with it, the adapter is saved as a plain LoRA of
            twice the rank, which fits the unchanged base (peft's conversion).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_peft():
        if initial is not None:
            wrapped.save_pretrained(
                folder, path_initial_model_for_weight_conversion=str(initial), save_embedding_layers=False
            )
            (folder / "README.md").unlink(missing_ok=True)
        else:
            config = wrapped.peft_config["default"]
            was, config.inference_mode = config.inference_mode, True
            config.save_pretrained(folder)
            config.inference_mode = was
    _sort_names(folder / ADAPTER_CONFIG)
    write_record(getattr(wrapped, "base_record", None), folder)
    if initial is None:
        tensors = weights if weights is not None else adapter_weights(wrapped)
        write_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})


def _sort_names(path: Path) -> None:
    """Sort the lists of names; peft keeps them in sets, whose order differs between processes."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def save_initial(wrapped: Any, folder: Path) -> None:
    """Write the initial matrices of PiSSA or OLoRA, for the conversion of the finished adapter."""
    config = wrapped.peft_config["default"]
    was, config.init_lora_weights = config.init_lora_weights, True
    write_adapter(wrapped, folder)
    config.init_lora_weights = was


def describe_adapter(wrapped: Any) -> str:
    """Description of the adapter for the summary."""
    config = wrapped.peft_config["default"]
    targets = config.target_modules
    shown = targets if isinstance(targets, str) else " ".join(sorted(targets))
    more = [f"experts {' '.join(config.target_parameters)}"] if config.target_parameters else []
    more += [f"whole {' '.join(config.modules_to_save)}"] if config.modules_to_save else []
    kind = "dora" if config.use_dora else "rslora" if config.use_rslora else config.init_lora_weights
    kind = "lora" if kind is True else kind
    return f"{kind}, rank {config.r}, alpha {config.lora_alpha:g}, on {', '.join([shown, *more])}"


def changes_base(lora: LoraSection) -> bool:
    """PiSSA and OLoRA subtract their initial matrices from the base's weights."""
    return lora.kind in _INITS
