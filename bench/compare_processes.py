"""The processes of compare.py: engines that make a step each time they are told to, and the time that is left."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compare_inputs import Task, mean_tokens, write_minimind, write_model, write_rows

HERE = Path(__file__).resolve().parent
PEERS = {"trl-packed", "trl-padded", "prepare-trl"}
LONGEST_S = 300.0  # that an engine may take to its first step, or for one step


class EngineFailed(Exception):
    """An engine ended, or did not answer."""


@dataclass
class Engine:
    """A process of compare_engines.py."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    answers: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            EngineFailed: there is none.
        """
        assert self.process.stdout is not None
        began = time.monotonic()
        late = threading.Timer(LONGEST_S, self.process.kill)
        late.start()
        line = self.process.stdout.readline()
        late.cancel()
        if not line:
            if time.monotonic() - began >= LONGEST_S:
                raise EngineFailed(f"no step within {LONGEST_S:.0f} s")
            lines = self.log.read_text(errors="replace").strip().splitlines()
            raise EngineFailed(lines[-1][:200] if lines else f"ended with {self.process.wait()}")
        self.answers.append(json.loads(line))
        return self.answers[-1]

    def go(self) -> dict[str, Any]:
        self.write("go")
        return self.read()

    def write(self, word: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()

    def end(self) -> None:
        self.write("end")
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def started(name: str, python: Path | str, engine: str, task: Task, env: dict[str, str]) -> Iterator[Engine]:
    """A process of compare_engines.py that is ready.

    Raises:
        EngineFailed: it did not get ready.
    """
    own = task.write()
    log = own.with_suffix(".log")
    offline = {"COMPARE_BEGAN": repr(time.time()), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(python), str(HERE / "compare_engines.py"), engine, str(own)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=file, text=True, env={**inherited, **offline, **env},
        )  # fmt: skip
    found = Engine(name, process, log)
    try:
        found.read()
        yield found
    finally:
        found.end()


class Bench:
    """The folder of a measurement, the interpreters, and the time that is left.

    Args:
        weights: of the parts to come, in order: their shares of the time.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, weights: list[float]) -> None:
        self.args, self.folder = args, folder
        self._models: dict[str, int] = {}
        self._checkout = ""
        self._weights, self._end = weights, time.monotonic() + 60 * args.budget
        self._until = 0.0
        self.failed: dict[str, str] = {}

    def begin(self) -> None:
        """The next part begins; what earlier parts have left over is for all others."""
        now = time.monotonic()
        self._until = now + max(0.0, self._end - now) * self._weights[0] / sum(self._weights)
        self._weights = self._weights[1:]
        self.failed = {}

    def has_time(self, seconds: float) -> bool:
        """Whether the part may take these seconds more."""
        return time.monotonic() + seconds <= self._until

    def task(self, name: str, shape: str, method: str, tokens: int, pairs: list[tuple[str, str]], **more: Any) -> Task:
        """The inputs of engines, written to the folder."""
        model = self.folder / f"model-{shape}"
        if shape == "minimind" and shape not in self._models:
            copy, self._models[shape] = write_minimind(self.args.minimind, model, self.folder, 512, 8)
            self._checkout = str(copy)
        elif shape not in self._models:
            self._models[shape] = write_model(model, shape, self.tokenizer_of(shape))
        rows = write_rows(self.folder / f"rows-{name}.jsonl", pairs)
        padded = max(1, round(tokens / mean_tokens(model, pairs)))
        task = Task(
            name, str(model), str(rows), str(self.folder), shape, method, tokens, more.pop("max_seq_len", tokens), padded,
            **{"steps": 1000, "checkout": self._checkout, **more},
        )  # fmt: skip
        task.write()
        return task

    def tokenizer_of(self, shape: str) -> Path | None:
        is_large = shape.startswith("qwen") and self.args.large_tokenizer
        found: Path | None = self.args.large_tokenizer if is_large else self.args.tokenizer
        return found

    def parameters(self, shape: str) -> int:
        return self._models[shape]

    def has(self, engine: str) -> bool:
        if engine == "minimind" and self.args.minimind is None:
            return False
        is_wanted = engine.endswith("ours") or not self.args.engines or engine in self.args.engines
        return is_wanted and (engine not in PEERS or self.args.peers_python is not None)

    def start(self, stack: contextlib.ExitStack, names: list[str], task: Task) -> dict[str, Engine]:
        """The engines that make a first step; why others do not is in `failed`."""
        found = {}
        for name in names:
            try:
                found[name] = stack.enter_context(self._engine(name, task))
            except (EngineFailed, OSError) as error:
                self.fail(name, error)
        return found

    def fail(self, name: str, error: Exception) -> None:
        self.failed[name] = str(error)
        print(f"  {name} failed: {error}", flush=True)

    @contextlib.contextmanager
    def _engine(self, name: str, task: Task) -> Iterator[Engine]:
        python = self.args.peers_python if name in PEERS else sys.executable
        own = replace(task, name=f"{task.name}-{name}")
        cache = self.folder / "cache" / own.name
        env = {"OMP_NUM_THREADS": str(self.args.threads), "TUNESMITH_CACHE": str(cache)}
        with started(name, python, name, own, env) as engine:
            yield engine

    def in_turn(self, engines: dict[str, Engine], rounds: int, least: int) -> int:
        """Steps of each in turn; the order changes from round to round. An engine that fails is left out from then on.

        Args:
            rounds: at most; fewer where the part's time is over, but not fewer than `least`.

        Returns:
            The number of rounds.
        """
        seconds = 0.0
        for number in range(rounds):
            if number >= least and not self.has_time(seconds):
                return number
            began = time.monotonic()
            names = list(engines)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                try:
                    engines[name].go()
                except EngineFailed as error:
                    self.fail(name, error)
                    del engines[name]
            seconds = time.monotonic() - began
        return rounds
