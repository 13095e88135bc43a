"""Counts of verdicts: who won, by how much, and whether the judge prefers the place of a reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tunesmith.display import one_line
from tunesmith.evaluation.intervals import METHOD, Counted, ratio, score_models
from tunesmith.evaluation.records import Score
from tunesmith.judging.question import Verdict

REFERENCE = "reference"
"""Name of the reply in the data, where a single model is judged."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair of replies and the verdicts on it.

    Attributes:
        row: FILE:ROW; replies of one row are not independent.
        is_equal: both are the same text.
        one_first, two_first: the verdicts with either reply in the first place; None: no verdict in the answer.
    """

    row: str
    one_first: Verdict | None
    two_first: Verdict | None
    is_equal: bool = False

    @property
    def is_whole(self) -> bool:
        return self.one_first is not None and self.two_first is not None

    @property
    def points(self) -> float:
        """Of the first model: 1 for a win, 1/2 for a tie, mean of both orders."""
        return (_POINTS[self.one_first] + 1 - _POINTS[self.two_first]) / 2


_POINTS = {"first": 1.0, "tie": 0.5, "second": 0.0, None: 0.0}


@dataclass(frozen=True, slots=True)
class Tally:
    """A comparison of two models by a judge, over the pairs with a verdict in both orders.

    Attributes:
        model, reference: names; the win rate is that of `model`.
        pairs: of replies; judged: those with both verdicts.
        equal: pairs of the same text, which are ties that the judge is not asked about.
        wins, losses: both orders say so. ties: both say tie. split: the orders differ.
        first_twice, second_twice: split pairs where the same place won in both orders, whatever stood there.
        without_verdict: answers that hold none.
        win_rate: mean points of a pair; ties and contradictions count as half.
        first_place: share of the first place in all verdicts that are not ties; 0.5 without a bias.
    """

    model: str
    reference: str
    pairs: int
    judged: int
    equal: int
    wins: int
    losses: int
    ties: int
    split: int
    first_twice: int
    second_twice: int
    without_verdict: int
    win_rate: Score
    first_place: Score

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def tally(model: str, reference: str, judged: Sequence[Judged], seed: int) -> Tally:
    whole = [pair for pair in judged if pair.is_whole]
    verdicts = [(pair.one_first, pair.two_first) for pair in whole]
    wins = verdicts.count(("first", "second"))
    losses = verdicts.count(("second", "first"))
    ties = verdicts.count(("tie", "tie"))
    win_rate = _score([(pair.row, pair.points, 1.0) for pair in whole], seed)
    places = [(pair.row, verdict) for pair in judged for verdict in (pair.one_first, pair.two_first)]
    decided = [(row, float(verdict == "first"), 1.0) for row, verdict in places if verdict in ("first", "second")]
    return Tally(
        model=model,
        reference=reference,
        pairs=len(judged),
        judged=len(whole),
        equal=sum(pair.is_equal for pair in judged),
        wins=wins,
        losses=losses,
        ties=ties,
        split=len(whole) - wins - losses - ties,
        first_twice=verdicts.count(("first", "first")),
        second_twice=verdicts.count(("second", "second")),
        without_verdict=sum(verdict is None for _, verdict in places),
        win_rate=win_rate,
        first_place=_score(decided, seed),
    )


def _score(points: Sequence[tuple[str, float, float]], seed: int) -> Score:
    """Mean of points by row, with the interval of the other scores."""
    places = {row: place for place, row in enumerate(dict.fromkeys(row for row, _, _ in points))}
    if not places:
        return Score(None)
    counts = np.zeros((len(places), 2))
    for row, got, possible in points:
        counts[places[row]] += (got, possible)
    models, _ = score_models([{"share": Counted(counts, ratio, is_share=True)}], [], seed)
    return models[0]["share"]


def format_judge(judge: Mapping[str, Any]) -> list[str]:
    """The judge's part of evaluate.json as lines for a terminal."""
    lines = [f"judge     {judge['model']} at {judge['url']}"]
    for found in judge["comparisons"]:
        counts = [f"{found['wins']:,} wins", f"{found['losses']:,} losses", f"{found['ties']:,} ties"]
        counts += [f"{found['split']:,} where the orders disagree"] if found["split"] else []
        counts += [f"{found['without_verdict']:,} answers without a verdict"] if found["without_verdict"] else []
        lines += [f"  {found['model']} against {found['reference']}", f"    {', '.join(counts)}"]
        lines.append(f"    win rate {show_share(found['win_rate'])} over {found['judged']:,} pairs in both orders")
        lines.append(f"    the first place won {show_share(found['first_place'])} (50 % without a bias)")
    return [one_line(line) for line in lines]


def show_share(score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "-"
    if score["low"] is None or score["high"] is None:
        return f"{score['value']:.1%}"
    return f"{score['value']:.1%} [{score['low']:.1%}, {score['high']:.1%}]"


INTERVALS = METHOD
