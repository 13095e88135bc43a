"""Choose the next token of each row: all rows at once where settings allow, row by row for rare ones.

A sampled row draws with one random number in [0, 1) of its own generator, against the cumulative probabilities in the
order of token ids. So a row's tokens do not depend on its neighbours, except where rounding (near 1e-7) moves a border
of that sum over the random number, or makes two tokens change places at the border of top_k or top_p.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import logits_process as process

from tunesmith.errors import ModelError
from tunesmith.generation.request import Constraint, Request
from tunesmith.generation.rules import rules_of
from tunesmith.generation.sampling import settings_of
from tunesmith.model.source import telling_text

_FEW, _NARROW = 128, 1024  # candidates that are sorted; more only where a row's top_p or top_k needs them
_VECTORISED = (
    process.RepetitionPenaltyLogitsProcessor,
    process.TemperatureLogitsWarper,
    process.TopKLogitsWarper,
    process.TopPLogitsWarper,
    process.MinPLogitsWarper,
)


class Chooser:
    """A row's settings, its random generator and the tokens that penalties look at."""

    def __init__(
        self, model: nn.Module, request: Request, max_new_tokens: int, stop_ids: Collection[int], device: torch.device
    ) -> None:
        config = settings_of(model, request.sampling)
        self.is_sampled = bool(config.do_sample)
        self.repairs = bool(config.remove_invalid_values)
        self.constraint: Constraint | None = request.constraint
        try:
            rules = rules_of(config, len(request.ids), max_new_tokens, stop_ids, str(device))
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"the model's generation_config.json cannot be used: {telling_text(error)}. Correct or remove it.",
                code="generation-config",
            ) from None
        self.rules = [] if all(type(rule) in _VECTORISED for rule in rules) else rules
        by_type: dict[type, Any] = {type(rule): rule for rule in rules}
        penalty, temperature, top_k, top_p, min_p = (by_type.get(kind) for kind in _VECTORISED)
        self.penalty: float | None = penalty.penalty if penalty else None
        self.temperature: float = temperature.temperature if temperature else 1.0
        self.top_k: int = top_k.top_k if top_k else 0
        self.top_p: float = top_p.top_p if top_p else 1.0
        self.min_p: float = min_p.min_p if min_p else 0.0
        self._random = random.Random(request.sampling.seed)
        self._seen: Tensor | None = None
        self._num_seen = 0
        if self.rules or self.penalty is not None:
            self._seen = torch.tensor(list(request.ids), dtype=torch.long, device=device)
            self._num_seen = len(request.ids)

    def number(self) -> float:
        return self._random.random()

    @property
    def history(self) -> Tensor:
        """The tokens so far, on the logits' device; kept only for rows whose rules look at them."""
        assert self._seen is not None
        return self._seen[: self._num_seen]

    def accept(self, token_id: int) -> ModelError | None:
        """Go on behind a token; the error that ends the row, if its constraint fails."""
        if self.constraint is not None:
            try:
                self.constraint.accept(token_id)
            except Exception as error:  # of a library; only this row depends on it
                return _constraint_error(error)
        self._note(token_id)
        return None

    def _note(self, token_id: int) -> None:
        if self._seen is None:
            return
        if self._num_seen == len(self._seen):
            self._seen = torch.cat([self._seen, torch.zeros_like(self._seen[:1]).repeat(max(64, self._num_seen))])
        self._seen[self._num_seen] = token_id
        self._num_seen += 1


def choose(logits: Tensor, rows: Sequence[Chooser]) -> list[int | ModelError]:
    """The next token of each row, or the error that ends the row.

    Args:
        logits: [rows, vocab] in float32; may be changed.
    """
    failed = _apply_constraints(logits, rows)
    special = [place for place, row in enumerate(rows) if row.rules]
    one_by_one = {place: logits[place : place + 1].clone() for place in special}
    _penalise(logits, rows)
    best, chosen = logits.max(-1)
    sampled = [place for place, row in enumerate(rows) if row.is_sampled and not row.rules]
    if sampled:
        some = logits if len(sampled) == len(rows) else logits[sampled]
        chosen[sampled] = _draw(some, [rows[place] for place in sampled])
    found: list[int | ModelError] = list(torch.where(best.isfinite(), chosen, -1).tolist())
    for place in special:
        if rows[place].repairs or found[place] != -1:
            found[place] = _follow_rules(one_by_one[place], rows[place])
    for place, token in enumerate(found):
        if place in failed:
            found[place] = failed[place]
        elif token == -1:
            found[place] = _damaged()
    return found


def _damaged() -> ModelError:
    return ModelError(
        "the model's logits are inf or nan: its weights are damaged. Use another checkpoint or model.",
        code="logits-not-finite",
    )


def _apply_constraints(logits: Tensor, rows: Sequence[Chooser]) -> dict[int, ModelError]:
    """Hide the tokens that are not allowed; errors of rows whose constraint allows none, or fails itself."""
    failed = {}
    for place, row in enumerate(rows):
        if row.constraint is None:
            continue
        try:
            allowed = row.constraint.mask()[: logits.shape[-1]].bool()
        except Exception as error:  # of a library; only this row depends on it
            failed[place] = _constraint_error(error)
            continue
        if not bool(allowed.any()):
            failed[place] = ModelError(
                "the constraint allows no token here, so the reply cannot be continued. Change the schema.",
                code="constraint-dead-end",
            )
        logits[place, : len(allowed)].masked_fill_(~allowed.to(logits.device), -torch.inf)
        logits[place, len(allowed) :] = -torch.inf
    return failed


def _constraint_error(error: Exception) -> ModelError:
    return ModelError(
        f"the constraint of this reply failed: {telling_text(error)}. Use another schema.", code="constraint-failed"
    )


def _penalise(logits: Tensor, rows: Sequence[Chooser]) -> None:
    """Apply the repetition penalty of the rows that have one."""
    places = [place for place, row in enumerate(rows) if row.penalty is not None and not row.rules]
    if not places:
        return
    histories = [rows[place].history for place in places]
    seen = nn.utils.rnn.pad_sequence(histories, batch_first=True, padding_value=-1)
    seen = torch.where(seen < 0, seen[:, :1], seen)  # a token twice is penalised once
    at = torch.tensor(places, device=logits.device)
    penalties = torch.tensor([rows[place].penalty for place in places], dtype=logits.dtype, device=logits.device)
    scores = logits[at[:, None], seen]
    scores = torch.where(scores < 0, scores * penalties[:, None], scores / penalties[:, None])
    logits[at[:, None], seen] = scores


def _follow_rules(scores: Tensor, row: Chooser) -> int | ModelError:
    """A row with rare rules: transformers' own processors, one after another."""
    history = row.history[None]
    for rule in row.rules:
        scores = rule(history, scores)
    if not row.is_sampled:
        return int(scores[0].argmax())
    numbers = torch.tensor([row.number()], dtype=torch.float64, device=scores.device)
    return int(_pick(torch.softmax(scores, -1), numbers))


def _pick(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """[rows]: the place at which the cumulative probability passes each row's number in [0, 1)."""
    totals = probabilities.cumsum(-1, dtype=torch.float64)
    whole = totals[:, -1]
    wanted = torch.minimum(numbers * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(totals, wanted[:, None], right=True)[:, 0].clamp(max=totals.shape[-1] - 1)


def _draw(logits: Tensor, rows: Sequence[Chooser]) -> Tensor:
    """Sampled tokens of rows: temperature, then top_k, top_p and min_p, as transformers applies them."""
    device = logits.device
    numbers = torch.tensor([row.number() for row in rows], dtype=torch.float64, device=device)
    settings = torch.tensor([[row.temperature, row.top_p, row.min_p] for row in rows], device=device)
    temperature, top_p, min_p = settings[:, :1], settings[:, 1:2], settings[:, 2:]
    # from the largest on, so that a tiny temperature gives -inf for the others, not inf for all
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=1e-6)
    vocab = logits.shape[-1]
    top_k = [row.top_k or vocab for row in rows]
    narrow = [place for place, k in enumerate(top_k) if k <= _NARROW]
    if len(narrow) == len(rows):
        return _draw_from_top(scores, top_k, top_p, min_p, numbers)
    chosen = torch.empty(len(rows), dtype=torch.long, device=device)
    if narrow:
        few = [top_k[place] for place in narrow]
        chosen[narrow] = _draw_from_top(scores[narrow], few, top_p[narrow], min_p[narrow], numbers[narrow])
    wide = [place for place, k in enumerate(top_k) if k > _NARROW]
    is_cut = any(rows[place].top_p < 1 or top_k[place] < vocab for place in wide)
    kept = _cut(scores[wide], [top_k[place] for place in wide], top_p[wide]) if is_cut else scores[wide]
    least = kept.amax(-1, keepdim=True) + min_p[wide].log()
    chosen[wide] = _pick(kept.masked_fill(kept < least, -torch.inf).softmax(-1), numbers[wide])
    return chosen


def _draw_from_top(scores: Tensor, top_k: Sequence[int], top_p: Tensor, min_p: Tensor, numbers: Tensor) -> Tensor:
    """Draw from at most `_NARROW` candidates a row."""
    width = min(max(top_k), scores.shape[-1])
    top, ids = scores.topk(width, -1)
    kept = torch.arange(width, device=scores.device)[None] < torch.tensor(top_k, device=scores.device)[:, None]
    kept = _keep_likeliest(top, kept, top_p)
    kept &= top >= top[:, :1] + min_p.log()
    ids, order = ids.sort(-1)  # in the order of ids, near-equal candidates cannot change places
    probabilities = top.masked_fill(~kept, -torch.inf).softmax(-1).gather(-1, order)
    return ids.gather(-1, _pick(probabilities, numbers)[:, None])[:, 0]


def _keep_likeliest(top: Tensor, kept: Tensor, top_p: Tensor) -> Tensor:
    """Of candidates sorted by score, the first ones until their probabilities sum up to top_p."""
    probabilities = top.masked_fill(~kept, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return kept & ((before < top_p) | (top_p >= 1))


def _cut(scores: Tensor, top_k: Sequence[int], top_p: Tensor) -> Tensor:
    """Scores with -inf for what top_k and top_p leave out, where top_k leaves more than `_NARROW`."""
    vocab = scores.shape[-1]
    is_whole = top_p >= 1
    if all(k >= vocab for k in top_k):  # top_p alone, which mostly keeps few: no need to sort the vocabulary
        total = scores.logsumexp(-1, keepdim=True)
        for width in (_FEW, _NARROW):
            if width >= vocab:
                break
            first = scores.topk(width, -1).values
            probabilities = (first - total).exp()
            summed = probabilities.cumsum(-1)
            if bool(((summed[:, -1:] > top_p + 1e-4) | is_whole).all()):
                return _above_last(scores, first, (summed - probabilities < top_p) | is_whole, is_whole)
    top = scores.sort(-1, descending=True).values
    kept = torch.arange(vocab, device=scores.device)[None] < torch.tensor(top_k, device=scores.device)[:, None]
    return _above_last(scores, top, _keep_likeliest(top, kept, top_p), torch.zeros_like(is_whole))


def _above_last(scores: Tensor, top: Tensor, kept: Tensor, is_whole: Tensor) -> Tensor:
    """Scores not below the last kept candidate's; others -inf. Candidates of equal score are kept together."""
    last = top.gather(-1, kept.sum(-1, keepdim=True) - 1)
    return scores.masked_fill((scores < last) & ~is_whole, -torch.inf)
