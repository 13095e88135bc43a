"""Kill processes of distributed runs with SIGKILL at random moments, let them continue, and compare the results.

Usage: chaos_processes.py [--kills N] [--seed S] [--steps N] [--processes N] [--folder DIR] [--seconds N]

Four kinds of run alternate: all weights of a GPT-2 and a LoRA adapter on a Qwen3, both with dropout, copied (ddp) and
sharded (fsdp). torchrun's agent starts the processes. What is killed is one process, which the agent starts again
(--max-restarts); the agent alone, so that its processes are left behind; or all of them. After the last two the same
command is started again, with train.resume. Kills come at any moment, while the data are prepared, inside a save, and
at the end of a run. The writers are slowed down (chaos.py, SLOW), so that many kills happen inside a save.

Each finished run must have exactly the weights, the optimizer state of its last checkpoint (SHA-256) and the lines of
metrics.jsonl, apart from its clocks, of a run with as many processes that was left alone; otherwise the exit code is 1.
A line for each kill, then a summary as JSON.

The processes are forked from this one, which has imported torch without using it: so a start takes a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos import half_saves, in_child, make_inputs, newest_step, outcome, read_facts, slow_down, train_words, wait
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tunesmith.cli import main

KINDS = {
    f"{parallel} {chaos_kind}": (chaos_kind, parallel)
    for chaos_kind in ("full", "lora")
    for parallel in ("ddp", "fsdp")
}
MODES = ("one process", "one process", "the agent", "all")
RESTARTS = 3
GONE_S = 60  # for processes that are left behind to end by themselves
STUCK_S = 240  # without any change: the run hangs


@dataclass
class Tally:
    """What was killed, and what came of it."""

    moments: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)
    slowest_end_s: float = 0.0  # of processes that were left behind

    @property
    def kills(self) -> int:
        return self.modes.total()


def work(words: list[str]) -> None:
    """One of the processes; its arguments are the command's."""
    if code := main(words):
        sys.stdout.flush()
        os._exit(code)


def launch(words: list[str], processes: int) -> int:
    """As torchrun --standalone --nproc-per-node N --max-restarts RESTARTS; returns its exit code."""
    os.setpgid(0, 0)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=RESTARTS,
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(config, work)(words)
    except ChildFailedError:
        return 1
    return 0


def members(agent: int) -> list[int]:
    """The agent's processes, in the order of their numbers."""
    found: set[int] = set()
    for file in Path(f"/proc/{agent}/task").glob("*/children"):
        try:
            found |= {int(word) for word in file.read_text().split()}
        except OSError:
            continue
    return sorted(pid for pid in found if is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def moment_of(run: Path, steps: int, before: set[Path]) -> str:
    if not read_facts(run):
        return "while preparing"
    if half_saves(run) - before:
        return "inside a save"
    return "inside the finish" if newest_step(run) == steps else "in training"


def is_due(aim: str, run: Path, steps: int, before: set[Path]) -> bool:
    if aim == "preparation":
        return any(run.parent.glob(f".{run.name}.*.partial"))
    if aim == "save":
        return bool(half_saves(run) - before)
    if aim == "end":
        return newest_step(run) == steps
    return aim == "any"


def strike(agent: int, mode: str, rng: random.Random, tally: Tally) -> str:
    """Kill; returns what was killed, "" where nothing was left to kill."""
    processes = members(agent)
    if not processes or not is_running(agent):
        return ""
    if mode == "one process":
        place = rng.randrange(len(processes))
        os.kill(processes[place], signal.SIGKILL)
        return f"process {place}"
    os.kill(agent, signal.SIGKILL)
    if mode == "all":
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    while any(map(is_running, processes)):
        if time.monotonic() - began > GONE_S:
            raise SystemExit(f"{mode} killed: processes {processes} still run after {GONE_S} s")
        time.sleep(0.05)
    tally.slowest_end_s = max(tally.slowest_end_s, time.monotonic() - began)
    return mode


def live(words: list[str], run: Path, rng: random.Random, kills: int, options: Any, tally: Tally, title: str) -> int:
    """One start of the command, with some kills; returns how many."""
    log, made = run.with_suffix(".log"), 0
    log.touch()
    agent = in_child(lambda: launch(words, options.processes), log)
    aims = ["any", "any", "any", "save", "save", "save", "end"] + ([] if read_facts(run) else ["preparation"] * 3)
    aim, mode = rng.choice(aims), rng.choice(MODES)
    before, due_at = half_saves(run), time.monotonic() + rng.uniform(0.0, 5.0 if aim == "any" else 0.1)
    changed_at, seen = time.monotonic(), ""
    while True:
        done, status = os.waitpid(agent, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code and not made:
                raise SystemExit(f"exit code {code} without a kill; see {log}:\n{log.read_text()[-3000:]}")
            return made
        now = f"{newest_step(run)} {log.stat().st_size}"
        if now != seen:
            seen, changed_at = now, time.monotonic()
        if time.monotonic() - changed_at > STUCK_S:
            raise SystemExit(f"no progress for {STUCK_S} s; see {log}:\n{log.read_text()[-3000:]}")
        if made < kills and time.monotonic() >= due_at and is_due(aim, run, options.steps, before):
            time.sleep(rng.uniform(0, 0.1))
            moment, step = moment_of(run, options.steps, before), newest_step(run)
            if struck := strike(agent, mode, rng, tally):
                made += 1
                tally.modes[mode] += 1
                tally.moments[moment] += 1
                print(f"kill {tally.kills}: {title}, {struck}, {moment}, after the save of step {step}", flush=True)
                aim, mode = rng.choice(["any", "save", "save", "end"]), rng.choice(MODES)
                before, due_at = half_saves(run), time.monotonic() + rng.uniform(1.0, 6.0)
        time.sleep(0.005)


def result(run: Path) -> dict[str, Any]:
    """What must be equal: the weights, the lines of metrics.jsonl, and the optimizer's state."""
    weights, records = outcome(run)
    newest = max((run / "checkpoints").glob("step-*"))
    optimizer = hashlib.sha256((newest / "optimizer.safetensors").read_bytes()).hexdigest()
    return {"weights": weights, "metrics": records, "optimizer": optimizer}


def run_chaos(options: Any, folder: Path) -> int:
    if wait(in_child(lambda: make_inputs(folder), folder / "inputs.log")):
        raise SystemExit((folder / "inputs.log").read_text())
    rng, tally, began = random.Random(options.seed), Tally(), time.monotonic()
    wanted: dict[str, dict[str, Any]] = {}
    while tally.kills < options.kills and time.monotonic() - began < options.seconds:
        title = list(KINDS)[tally.runs.total() % len(KINDS)]
        kind, parallel = KINDS[title]
        flags = ["--train.parallel", parallel, "--train.resume", "true"]
        if title not in wanted:
            alone = folder / f"alone-{parallel}-{kind}"
            live([*train_words(folder, kind, options.steps, alone), *flags], alone, rng, 0, options, tally, title)
            wanted[title] = result(alone)
            print(f"{title}, left alone: weights {wanted[title]['weights'][:16]}", flush=True)
        run = folder / f"run-{tally.runs.total()}"
        words, made = [*train_words(folder, kind, options.steps, run), *flags], 0
        most = min(6, options.kills - tally.kills)
        while read_facts(run).get("finished_at_step") != options.steps:
            made += live(words, run, rng, most - made, options, tally, title)
        tally.runs[title] += 1
        found = result(run)
        different = [name for name in found if found[name] != wanted[title][name]]
        tally.different += [f"{run.name} ({title}): {name}" for name in different]
        print(f"{run.name}: {title}, {made} kills, {'NOT THE SAME' if different else 'the same'}", flush=True)
        if not different:
            shutil.rmtree(run)
    print(json.dumps({
        "kills": tally.kills,
        "killed": tally.modes,
        "moments": tally.moments,
        "runs": tally.runs,
        "different": tally.different,
        "slowest_end_of_processes_left_behind_s": round(tally.slowest_end_s, 1),
        "processes": options.processes,
        "seconds": round(time.monotonic() - began),
    }))  # fmt: skip
    return 1 if tally.different else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after this time")
    parser.add_argument("--folder", type=Path, help="working folder, which is kept (default: a temporary folder)")
    options = parser.parse_args()
    slow_down()
    os.environ["CHAOS_DETERMINISTIC"] = "false"
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        sys.exit(run_chaos(options, options.folder))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(run_chaos(options, Path(temporary)))
