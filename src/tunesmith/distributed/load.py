"""Load a model so that each process reads and keeps its shard of the weights alone.

transformers shards a model before it reads the weights, so that each process reads its slices of the files, whatever
their type and form. Adapters, added tokens and our own sharding need a model that is not sharded yet; so the shards are
moved into such a model, as held parameters (held.py).
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as hf_logging

from tunesmith.config.schema import ModelSection
from tunesmith.distributed.held import hold
from tunesmith.distributed.shards import ShardFiles
from tunesmith.errors import ModelError
from tunesmith.model.load import LOADING, load_model, require_all_weights
from tunesmith.model.source import ModelSource, explain_load_error

_NAMES = "names.json"


def load_held(
    section: ModelSection,
    config: PretrainedConfig,
    dtype: torch.dtype,
    size: int,
    source: ModelSource,
    whole_rows: bool,
) -> PreTrainedModel:
    """The model with held parameters; all processes call this together.

    Args:
        size: number of processes.
        whole_rows: whether embedding and head must be whole here, for tokens that will be added.
    """
    plan = _plan(section, config, size)
    with _loading():
        sharded = load_model(section, config, dtype, 0, source=source, extra={"distributed_config": plan})
    return _without_sharding(section, cast(PreTrainedModel, sharded), dtype, whole_rows)


def load_from_shards(
    section: ModelSection, config: PretrainedConfig, dtype: torch.dtype, size: int, files: list[Path]
) -> PreTrainedModel:
    """The model of a checkpoint in shards: with held parameters, or whole if there is one process.

    Args:
        files: with the weights.
    """
    stored, plan = ShardFiles(files), _plan(section, config, size) if size > 1 else None
    kind: Any = _class_of(section, config)
    extra: Mapping[str, Any] = {"distributed_config": plan} if plan else {}
    try:
        with LOADING, _loading():
            model, report = kind.from_pretrained(
                None, config=copy.deepcopy(config), dtype=dtype, state_dict=dict(stored), output_loading_info=True,
                ignore_mismatched_sizes=True, **extra,
            )  # fmt: skip
    except Exception as error:
        raise explain_load_error(section.path, "its weights", error) from None
    require_all_weights(section.path, report)
    # under the names that are saved, [] turns none of them back into those of the files, and None all
    names = json.loads((files[0].parent / _NAMES).read_text(encoding="utf-8"))
    model._weight_conversions = None if names["are_converted"] else []
    if (Path(section.path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(section.path)
    loaded: PreTrainedModel = _without_sharding(section, model, dtype, False) if plan else model
    return loaded


def write_names(folder: Path, model: nn.Module) -> None:
    """Write beside the shards whether the names of the weights differ from those of the model's files, in which
    transformers keeps fused experts as separate tensors."""
    are_converted = getattr(model, "_weight_conversions", None) != []
    (folder / _NAMES).write_text(json.dumps({"are_converted": are_converted}), encoding="utf-8")


def _class_of(section: ModelSection, config: PretrainedConfig) -> type[PreTrainedModel]:
    return type(empty_model(section, config, None))


def empty_model(section: ModelSection, config: PretrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model without memory."""
    given = {"dtype": dtype} if dtype else {}
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=section.trust_remote_code, **given
        )
    model: PreTrainedModel = made
    return model


def _plan(section: ModelSection, config: PretrainedConfig, size: int) -> DistributedConfig:
    """How transformers shards the model while it loads; any division into modules gives the same shards."""
    model = empty_model(section, config, None)
    blocks: Any = getattr(model, "_no_split_modules", None) or ()
    names = [name for name, module in model.named_modules() if type(module).__name__ in set(blocks)]
    if not names:
        names = [name for name, module in model.named_modules() if name and list(module.parameters(recurse=False))][:1]
    patterns = {".".join("*" if word.isdigit() else word for word in name.split(".")) for name in names}
    return DistributedConfig(fsdp_size=size, fsdp_plan=dict.fromkeys(sorted(patterns), "free_full_weight"))


@torch.no_grad()
def _without_sharding(
    section: ModelSection, sharded: PreTrainedModel, dtype: torch.dtype, whole_rows: bool
) -> PreTrainedModel:
    """The same model with held parameters instead of sharded ones."""
    config = copy.deepcopy(sharded.config)
    del config.distributed_config
    plain = empty_model(section, config, dtype)
    wanted = set(_names_of_rows(plain)) if whole_rows else set()
    wanted |= {name for name, module in _odd_linears(plain) for name in [f"{name}.weight"]}
    made: dict[int, nn.Parameter] = {}
    mapped = _mapped_ranges()
    for name in [name for name, _ in sharded.named_parameters(remove_duplicate=False)]:
        path, _, last = name.rpartition(".")
        parameter = getattr(sharded.get_submodule(path), last)
        if id(parameter) not in made:
            is_wanted = name in wanted or name.endswith(".shared_expert_gate.weight")
            made[id(parameter)] = _take(parameter, is_wanted, mapped)
        setattr(plain.get_submodule(path), last, made[id(parameter)])
        sharded.get_submodule(path)._parameters[last] = None  # frees the mapped or converted copy
    for name, buffer in sharded.named_buffers(remove_duplicate=False):
        path, _, last = name.rpartition(".")
        plain.get_submodule(path)._buffers[last] = buffer.cpu()
    if any(tensor.is_meta for tensor in [*plain.parameters(), *plain.buffers()]):
        raise ModelError(f"{section.path}: some of its weights were not loaded.", code="weights-missing")
    other: Any = plain
    other.generation_config = sharded.generation_config
    other._weight_conversions = getattr(sharded, "_weight_conversions", None)
    plain.eval()
    release_memory()  # the sharded model's hooks refer to each other
    return plain


def _take(parameter: Any, is_wanted: bool, mapped: list[tuple[int, int]]) -> nn.Parameter:
    if not hasattr(parameter, "full_tensor"):
        return nn.Parameter(parameter.cpu().clone(), parameter.requires_grad)
    if is_wanted:
        return nn.Parameter(parameter.full_tensor().cpu(), parameter.requires_grad)
    part = parameter.to_local().detach()
    if any(start <= part.data_ptr() < end for start, end in mapped):
        part = part.clone()  # a mapped file may start anywhere, which changes rounding
    return hold(part, parameter.shape, parameter.requires_grad)


def _names_of_rows(model: PreTrainedModel) -> list[str]:
    """Names of the weights that have a row for each token."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight) for layer in layers if layer is not None}
    return [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in weights]


def _odd_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that adapters try out to see whether they are linear."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            yield name, module


@contextmanager
def _loading() -> Iterator[None]:
    """Set what transformers reads from the environment, and silence a warning.

    It binds the process to the GPU of LOCAL_RANK, which a launcher may not set; it reads ahead in threads, which would
    hold a model's converted tensors twice; and it warns that its own plan, which we replace, does not fit some models.
    """
    hf_logging.disable_progress_bar()
    logger = logging.getLogger("transformers.distributed.mixin")
    level, before = logger.level, dict(os.environ)
    logger.setLevel(logging.ERROR)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    try:
        yield
    finally:
        logger.setLevel(level)
        for name in ("HF_DEACTIVATE_ASYNC_LOAD", "LOCAL_RANK"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def release_memory() -> None:
    """Give freed memory back to the system, which glibc keeps for small allocations."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc or system
        ctypes.CDLL(None).malloc_trim(0)


def _mapped_ranges() -> list[tuple[int, int]]:
    """Addresses of mapped weight files."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [(0, 2**64)]  # of any address it is unknown
    found = []
    for line in lines:
        words = line.split(maxsplit=5)
        if len(words) > 5 and words[5].startswith("/"):
            start, _, end = words[0].partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found
