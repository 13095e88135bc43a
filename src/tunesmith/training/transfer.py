"""Copies for which neither host nor device waits: batches before their forwards, numbers after their step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tunesmith.attention.layout import AttentionPlan, PackedLayout, make_layout
from tunesmith.data.pack import Batch
from tunesmith.model.loss import SupervisedLM, to_tensors


class OnTheWay:
    """The copy of a tensor on the CPU; the host waits for it only where it is read."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copy = tensor.detach()
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy.cpu()


class BatchCopier:
    """Copies batches to a device, on a GPU from pinned memory on a stream of their own.

    Args:
        plan: the kernels of the model's attention; None where it does not take layouts.
    """

    def __init__(self, device: torch.device, plan: AttentionPlan | None) -> None:
        self._device, self._plan = device, plan
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
        """The batch with its inputs on the device, and what the stream of the forward has to wait for."""
        if self._stream is None:
            return self._with_inputs(batch), None
        with torch.cuda.stream(self._stream):
            copied = self._with_inputs(batch)
            event = torch.cuda.Event()
            event.record()
        return copied, event

    def hand_over(self, batch: Batch, event: torch.cuda.Event | None) -> Batch:
        """Before its forward."""
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for tensor in tensors_of(batch.inputs):
                tensor.record_stream(stream)  # or its memory could be used for the next copy before the forward is done
        return batch

    def _with_inputs(self, batch: Batch) -> Batch:
        inputs = to_tensors(batch, self._device)
        if self._plan is not None:
            inputs["layout"] = make_layout(batch.layout, self._device, self._plan)
        return replace(batch, inputs=inputs)


def copied_ahead(batches: Iterable[Batch], lm: SupervisedLM) -> Iterator[Batch]:
    """The batches with their inputs on the device of the model; each is copied while the one before it is computed."""
    copier = BatchCopier(next(lm.parameters()).device, lm.plan if lm.is_packed else None)
    waiting = None
    for batch in batches:
        following = copier.copy(batch)
        if waiting is not None:
            yield copier.hand_over(*waiting)
        waiting = following
    if waiting is not None:
        yield copier.hand_over(*waiting)


def tensors_of(inputs: dict[str, Any]) -> Iterator[Tensor]:
    """All tensors on the device among the arguments of a forward."""
    for value in inputs.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, PackedLayout):
            yield from value.tensors()
