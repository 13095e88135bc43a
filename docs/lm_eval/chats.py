"""Scores of chats.yaml, which lm-eval loads: exact match with the normalisation of `tunesmith evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.generation.matching import matches_exactly


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The scores of one reply."""
    reply, reference = results[0], doc["messages"][1]["content"]
    return {
        "exact_match": float(matches_exactly(reply, reference)),
        "exact_match_strict": float(reply == reference),
    }
