"""What the model in training replied to held-out rows at each evaluation (train.eval_generate)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.runfolder import read_lines

_STEPS = 6  # shown of a row


@dataclass(frozen=True, slots=True)
class ReplyAt:
    step: int
    reply: str
    stopped: bool
    exact_match: bool


@dataclass(frozen=True, slots=True)
class RowReplies:
    """A held-out row and the replies to it over the steps.

    Attributes:
        row: FILE:ROW.
    """

    row: str
    prompt: str
    reference: str
    replies: Sequence[ReplyAt]


def read_replies(path: Path) -> list[RowReplies]:
    """The rows of eval_replies.jsonl, each with at most `_STEPS` replies; damaged lines are left out."""
    found: dict[str, RowReplies] = {}
    try:
        lines = list(read_lines(path))
    except OSError:
        return []
    for line, step in lines:
        for saved in _replies_of(json.loads(line)):
            row, prompt, reply, reference = (saved[name] for name in ("row", "prompt", "reply", "reference"))
            at = ReplyAt(step, reply, saved.get("stopped") is True, saved.get("exact_match") is True)
            found.setdefault(row, RowReplies(row, prompt, reference, []))
            found[row] = _with(found[row], at)
    return [RowReplies(r.row, r.prompt, r.reference, _some(r.replies)) for r in found.values()]


def _replies_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    replies = line.get("replies")
    every = [reply for reply in replies if isinstance(reply, dict)] if isinstance(replies, list) else []
    texts = ("row", "prompt", "reply", "reference")
    return [reply for reply in every if all(isinstance(reply.get(name), str) for name in texts)]


def _with(row: RowReplies, at: ReplyAt) -> RowReplies:
    return RowReplies(row.row, row.prompt, row.reference, [*row.replies, at])


def _some(replies: Sequence[ReplyAt]) -> list[ReplyAt]:
    if len(replies) <= _STEPS:
        return list(replies)
    places = [round(i * (len(replies) - 1) / (_STEPS - 1)) for i in range(_STEPS)]
    return [replies[place] for place in places]
