"""The weights of a model under llama.cpp's names, in its layout, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError
from tunesmith.gguf.architecture import Form

Array = npt.NDArray[Any]
TYPES = ("f32", "f16", "bf16", "q8_0")
_BLOCK = 32  # values that share a scale in q8_0
_LARGEST = {"f16": 65504.0, "q8_0": 127 * 65504.0}
# read by functions of llama.cpp that take fp32 only, or too small to matter
_FP32 = (".ffn_gate_inp.weight", "position_embd.weight", "rope_freqs.weight")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: llama.cpp's.
        source: the parameter that it is made of, for messages.
        shape: as in numpy; GGUF lists it the other way round.
        type: one of TYPES.
        load: its fp32 values.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: str
    load: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        count = int(np.prod(self.shape))
        return {"f32": 4 * count, "f16": 2 * count, "bf16": 2 * count, "q8_0": count // _BLOCK * (_BLOCK + 2)}[
            self.type
        ]

    def encode(self) -> Array:
        """The bytes as they are written.

        Raises:
            ModelError: a value cannot be written in this type.
        """
        from gguf import GGMLQuantizationType, quantize

        values = np.ascontiguousarray(self.load(), dtype=np.float32)
        if not np.isfinite(values).all():
            raise ModelError(
                f"{self.source}: has NaN or infinite values; the model is damaged. Export an earlier checkpoint.",
                code="weights-not-finite",
            )
        largest = float(np.abs(values).max(initial=0.0))
        if largest > _LARGEST.get(self.type, np.inf):
            raise ModelError(
                f"{self.source}: has values up to {largest:.3g}, which {self.type} cannot hold. Use --type f32.",
                code="weights-too-large",
            )
        written: Array = quantize(values, GGMLQuantizationType[self.type.upper()])
        return written


def list_tensors(name: str, model: Any, form: Form, kind: str) -> list[GgufTensor]:
    """All tensors of the file, in its order.

    Args:
        name: of the model, for messages.
        kind: type of the matrices, one of TYPES; vectors are fp32.

    Raises:
        ModelError: a parameter has no name in llama.cpp.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES.get(arch) == form.name)
    names = get_tensor_name_map(arch, form.metadata["block_count"])
    found = []
    for key, part, shape, load in _parts(model, form):
        gguf_name = names.get_name(part, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(
                f"{name}: {key} has no place in llama.cpp's {form.name}, so the model has no GGUF form.",
                code="no-gguf-form",
            )
        gguf_name += "" if gguf_name.endswith((".weight", ".bias")) else ".weight"  # experts have no suffix here
        found.append(GgufTensor(gguf_name, key, shape, _type_of(gguf_name, shape, kind), load))
    if form.rope_factors:
        factors = np.array(form.rope_factors, np.float32)
        found.append(GgufTensor("rope_freqs.weight", "rope_parameters", factors.shape, "f32", lambda: factors))
    return found


def _type_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1 or name.endswith(_FP32):
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _BLOCK else kind


def _parts(model: nn.Module, form: Form) -> Iterator[tuple[str, str, tuple[int, ...], Callable[[], Array]]]:
    """(parameter, name for the map, shape, loader) of each tensor, with transformers' fused ones split."""
    lm: Any = model
    is_tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    head = next(name for name, module in model.named_modules() if module is lm.get_output_embeddings())
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for key, weight in model.state_dict().items():
        if (key == f"{head}.weight" and is_tied and not form.writes_head) or _is_gate(key, form):
            continue
        change = partial(_change, key, form, key in turned)
        if key.endswith(".experts.gate_up_proj"):  # [experts, gate and up, in]
            middle = weight.shape[1] // 2
            for part, half in (("gate_proj", weight[:, :middle]), ("up_proj", weight[:, middle:])):
                yield key, key.replace("gate_up_proj", part), tuple(half.shape), partial(_load, half, change)
        else:
            shape = tuple(reversed(weight.shape)) if key in turned else tuple(weight.shape)
            if key.endswith(".shared_expert_gate.weight"):
                shape = (weight.shape[-1],)
            yield key, key, shape, partial(_load, weight, change)


def _is_gate(key: str, form: Form) -> bool:
    return form.shared_scale is not None and key.endswith(".shared_expert_gate.weight")


@torch.no_grad()
def _load(weight: Tensor, change: Callable[[Tensor], Tensor]) -> Array:
    array: Array = change(weight.detach().float()).cpu().numpy()
    return array


def _change(key: str, form: Form, is_turned: bool, weight: Tensor) -> Tensor:
    """A weight in llama.cpp's layout."""
    *_, module, _ = ("", "", *key.split("."))
    if is_turned:  # Conv1D has [in, out]
        return weight.T
    if heads := form.permuted.get(module):
        return interleave(weight, heads)
    if key.endswith(".shared_expert_gate.weight"):
        return weight.reshape(-1)
    if form.norm_offset and weight.ndim == 1 and module.endswith("norm"):
        weight = weight + form.norm_offset
    if form.query_scale != 1 and module == _query_module(form):
        weight = weight * form.query_scale
    if form.shared_scale is not None and key.endswith(".shared_expert.down_proj.weight"):
        weight = weight * form.shared_scale
    return weight


def _query_module(form: Form) -> str:
    return "q_norm" if form.name == "gemma3" else "q_proj"  # Gemma 3 normalizes its queries


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of q_proj or k_proj for llama.cpp's rotation, which turns neighbours; transformers turns the two halves."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
