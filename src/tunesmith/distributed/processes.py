"""The world of a run that a launcher started in several processes, on torch.distributed."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from tunesmith.config.deepspeed_file import wants_deepspeed
from tunesmith.config.train_keys import TrainSection
from tunesmith.distributed.channel import Channel, Failure
from tunesmith.distributed.launch import VOICE, Launch, find_launch
from tunesmith.distributed.meeting import NotMetError, meet
from tunesmith.distributed.world import OneProcess, World
from tunesmith.errors import ConfigError, InterruptedRun, RunError, TunesmithError
from tunesmith.files import is_out_of_memory, lacking_memory

_JOIN_S = 300  # for all processes to start
_POLL_S = 0.05
_WITHOUT_ADVICE = ("process-lost", "process-failed", "run-interrupted")  # failures of a process that ended at once
_JOINED = itertools.count()  # worlds of this process; each has its own keys in the store
_stores: list[Any] = []  # kept to the end of the process: others may still read from it


def collective_s() -> float:
    """Time limit of one collective in seconds (TUNESMITH_COLLECTIVE_S)."""
    try:
        return max(5.0, float(os.environ.get("TUNESMITH_COLLECTIVE_S", "")))
    except ValueError:
        return 1800.0


class ToldError(RunError):
    """A failure of another process, or one of this process that process 0 has printed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text, code=failure.code)
        self.exit_code = failure.exit_code
        self.failure = failure

    def with_advice(self, advice: str) -> ToldError:
        """With how to continue the run, which a process that ended without a word has not said."""
        is_complete = self.failure.code not in _WITHOUT_ADVICE or "tunesmith resume" in self.failure.text
        return self if is_complete else ToldError(replace(self.failure, text=f"{self.failure.text} {advice}"))


class Processes:
    """Several processes with one process group each for CPU and GPU tensors."""

    def __init__(self, launch: Launch, channel: Channel, group: Any, store: Any) -> None:
        self.rank, self.size, self.local_rank = launch.rank, launch.size, launch.local_rank
        self.channel = channel
        self._launch, self._group, self._store = launch, group, store
        self._shared = 0
        self._has_waited = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total, group=self._group if total.device.type == "cpu" else None)
        return total

    def agree(self, wish: bool) -> bool:
        return bool(self.sum(torch.tensor(int(wish), dtype=torch.int32)).item())

    def share(self, make: Callable[[], Any]) -> Any:
        self._shared += 1
        key = f"share/{self._shared}"
        if self.is_main:
            value = make()
            self._store.set(key, json.dumps(value))
            return value
        while not self._store.check([key]):
            self.raise_failure()
            time.sleep(_POLL_S)
        return json.loads(self._store.get(key))

    def raise_failure(self) -> None:
        """Raises:
        ToldError: another process has failed.
        """
        if (failure := self.channel.failure()) and failure.rank != self.rank:
            self._take(failure)
            raise ToldError(failure)

    def _take(self, failure: Failure) -> None:
        """Another process has failed; it may end when process 0 has taken its failure."""
        self.channel.notice()
        VOICE.speaks_for_first = self.channel.speaks(failure)
        if self.is_main:
            self.channel.tell()

    def raise_cause(self, waits: bool = False) -> None:
        """After an interrupt: it may come from the channel, since another process has failed, or from torchrun, which
        ends all others when it sees that one has ended.

        Args:
            waits: long enough to see that a process is lost.

        Raises:
            ToldError: that failure, unless that process was only interrupted as well.
        """
        waits, self._has_waited = waits and not self._has_waited, self._has_waited or waits
        failure = self.channel.find_lost() if waits else self.channel.failure()
        if failure and failure.rank != self.rank and failure.exit_code != InterruptedRun.exit_code:
            self._take(failure)
            raise ToldError(failure)

    @contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self.raise_cause(waits=True)
            raise
        except RuntimeError as error:  # of gloo or NCCL, when a process has ended; and anything else of torch
            if is_out_of_memory(error) or not (failure := self.channel.find_cause()):
                raise
            if failure.rank == self.rank:
                raise
            self._take(failure)
            raise ToldError(failure) from error

    def ask_stop(self) -> str:
        """Tell process 0 of a signal that only this process got, so that it says what happens next."""
        self.channel.ask_stop()
        return ""

    def publish_interrupt(self) -> str:
        """Tell the other processes that a second signal ends this one at once."""
        text = f"{'' if self.is_main else f'{self._launch.name}: '}interrupted."
        self.channel.fail(Failure(self.rank, text, InterruptedRun.exit_code, "run-interrupted"))
        return ""

    def publish(self, error: BaseException) -> None:
        """Tell the other processes what ended this one; process 0 prints it."""
        self.channel.notice()
        if isinstance(error, ToldError):
            return
        text, is_interrupt = str(error), isinstance(error, KeyboardInterrupt)
        if is_out_of_memory(error):
            text = f"{lacking_memory(error)} is out of memory"
        elif is_interrupt:
            text = "interrupted."
        elif not isinstance(error, TunesmithError):
            text = f"unexpected error: {type(error).__name__}: {' '.join(text.split())[:2000]}".rstrip(".:")
            text = f"{text}. TUNESMITH_DEBUG=1 shows the traceback."
        default = InterruptedRun.exit_code if is_interrupt else RunError.exit_code
        failure = Failure(
            self.rank,
            text if self.is_main else f"{self._launch.name}: {text}",
            int(getattr(error, "exit_code", default)),
            str(getattr(error, "code", "") or ("run-interrupted" if is_interrupt else "process-failed")),
        )
        told = self.channel.fail(failure)
        if self.is_main:
            self.channel.tell()
        elif told.rank == self.rank and self.channel.owns_process:
            self.channel.wait_told()


@contextmanager
def joined_world(train: TrainSection, owns_process: bool = True) -> Iterator[World]:
    """The world of this run: all processes of the launcher, or this one.

    Args:
        owns_process: nothing runs in this process but the command; otherwise errors are raised to a caller, who may
            start the run again (Ray Train).

    Raises:
        ConfigError: train.parallel does not fit the number of processes.
        RunError: another process has failed.
    """
    launch = find_launch()
    require_fitting(train, launch)
    if launch is None or (launch.size == 1 and train.parallel in ("auto", "none") and not wants_deepspeed(train)):
        yield OneProcess()
        return
    world, leave = _join(launch, owns_process)
    error: BaseException | None = None
    try:
        try:
            yield world
        except (KeyboardInterrupt, InterruptedRun):
            world.raise_cause(waits=world.is_main)  # the signal may come while the end of a collective is looked into
            raise
    except BaseException as raised:
        error = raised
        world.publish(raised)
        raise
    finally:
        leave(error)


def require_fitting(train: TrainSection, launch: Launch | None) -> None:
    """Raises:
    ConfigError: train.parallel does not fit the number of processes.
    """
    if train.parallel == "none" and launch is not None and launch.size > 1:
        raise ConfigError(
            "train.parallel",
            [f"none, and {launch.size} processes were started: each would train the same run. Start one, or leave "
             "train.parallel out"],
            code="parallel-does-not-fit",
        )  # fmt: skip
    name = "deepspeed" if wants_deepspeed(train) else train.parallel
    if name in ("ddp", "fsdp", "deepspeed") and launch is None:
        raise ConfigError(
            "train.parallel",
            [f"{name} needs a launcher, which says how many processes there are: torchrun --nproc-per-node N "
             "-m tunesmith train ..."],
            code="parallel-does-not-fit",
        )  # fmt: skip


def _join(launch: Launch, owns_process: bool) -> tuple[Processes, Callable[[BaseException | None], None]]:
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    limit = datetime.timedelta(seconds=collective_s())
    owns_group = not dist.is_initialized()
    number = next(_JOINED)
    try:
        store = _connect(launch, is_first=owns_group and number == 0)
        prefix = f"tunesmith/{meet(PrefixStore(f'tunesmith/{number}', store), launch.rank, launch.size, _JOIN_S)}"
        VOICE.has_joined = True
        if owns_group:
            store = PrefixStore(f"{prefix}/group", store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=limit)
        group = dist.new_group(backend="gloo", timeout=limit)
        client = PrefixStore(prefix, _connect(launch, is_first=False))
        channel = Channel(PrefixStore("channel", client), launch.rank, launch.size, launch.name, owns_process)
    except (NotMetError, RuntimeError, OSError) as error:
        raise RunError(
            f"{launch.name}: cannot reach the other processes at {launch.address}:{launch.port} "
            f"({' '.join(str(error).split())[:300]}). All must be started, and reach that address.",
            code="processes-not-joined",
        ) from None
    world = Processes(launch, channel, group, PrefixStore("values", client))

    def leave(error: BaseException | None) -> None:
        if error is None:
            with contextlib.suppress(Exception):  # nobody's connection is closed while another still needs it
                dist.barrier(group)
        channel.close()
        if error is None and owns_group:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
        VOICE.has_joined = error is not None

    return world, leave


def _connect(launch: Launch, is_first: bool) -> Any:
    """A client of the launcher's store; process 0 keeps the store itself where the launcher has none."""
    keeps = launch.rank == 0 and not launch.has_agent and is_first
    timeout = datetime.timedelta(seconds=_JOIN_S)
    store = TCPStore(launch.address, launch.port, launch.size, is_master=keeps, timeout=timeout, wait_for_workers=False)
    _stores.append(store)
    return store
