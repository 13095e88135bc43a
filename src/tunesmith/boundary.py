"""Turn any error into one plain message and an exit code.

Stages raise TunesmithError for what they know. This module explains what can happen anywhere: the system refuses a
file, memory is full, a library meets a damaged file. Any other error is reported as a bug of tunesmith.
TUNESMITH_DEBUG=1 also prints the traceback.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import errno
import gzip
import io
import json
import lzma
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tunesmith.display import shorten
from tunesmith.distributed.launch import VOICE
from tunesmith.errors import InterruptedRun, RunError, Terminated, TunesmithError
from tunesmith.files import is_out_of_memory, lacking_memory, system_error
from tunesmith.streams import OutputLost

_LONGEST = 2000  # characters of a library's text
_DEBUG = "TUNESMITH_DEBUG"
# error number -> advice; exit code 4, since the input is not the cause
_MACHINE = {
    errno.ENOSPC: "Make room on that disk, or name another place.",
    errno.EDQUOT: "Make room within the quota, or name another place.",
    errno.EROFS: "Name a place that can be written to.",
    errno.EFBIG: "The file system or `ulimit -f` allows no file of this size; name another place.",
    errno.EIO: "The disk or network folder fails to read or write; check it, and copy the files to another.",
    errno.ESTALE: "The network folder has gone away; connect it again.",
    errno.ENOTCONN: "The network folder has gone away; connect it again.",
    errno.EMFILE: "Raise the limit: ulimit -n 4096.",
    errno.ENFILE: "Close other programs.",
}
_INPUT = {
    errno.ENOENT: "Check the name.",
    errno.EACCES: "Change its owner or mode, or name another place.",
    errno.EPERM: "Change its owner or mode, or name another place.",
    errno.EISDIR: "Give a file, not a folder.",
    errno.ENOTDIR: "A part of this name is a file, not a folder. Check the name.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ELOOP: "Its links form a loop. Correct or remove them.",
    errno.EEXIST: "Remove it, or give another name.",
    errno.ENOTEMPTY: "Remove its contents, or give another name.",
}
_NETWORK = "Check the network and HF_ENDPOINT; with HF_HUB_OFFLINE=1 only what is already downloaded is used."
_UNREACHED = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH,
              errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL)  # fmt: skip
_CLIENTS = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "aiohttp")
# packages that read files; their errors are about the file
_READERS = ("datasets", "jinja2", "openpyxl", "peft", "pyarrow", "safetensors", "tokenizers", "transformers", "yaml")
# our modules that read files; libraries in C and Rust leave no frame
_READING = frozenset(
    f"tunesmith.{name}"
    for name in (
        "reading", "files", "tensors", "config.plainyaml", "config.runfile", "sources.arrow", "sources.containers",
        "sources.csvfile", "sources.datafile", "sources.dataset_info", "sources.excel", "sources.folders",
        "sources.jsonfile", "sources.jsontext", "sources.read", "data.store", "adapters.adapter_config",
        "adapters.base", "adapters.open_adapter", "run.folder", "model.load", "model.reopen", "model.source",
        "model.tokenizer", "generation.speaker", "training.checkpoint", "training.metrics", "use.combine",
        "use.merge", "use.proof",
    )
)  # fmt: skip
# standard errors about what was read; tokenizers raises Exception itself
_DAMAGED = (UnicodeDecodeError, json.JSONDecodeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile,
            csv.Error, pickle.UnpicklingError, EOFError, RecursionError)  # fmt: skip
_PLACES = ("path", "file", "folder", "source")  # parameters of our functions for what they read
_STAGES = {
    "config": "the run file",
    "sources": "the data",
    "rows": "the data",
    "data": "the data",
    "adapters": "the adapter",
    "model": "the model or its tokenizer",
    "generation": "the model or adapter",
    "training": "the folder of the run",
    "run": "the folder of the run",
    "use": "the model or adapter",
    "publish": "the model or adapter",
    "report": "the folder of the run",
    "serve": "the model or adapter",
}


def report_failure(error: BaseException, words: list[str]) -> int:
    """Print the message of an error that ended the command; returns the exit code."""
    if isinstance(error, OutputLost) and error.has_reader_left:
        return 0
    if os.environ.get(_DEBUG):
        print("".join(traceback.format_exception(_unsuppressed(error))), file=sys.stderr)
    text, code = explain(error, words)
    if VOICE.is_heard():  # of several processes, the first tells what has happened
        print(shorten(text), file=sys.stderr)
    return code


def explain(error: BaseException, words: list[str]) -> tuple[str, int]:
    """A message and an exit code for any error."""
    if isinstance(error, TunesmithError) and error.exit_code == InterruptedRun.exit_code:  # also of another process
        return str(error), error.exit_code
    if isinstance(error, TunesmithError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {_what_stands(words)}", InterruptedRun.exit_code
    if isinstance(error, OutputLost):
        return (
            f"error: cannot write standard output: {error}. {_MACHINE.get(error.error.errno or 0, '')}".rstrip(),
            RunError.exit_code,
        )
    if is_out_of_memory(error):
        return f"error: {_explain_memory(error, words)}", RunError.exit_code
    refused = system_error(error)
    if _is_about_network(error):
        what = tell(error) if refused is None or not refused.strerror else refused.strerror
        return f"error: {_stage_of(error)}: the network: {what}. {_NETWORK}", RunError.exit_code
    if refused is not None and refused.errno is not None and refused.strerror:
        return _explain_system(refused, _place_of(error))
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's expanduser
        named = ", ".join(word for word in words if word.startswith("~")) or "a name"
        return (
            f"error: {named}: no such user. Write out the user's folder, or put ./ before a file name with ~.",
            TunesmithError.exit_code,
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from"):  # pathlib's resolve
        return f"error: {error}. {_INPUT[errno.ELOOP]}", TunesmithError.exit_code
    if isinstance(error, RecursionError) and _was_reading(error):
        return f"error: {_place_of(error)}: nested too deeply to be read. Flatten it.", TunesmithError.exit_code
    if _is_about_input(error) and _was_reading(error):
        return (
            f"error: {_place_of(error)}: cannot be read: {tell(error)}. The file is damaged or of another type. "
            f"Save or download it again; {_DEBUG}=1 shows what was being read.",
            TunesmithError.exit_code,
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("tunesmith"):
        return (
            f"error: a package cannot be imported: {tell(error)}. Install tunesmith and what it needs again: "
            f"pip install --force-reinstall tunesmith. {_DEBUG}=1 shows which import it was.",
            TunesmithError.exit_code,
        )
    if refused is not None and not isinstance(error, ValueError) and _was_reading(error):  # of a library
        return f"error: {_place_of(error)}: {tell(error)}. {_DEBUG}=1 shows more.", TunesmithError.exit_code
    return (
        f"error: unexpected error, please report it as a bug: {tell(error)}\n{_DEBUG}=1 shows the traceback.",
        RunError.exit_code,
    )


def tell(error: BaseException) -> str:
    """Class and text of an error in one line of bounded length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"{type(error).__name__}: {text}".rstrip(". :")


def _explain_memory(error: BaseException, words: list[str]) -> str:
    command = words[0] if words else ""
    whose = lacking_memory(error)
    others = (
        "end other programs" if whose == "this machine" else "end other programs on the GPU (nvidia-smi lists them)"
    )
    advice = {
        "train": "lower train.micro_batch_tokens and data.max_seq_len, or train an adapter (--lora.kind lora)",
        "resume": f"{others}; a resumed run keeps its model and batch size",
        "merge": f"{others}, or merge on a machine with memory for two copies of the base model",
        "chat": "use a smaller model or a lower --max-new-tokens",
        "serve": "use a smaller model or a lower --max-rows",
    }.get(command, f"{others}, or use less data at once")
    return f"out of memory on {whose}. To fix: {advice}."


def _explain_system(error: OSError, place: str) -> tuple[str, int]:
    """Args:
    place: what was worked on, for an error that names no file.
    """
    number = error.errno or 0
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    where = " -> ".join(name if len(name) <= 200 else f"{name[:60]}..." for name in names) or place
    advice = _MACHINE.get(number) or _INPUT.get(number) or (names and "Check the file and its disk.")
    advice = advice or f"{_DEBUG}=1 shows where."
    code = RunError.exit_code if number in _MACHINE else TunesmithError.exit_code
    return f"error: {where}: {error.strerror}. {advice}", code


def _is_about_network(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        # gaierror (no such host) has its own numbers
        return error.errno in _UNREACHED or type(error).__name__ == "gaierror"
    is_clients = any(kind.__module__.split(".")[0] in _CLIENTS for kind in type(error).__mro__)
    return is_clients or isinstance(error, (ConnectionError, TimeoutError))


def _is_about_input(error: BaseException) -> bool:
    """Whether an error of this class is about the input."""
    kinds = type(error).__mro__
    if "TemplateRuntimeError" in {kind.__name__ for kind in kinds}:  # of jinja2: rendering, not reading
        return False
    is_librarys = type(error).__module__.split(".")[0] in _READERS
    return type(error) is Exception or isinstance(error, _DAMAGED) or is_librarys


def _was_reading(error: BaseException) -> bool:
    """Whether the error comes from a reading library or one of our reading modules; else it is a bug of ours."""
    is_reading = False
    for name in _modules_of(error):
        if name.split(".")[0] == "tunesmith":
            is_reading = name in _READING
        else:
            is_reading = is_reading or name.split(".")[0] in _READERS
    return is_reading


def _modules_of(error: BaseException) -> Iterator[str]:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield str(frame.f_globals.get("__name__", ""))


def _stage_of(error: BaseException) -> str:
    """What was being processed, by our innermost module on the stack."""
    stage = "what was given"
    for name in _modules_of(error):
        parts = name.split(".")
        if parts[0] == "tunesmith" and len(parts) > 1:
            stage = _STAGES.get(parts[1], stage)
    return stage


def _place_of(error: BaseException) -> str:
    """The file that our innermost reading function was reading; else the stage."""
    place = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
        if name in _READING:
            held = (_as_path(frame.f_locals.get(place_name)) for place_name in _PLACES)
            place = next(filter(None, held), place)
        elif name.split(".")[0] == "tunesmith":
            place = ""
    return place or _stage_of(error)


def _as_path(value: object) -> str:
    """Name of a path, an existing file or an open file; "" for other values."""
    value = getattr(value, "name", "") if isinstance(value, io.IOBase) else value
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, str) and 0 < len(value) < 1000 and _is_there(value) else ""


def _is_there(name: str) -> bool:
    try:
        return os.path.lexists(name)
    except ValueError:  # a null character
        return False


def _unsuppressed(error: BaseException) -> BaseException:
    """Restore the context of errors that were raised `from None`."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__suppress_context__ = False
        seen = seen.__cause__ or seen.__context__
    return error


def _what_stands(words: list[str]) -> str:
    """What an interrupted command has left: a complete folder or nothing."""
    command = words[0] if words else ""
    output = next((words[at + 1] for at, word in enumerate(words[:-1]) if word == "--output"), None)
    output = next((word.partition("=")[2] for word in words if word.startswith("--output=")), output)
    if command in ("merge", "tokenizer") and output and os.path.isdir(output) and os.listdir(output):
        return f"{output} is complete"
    if command == "push":
        return "a push is one commit: the repository has all of it or nothing"
    if command in ("resume", "report"):
        return "the run is as it was"
    if command == "demo":
        return "its files so far are kept; give --output a new folder to start again"
    return "nothing was left behind"


class Signals:
    """Raise Ctrl-C, SIGTERM and a closed terminal as exceptions, so that files are cleaned up.

    An interrupt is sent again where Python or a library drops it: it cannot be raised inside a destructor, and some
    libraries turn one during their import into another error.
    """

    def __init__(self) -> None:
        self._last = -math.inf

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        self._last = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def drop(self, dropped: Any) -> None:
        """Hook for sys.unraisablehook."""
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(dropped)
            return
        again = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
        again.daemon = True
        again.start()

    def cause_of(self, error: BaseException) -> BaseException:
        """The interrupt that caused an error within the last second, else the error itself."""
        is_explained = isinstance(error, (TunesmithError, OutputLost, KeyboardInterrupt))
        if is_explained or time.monotonic() - self._last > 1:
            return error
        return KeyboardInterrupt().with_traceback(error.__traceback__)


@contextlib.contextmanager
def taken_signals(saves: bool = False) -> Iterator[Signals]:
    """Within the block, signals that would end the process raise interrupts; ignored ones (nohup) stay ignored.

    Args:
        saves: the command saves a checkpoint at SIGUSR1. Before it can, that signal must not end it.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
        yield signals
        return
    ending = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    taken = [number for number in numbers if signal.getsignal(number) in ending]
    before = {number: signal.signal(number, signals.interrupt) for number in taken}
    if saves and hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    hook, sys.unraisablehook = sys.unraisablehook, signals.drop
    try:
        yield signals
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if signal.getsignal(number) in (signals.interrupt, signal.SIG_IGN):
                signal.signal(number, handler)


def end_at_next_interrupt(code: int) -> None:
    """While Python shuts down, another Ctrl-C ends the process silently."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(code))


def end_interrupted(code: int) -> None:
    """End this process without waiting for threads that the interrupt has left in the middle of their work.

    Python's usual end would destroy what they use: C++ then aborts the process ("terminate called without an active
    exception"), and the exit code is lost.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    atexit._run_exitfuncs()  # temporary folders are removed
    os._exit(code)
