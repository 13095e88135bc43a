"""From likelihoods and replies to the scores of each model, and the differences of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.evaluation.intervals import Array, Counted, ratio, score_models
from tunesmith.evaluation.likelihood import Likelihood
from tunesmith.evaluation.records import SCORES, Difference, ReplyRecord, Score
from tunesmith.evaluation.replies import Asked, ReplyScorer
from tunesmith.evaluation.texts import bleu_of, chrf_of

_CORPUS: dict[str, Callable[[Array], Array]] = {"bleu": bleu_of, "chrf": chrf_of}


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """All that was found out about a model.

    Attributes:
        name: of the model.
        base: name of its base, if that is put beside it.
        likelihood: over the same rows for each model.
        replies: what was asked, and what was replied.
    """

    name: str
    base: str | None
    is_base: bool
    likelihood: Likelihood
    replies: Sequence[tuple[Asked, ReplyRecord]]
    scorer: ReplyScorer


def count_scores(measured: Measured) -> dict[str, Counted]:
    """The counts of each score by row, in the order of SCORES; scores that apply to no row are left out."""
    found = measured.likelihood.scores()
    num_rows = len(measured.likelihood.sums)
    sums: dict[str, Array] = {}
    for asked, record in measured.replies:
        counts = {name: np.array([value, 1.0]) for name, value in record.scores.items() if name not in _CORPUS}
        counts["length_ratio"] = np.array([record.tokens, record.reference_tokens], dtype=np.float64)
        bleu, chrf = measured.scorer.corpus_counts(record, asked)
        counts |= {"bleu": np.array(bleu, dtype=np.float64), "chrf": np.array(chrf, dtype=np.float64)}
        for name, count in counts.items():
            sums.setdefault(name, np.zeros((num_rows, len(count))))[asked.row] += count
    for name, counted in sums.items():
        found[name] = Counted(counted, _CORPUS.get(name, ratio), is_share=SCORES[name].shown == "share")
    return {name: found[name] for name in SCORES if name in found}


def score_all(models: Sequence[Measured], seed: int) -> tuple[dict[str, dict[str, Score]], list[Difference]]:
    """Scores by the names of the models, and differences: each model to its base, and later models to the first."""
    places = {model.name: place for place, model in enumerate(models)}
    pairs = list(dict.fromkeys(_pairs(models)))
    scores, differences = score_models(
        [count_scores(model) for model in models], [(places[one], places[two]) for one, two in pairs], seed
    )
    named = {model.name: found for model, found in zip(models, scores, strict=True)}
    return named, [Difference(one, two, found) for (one, two), found in zip(pairs, differences, strict=True)]


def _pairs(models: Sequence[Measured]) -> Iterator[tuple[str, str]]:
    yield from ((model.name, model.base) for model in models if model.base is not None)
    first, *others = [model.name for model in models if not model.is_base]
    yield from ((other, first) for other in others)
