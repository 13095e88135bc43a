"""What can go wrong, and the exit code that each kind ends the command with.

TunesmithError
├── UsageError        2   the command line itself is off
├── ConfigError       1   a key or value of the run's config
├── DataError         1   a file or row of the data
├── ModelError        1   a model, tokenizer or chat template
├── InterruptedRun    3   stopped by the person; can be gone on with
└── RunError          4   the run itself failed (out of memory, disk full)

A message says where, what, why and what to do. No traceback is shown for any of these.
"""


class TunesmithError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code = 1


class UsageError(TunesmithError):
    exit_code = 2


class ConfigError(TunesmithError):
    """All problems of one config, reported together.

    Args:
        source: where the config came from, for the first line ("run.yaml", "the command line").
        problems: one line each, "section.key: what is wrong and what to do".
        exit_code: 2 where a flag's name itself is unknown, else 1.
    """

    def __init__(self, source: str, problems: list[str], exit_code: int = 1) -> None:
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__("\n".join([f"{source}: {len(problems)} {noun}", *(f"  {p}" for p in problems)]))
        self.problems = problems
        self.exit_code = exit_code


class DataError(TunesmithError):
    pass


class ModelError(TunesmithError):
    pass


class InterruptedRun(TunesmithError):
    exit_code = 3


class RunError(TunesmithError):
    exit_code = 4


class Terminated(KeyboardInterrupt):
    """SIGTERM, or the terminal was closed: as Ctrl-C, but a chat ends as well."""
