"""Where the training loop is and how long that took before: a stop says what it waits for, a watchdog what is slow."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tunesmith.data.feed import Step
from tunesmith.display import format_rows
from tunesmith.monitor.usage import Stopwatch

_AGAIN = "press Ctrl-C again to stop now"
_NAMES = {"step": "the current step", "forward": "the current batch", "evaluation": "the evaluation"}
_STEPS = 50  # that the usual times are medians of
_KNOWN_STEPS = 5  # before a step has a usual time; the first ones are slower (memory, compiled kernels)


_PHASES = ("forward", "wait", "update")
_LAST = 2**31  # forward


@dataclass(frozen=True, slots=True)
class StepTime:
    """What a step cost.

    Attributes:
        tokens: of all processes.
        squares: of its documents' lengths, summed: attention costs that much.
    """

    seconds: float
    tokens: int
    squares: int


class Pace:
    """The loop tells it; another thread may ask at any time.

    Attributes:
        is_at_end: all steps are made.
        stopwatch: of the forwards and backwards of steps.
        save_s: how long the last checkpoint took to write; 0: not known yet.
    """

    def __init__(self, stopwatch: Stopwatch | None = None) -> None:
        self.stopwatch = stopwatch or Stopwatch()
        self.is_at_end = False
        self.save_s = 0.0
        self._doing = ""
        self._began = self._forward_began = time.monotonic()
        self._usual_s: dict[str, float] = {}  # of the last step, forward and evaluation
        self._number, self._forward, self._phase = 0, 0, "forward"
        self._step: Step | None = None
        self._tokens = 0  # of this process since `take_work`
        self._mean_tokens = 0.0  # of a forward of the last step
        self._steps: deque[StepTime] = deque(maxlen=_STEPS)

    @contextmanager
    def of(self, doing: str, num_forwards: int = 1) -> Iterator[None]:
        """Time a step, an evaluation, or a step that can end after each of its forwards ("forward")."""
        self._doing = doing
        self._began = self._forward_began = time.monotonic()
        yield
        self._usual_s[doing] = self.seconds() / max(1, num_forwards)
        self._doing = ""

    @contextmanager
    def of_step(self, number: int, step: Step) -> Iterator[None]:
        """Time a step, which will have this number."""
        self._number, self._forward, self._phase = number, 1, "forward"
        self._step = step
        try:
            with self.of("forward", len(step.batches)):
                self.stopwatch.start()
                yield
                self._tokens += step.batches.num_tokens
                self._mean_tokens = step.batches.num_tokens / max(1, len(step.batches))
                self._steps.append(StepTime(self.seconds(), step.whole.num_tokens, step.whole.num_squares))
        finally:
            self._step = None

    def wait(self) -> None:
        """A forward and its backward are done; this process waits for the others."""
        self._phase = "wait"
        if self._step is not None:
            self.stopwatch.stop()

    def count_forward(self) -> None:
        """The next forward begins."""
        self._forward += 1
        self._phase = "forward"
        self._forward_began = time.monotonic()
        if self._step is not None:
            self.stopwatch.start()

    def end_forwards(self) -> None:
        """All forwards of the step are done; the gradients of all processes are summed."""
        self._phase = "update"
        self.stopwatch.stop()

    def take_work(self) -> tuple[int, float]:
        """Tokens of this process since the last call, and seconds in its forwards and backwards without waiting."""
        tokens, self._tokens = self._tokens, 0
        return tokens, self.stopwatch.take()

    def seconds(self) -> float:
        """Since the current step or evaluation began."""
        return time.monotonic() - self._began

    @property
    def running_step(self) -> int:
        """Number of the step that is being made; 0 between steps, where evaluations and saves happen."""
        return self._number if self._step is not None else 0

    def usual_s(self) -> float | None:
        """Seconds that the running step should take, by the steps before it; None where that is not known yet.

        A step with more tokens, or with longer documents, may take longer in proportion.
        """
        step, steps = self._step, list(self._steps)
        if step is None or len(steps) < _KNOWN_STEPS:
            return None
        whole = step.whole
        usual = statistics.median(made.seconds for made in steps)
        tokens = statistics.median(made.tokens for made in steps)
        squares = statistics.median(made.squares for made in steps)
        return usual * max(1.0, whole.num_tokens / max(1, tokens), whole.num_squares / max(1, squares))

    def position(self) -> tuple[tuple[int, int, int], str]:
        """A place in the run, which grows, and a text for it: "in forward 3 of its 8 of step 812: rows a.jsonl:17"."""
        number, forward, phase, step = self._number, self._forward, self._phase, self._step
        if step is None:
            after = f"after step {number}" if number else "before step 1"
            return (number, _LAST, 0), f"{'evaluating' if self._doing else 'between two steps'} {after}"
        order, count = (number, forward, _PHASES.index(phase)), len(step.batches)
        if phase == "update":
            return order, f"at the end of step {number}: summing gradients, or updating"
        if phase == "wait":
            return order, f"after forward {forward} of its {count} of step {number}"
        rows = step.batches.rows_of(forward - 1)
        return order, f"in forward {forward} of its {count} of step {number}" + (
            f": {format_rows(rows)}" if rows else ""
        )

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
            parts.append(_NAMES[doing] + (_about(self._doing_s(doing)) if doing in self._usual_s else ""))
        # a step that can end after each forward is given up: the one before it is saved
        if (step and step != saved_step) or doing != "forward":
            parts.append("a checkpoint" + (_about(self.save_s) if self.save_s else ""))
        return f"Stopping {'after ' if parts else ''}{' and '.join(parts) or 'now'}; {_AGAIN}."

    def left_s(self) -> float:
        """What a first signal leaves to be done, in seconds, as far as that is known."""
        return max(0.0, self._doing_s(self._doing)) + self.save_s

    def _doing_s(self, doing: str) -> float:
        return self._usual_s.get(doing, 0.0) * self._relative_size() - (time.monotonic() - self._forward_began)

    def _relative_size(self) -> float:
        """Tokens of the running forward, as a multiple of the last step's mean forward."""
        step = self._step
        if step is None or not self._mean_tokens:
            return 1.0
        return step.batches.num_tokens_of(self._forward - 1) / self._mean_tokens


def _about(seconds: float) -> str:
    return f" (about {max(1, round(seconds))} s)" if seconds < 100 else f" (about {round(seconds / 60)} min)"
