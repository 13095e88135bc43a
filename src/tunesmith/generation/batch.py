"""Generate tokens for a batch of prompts: the loop used by chat, reports and the demo."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.generation.rules import rules_of
from tunesmith.generation.sampling import Sampling, settings_of
from tunesmith.model.source import telling_text


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
        config = settings_of(model, prompt.sampling)
        self.is_sampled = bool(config.do_sample)
        self.repairs = bool(config.remove_invalid_values)
        try:
            self.rules = rules_of(
                config, len(prompt.ids), prompt.sampling.max_new_tokens, stop_ids, str(next(model.parameters()).device)
            )
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
