"""A parser whose help begins with examples, and the making of a command."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple, NoReturn

from tunesmith.parser.texts import EPILOG, EXAMPLES, USAGE


class CommandParser(argparse.ArgumentParser):
    """A parser whose help begins with examples, and that knows its flags.

    Attributes:
        flags: names of its flags, in order.
        commands: name -> parser of each command below it.
        problems: of flags, found before; shown with argparse's own message.
    """

    def __init__(self, *args: Any, examples: str = "", **options: Any) -> None:
        self.flags: list[str] = []
        self.commands: dict[str, CommandParser] = {}
        self.problems: list[str] = []
        self._examples = examples
        super().__init__(*args, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        self.flags += [name for name in names if name.startswith("-")]
        return super().add_argument(*names, **options)

    def add_mutually_exclusive_group(self, **options: Any) -> Any:
        return FlagGroup(super().add_mutually_exclusive_group(**options), self.flags)

    def add_section(self, name: str) -> FlagGroup:
        """A group of flags with a heading in the help."""
        return FlagGroup(self.add_argument_group(name), self.flags)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, but words too many are an error of the command, shown with its usage."""
        found, extra = self.parse_known_args(args, namespace)
        if extra:
            words = ", ".join(extra)
            noun = "unexpected argument" if len(extra) == 1 else "unexpected arguments"
            whose = self.commands.get(getattr(found, "command", None) or "", self)
            whose.error(f"{noun}: {words}; remove {'it' if len(extra) == 1 else 'them'}, or quote a name with spaces")
        return found

    def error(self, message: str) -> NoReturn:
        super().error("\n  ".join([message, *self.problems]))

    def format_help(self) -> str:
        noun = "examples" if self._examples.count("\n") > 1 else "example"
        return f"{noun}:\n{self._examples}\n{super().format_help()}"


class FlagGroup:
    """A group of flags; tells its parser their names."""

    def __init__(self, group: Any, flags: list[str]) -> None:
        self._group, self._flags = group, flags

    def add_argument(self, *names: str, **options: Any) -> Any:
        self._flags += names
        return self._group.add_argument(*names, **options)


class Commands(NamedTuple):
    subparsers: Any
    parsers: dict[str, CommandParser]


def add_command(commands: Commands, name: str, summary: str) -> CommandParser:
    parser: CommandParser = commands.subparsers.add_parser(
        name,
        examples=EXAMPLES[name],
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EPILOG.get(name),
        usage=USAGE.get(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands.parsers[name] = parser
    return parser
