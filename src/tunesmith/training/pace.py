"""What the loop is doing and how long that took before: a stop says what it waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_AGAIN = "press Ctrl-C again to stop now"
_NAMES = {"step": "the current step", "forward": "the current batch", "evaluation": "the evaluation"}


class Pace:
    """The loop tells it; another thread may ask `explain` at any time.

    Attributes:
        is_at_end: all steps are made.
        save_s: how long the last checkpoint took to write; 0: not known yet.
    """

    def __init__(self) -> None:
        self.is_at_end = False
        self.save_s = 0.0
        self._doing = ""
        self._began = self._forward_began = time.monotonic()
        self._usual_s: dict[str, float] = {}  # of the last step, forward and evaluation

    @contextmanager
    def of(self, doing: str, num_forwards: int = 1) -> Iterator[None]:
        """Time a step, an evaluation, or a step that can end after each of its forwards ("forward")."""
        self._doing = doing
        self._began = self._forward_began = time.monotonic()
        yield
        self._usual_s[doing] = self.seconds() / max(1, num_forwards)
        self._doing = ""

    def count_forward(self) -> None:
        self._forward_began = time.monotonic()

    def seconds(self) -> float:
        """Since the current step or evaluation began."""
        return time.monotonic() - self._began

    def explain(self, step: int, saved_step: int | None) -> str:
        """What a first signal leaves to be done.

        Args:
            step: the last finished one.
            saved_step: of the newest checkpoint.
        """
        if self.is_at_end:
            return f"All steps are done and the model is being saved; {_AGAIN} (tunesmith resume then saves it)."
        doing, parts = self._doing, []
        if doing in _NAMES:
            left = self._usual_s.get(doing, 0.0) - (time.monotonic() - self._forward_began)
            parts.append(_NAMES[doing] + (_about(left) if doing in self._usual_s else ""))
        # a step that can end after each forward is given up: the one before it is saved
        if (step and step != saved_step) or doing != "forward":
            parts.append("a checkpoint" + (_about(self.save_s) if self.save_s else ""))
        return f"Stopping {'after ' if parts else ''}{' and '.join(parts) or 'now'}; {_AGAIN}."


def _about(seconds: float) -> str:
    return f" (about {max(1, round(seconds))} s)" if seconds < 100 else f" (about {round(seconds / 60)} min)"
