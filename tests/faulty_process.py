"""Run the command in one of several processes, and let one of them fail at a chosen moment.

Usage, under torchrun: faulty_process.py WHAT RANK WHEN command ...

WHAT: none, kill, stop (SIGSTOP), memory (a limit on the address space), file (a limit on the size of files), nan (in a
weight), raise (an error that nothing expects).
WHEN: a number of optimizer steps, or a glob pattern of a file that appears.

Nothing of the package is replaced: steps are seen through torch's own hook of all optimizers.
"""

from __future__ import annotations

import glob
import itertools
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook


def happen(what: str, optimizer: Any = None) -> None:
    if what in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    elif what == "memory":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**12
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.empty(2**28)  # what a step would ask for
    elif what == "file":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    elif what == "nan":
        weight = optimizer.param_groups[0]["params"][0].data
        (weight.to_local() if isinstance(weight, DTensor) else weight).fill_(float("nan"))
    elif what == "raise":
        raise ValueError("planted by the test")


def watch(what: str, pattern: str) -> None:
    while not glob.glob(pattern, include_hidden=True):
        time.sleep(0.005)
    happen(what)


def plan(what: str, when: str) -> None:
    if when.isdigit():
        steps = itertools.count(1)

        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            if next(steps) == int(when):
                happen(what, optimizer)

        register_optimizer_step_post_hook(after_step)
    else:
        threading.Thread(target=watch, args=(what, when), daemon=True).start()


if __name__ == "__main__":
    what, rank, when, *words = sys.argv[1:]
    # processes that are started again do not fail
    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        plan(what, when)
    sys.argv = ["tunesmith", *words]
    from tunesmith.cli import main

    raise SystemExit(main())
