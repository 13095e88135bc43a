"""Commands and flags with their help; imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

from tunesmith import __version__
from tunesmith.config.choices import (
    EXPORT_FORMATS,
    FIXED_KEYS,
    FREE_KEYS,
    MERGE_METHODS,
    MINIMIND_GENERATIONS,
    NAME_KEYS,
    PREVIEW_KINDS,
    RESUME_PARTS,
    WEIGHT_GENERATIONS,
    part_of,
)

# shown first by --help of the command; every command has one
_EXAMPLES = {
    "": """  tunesmith check --model Qwen/Qwen2.5-0.5B --data chats.jsonl
  tunesmith train --model Qwen/Qwen2.5-0.5B --data chats.jsonl --output runs/mine
  tunesmith chat runs/mine
""",
    "train": """  tunesmith train --model Qwen/Qwen2.5-0.5B --data chats.jsonl --output runs/mine
  tunesmith train run.yaml --optim.lr 1e-5 --train.epochs 2
  tunesmith train recipe:qwen2.5-0.5b-lora --data chats.jsonl --output runs/lora
""",
    "resume": """  tunesmith resume runs/mine
  tunesmith resume runs/mine --train.max_steps 2000
""",
    "preview": """  tunesmith preview --model Qwen/Qwen2.5-0.5B --data chats.jsonl --rows 3
  tunesmith preview --model Qwen/Qwen2.5-0.5B --data chats.jsonl --row chats.jsonl:222
  tunesmith preview --model Qwen/Qwen2.5-0.5B --data chats.jsonl --only refused cut
""",
    "check": """  tunesmith check --model Qwen/Qwen2.5-0.5B --data chats.jsonl --eval-data held-out.jsonl
""",
    "lr-find": """  tunesmith lr-find --model Qwen/Qwen2.5-0.5B --data chats.jsonl
  tunesmith lr-find run.yaml --lora.kind lora
""",
    "merge": """  tunesmith merge runs/lora --output merged
  tunesmith merge runs/chat runs/code --method ties --weights 1 0.5 --output both
""",
    "export": """  tunesmith export runs/mine --format minimind --output for-minimind
  tunesmith export full_sft_512.pth --tokenizer minimind/model --format hf --output minimind-26m
""",
    "tokenizer": """  tunesmith tokenizer --data books/ --vocab-size 4096 --output tokenizer
""",
    "report": """  tunesmith report runs/mine
""",
    "chat": """  tunesmith chat runs/mine
  tunesmith chat runs/mine --prompt "Who are you?"
""",
    "recipes": """  tunesmith recipes
  tunesmith train recipe:qwen2.5-0.5b-lora --data chats.jsonl --output runs/lora
""",
    "convert-config": """  tunesmith convert-config axolotl.yaml --output run.yaml
  tunesmith convert-config qwen3_lora_sft.yaml --dataset-info LLaMA-Factory/data > run.yaml
  tunesmith convert-config --from minimind -- python train_full_sft.py --dim 512 --n_layers 8
""",
    "demo": """  tunesmith demo
  tunesmith demo --output runs/first
""",
}
_EPILOG = {
    "lr-find": "takes the flags and run file of train, makes no RUN folder, and prints the optim.lr to use\n",
    "chat": "in the chat: /reset forgets the conversation, /system TEXT sets the system prompt, /exit leaves\n",
}
_USAGE = {
    "train": "tunesmith train [run.yaml] --model M --data D --output RUN [--section.key value ...]",
    "resume": "tunesmith resume RUN [--allow PART ...] [--section.key value ...]",
    "convert-config": "tunesmith convert-config FILE [--dataset-info DIR] [--output run.yaml]\n"
    "       tunesmith convert-config --from minimind [--generation G] [--output run.yaml] -- COMMAND ...",
    "tokenizer": "tunesmith tokenizer [run.yaml] --data D --vocab-size N --output DIR",
    "check": "tunesmith check [run.yaml] --model M --data D [--eval-data E] [--strict] [--json | --html out.html]",
    "lr-find": "tunesmith lr-find [run.yaml] --model M --data D [--section.key value ...]",
    "preview": "tunesmith preview [run.yaml] --model M --data D [--rows N] [--row FILE:N ...] [--only KIND ...]\n"
    "                         [--json | --html out.html]",
}
_SECTIONS = {
    "model": "the model and its tokenizer",
    "data": "the data, its columns and its chat template",
    "optim": "optimizer and learning rate",
    "lora": "an adapter instead of all weights",
    "train": "length, batch, precision, saving and logging",
}


LABEL_KEYS = ("model", "data", "lora.kind", "train.micro_batch_tokens", "train.seed")
"""Sections and keys that decide the labels."""


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
        return _Group(super().add_mutually_exclusive_group(**options), self.flags)

    def add_section(self, name: str) -> _Group:
        """A group of flags with a heading in the help."""
        return _Group(self.add_argument_group(name), self.flags)

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


class _Group:
    """A group of flags; tells its parser their names."""

    def __init__(self, group: Any, flags: list[str]) -> None:
        self._group, self._flags = group, flags

    def add_argument(self, *names: str, **options: Any) -> Any:
        self._flags += names
        return self._group.add_argument(*names, **options)


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="tunesmith",
        description="Supervised fine-tuning (SFT) of language models: proven labels, exact resume, verified merges.",
        epilog="tunesmith COMMAND --help shows the flags of a command.",
        examples=_EXAMPLES[""],
    )
    parser.add_argument("--version", action="version", version=f"tunesmith {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands = _Commands(subparsers, parser.commands)
    train = _add_command(commands, "train", "fine-tune a model on your data")
    _add_config_flags(train, ("model", "data", "optim", "lora", "train"))
    train.add_argument("--json-schema", action="store_true", help="print the JSON schema of run.yaml for editors")
    resume = _add_command(commands, "resume", "continue an interrupted run, or train a finished one longer")
    resume.add_argument("run", type=_name, metavar="RUN", help="folder of the run (train --output)")
    resume.add_argument(
        "--allow", nargs="+", default=[], type=_one_of(RESUME_PARTS), metavar="PART",
        help=f"parts that may differ from the start of the run: {', '.join(RESUME_PARTS)}",
    )  # fmt: skip
    _add_resume_flags(resume)
    preview = _add_command(commands, "preview", "show rows as the model sees them, with trained tokens coloured")
    _add_config_flags(preview, LABEL_KEYS)
    preview.add_argument("--rows", type=_positive, metavar="N", help="how many rows (default: 5, or all of --row)")
    preview.add_argument(
        "--row", nargs="+", action="extend", default=[], metavar="FILE:N",
        help="these rows, as check names them: FILE:12, FILE:10-20; with one file 12 will do",
    )  # fmt: skip
    preview.add_argument(
        "--only", nargs="+", action="extend", default=[], type=_one_of(PREVIEW_KINDS), metavar="KIND",
        help=f"only rows of a kind: {', '.join(PREVIEW_KINDS)}",
    )  # fmt: skip
    output = preview.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object a row")
    output.add_argument("--html", type=_path, metavar="FILE", help="write an HTML page")
    check = _add_command(commands, "check", "read a whole data set and report errors and oddities")
    _add_config_flags(check, LABEL_KEYS)
    check.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")
    output = check.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object")
    output.add_argument("--html", type=_path, metavar="FILE", help="also write an HTML page")
    lr_find = _add_command(commands, "lr-find", "find a learning rate for a run, by short runs on its model and data")
    _add_config_flags(lr_find, ("model", "data", "optim", "lora", "train"))
    tokenizer = _add_command(commands, "tokenizer", "train a byte-level BPE tokenizer on your texts")
    _add_config_flags(tokenizer, ("data",))
    tokenizer.add_argument("--vocab-size", type=_positive, default=6400, metavar="N", help="tokens (default: 6400)")
    tokenizer.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to create")
    sample = "train on at most N MB of text, drawn evenly from all of it (default: 16)"
    tokenizer.add_argument("--sample-mb", type=_positive, default=16, metavar="N", help=sample)
    _add_use_commands(commands)
    return parser


class _Commands(NamedTuple):
    subparsers: Any
    parsers: dict[str, CommandParser]


def _add_use_commands(commands: _Commands) -> None:
    """Commands that use a trained model."""
    chat = _add_command(commands, "chat", "talk to a model or a finished run")
    chat.add_argument("model", type=_name, metavar="MODEL_OR_RUN", help="folder of a run or model, or a hub id")
    chat.add_argument(
        "more", metavar="ADAPTER", nargs="*", default=[], help="more adapters of the same base, to switch between"
    )
    chat.add_argument("--tokenizer", type=_name, metavar="T", help="folder or hub id; a .pth has none of its own")
    _add_free_config(chat)
    chat.add_argument("--prompt", metavar="TEXT", help="answer one prompt and exit")
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument("--max-new-tokens", type=_positive, default=512, metavar="N", help="longest reply (default: 512)")
    chat.add_argument("--temperature", type=_temperature, metavar="T", help="0: greedy; default: the model's own")
    chat.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of sampling (default: 0)")
    chat.add_argument(
        "--chat-template", metavar="T", help="a .jinja file, chatml, alpaca or none; default: the model's"
    )
    chat.add_argument("--trust-remote-code", action="store_true", help="run Python code in the model's folder")
    chat.add_argument("--allow-changed-base", action="store_true", help="open an adapter although its base has changed")
    merge = _add_command(commands, "merge", "merge adapters into their base model and verify the result")
    merge.add_argument(
        "adapters", type=_name, nargs="+", metavar="ADAPTER", help="PEFT folders, or runs that trained an adapter"
    )
    merge.add_argument("--output", required=True, type=_name, metavar="DIR", help="folder to create")
    merge.add_argument(
        "--method", type=_one_of(MERGE_METHODS), default="sequential", metavar="METHOD",
        help=f"how to combine several adapters: {', '.join(MERGE_METHODS)} (default: sequential)",
    )  # fmt: skip
    merge.add_argument("--weights", nargs="+", type=_weight, metavar="X", help="weight of each adapter (default: 1)")
    merge.add_argument(
        "--density",
        type=_share,
        default=0.5,
        metavar="X",
        help="share of values that ties, dare and prune keep (default: 0.5)",
    )
    merge.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of dare's choice (default: 0)")
    merge.add_argument("--base", type=_name, metavar="M", help="the base model in full precision, if it has moved")
    merge.add_argument(
        "--allow-changed-base", action="store_true", help="merge although the base has changed since training"
    )
    merge.add_argument("--trust-remote-code", action="store_true", help="run Python code in the base's folder")
    _add_export(commands)
    report = _add_command(commands, "report", "write RUN/report.html again: verdict, curves, data, replies, config")
    report.add_argument("run", type=_name, metavar="RUN", help="folder of the run (train --output), finished or not")
    _add_command(commands, "recipes", "list the run files of the package, for train recipe:NAME")
    _add_convert_config(commands)
    demo = _add_command(commands, "demo", "fine-tune the small model of the package in a few minutes and test it")
    demo.add_argument(
        "--output", type=_name, default="runs/demo", metavar="RUN", help="folder to create (default: runs/demo)"
    )


def _add_convert_config(commands: _Commands) -> None:
    summary = "convert a TRL, LLaMA-Factory or Axolotl YAML, or a MiniMind command, to a run file"
    convert = _add_command(commands, "convert-config", summary)
    convert.add_argument("file", type=_path, nargs="?", metavar="FILE", help="the YAML to convert")
    convert.add_argument(
        "--from", dest="source", type=_one_of(("minimind",)), metavar="minimind", help="convert the command after --"
    )
    convert.add_argument(
        "--generation", type=_one_of(MINIMIND_GENERATIONS), metavar="G",
        help=f"generation of MiniMind's scripts: {', '.join(MINIMIND_GENERATIONS)} (default: the newest that has all "
        "flags of the command)",
    )  # fmt: skip
    convert.add_argument("--output", type=_path, metavar="FILE", help="run file to write (default: to standard output)")
    convert.add_argument(
        "--dataset-info", type=_path, metavar="DIR", help="folder with LLaMA-Factory's dataset_info.json"
    )


def _add_export(commands: _Commands) -> None:
    export = _add_command(commands, "export", "write a model in another tool's files, read back and compared")
    export.add_argument("model", type=_name, metavar="MODEL", help="a RUN, model folder, hub id, adapter or .pth")
    export.add_argument("--output", required=True, type=_name, metavar="DIR", help="folder to create")
    export.add_argument(
        "--format", required=True, type=_one_of(EXPORT_FORMATS), metavar="FORMAT",
        help="hf (from a .pth), minimind (a .pth), or minimind-lora (an adapter as its LoRA .pth)",
    )  # fmt: skip
    export.add_argument(
        "--generation", type=_one_of(WEIGHT_GENERATIONS), metavar="G",
        help=f"of MiniMind's files: {', '.join(WEIGHT_GENERATIONS)} (default: the newest that the architecture has)",
    )  # fmt: skip
    export.add_argument(
        "--weight", type=_name, metavar="NAME", help="begin of the file's name (default: full_sft; lora)"
    )
    export.add_argument("--tokenizer", type=_name, metavar="T", help="folder or hub id; a .pth has none of its own")
    export.add_argument("--base", type=_name, metavar="M", help="the base of a LoRA .pth")
    _add_free_config(export)
    export.add_argument("--trust-remote-code", action="store_true", help="run Python code in the model's folder")


def _add_free_config(parser: CommandParser) -> None:
    parser.add_argument(
        "--model.config.KEY", metavar="VALUE", help="what a .pth does not say, as in num_attention_heads 16"
    )


def _add_command(commands: _Commands, name: str, summary: str) -> CommandParser:
    parser: CommandParser = commands.subparsers.add_parser(
        name,
        examples=_EXAMPLES[name],
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_EPILOG.get(name),
        usage=_USAGE.get(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands.parsers[name] = parser
    return parser


def _name(text: str) -> str:
    """Name of a file, folder or model; an empty one comes from an unset shell variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a name")
    return text


def _one_of(options: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        from tunesmith.config.suggest import did_you_mean, suggest_words

        if text not in options:
            hint = did_you_mean(suggest_words(text, options))
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(options)}{hint}")
        return text

    return parse


def _path(text: str) -> Path:
    return Path(_name(text))


def _positive(text: str) -> int:
    return int(_number(text, "a whole number of 1 or more, such as 5", lambda value: 1 <= value <= sys.maxsize, int))


def _seed(text: str) -> int:
    from tunesmith.config.schema import LARGEST_SEED

    needed = f"a whole number from 0 to {LARGEST_SEED}, such as 42"
    return int(_number(text, needed, lambda value: 0 <= value <= LARGEST_SEED, int))


def _share(text: str) -> float:
    return _number(text, "a share above 0 and at most 1, such as 0.5", lambda value: 0 < value <= 1)


def _temperature(text: str) -> float:
    return _number(text, "a number of 0 or more, such as 0.7", lambda value: math.isfinite(value) and value >= 0)


def _weight(text: str) -> float:
    return _number(text, "a number, such as 0.5", math.isfinite)


def _number(text: str, needed: str, fits: Callable[[Any], bool], kind: type[int] | type[float] = float) -> float:
    """The number that a flag gives.

    Raises:
        argparse.ArgumentTypeError: it is none, or does not fit; says what is needed.
    """
    with suppress(ValueError):
        if fits(value := kind(text)):
            return value
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    raise argparse.ArgumentTypeError(f"must be {needed}, not {shown!r}")


def _add_config_flags(parser: CommandParser, names: tuple[str, ...]) -> None:
    """Add a flag for every config key of these sections or names; its help is the docstring of the key."""
    from tunesmith.config.runfile import leaf_fields
    from tunesmith.config.schema import RunConfig

    parser.add_argument("run_yaml", nargs="?", type=_path, metavar="run.yaml", help="the config; flags win over it")
    sections = dict.fromkeys(name.partition(".")[0] for name in names)
    groups = {name: parser.add_section(f"{name} ({_SECTIONS[name]})") for name in sections}
    for dotted, field in leaf_fields(RunConfig).items():
        section = dotted.partition(".")[0]
        if section in names or dotted in names:
            _add_config_flag(groups[section], dotted, field)


def _add_resume_flags(parser: CommandParser) -> None:
    """Add a flag for every config key that resume takes, grouped by what it needs."""
    from tunesmith.config.runfile import leaf_fields
    from tunesmith.config.schema import RunConfig

    free = parser.add_section("may change (more steps of a cosine or linear schedule: --allow schedule)")
    moved = parser.add_section("may have moved; the content is compared")
    parts = {part: parser.add_section(f"may change with --allow {part}") for part in RESUME_PARTS}
    for dotted, field in leaf_fields(RunConfig).items():
        is_hidden = dotted in (*FIXED_KEYS, "train.output_dir")  # refused with a reason by run/resume.py
        group = free if dotted in FREE_KEYS else moved if dotted in NAME_KEYS else parts[part_of(dotted)]
        _add_config_flag(group, dotted, field, is_hidden)


def _add_config_flag(group: _Group, dotted: str, field: Any, is_hidden: bool = False) -> None:
    from pydantic_core import PydanticUndefined

    from tunesmith.config.runfile import OPEN_MAPS, SHORTHANDS, takes_list

    short = [flag for flag, key in SHORTHANDS.items() if key == dotted]
    text = (field.description or "").replace("%", "%%")
    if field.default not in (None, PydanticUndefined, "") and not field.is_required():
        text += f" (default: {_show(field.default)})"
    text = argparse.SUPPRESS if is_hidden else text
    if dotted in OPEN_MAPS:
        group.add_argument(f"--{dotted}.KEY", metavar="VALUE", help=text)  # parsed in _take_open_maps
        return
    options: dict[str, Any] = {"dest": dotted, "default": argparse.SUPPRESS, "help": text}
    if takes_list(field):
        is_pair = dotted == "optim.betas"  # of these the last wins; names add up
        options |= {"nargs": "+", "metavar": "X" if is_pair else "NAME", "action": "store" if is_pair else "extend"}
    elif field.annotation is bool:
        options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    else:
        options |= {"metavar": _metavar(field.annotation)}
    group.add_argument(*short, f"--{dotted}", **options)


def _metavar(annotation: Any) -> str:
    """Placeholder of a value: the choices, N for an integer, X for any number, TEXT."""
    options = get_args(annotation) or (annotation,)
    options += tuple(kind for option in options for kind in get_args(option)[:1])  # of Annotated[float, ...]
    if all(isinstance(option, str) for option in options):
        return "|".join(options)
    return "N" if int in options else "X" if float in options else "TEXT"


def _show(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
