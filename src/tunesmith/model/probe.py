"""Choose the model for the tests at start: the loaded one, or a small one with the same config."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

MAX_PARAMETERS = 3_000_000_000  # limit for a model to be run twice in fp32
_MIN_LAYERS = 2


def probe_model(model: PreTrainedModel, max_parameters: int = MAX_PARAMETERS) -> PreTrainedModel:
    """The model itself if it is whole, on one device and not too large; otherwise a small one with its config.

    The small model has random weights and as many of the first layers as are needed to have every type of layer.
    """
    parameters = list(model.parameters())
    # full_tensor: DTensor (sharded); part: of which this process has its shard alone (distributed/held.py)
    is_whole = not any(p.is_meta or hasattr(p, "full_tensor") or hasattr(p, "part") for p in parameters)
    is_in_one_place = len({p.device for p in parameters}) == 1
    if is_whole and is_in_one_place and sum(p.numel() for p in parameters) <= max_parameters:
        return model
    device = next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))
    config = shorten(model.config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        small: PreTrainedModel = type(model)(config)
    small.set_attn_implementation(model.config._attn_implementation)
    small.float()
    nn.Module.to(small, device)  # transformers' `to` is untyped
    return small


def shorten(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the config with the first layers only; lists with one entry per layer are shortened accordingly."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    layers: int = text.num_hidden_layers
    kept = min(layers, _num_layers_of_all_types(text))
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(text, name, value[:kept])
    text.num_hidden_layers = kept
    return config


def _num_layers_of_all_types(text: Any) -> int:
    """Number of first layers that include every type of layer, dense and sparse ones among them."""
    types = list(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or [])
    first_of_type = [types.index(kind) + 1 for kind in set(types)]
    sparse = getattr(text, "decoder_sparse_step", None) or 0
    dense = getattr(text, "first_k_dense_replace", None) or 0
    dense_by_name = [layer + 1 for layer in getattr(text, "mlp_only_layers", None) or []][:1]
    return int(max(_MIN_LAYERS, sparse, dense + 1, *first_of_type, *dense_by_name))


@contextmanager
def in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients, with half-precision weights in fp32; restored afterwards."""
    tensors = [*model.parameters(), *model.buffers()]
    halves = [(t, t.dtype) for t in tensors if t.dtype in (torch.bfloat16, torch.float16)]
    was_training = model.training
    model.eval()
    for tensor, _ in halves:
        tensor.data = tensor.data.float()
    try:
        with torch.no_grad():
            yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)  # exact: the values came from this dtype
        model.train(was_training)
