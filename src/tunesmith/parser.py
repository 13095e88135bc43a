"""Commands and flags with their help; imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, get_args

from tunesmith import __version__
from tunesmith.config.choices import MERGE_METHODS, RESUME_PARTS

_EPILOG = {
    "train": """examples:
  tunesmith train --model Qwen/Qwen2.5-0.5B --data chats.jsonl --output runs/mine
  tunesmith train run.yaml --optim.lr 1e-5 --train.epochs 2
""",
    "resume": """examples:
  tunesmith resume runs/mine
  tunesmith resume runs/mine --train.max_steps 2000
""",
    "preview": """example:
  tunesmith preview --model Qwen/Qwen2.5-0.5B --data chats.jsonl --rows 3
""",
    "check": """example:
  tunesmith check --model Qwen/Qwen2.5-0.5B --data chats.jsonl --eval-data held-out.jsonl
""",
    "merge": """examples:
  tunesmith merge runs/lora --output merged
  tunesmith merge runs/chat runs/code --method ties --weights 1 0.5 --output both
""",
    "tokenizer": """example:
  tunesmith tokenizer --data books/ --vocab-size 6400 --output tokenizer
""",
    "chat": """examples:
  tunesmith chat runs/mine
  tunesmith chat runs/mine --prompt "Who are you?"
in the chat: /reset forgets the conversation, /system TEXT sets the system prompt, /exit leaves
""",
}


_USAGE = {
    "train": "tunesmith train [run.yaml] --model M --data D --output RUN [--section.key value ...]",
    "resume": "tunesmith resume RUN [--allow PART ...] [--section.key value ...]",
    "tokenizer": "tunesmith tokenizer [run.yaml] --data D --vocab-size N --output DIR",
    "check": "tunesmith check [run.yaml] --model M --data D [--eval-data E] [--strict] [--json | --html out.html]",
    "preview": "tunesmith preview [run.yaml] --model M --data D [--rows N] [--json | --html out.html]",
}


LABEL_KEYS = ("model", "data", "lora.kind", "train.micro_batch_tokens")  # sections and keys that decide the labels


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tunesmith", description="Supervised fine-tuning of language models that a person can trust."
    )
    parser.add_argument("--version", action="version", version=f"tunesmith {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = _add_command(commands, "train", "fine-tune a model on your data")
    _add_config_flags(train, ("model", "data", "optim", "lora", "train"))
    train.add_argument("--json-schema", action="store_true", help="print the JSON schema of run.yaml for editors")
    resume = _add_command(commands, "resume", "continue an interrupted run, or train a finished one longer")
    resume.add_argument("run", type=_name, metavar="RUN", help="folder of the run (train --output)")
    resume.add_argument(
        "--allow", nargs="+", default=[], choices=RESUME_PARTS, metavar="PART",
        help=f"parts that may differ from the start of the run: {', '.join(RESUME_PARTS)}",
    )  # fmt: skip
    _add_config_flags(resume, ("model", "data", "optim", "lora", "train"), has_file=False)
    preview = _add_command(commands, "preview", "show rows as the model sees them, with trained tokens coloured")
    _add_config_flags(preview, LABEL_KEYS)
    preview.add_argument("--rows", type=_positive, default=5, metavar="N", help="how many rows (default: 5)")
    output = preview.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object a row")
    output.add_argument("--html", type=_path, metavar="FILE", help="write an HTML page")
    check = _add_command(commands, "check", "read a whole data set and report errors and oddities")
    _add_config_flags(check, LABEL_KEYS)
    check.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")
    output = check.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object")
    output.add_argument("--html", type=_path, metavar="FILE", help="also write an HTML page")
    tokenizer = _add_command(commands, "tokenizer", "train a byte-level BPE tokenizer on your texts")
    _add_config_flags(tokenizer, ("data",))
    tokenizer.add_argument("--vocab-size", type=_positive, default=6400, metavar="N", help="tokens (default: 6400)")
    tokenizer.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to create")
    _add_use_commands(commands)
    return parser


def _add_use_commands(commands: Any) -> None:
    """Commands that use a trained model."""
    chat = _add_command(commands, "chat", "talk to a model or a finished run")
    chat.add_argument("model", type=_name, metavar="MODEL_OR_RUN", help="folder of a run or model, or a hub id")
    chat.add_argument("more", metavar="ADAPTER", nargs="*", help="more adapters of the same base, to switch between")
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
        "--method", choices=MERGE_METHODS, default="sequential",
        help="how several adapters are combined (default: sequential, one after another)",
    )  # fmt: skip
    merge.add_argument("--weights", nargs="+", type=float, metavar="X", help="weight of each adapter (default: 1)")
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
    _add_command(commands, "recipes", "list the run files of the package, for train recipe:NAME")
    convert = _add_command(commands, "convert-config", "convert a TRL, LLaMA-Factory or Axolotl YAML to a run file")
    convert.add_argument(
        "file", type=_path, metavar="FILE", help="the YAML to convert; the run file goes to standard output"
    )
    demo = _add_command(commands, "demo", "fine-tune the small model of the package in a few minutes and test it")
    demo.add_argument(
        "--output", type=_name, default="runs/demo", metavar="RUN", help="folder to create (default: runs/demo)"
    )


def _add_command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_EPILOG.get(name),
        usage=_USAGE.get(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _name(text: str) -> str:
    """Name of a file, folder or model; an empty one comes from an unset shell variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a name")
    return text


def _path(text: str) -> Path:
    return Path(_name(text))


def _positive(text: str) -> int:
    return _whole_number(text, 1, sys.maxsize)


def _seed(text: str) -> int:
    from tunesmith.config.schema import LARGEST_SEED

    return _whole_number(text, 0, LARGEST_SEED)


def _whole_number(text: str, smallest: int, largest: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < smallest:
        raise argparse.ArgumentTypeError(f"{value} is not {smallest} or more")
    if value > largest:
        raise argparse.ArgumentTypeError(f"{text} is larger than {largest}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{value} is not a number of 0 or more")
    return value


def _add_config_flags(parser: argparse.ArgumentParser, names: tuple[str, ...], has_file: bool = True) -> None:
    """Add a flag for every config key of these sections or names; its help is the docstring of the key."""
    from pydantic_core import PydanticUndefined

    from tunesmith.config.runfile import OPEN_MAPS, SHORTHANDS, leaf_fields, takes_list
    from tunesmith.config.schema import RunConfig

    if has_file:
        parser.add_argument("run_yaml", nargs="?", type=_path, metavar="run.yaml", help="the config; flags win over it")
    short = {dotted: flag for flag, dotted in SHORTHANDS.items()}
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(n.split(".")[0] for n in names)}
    for dotted, field in leaf_fields(RunConfig).items():
        section = dotted.split(".")[0]
        if not (section in names or dotted in names):
            continue
        flags = [short[dotted], f"--{dotted}"] if dotted in short else [f"--{dotted}"]
        default = field.default
        text = (field.description or "").replace("%", "%%")
        if default not in (None, PydanticUndefined, "") and not field.is_required():
            text += f" (default: {_show(default)})"
        if dotted in OPEN_MAPS:
            groups[section].add_argument(f"--{dotted}.KEY", metavar="VALUE", help=text)  # parsed in _take_open_maps
            continue
        options: dict[str, Any] = {"dest": dotted, "default": argparse.SUPPRESS, "help": text}
        if takes_list(field):
            is_pair = dotted == "optim.betas"  # of these the last wins; names add up
            options |= {"nargs": "+", "metavar": "X" if is_pair else "NAME", "action": "store" if is_pair else "extend"}
        elif field.annotation is bool:
            options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
        else:
            options |= {"metavar": _metavar(field.annotation)}
        groups[section].add_argument(*flags, **options)


def _metavar(annotation: Any) -> str:
    """Placeholder of a value: the choices, N for an integer, X for any number, TEXT."""
    options = get_args(annotation) or (annotation,)
    if all(isinstance(option, str) for option in options):
        return "|".join(options)
    return "N" if int in options else "X" if float in options else "TEXT"


def _show(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
