"""The words of a command line before argparse reads them: free keys, unknown commands and unknown flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.errors import UsageError
from tunesmith.parser.command import CommandParser


def take_open_maps(argv: list[str], maps: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split off flags whose keys are free, as in --model.config.KEY VALUE."""
    from tunesmith.config.plainyaml import load

    rest: list[str] = []
    taken: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and any(name.startswith(f"{m}.") for m in maps)):
            rest.append(word)
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UsageError(
                    f"--{name}: needs a value; write one that starts with -- as --{name}=VALUE",
                    code="flag-without-value",
                )
        try:
            taken[name] = load(value)  # 256 is a number, false is false, text is text
        except ValueError:
            taken[name] = value
    return rest, taken


_OTHER_NAMES = {  # of commands, in other tools
    "sft": "train", "finetune": "train", "fine-tune": "train", "fit": "train", "pretrain": "train", "run": "train",
    "continue": "resume", "show": "preview", "view": "preview", "inspect": "preview", "preprocess": "preview",
    "validate": "check", "verify": "check", "lint": "check", "talk": "chat", "infer": "chat", "inference": "chat",
    "eval": "evaluate", "score": "evaluate", "benchmark": "evaluate",
    "distill": "generate", "distil": "generate", "sample": "generate", "cli": "chat",
    "fuse": "merge", "merge-lora": "merge", "merge_lora": "merge",
    "server": "serve", "api": "serve", "web": "serve", "webui": "serve",
    "convert": "convert-config", "convert_config": "convert-config", "list": "recipes",
}  # fmt: skip


def find_command(parser: CommandParser, word: str) -> CommandParser:
    """Raises:
    UsageError: it is not a command; the message names the nearest one.
    """
    from tunesmith.config.suggest import did_you_mean, suggest_words

    if word in parser.commands:
        return parser.commands[word]
    if word.startswith("-"):
        name = word.partition("=")[0]
        long = [flag for flag in parser.flags if flag.startswith("--")]
        found = did_you_mean(["--version"] if name.lower() == "-v" else suggest_words(f"--{name.lstrip('-')}", long))
        raise UsageError(
            f"{word}: unknown flag{found or '; flags come after a command, as in tunesmith train ' + word}",
            code="flag-before-command",
        )
    other = _OTHER_NAMES.get(word.lower())
    found = did_you_mean([other] if other in parser.commands else suggest_words(word, parser.commands))
    raise UsageError(f"{word}: unknown command{found}\ncommands: {', '.join(parser.commands)}", code="unknown-command")


def _is_flag(word: str) -> bool:
    return word != "--" and (word.startswith("--") or (word.startswith("-") and word[1:2].isalpha()))


def take_unknown_flags(argv: list[str], flags: list[str]) -> tuple[list[str], list[str]]:
    """Split off unknown flags and drop their values, so that they are reported with all other problems."""
    rest: list[str] = []
    unknown: list[str] = []
    is_skipping = False
    for at, word in enumerate(argv):
        if word == "--":
            return rest + argv[at:], unknown
        if _is_flag(word):
            name = word.partition("=")[0]
            is_skipping = name not in flags
            if is_skipping:
                unknown.append(name)
        if not is_skipping:
            rest.append(word)
    return rest, unknown


def refuse_unknown_flags(command: CommandParser, argv: list[str]) -> None:
    """Raises:
    UsageError: names every flag that the command does not have, each with the nearest one that it has.
    """
    from tunesmith.config.suggest import did_you_mean, suggest_words

    _, unknown = take_unknown_flags(argv, command.flags)
    lines = []
    known = [flag for flag in command.flags if flag.startswith("--")]
    for name in unknown:
        found = did_you_mean(suggest_words(f"--{name.lstrip('-')}", known))
        lines.append(f"{name}: unknown flag{found or '; the command has ' + ', '.join(known)}")
    if lines:
        raise UsageError("\n".join([f"{command.prog}:", *(f"  {line}" for line in lines)]), code="unknown-flag")
