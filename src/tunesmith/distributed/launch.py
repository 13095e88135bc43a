"""What a launcher says about the processes of a run: torchrun, and all that set its variables (Ray Train, PyTorchJob).

Imports no torch: commands that end with an error must not wait for it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.errors import UsageError

_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE")
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Launch:
    """One of several processes, as its launcher numbered it.

    Attributes:
        rank, size: number of this process, from 0, and how many there are.
        local_rank: number of this process on its host.
        address, port: of the launcher's key-value store.
        has_agent: the launcher itself keeps that store; otherwise process 0 does.
        is_again: the launcher has started the processes again, or may have: with several hosts, only the one where a
            process was lost counts that.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    has_agent: bool
    is_again: bool

    @property
    def name(self) -> str:
        return f"process {self.rank} of {self.size} (host {socket.gethostname()}, pid {os.getpid()})"


def find_launch() -> Launch | None:
    """The launch of this process; None if it was started by itself.

    Raises:
        UsageError: a launcher has set some of the variables, or values that are no numbers.
    """
    given = os.environ
    if "RANK" not in given:
        return None
    missing = [name for name in _VARIABLES if not given.get(name)]
    if missing:
        raise UsageError(
            f"RANK is set and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: a launcher sets all of "
            f"{', '.join(_VARIABLES)}. Start the run with torchrun, or unset RANK.",
            code="launcher-incomplete",
        )
    try:
        rank, size, port = (int(given[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local_rank = int(given.get("LOCAL_RANK", rank))
        restarts, most, hosts = (int(given.get(name, 0)) for name in _COUNTS)
    except ValueError as error:
        raise UsageError(
            f"a variable of the launcher is not a number: {error}. Start the run with torchrun.",
            code="launcher-incomplete",
        ) from None
    if not 0 <= rank < size:
        raise UsageError(
            f"RANK {rank} and WORLD_SIZE {size} do not fit: ranks count from 0. Start the run with torchrun.",
            code="launcher-incomplete",
        )
    has_agent = given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_again = restarts > 0 or (hosts > 1 and most > 0)
    return Launch(rank, size, local_rank, given["MASTER_ADDR"], port, has_agent, is_again)


def is_first() -> bool:
    """Whether this is the process that writes, of several or by itself."""
    return os.environ.get("RANK", "0") == "0"


def require_one_process(words: Sequence[str]) -> None:
    """Raises:
    UsageError: several processes were started for a command that runs in one.
    """
    launch = find_launch()
    command = words[0] if words else ""
    if launch is not None and launch.size > 1 and command not in ("train", "resume"):
        raise UsageError(
            f"{command or 'tunesmith'}: runs in one process, and {launch.size} were started. Only train and resume run "
            "under torchrun in several.",
            code="not-for-several-processes",
        )


class Voice:
    """Whether this process prints. Before the processes have joined, the first of each host does; then only process 0.

    What happens on another process is told by process 0.

    Attributes:
        has_joined: the processes know each other.
        speaks_for_first: process 0 is lost, and this one tells it.
    """

    def __init__(self) -> None:
        self.has_joined = self.speaks_for_first = False

    def is_heard(self) -> bool:
        if self.speaks_for_first:
            return True
        rank = os.environ.get("RANK", "0") if self.has_joined else os.environ.get("LOCAL_RANK", "0")
        return rank == "0" or "RANK" not in os.environ


VOICE = Voice()
