"""The file of train.deepspeed: which of DeepSpeed's keys are used, which are set from the run's own, which are refused.

Imports no torch and no DeepSpeed: a file with a mistake is answered before they are loaded.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config.plainyaml import show
from tunesmith.config.suggest import suggest_words
from tunesmith.errors import ConfigError
from tunesmith.reading import read_text

if TYPE_CHECKING:
    from tunesmith.config.schema import RunConfig
    from tunesmith.config.train_keys import TrainSection

AUTO = "auto"
ADVICE = "train.parallel fsdp does without it (no file needed)"

_ZERO_USED = frozenset({
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
    "allgather_bucket_size", "overlap_comm", "offload_optimizer", "offload_param", "sub_group_size",
    "round_robin_gradients", "stage3_prefetch_bucket_size", "prefetch_bucket_size",
    "stage3_param_persistence_threshold", "param_persistence_threshold", "stage3_model_persistence_threshold",
    "model_persistence_threshold", "stage3_max_live_parameters", "max_live_parameters", "stage3_max_reuse_distance",
    "max_reuse_distance", "use_multi_rank_bucket_allreduce",
})  # fmt: skip
"""Keys of zero_optimization that are handed to DeepSpeed as they are."""

_ZERO_WITHOUT_EFFECT = frozenset({
    "elastic_checkpoint", "load_from_fp32_weights", "ignore_unused_parameters",
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
    "gather_16bit_weights_on_model_save", "pipeline_loading_checkpoint", "memory_efficient_linear", "legacy_stage1",
    "grad_hooks", "compute_grad_norm", "log_trace_cache_warnings", "enable_sanity_checks", "override_module_apply",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "stage3_module_granularity_threshold",
})  # fmt: skip
"""Keys of zero_optimization about saving by DeepSpeed, its own module initialisation, or its checks of itself."""

_OFFLOAD_USED = frozenset({"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "fast_init"})
_OFFLOAD_UNUSED = frozenset({"nvme_path", "pipeline_read", "pipeline_write", "ratio", "cpuadam_cores_perc"})

_WITHOUT_EFFECT = frozenset({
    "steps_per_print", "wall_clock_breakdown", "dump_state", "log_level", "memory_breakdown", "disable_python_gc",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "checkpoint", "dataloader_drop_last", "aio",
    "timers", "use_node_local_storage", "disable_allgather", "optimizer_legacy_fusion", "nebula",
})  # fmt: skip
"""Keys about DeepSpeed's own printing, saving and checks: they change no step of a run, and no note is needed."""

_OURS = {
    "train_batch_size": "train.micro_batch_tokens and train.grad_accum_steps say what a step has",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens says what one forward has",
    "gradient_accumulation_steps": "train.grad_accum_steps says how many forwards a step has, over all processes",
    "managed_gradient_accumulation": "train.grad_accum_steps says how many forwards a step has",
    "prescale_gradients": "gradients are summed over the processes, and divided by the step's targets",
    "gradient_predivide_factor": "gradients are summed over the processes, and divided by the step's targets",
    "gradient_allreduce_op": "gradients are summed over the processes, and divided by the step's targets",
    "communication_data_type": "gradients are summed in fp32",
    "seq_parallel_communication_data_type": "gradients are summed in fp32",
    "data_types": "gradients and weights are kept in fp32",
    "activation_checkpointing": "train.gradient_checkpointing does this",
    "tensorboard": "train.trackers does this", "wandb": "train.trackers does this",
    "csv_monitor": "metrics.jsonl has every step", "comet": "train.trackers does this",
    "monitor_config": "train.trackers does this",
    "flops_profiler": "it measures DeepSpeed's own loop", "comms_logger": "it prints from DeepSpeed's own loop",
}  # fmt: skip
"""Keys whose meaning a run's own keys or its train step have -> what decides instead."""

_REFUSED = {
    "pipeline": "pipeline parallelism", "compression_training": "compression while training",
    "weight_quantization": "quantized weights", "quantize_training": "quantized training",
    "sparse_attention": "sparse attention", "sparse_gradients": "sparse gradients",
    "progressive_layer_drop": "progressive layer drop", "curriculum_learning": "curriculum learning",
    "data_efficiency": "data efficiency (curriculum, random-LTD)", "eigenvalue": "eigenvalues for quantization",
    "autotuning": "autotuning", "elasticity": "elastic batch sizes", "hybrid_engine": "the hybrid engine",
    "tensor_parallel": "tensor parallelism", "autotp_size": "tensor parallelism",
    "sequence_parallel_size": "sequence parallelism", "data_parallel_size": "sequence parallelism",
    "expert_parallel": "expert parallelism", "use_data_before_expert_parallelism": "expert parallelism",
    "amp": "apex mixed precision", "compile": "DeepCompile", "inference": "inference",
    "datastates_ckpt": "DataStates checkpoints",
}  # fmt: skip
"""Keys of what is not tested here -> its name."""

_ZERO_REFUSED = {
    "zenflow": "ZenFlow", "zero_quantized_weights": "quantized weights (ZeRO++)",
    "zero_quantized_nontrainable_weights": "quantized weights (ZeRO++)",
    "zero_quantized_gradients": "quantized gradients (ZeRO++)",
    "zero_hpz_partition_size": "a second partition (ZeRO++)",
    "mics_shard_size": "MiCS", "mics_hierarchical_params_gather": "MiCS",
    "cpu_offload_params": "an old form of offload_param", "cpu_offload_param": "an old form of offload_param",
    "cpu_offload": "an old form of offload_optimizer", "cpu_offload_use_pin_memory": "an old form of offload_optimizer",
    "save_muon_momentum_buffer_in_memory": "the Muon optimizer", "leaf_module": "leaf modules",
    "parameter_alignment": "aligned parameters",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeepSpeedFile:
    """What a run takes from the file.

    Attributes:
        zero: zero_optimization as DeepSpeed gets it.
        notes: keys that the run does not follow, and what it does instead.
    """

    stage: int
    zero: dict[str, Any]
    notes: list[str]


def wants_deepspeed(train: TrainSection) -> bool:
    """Whether a run is spread by DeepSpeed: train.parallel says so, or leaves it to a given file."""
    return train.parallel == "deepspeed" or (train.parallel == "auto" and train.deepspeed is not None)


def check_deepspeed(train: TrainSection) -> list[str]:
    """The problem, if train.parallel needs a file that is not given."""
    if train.parallel != "deepspeed" or train.deepspeed is not None:
        return []
    return [
        'train.parallel: deepspeed needs train.deepspeed, a file such as {"zero_optimization": {"stage": 2}}; or set '
        "train.parallel fsdp, which needs none"
    ]


def require_deepspeed() -> None:
    """Raises:
    ConfigError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "train.parallel",
            ["deepspeed needs DeepSpeed, which is not installed: pip install 'tunesmith[deepspeed]'; train.parallel "
             "fsdp needs no package"],
            code="package-missing",
        )  # fmt: skip


def read_deepspeed(config: RunConfig, precision: str) -> DeepSpeedFile:
    """Read the file of train.deepspeed.

    Args:
        precision: the resolved train.precision.

    Raises:
        ConfigError: it cannot be read, or has keys that are unknown or not supported.
    """
    name = config.train.deepspeed or ""
    content = _read(name)
    zero = _check(content, name)
    notes = []
    for key, value in content.items():
        if key in _OURS and _is_on(value) and not _is_default(key, value):
            notes.append(f"{key} {show(value)} is not used: {_OURS[key]}")
        elif key in _COMPARED:
            notes += [f"{key}{note}" for note in _COMPARED[key](value, config, precision)]
    return DeepSpeedFile(zero["stage"], zero, [f"note: {name}: {note}" for note in notes])


def _check(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """zero_optimization for DeepSpeed.

    Raises:
        ConfigError: there are keys that are unknown or not supported.
    """
    problems = []
    for key, value in content.items():
        if key in _REFUSED and _is_on(value) and not (key.endswith("_size") and value == 1):
            problems.append(f"{key}: {_REFUSED[key]} is not supported here; remove it, or {ADVICE}")
        known = (*_REFUSED, *_OURS, *_COMPARED, *_WITHOUT_EFFECT, "zero_optimization")
        if key not in known:
            problems.append(_unknown(key, known))
    zero = _read_zero(content.get("zero_optimization", {}), problems)
    if problems:
        raise ConfigError(f"train.deepspeed {name}", problems, code="deepspeed-file")
    return zero


def _read(name: str) -> dict[str, Any]:
    try:
        content = json.loads(read_text(Path(name).expanduser()), object_pairs_hook=_refuse_twice)
    except FileNotFoundError:
        raise ConfigError(
            "train.deepspeed", [f"{name}: no such file. Give the JSON file of DeepSpeed's settings."],
            code="deepspeed-file",
        ) from None  # fmt: skip
    except OSError as error:
        raise ConfigError(
            "train.deepspeed", [f"{name}: cannot be read: {error.strerror}"], code="deepspeed-file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("train.deepspeed", [f"{name}: is not JSON: {error}"], code="deepspeed-file") from None
    if not isinstance(content, dict):
        raise ConfigError(
            "train.deepspeed",
            [f'{name}: must be a JSON object, such as {{"zero_optimization": {{"stage": 2}}}}, not {show(content)}'],
            code="deepspeed-file",
        )
    return content


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has the key {show(key)} twice; keep one")
        found[key] = value
    return found


def _read_zero(section: Any, problems: list[str]) -> dict[str, Any]:
    """zero_optimization for DeepSpeed; "auto" means its own default."""
    if not isinstance(section, dict):
        problems.append(f"zero_optimization: needs keys with values below it, not {show(section)}")
        return {}
    stage = section.get("stage", 0)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        why = "stage 0 has the whole model on each process: set train.parallel ddp instead" if stage == 0 else ""
        problems.append(f"zero_optimization.stage: must be 1, 2 or 3, not {show(stage)}{'; ' + why if why else ''}")
    zero: dict[str, Any] = {}
    for key, value in section.items():
        dotted = f"zero_optimization.{key}"
        if key in ("offload_optimizer", "offload_param"):
            if offload := _read_offload(dotted, value, problems):
                zero[key] = offload
        elif key in _ZERO_USED:
            if value == AUTO:
                continue
            if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
                problems.append(f"{dotted}: must be a number of at least 0, true or false, not {show(value)}")
            else:
                zero[key] = value
        elif key in _ZERO_REFUSED:
            if _is_on(value) and not (key == "zero_hpz_partition_size" and value == 1) and value != -1:
                problems.append(f"{dotted}: {_ZERO_REFUSED[key]} is not supported here; remove it, or {ADVICE}")
        elif key not in _ZERO_WITHOUT_EFFECT:
            known = (*_ZERO_USED, *_ZERO_REFUSED, *_ZERO_WITHOUT_EFFECT)
            problems.append(f"zero_optimization.{_unknown(key, known)}")
    if "offload_param" in zero and stage != 3:
        problems.append("zero_optimization.offload_param: needs stage 3; remove it")
    return zero


def _read_offload(dotted: str, section: Any, problems: list[str]) -> dict[str, Any]:
    if section is None or section == AUTO:
        return {}
    if not isinstance(section, dict):
        problems.append(f'{dotted}: needs keys with values below it, such as {{"device": "cpu"}}, not {show(section)}')
        return {}
    device = section.get("device", "none")
    if device == "nvme":
        problems.append(f"{dotted}.device: offload to NVMe is not tested here; use cpu, or {ADVICE}")
    elif device not in ("cpu", "none", AUTO, None):
        problems.append(f"{dotted}.device: must be cpu or none, not {show(device)}")
    for key in section:
        if key == "super_offload" and _is_on(section[key]):
            problems.append(f"{dotted}.super_offload: is not supported here; remove it")
        elif key not in _OFFLOAD_USED | _OFFLOAD_UNUSED | {"super_offload"}:
            problems.append(f"{dotted}.{_unknown(key, (*_OFFLOAD_USED, *_OFFLOAD_UNUSED))}")
    if device != "cpu":
        return {}
    return {key: value for key, value in section.items() if key in _OFFLOAD_USED and value != AUTO}


def _unknown(key: str, known: tuple[str, ...]) -> str:
    near = suggest_words(key, known)
    return f"{key}: unknown key of DeepSpeed{'; did you mean ' + ' or '.join(near) + '?' if near else ''}"


def _is_on(value: Any) -> bool:
    """Whether a value switches something on: {"enabled": false}, false, 0, null and "auto" do not."""
    if isinstance(value, Mapping):
        return bool(value.get("enabled", any(_is_on(item) for item in value.values())))
    return bool(value) and value != AUTO and value != "none"


def _is_default(key: str, value: Any) -> bool:
    """Whether a value says what happens here anyway."""
    same: dict[str, Any] = {
        "managed_gradient_accumulation": True, "gradient_predivide_factor": 1.0, "communication_data_type": "fp32",
        "seq_parallel_communication_data_type": "fp32", "gradient_allreduce_op": "sum",
        "data_types": {"grad_accum_dtype": "fp32"},
    }  # fmt: skip
    return key in same and value == same[key]


def _compare_precision(name: str) -> Callable[[Any, RunConfig, str], Iterator[str]]:
    def compare(value: Any, config: RunConfig, precision: str) -> Iterator[str]:
        enabled = value.get("enabled") if isinstance(value, Mapping) else value
        if enabled != AUTO and bool(enabled) != (precision == name):
            yield f".enabled {json.dumps(enabled)} is not used: train.precision is {precision}"

    return compare


def _compare_autocast(value: Any, config: RunConfig, precision: str) -> Iterator[str]:
    if _is_on(value) and precision != "bf16":
        yield f" is not used: train.precision is {precision}"


def _compare_clipping(value: Any, config: RunConfig, precision: str) -> Iterator[str]:
    if value != AUTO and value != config.optim.max_grad_norm:
        yield f" {show(value)} is not used: optim.max_grad_norm is {config.optim.max_grad_norm:g}"


def _compare_optimizer(value: Any, config: RunConfig, precision: str) -> Iterator[str]:
    optim = config.optim
    given = value if isinstance(value, Mapping) else {"type": value}
    if given.get("type", AUTO) not in (AUTO, "AdamW", "Adam", "adamw", "adam"):
        yield f".type {show(given['type'])} is not used: optim.name is {optim.name}"
    params = given.get("params", {})
    ours = {"lr": optim.lr, "weight_decay": optim.weight_decay, "eps": optim.eps, "betas": list(optim.betas)}
    for key, theirs in params.items() if isinstance(params, Mapping) else ():
        if key in ours and theirs != AUTO and theirs != ours[key]:
            yield f".params.{key} {show(theirs)} is not used: optim.{key} is {show(ours[key])}"


def _compare_scheduler(value: Any, config: RunConfig, precision: str) -> Iterator[str]:
    params = value.get("params", {}) if isinstance(value, Mapping) else {}
    if isinstance(params, Mapping) and params and all(item == AUTO for item in params.values()):
        return
    yield f" is not used: optim.schedule is {config.optim.schedule}, and optim.warmup_ratio and warmup_steps the warmup"


_COMPARED: dict[str, Callable[[Any, RunConfig, str], Iterator[str]]] = {
    "bf16": _compare_precision("bf16"),
    "bfloat16": _compare_precision("bf16"),
    "fp16": _compare_precision("fp16"),
    "torch_autocast": _compare_autocast,
    "gradient_clipping": _compare_clipping,
    "optimizer": _compare_optimizer,
    "scheduler": _compare_scheduler,
}
"""Keys that a run's own keys decide; a note where the file says otherwise."""


def find_refused(name: str) -> str:
    """Why no run can use this file; "" if one can, or if the file is not there."""
    if not Path(name).expanduser().is_file():
        return ""
    try:
        _check(_read(name), name)
    except ConfigError as error:
        return "; ".join(error.problems)
    return ""
