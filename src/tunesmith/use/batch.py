"""Generate tokens for a batch of prompts: the loop used by chat, reports and the demo."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import logits_process as process

from tunesmith.errors import ModelError, UsageError
from tunesmith.model.source import telling_text


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings for sampling a reply.

    Attributes:
        max_new_tokens: limit in tokens, the stop token included.
        temperature: 0 is greedy; None uses the model's generation_config.
        seed: of the row's own random generator, so that its reply does not depend on the other rows of the batch.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: a value is out of range or of the wrong type.
        """
        for name, value, is_right in (
            ("max_new_tokens", self.max_new_tokens, _is_count(self.max_new_tokens)),
            ("temperature", self.temperature, self.temperature is None or _is_size(self.temperature)),
            ("seed", self.seed, _is_count(self.seed) and self.seed < 2**63),
        ):
            if not is_right:
                raise UsageError(
                    f"{name}: {value!r} is not allowed; see the help of tunesmith.Model.", code="sampling-value"
                )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to continue, at least one."""

    ids: Sequence[int]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        row: index of its prompt.
        is_last: whether it is a stop token or reaches max_new_tokens.
    """

    row: int
    id: int
    is_last: bool


@torch.no_grad()
def generate_tokens(model: nn.Module, prompts: Sequence[Prompt], stop_ids: Collection[int]) -> Iterator[Token]:
    """Tokens of all replies as they are generated, one per unfinished row in turn.

    The model's generation_config decides what `Sampling` does not: do_sample, top_k, top_p, repetition_penalty and all
    other settings that choose one token at a time. `unapplied_settings` names those that are ignored.

    Raises:
        ModelError: the generation_config cannot be used, or logits are not finite.
    """
    rows = [_Row(model, i, prompt, stop_ids) for i, prompt in enumerate(prompts) if prompt.sampling.max_new_tokens > 0]
    if not rows:
        return
    batch = _Batch(model, [row.prompt.ids for row in rows])
    unfinished = set(range(len(rows)))
    while unfinished:
        logits = batch.next_logits()
        chosen = _choose(rows, logits, batch, unfinished)
        batch.append(chosen)
        for place in sorted(unfinished):
            rows[place].left -= 1
            token = Token(rows[place].index, chosen[place], chosen[place] in stop_ids or not rows[place].left)
            if token.is_last:
                unfinished.remove(place)
            yield token


class _Batch:
    """Left-padded token ids of all rows, with the model's key-value cache."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        self._model, self._cache = model, None
        self._takes = inspect.signature(model.forward).parameters
        device = next(model.parameters()).device
        width = max(map(len, prompts))
        self.starts = [width - len(ids) for ids in prompts]
        self.ids = torch.zeros(len(prompts), width, dtype=torch.long)
        self._mask = torch.zeros_like(self.ids)
        for place, (ids, start) in enumerate(zip(prompts, self.starts, strict=True)):
            self.ids[place, start:] = torch.tensor(ids)
            self._mask[place, start:] = 1
        self.ids, self._mask = self.ids.to(device), self._mask.to(device)

    def next_logits(self) -> Tensor:
        """Logits of each row's next token, [rows, vocab], in float32."""
        length = self.ids.shape[1] if self._cache is None else 1
        given = {"position_ids": (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -length:], "logits_to_keep": 1}
        output = self._model(
            input_ids=self.ids[:, -length:],
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in given.items() if name in self._takes},
        )
        self._cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def append(self, tokens: Sequence[int]) -> None:
        column = torch.tensor(tokens, device=self.ids.device)[:, None]
        self.ids = torch.cat([self.ids, column], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(column)], dim=1)


class _Row:
    """A prompt being continued: its logits processors, its random generator and its remaining tokens."""

    def __init__(self, model: nn.Module, index: int, prompt: Prompt, stop_ids: Collection[int]) -> None:
        self.index, self.prompt, self.left = index, prompt, prompt.sampling.max_new_tokens
        config = _settings(model, prompt.sampling)
        self.is_sampled = bool(config.do_sample)
        self.repairs = bool(config.remove_invalid_values)
        try:
            self.rules = _rules(config, prompt, stop_ids, str(next(model.parameters()).device))
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"the model's generation_config.json cannot be used: {telling_text(error)}. Correct or remove it.",
                code="generation-config",
            ) from None
        self._generator = torch.Generator().manual_seed(prompt.sampling.seed)

    def draw(self, scores: Tensor) -> int:
        """Draw a token by its probability, using one random number in [0, 1)."""
        totals = torch.softmax(scores, dim=-1).double().cpu().cumsum(dim=-1)
        number = torch.rand(1, generator=self._generator, dtype=torch.float64) * totals[-1]
        return min(int(torch.searchsorted(totals, number, right=True)), len(totals) - 1)


def _choose(rows: Sequence[_Row], logits: Tensor, batch: _Batch, unfinished: Collection[int]) -> list[int]:
    """The next token of each row; arbitrary for finished rows."""
    chosen = logits.argmax(dim=-1).tolist()
    is_number = logits.isfinite().any(dim=-1) & ~logits.isnan().any(dim=-1)
    for place, is_usable in enumerate(is_number.tolist()):
        row = rows[place]
        if place not in unfinished:
            continue
        if not is_usable and not row.repairs:
            raise ModelError(
                "the model's logits are inf or nan: its weights are damaged. Use another checkpoint or model.",
                code="logits-not-finite",
            )
        if not row.rules and not row.is_sampled:
            continue
        scores = logits[place : place + 1]
        history = batch.ids[place : place + 1, batch.starts[place] :]
        for rule in row.rules:
            scores = rule(history, scores)
        chosen[place] = row.draw(scores[0]) if row.is_sampled else int(scores[0].argmax())
    return chosen


def _settings(model: nn.Module, sampling: Sampling) -> GenerationConfig:
    """The model's generation_config, overridden by `sampling`, with transformers' defaults for the rest."""
    own = getattr(model, "generation_config", None)
    config = copy.deepcopy(own) if own is not None else GenerationConfig()
    if sampling.temperature == 0:
        config.do_sample = False
    elif sampling.temperature is not None:
        config.do_sample, config.temperature = True, sampling.temperature
    if config.top_k is None:
        config.top_k = _DEFAULT_TOP_K
    return config


_DEFAULT_TOP_K = 50  # transformers' default


# settings that choose by more than one token's scores, or that need more than a row's own tokens
_NOT_APPLIED = {
    "num_beams": (None, 1), "guidance_scale": (None, 1, 1.0), "penalty_alpha": (None, 0, 0.0), "dola_layers": (None,),
    "constraints": (None,), "force_words_ids": (None,), "prompt_lookup_num_tokens": (None,), "stop_strings": (None,),
    "max_time": (None,), "token_healing": (None, False), "watermarking_config": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0), "encoder_no_repeat_ngram_size": (None, 0),
}  # fmt: skip


def unapplied_settings(config: GenerationConfig | None) -> list[str]:
    """Names of settings in a generation_config that `generate_tokens` does not apply."""
    return [name for name, unset in _NOT_APPLIED.items() if getattr(config, name, None) not in unset]


def _rules(config: GenerationConfig, prompt: Prompt, stop_ids: Collection[int], device: str) -> list[Any]:
    """transformers' logits processors for these settings, in the order in which `generate` applies them."""
    length, stops = len(prompt.ids), sorted(stop_ids)
    rules: list[Any] = []
    if config.sequence_bias:
        rules.append(process.SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.repetition_penalty not in (None, 1.0):
        rules.append(process.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        rules.append(process.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        rules.append(process.NoBadWordsLogitsProcessor(config.bad_words_ids, stops or None))
    if config.min_length and stops:
        rules.append(process.MinLengthLogitsProcessor(config.min_length, stops, device=device))
    if config.min_new_tokens and stops:
        rules.append(process.MinNewTokensLengthLogitsProcessor(length, config.min_new_tokens, stops, device=device))
    if config.forced_bos_token_id is not None:
        rules.append(process.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        end = length + prompt.sampling.max_new_tokens
        rules.append(process.ForcedEOSTokenLogitsProcessor(end, config.forced_eos_token_id, device=device))
    if config.remove_invalid_values:
        rules.append(process.InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty and stops:
        ids = torch.tensor(stops, device=device)
        rules.append(process.ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, ids, length))
    if config.suppress_tokens:
        rules.append(process.SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    if config.begin_suppress_tokens:
        begin = length + (length == 1 and config.forced_bos_token_id is not None)
        rules.append(process.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device=device))
    if config.do_sample:
        rules += _warpers(config, device)
    if config.renormalize_logits:
        rules.append(process.LogitNormalization())
    return rules


def _warpers(config: GenerationConfig, device: str) -> list[Any]:
    """The processors that shape the probabilities of a sampled token."""
    rules: list[Any] = []
    if config.temperature not in (None, 1.0):
        rules.append(process.TemperatureLogitsWarper(config.temperature))
    if config.top_h is not None:
        rules.append(process.TopHLogitsWarper(config.top_h))
    if config.top_k:
        rules.append(process.TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        rules.append(process.TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        rules.append(process.MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1.0:
        rules.append(process.TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff:
        rules.append(process.EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff:
        rules.append(process.EtaLogitsWarper(config.eta_cutoff, device=device))
    return rules
