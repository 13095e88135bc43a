"""The repeated blocks of a transformer: units of sharding, and of torch.compile.

Compiled block by block, a model of any depth takes the time of one block, and hooks between the blocks (sharding,
checkpointing) stay outside. Evaluation and generation are not compiled: they would each compile it once more.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from tunesmith.data.pack import Batch, Documents
from tunesmith.distributed.spread import Spread
from tunesmith.model.loss import SupervisedLM, supervised_loss


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks, by the classes that transformers names as not to be split."""
    names: Any = getattr(model, "_no_split_modules", None) or ()
    found = [module for module in model.modules() if type(module).__name__ in set(names)]
    if found:
        return found
    lists: list[list[nn.Module]] = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def compile_blocks(model: nn.Module) -> None:
    """Let torch.compile make the forwards of the blocks in training, at their first call (see `compile_now`)."""
    for block in find_blocks(model):
        block.forward = types.MethodType(_forward, block)  # a method, so that a copy of the block uses its own weights


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(block).forward
    if block.training and torch.is_grad_enabled():
        forward = _compiled(forward)
    return forward(block, *args, **kwargs)


@functools.cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(forward, dynamic=True)
    return compiled


def compile_now(lm: SupervisedLM, spread: Spread, context: AbstractContextManager[object], lens: list[int]) -> float:
    """Make one forward and backward, so that the blocks are compiled; returns the seconds that it took.

    The compiler plans for the sizes that it sees first, so a resumed run must begin with the same ones. So what earlier
    runs of this process have compiled (a stage before this one) is forgotten, as it is in a process that resumes.

    Args:
        context: of the forward, for autocast.
        lens: tokens of each document; the same in each start of a run. An odd sum is the best, since the compiler
            could take a divisor for a rule.
    """
    began = time.monotonic()
    torch.compiler.reset()
    _compiled.cache_clear()
    lm.train()
    with lm.computing():
        with context:
            loss = supervised_loss(spread.callable(lm), blank_batch(lens)).loss
        spread.backward(loss, is_last=True)
    lm.zero_grad(set_to_none=True)
    return time.monotonic() - began


def blank_batch(lens: list[int]) -> Batch:
    """Documents of these lengths, with all tokens 0."""
    positions = np.concatenate([np.arange(length) for length in lens])
    targets = np.flatnonzero(positions)
    zeros = np.zeros((1, sum(lens)), np.int64)
    return Batch(zeros, positions[None], zeros[0, targets], targets - 1, Documents(lens))
