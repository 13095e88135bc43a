"""Exceptions raised for problems that the user can fix, with their exit codes.

TunesmithError
├── UsageError        2   wrong command line
├── ConfigError       1   wrong key or value in the run's config
├── DataError         1   a data file or row
├── ModelError        1   a model, tokenizer or chat template
├── InterruptedRun    3   stopped by the user; can be resumed
└── RunError          4   the run itself failed (out of memory, disk full)

A message says where, what, why and what to do. None of these shows a traceback.
Every error has a `code`, which names its cause and stays the same when the message is reworded; docs/errors.md lists
them all.
"""


class TunesmithError(Exception):
    """Base class of all errors that the user can cause or fix.

    Args:
        message: where, what, why and what to do.
        code: cause of the error in kebab-case ("file-not-found").
    """

    exit_code = 1

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class UsageError(TunesmithError):
    """The command line, or an argument of the API, is wrong."""

    exit_code = 2


class ConfigError(TunesmithError):
    """All problems of one config, reported together.

    Args:
        source: where the config came from, for the first line ("run.yaml", "the command line").
        problems: one line each, "section.key: what is wrong and what to do".
        exit_code: 2 where a flag itself is unknown, else 1.
    """

    def __init__(self, source: str, problems: list[str], exit_code: int = 1, *, code: str = "config") -> None:
        noun = "problem" if len(problems) == 1 else "problems"
        message = "\n".join([f"{source}: {len(problems)} {noun}", *(f"  {problem}" for problem in problems)])
        super().__init__(message, code=code)
        self.problems = problems
        self.exit_code = exit_code


class DataError(TunesmithError):
    """A data file or row cannot be used."""


class ModelError(TunesmithError):
    """A model, adapter, tokenizer or chat template cannot be used."""


class InterruptedRun(TunesmithError):
    """The user stopped the run, which can be resumed."""

    exit_code = 3


class RunError(TunesmithError):
    """The run itself failed; the message names the last good checkpoint, if there is one."""

    exit_code = 4


class Terminated(KeyboardInterrupt):
    """SIGTERM, or the terminal was closed. Handled as Ctrl-C, and also ends a chat."""
