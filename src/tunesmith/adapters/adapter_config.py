"""Parse and check adapter_config.json of any tool; match module patterns within a time limit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunesmith.errors import ModelError
from tunesmith.runfolder import latest_stage

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = regex.compile(r"[\w.]+")
_MATCH_S = 1.0  # seconds, for one pattern on all names of a model; usually takes milliseconds
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# fields about training or the runtime, which do not affect the weights
_NO_MATTER = ("auto_mapping", "eva_config", "megatron_core", "peft_version", "runtime_config", "qalora_group_size")
_TASKS = (None, "CAUSAL_LM")

_Names = list[str]
_Rank = Field(ge=1, le=2**20)


class PatternError(ValueError):
    """A pattern is not a regular expression, or matching takes too long."""


class AdapterConfig(BaseModel):
    """Fields of peft's LoraConfig that determine the effect of an adapter."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    r: int = _Rank
    lora_alpha: float = 8
    lora_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    bias: str = "none"
    target_modules: str | _Names | None = None
    exclude_modules: str | _Names | None = None
    target_parameters: _Names | None = None
    modules_to_save: _Names | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | _Names | None = None
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    def token_indices(self, module: str) -> list[int]:
        """Rows of an embedding that the adapter trains."""
        indices = self.trainable_token_indices or []
        return indices.get(module.rpartition(".")[2], []) if isinstance(indices, dict) else indices

    def all_token_indices(self) -> list[list[int]]:
        indices = self.trainable_token_indices or []
        return list(indices.values()) if isinstance(indices, dict) else [indices]


def find_adapter(path: Path) -> Path | None:
    """The PEFT folder at a path (the path itself or RUN/adapter); None if there is none."""
    path = latest_stage(path)
    for folder in (path, path / "adapter"):
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            return folder
    return None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Parse adapter_config.json of a PEFT folder.

    Raises:
        ModelError: it cannot be read, is not of a LoRA adapter, or has impossible values.
    """
    path = folder / ADAPTER_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ModelError(
            f"{folder}: {ADAPTER_CONFIG} cannot be read; the adapter is incomplete. Copy or save it again.",
            code="adapter-config-unreadable",
        ) from None
    if not isinstance(content, dict) or "peft_type" not in content:
        raise ModelError(
            f"{path}: has no peft_type, so it is not the config of an adapter. Give a folder saved by peft.",
            code="adapter-config-unreadable",
        )
    if content["peft_type"] != "LORA":
        raise ModelError(
            f"{folder}: is a {content['peft_type']!r} adapter; tunesmith opens LoRA and its variants.",
            code="adapter-kind-unknown",
        )
    try:
        config = AdapterConfig(**{key: value for key, value in content.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][:1])
        raise ModelError(
            f"{path}: {field} is {_short(content.get(field))}: {first['msg'].lower()}.", code="adapter-config-invalid"
        ) from None
    problem = _find_problem(config)
    if problem:
        raise ModelError(f"{path}: {problem}", code="adapter-config-invalid")
    return config


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _find_problem(config: AdapterConfig) -> str:
    if config.task_type not in _TASKS:
        return f"task_type is {_short(config.task_type)}; tunesmith opens adapters of CAUSAL_LM, which generate text."
    if config.bias not in ("none", "all", "lora_only"):
        return f"bias is {_short(config.bias)}; it must be none, all or lora_only."
    for field in ("target_parameters", "modules_to_save"):
        for name in getattr(config, field) or []:
            if not _NAME.fullmatch(name):
                return f"{field} contains {_short(name)}, which is not the name of a module."
    indices = config.trainable_token_indices
    names = list(indices) if isinstance(indices, dict) else []
    if any(not _NAME.fullmatch(name) for name in names):
        return f"trainable_token_indices names {_short(names)}, which are not names of modules."
    if any(not 0 <= number < 2**31 for numbers in config.all_token_indices() for number in numbers):
        return "trainable_token_indices contains a number that is not a token id."
    if any(not 1 <= rank <= 2**20 for rank in (config.rank_pattern or {}).values()):
        return "rank_pattern contains a number that is not a rank."
    begun = config.init_lora_weights
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        return (
            f"init_lora_weights is {_short(begun)}: these matrices belong to a base changed by {begun}, not to the "
            "original base. A finished run contains the converted adapter: give the RUN folder, or finish the run "
            "with tunesmith resume RUN. An adapter saved by peft is converted by save_pretrained with "
            "path_initial_model_for_weight_conversion."
        )
    return _find_unknown(config)


def _find_unknown(config: AdapterConfig) -> str:
    """Why a field that is set cannot be handled; "" if there is none."""
    from dataclasses import MISSING, fields

    from peft import LoraConfig

    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(LoraConfig)
    }
    for name, value in (config.model_extra or {}).items():
        if name in _NO_MATTER or name in ("peft_type", "inference_mode", "megatron_config"):
            continue
        if value not in (None, False, [], {}) and value != defaults.get(name):
            return f"{name} is {_short(value)}, which tunesmith does not support. Open the adapter with peft."
    return ""


def is_name(pattern: str) -> bool:
    """Whether a name is a plain module name, not a regular expression."""
    return _NAME.fullmatch(pattern) is not None


def match_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that a regular expression matches in full.

    peft uses Python's re, which never finishes on a pattern such as (a+)+$. Here matching has a time limit, and peft
    gets the matching names instead of the pattern.

    Raises:
        PatternError: the pattern cannot be compiled, or takes too long.
    """
    deadline = time.monotonic() + _MATCH_S
    try:
        compiled = regex.compile(pattern)
        return [name for name in names if compiled.fullmatch(name, timeout=max(deadline - time.monotonic(), 1e-3))]
    except TimeoutError:
        raise PatternError(f"{_short(pattern)} takes too long to match; avoid nested repetitions") from None
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise PatternError(f"{_short(pattern)} is not a regular expression: {error}") from None


def select_modules(targets: str | Iterable[str] | None, names: Iterable[str]) -> list[str]:
    """Modules selected by peft's target_modules: a regular expression for full names, or ends of names."""
    names = list(names)
    if targets is None:
        return []
    if isinstance(targets, str):
        return match_names(targets, names)
    wanted = set(targets)
    return [name for name in names if any(ending in wanted for ending in _endings(name))]


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[index:]) for index in range(len(parts))]


def resolve_pattern(patterns: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, Any]:
    """The value of rank_pattern or alpha_pattern for each matching name; the first match wins, as in peft."""
    chosen: dict[str, Any] = {}
    names = list(names)
    for pattern, value in (patterns or {}).items():
        if is_name(pattern):
            matched = [name for name in names if pattern in _endings(name)]
        else:
            matched = match_names(rf"(.*\.)?({pattern})", names)
        for name in matched:
            chosen.setdefault(name, value)
    return chosen
