"""The last place that an error reaches: whatever it is, one message in plain words and an exit code.

Stages explain what they know about (TunesmithError). Here is explained what can happen anywhere: the system refuses a
file, memory ends, a library meets a damaged file. What nothing explains is a bug of ours, and is called one.
TUNESMITH_DEBUG=1 prints the traceback as well.
"""

from __future__ import annotations

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
from tunesmith.errors import InterruptedRun, RunError, Terminated, TunesmithError
from tunesmith.files import is_out_of_memory, lacking_memory, system_error
from tunesmith.streams import OutputLost

_LONGEST = 2000  # characters of a library's text
_DEBUG = "TUNESMITH_DEBUG"
# what the system says -> what to do; these codes end with exit 4, since the input is not to blame
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
    errno.ELOOP: "Its links lead back to themselves. Mend or remove them.",
    errno.EEXIST: "Remove it, or give another name.",
    errno.ENOTEMPTY: "Remove what it holds, or give another name.",
}
_NETWORK = "Check the network and HF_ENDPOINT; with HF_HUB_OFFLINE=1 only what is already downloaded is used."
_UNREACHED = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH,
              errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL)  # fmt: skip
_CLIENTS = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "aiohttp")
# packages that read files; what is raised in one of them, or of its kinds, speaks about the file
_READERS = ("datasets", "jinja2", "openpyxl", "peft", "pyarrow", "safetensors", "tokenizers", "transformers", "yaml")
# our own modules that read what others wrote; libraries in C and Rust leave no frame of their own
_READING = frozenset(
    f"tunesmith.{name}"
    for name in (
        "reading", "files", "plainyaml", "runfile", "data.arrow", "data.containers", "data.csvfile", "data.datafile",
        "data.dataset_info", "data.excel", "data.folders", "data.jsonfile", "data.jsontext", "data.read", "data.store",
        "model.adapter_config", "model.base", "model.load", "model.open_adapter", "model.reopen", "model.source",
        "model.tensors", "model.tokenizer", "train.checkpoint", "train.folder", "train.metrics", "use.combine",
        "use.generate", "use.merge", "use.proof",
    )
)  # fmt: skip
# kinds of the standard library that speak about what was read; tokenizers has none but Exception itself
_DAMAGED = (UnicodeDecodeError, json.JSONDecodeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile,
            csv.Error, pickle.UnpicklingError, EOFError, RecursionError)  # fmt: skip
_PLACES = ("path", "file", "folder", "source")  # what our functions call what they read
_STAGES = {
    "data": "the data",
    "model": "the model or its tokenizer",
    "train": "the folder of the run",
    "use": "the model or adapter",
    "runfile": "the run file",
}


def report_failure(error: BaseException, words: list[str]) -> int:
    """Print what is to be said about an error that ended the command; returns the exit code."""
    if isinstance(error, OutputLost) and error.has_reader_left:
        return 0
    if os.environ.get(_DEBUG):
        print("".join(traceback.format_exception(_unsuppressed(error))), file=sys.stderr)
    text, code = explain(error, words)
    print(shorten(text), file=sys.stderr)
    return code


def explain(error: BaseException, words: list[str]) -> tuple[str, int]:
    """A message and an exit code for any error."""
    if isinstance(error, InterruptedRun):
        return str(error), error.exit_code
    if isinstance(error, TunesmithError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {_what_stands(words)}", InterruptedRun.exit_code
    if isinstance(error, OutputLost):
        return (
            f"error: standard output cannot be written: {error}. {_MACHINE.get(error.error.errno or 0, '')}".rstrip(),
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
            f"error: {named}: no such user. Write the folder of the user out, or put ./ before the ~ of a file.",
            TunesmithError.exit_code,
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from"):  # pathlib's resolve
        return f"error: {error}. {_INPUT[errno.ELOOP]}", TunesmithError.exit_code
    if isinstance(error, RecursionError) and _was_reading(error):
        return f"error: {_place_of(error)}: nested too deep to be read. Flatten it.", TunesmithError.exit_code
    if _is_about_input(error) and _was_reading(error):
        return (
            f"error: {_place_of(error)}: cannot be read: {tell(error)}. A file is damaged, or is not what its name "
            f"says. Save or download it again; {_DEBUG}=1 shows what was being read.",
            TunesmithError.exit_code,
        )
    if refused is not None and not isinstance(error, ValueError) and _was_reading(error):  # a library's, in its words
        return f"error: {_place_of(error)}: {tell(error)}. {_DEBUG}=1 shows more.", TunesmithError.exit_code
    return (
        f"error: tunesmith failed in a way it should not: {tell(error)}\n{_DEBUG}=1 shows where; please report it.",
        RunError.exit_code,
    )


def tell(error: BaseException) -> str:
    """Kind and text in one line of bounded length."""
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
        "resume": f"{others}; a run goes on with the model and batch that it began with",
        "merge": f"{others}, or merge on a machine that holds the base model twice",
        "chat": "give a smaller model, or a lower --max-new-tokens",
    }.get(command, f"{others}, or give less data at once")
    return f"the memory of {whose} does not suffice. What helps: {advice}."


def _explain_system(error: OSError, place: str) -> tuple[str, int]:
    """Args:
    place: what was worked on, for an error that names no file.
    """
    number = error.errno or 0
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    where = " -> ".join(name if len(name) <= 200 else f"{name[:60]}..." for name in names) or place
    advice = _MACHINE.get(number) or _INPUT.get(number) or (names and "Check the file and the disk that it lies on.")
    advice = advice or f"{_DEBUG}=1 shows what was being done."
    code = RunError.exit_code if number in _MACHINE else TunesmithError.exit_code
    return f"error: {where}: {error.strerror}. {advice}", code


def _is_about_network(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        # gaierror's numbers are its own: no such host
        return error.errno in _UNREACHED or type(error).__name__ == "gaierror"
    is_clients = any(kind.__module__.split(".")[0] in _CLIENTS for kind in type(error).__mro__)
    return is_clients or isinstance(error, (ConnectionError, TimeoutError))


def _is_about_input(error: BaseException) -> bool:
    """Whether errors of this kind speak about what was given to read."""
    kinds = type(error).__mro__
    if "TemplateRuntimeError" in {kind.__name__ for kind in kinds}:  # jinja2's: rendering, not reading
        return False
    is_librarys = type(error).__module__.split(".")[0] in _READERS
    return type(error) is Exception or isinstance(error, _DAMAGED) or is_librarys


def _was_reading(error: BaseException) -> bool:
    """Whether it was raised by a library that reads, or where we read; our own bugs are raised elsewhere."""
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
    """What was being worked on, by the innermost of our modules on the stack."""
    stage = "what was given"
    for name in _modules_of(error):
        parts = name.split(".")
        if parts[0] == "tunesmith" and len(parts) > 1:
            stage = _STAGES.get(parts[1], stage)
    return stage


def _place_of(error: BaseException) -> str:
    """The file that was being read, where the innermost of our reading functions hold it; else the stage."""
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
    """Of a path, a name of something that is there, or an open file."""
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
    """With everything that it was raised from: `from None` is for those who did not ask."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__suppress_context__ = False
        seen = seen.__cause__ or seen.__context__
    return error


def _what_stands(words: list[str]) -> str:
    """A folder that is made whole or not at all is there or not."""
    command = words[0] if words else ""
    output = next((words[at + 1] for at, word in enumerate(words[:-1]) if word == "--output"), None)
    output = next((word.partition("=")[2] for word in words if word.startswith("--output=")), output)
    if command in ("merge", "tokenizer") and output and os.path.isdir(output) and os.listdir(output):
        return f"{output} is complete"
    if command == "demo":
        return "what it has made so far is kept; give --output a new folder to begin again"
    return "nothing was left behind"


class Signals:
    """Ctrl-C, SIGTERM and a closed terminal as exceptions where the program stands, so that files are cleaned up.

    An interrupt is made again where Python or a library drops it: inside a destructor it cannot be raised, and some
    libraries turn one that meets them half imported into an error of their own.
    """

    def __init__(self) -> None:
        self._last = -math.inf

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        self._last = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def drop(self, dropped: Any) -> None:
        """What sys.unraisablehook calls."""
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(dropped)
            return
        again = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
        again.daemon = True
        again.start()

    def cause_of(self, error: BaseException) -> BaseException:
        """The interrupt that a moment ago led to an error, else the error itself."""
        is_explained = isinstance(error, (TunesmithError, OutputLost, KeyboardInterrupt))
        if is_explained or time.monotonic() - self._last > 1:
            return error
        return KeyboardInterrupt().with_traceback(error.__traceback__)


@contextlib.contextmanager
def taken_signals() -> Iterator[Signals]:
    """Within the block, signals that would end the process are interrupts; one that is ignored (nohup) still is."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():  # Python takes signals nowhere else
        yield signals
        return
    ending = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    taken = [number for number in numbers if signal.getsignal(number) in ending]
    before = {number: signal.signal(number, signals.interrupt) for number in taken}
    hook, sys.unraisablehook = sys.unraisablehook, signals.drop
    try:
        yield signals
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if signal.getsignal(number) == signals.interrupt:
                signal.signal(number, handler)


def end_at_next_interrupt(code: int) -> None:
    """What is left is Python's own end; another Ctrl-C ends the process without a word."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(code))
