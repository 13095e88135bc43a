"""Loss, token accuracy and bits per byte of each row: training's forward, summed by row instead of over all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.feed import plan_samples
from tunesmith.data.pack import Batch, build_batch
from tunesmith.errors import ModelError
from tunesmith.evaluation.intervals import Array, Counted, ratio
from tunesmith.evaluation.rows import Key, LabelledRows
from tunesmith.generation.decode import decode_reply
from tunesmith.generation.speaker import Speaker
from tunesmith.layers.copies import HalfCopies
from tunesmith.model.head import choose_head_path, head_logits
from tunesmith.model.isolation import probe_isolation, use_packed_attention
from tunesmith.model.loss import to_tensors
from tunesmith.model.probe import probe_model
from tunesmith.training.precision import Precision, choose_precision, keep_precision

_CHUNK_BYTES = 256 * 2**20  # of fp32 logits at once


@dataclass(frozen=True, slots=True, eq=False)
class Likelihood:
    """Sums of each row, in the order of the rows.

    Attributes:
        sums: [rows, 4]: loss in nats, correct tokens, supervised tokens, bytes of the supervised text.
        remark: how documents were packed.
    """

    sums: Array
    remark: str

    def scores(self) -> dict[str, Counted]:
        loss, correct, targets, size = (self.sums[:, place] for place in range(4))
        bits = loss / math.log(2)
        return {
            "loss": Counted(np.stack([loss, targets], axis=1), ratio),
            "perplexity": Counted(np.stack([loss, targets], axis=1), perplexity),
            "token_accuracy": Counted(np.stack([correct, targets], axis=1), ratio, is_share=True),
            "bits_per_byte": Counted(np.stack([bits, size], axis=1), ratio),
        }


def perplexity(sums: Array) -> Array:
    with np.errstate(over="ignore"):
        found: Array = np.exp(ratio(sums))
    return found


def measure(
    speaker: Speaker, labelled: LabelledRows, keys: Sequence[Key], watch: Callable[[int, int], None]
) -> Likelihood:
    """The likelihood of the supervised tokens of these rows.

    Args:
        watch: called after each forward with the samples done and all samples.

    Raises:
        ModelError: a loss is not finite.
    """
    samples = np.array(labelled.samples_of(keys), dtype=np.int64)
    losses, correct = np.zeros(len(labelled.store)), np.zeros(len(labelled.store))
    scorer = _Scorer(speaker, labelled)
    try:
        done = 0
        for pack in plan_samples(labelled.store, samples, labelled.lengths.capacity, 0, 0):
            for group in [pack] if scorer.is_packed else [pack[place : place + 1] for place in range(len(pack))]:
                losses[group], correct[group] = scorer.score(build_batch(labelled.store, group))
                done += len(group)
                watch(done, len(samples))
    finally:
        scorer.close()
    sums = np.zeros((len(keys), 4))
    for place, key in enumerate(keys):
        row = labelled.rows[key]
        own = slice(row.first, row.first + row.count)
        size = sum(_count_bytes(labelled, number) for number in range(row.first, row.first + row.count))
        sums[place] = losses[own].sum(), correct[own].sum(), labelled.store.num_targets[own].sum(), size
        if not math.isfinite(sums[place, 0]):
            raise ModelError(
                f"{labelled.candidate.path}: its loss on {row.where} is inf or nan: its weights are damaged. Use "
                "another checkpoint or model.",
                code="loss-not-finite",
            )
    return Likelihood(sums, scorer.remark)


def _count_bytes(labelled: LabelledRows, number: int) -> int:
    """UTF-8 bytes of the supervised text of a sample, without stop tokens."""
    sample = labelled.store[number]
    trained = sample.loss_mask.astype(bool).copy()
    trained[:1] = False
    return len(decode_reply(labelled.encoder, sample.input_ids[trained].tolist()).encode())


def _precision_of(labelled: LabelledRows, weights: Tensor) -> Precision:
    """The run's own precision where its weights are opened in fp32; half-precision weights need no autocast."""
    run = labelled.candidate.run
    name: str = run.config.train.precision if run else "auto"
    name = keep_precision(name, run.record.guard.precision if run else None, weights.device)
    if weights.dtype != torch.float32 or name == "bf16_pure" or (name == "fp16" and weights.device.type == "cpu"):
        name = "fp32"
    return choose_precision(name, weights.device, run is not None and run.record.guard.has_copies)


class _Scorer:
    """A model set up for packed forwards, as in training; `close` gives it its own attention back."""

    def __init__(self, speaker: Speaker, labelled: LabelledRows) -> None:
        self.model = cast(PreTrainedModel, speaker.model)
        self._own = self.model.config._attn_implementation
        probe = probe_model(self.model)
        isolation = probe_isolation(probe, labelled.lengths.max_seq_len, labelled.lengths.capacity)
        self.is_packed, self.remark = isolation.is_isolated, isolation.report
        if self.is_packed:
            use_packed_attention(probe)
            use_packed_attention(self.model)
        self._head_path = choose_head_path(probe, self.is_packed)
        self._device = next(self.model.parameters()).device
        self._precision = _precision_of(labelled, next(self.model.parameters()))
        dtype = self._precision.copies
        self._copies: AbstractContextManager[None] = HalfCopies(self.model, dtype) if dtype else nullcontext()

    def close(self) -> None:
        if self.is_packed:
            self.model.set_attn_implementation(self._own)

    @torch.no_grad()
    def score(self, batch: Batch) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Loss and correct tokens of each document of a batch."""
        tensors = to_tensors(batch, self._device)
        with self._copies, self._precision.context(self._device):
            losses, correct = self._score_tokens(tensors)
        ends = np.cumsum(batch.layout.lens)
        document = np.searchsorted(ends, batch.target_at, side="right")
        weights = [values.cpu().double().numpy() for values in (losses, correct)]
        sums = [np.bincount(document, weights=values, minlength=len(ends)).astype(np.float64) for values in weights]
        return sums[0], sums[1]

    def _score_tokens(self, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target, and whether it is the most likely token."""
        inputs: dict[str, Any] = {"input_ids": tensors["input_ids"], "use_cache": False}
        if self.is_packed:
            inputs |= {"position_ids": tensors["position_ids"], "documents": tensors["layout"]}
        at, targets = tensors["target_at"], tensors["targets"]
        if not len(targets):
            empty = torch.zeros(0, device=self._device)
            return empty, empty
        if self._head_path != "decoder":
            kept = {"logits_to_keep": at} if self._head_path == "logits_to_keep" else {}
            logits = self.model(**inputs, **kept).logits[0]
            return token_losses(logits if kept else logits[at], targets)
        hidden = self.model.get_decoder()(**inputs).last_hidden_state[0, at]
        rows = max(1, _CHUNK_BYTES // (4 * self.model.config.get_text_config().vocab_size))
        parts = [
            token_losses(head_logits(self.model, chunk), wanted)
            for chunk, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat([losses for losses, _ in parts]), torch.cat([correct for _, correct in parts])


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each of [n, vocab] logits and [n] targets, and whether its argmax is the target."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
