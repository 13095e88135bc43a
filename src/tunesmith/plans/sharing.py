"""Whether a run computes shared prefixes once (data.share_prefix), and what that saves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tunesmith.display import format_count
from tunesmith.plans.prefixes import Prefixes

LEAST_RATIO = 1.1  # for auto: below it, a few percent are saved at most, and packs are mixed less


@dataclass(frozen=True, slots=True, eq=False)
class Sharing:
    """Attributes:
    is_on: whether packs are computed as prefix trees.
    tokens: of an epoch's samples.
    computed: of them, in the packs as they are.
    reason: why it is off; empty where nobody asked.
    train, eval: the prefixes of the samples to train on and of those to evaluate on, where it is on.
    trains_once: the samples of a row train a token that they share once (data.train_on all).
    """

    is_on: bool = False
    tokens: int = 0
    computed: int = 0
    reason: str = ""
    train: Prefixes | None = None
    eval: Prefixes | None = None
    trains_once: bool = False

    @property
    def ratio(self) -> float:
        return self.tokens / self.computed if self.computed else 1.0

    @property
    def line(self) -> str:
        """For the summary; empty where there is nothing to say."""
        if not self.is_on:
            return f"not shared: {self.reason}" if self.reason else ""
        once = ", and trained once in each row" if self.trains_once else ""
        return (
            f"shared prefixes are computed once{once}: {format_count(self.computed)} of {format_count(self.tokens)} "
            f"tokens an epoch ({self.ratio:.2f} tokens for each computed)"
        )

    def to_json(self) -> dict[str, Any]:
        """In data_ledger.json."""
        if not self.is_on:
            return {"is_on": False, "reason": self.reason}
        return {"is_on": True, "tokens": self.tokens, "computed": self.computed, "ratio": round(self.ratio, 4)}

    def off(self, reason: str) -> Sharing:
        return replace(self, is_on=False, reason=reason, train=None, eval=None, trains_once=False)
