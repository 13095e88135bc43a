"""Replace what a transformers model computes slowly, where the result is the same."""

from __future__ import annotations

from torch import nn

from tunesmith.layers.norm import speed_up_norm
from tunesmith.layers.products import onednn_is_faster, speed_up_linear
from tunesmith.layers.swiglu import speed_up_mlp


def speed_up(model: nn.Module, head: nn.Module | None, is_checkpointed: bool) -> None:
    """Replace the forward of norms, MLPs and linear layers.

    Each module is compared with its replacement first, and left alone where they differ. Its parameters, hooks and
    place in the model stay. Outputs of norms and MLPs are the same bit for bit; products may be rounded otherwise.

    Args:
        head: the output layer, which is left alone.
        is_checkpointed: activations are computed again in the backward, so there is nothing to keep less of.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            if module is not head and onednn_is_faster():
                speed_up_linear(module)
        elif not speed_up_norm(module) and not is_checkpointed:
            speed_up_mlp(module)
