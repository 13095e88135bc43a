"""The parser of the whole command; imports nothing heavy."""

from __future__ import annotations

from tunesmith import __version__
from tunesmith.config.choices import PREVIEW_KINDS, RESUME_PARTS
from tunesmith.parser.command import CommandParser, Commands, add_command
from tunesmith.parser.config_flags import LABEL_KEYS, add_config_flags, add_resume_flags
from tunesmith.parser.texts import EXAMPLES
from tunesmith.parser.use import add_use_commands
from tunesmith.parser.values import as_name, as_path, as_positive, one_of


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="tunesmith",
        description="Supervised fine-tuning (SFT) of language models: proven labels, exact resume, verified merges.",
        epilog="tunesmith COMMAND --help shows the flags of a command.",
        examples=EXAMPLES[""],
    )
    parser.add_argument("--version", action="version", version=f"tunesmith {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands = Commands(subparsers, parser.commands)
    train = add_command(commands, "train", "fine-tune a model on your data")
    add_config_flags(train, ("model", "data", "optim", "lora", "train"))
    train.add_argument("--json-schema", action="store_true", help="print the JSON schema of run.yaml for editors")
    resume = add_command(commands, "resume", "continue an interrupted run, or train a finished one longer")
    resume.add_argument("run", type=as_name, metavar="RUN", help="folder of the run (train --output)")
    resume.add_argument(
        "--allow", nargs="+", default=[], type=one_of(RESUME_PARTS), metavar="PART",
        help=f"parts that may differ from the start of the run: {', '.join(RESUME_PARTS)}",
    )  # fmt: skip
    add_resume_flags(resume)
    preview = add_command(commands, "preview", "show rows as the model sees them, with trained tokens coloured")
    add_config_flags(preview, LABEL_KEYS)
    _add_stage_flag(preview, "the first")
    preview.add_argument("--rows", type=as_positive, metavar="N", help="how many rows (default: 5, or all of --row)")
    preview.add_argument(
        "--row", nargs="+", action="extend", default=[], metavar="FILE:N",
        help="these rows, as check names them: FILE:12, FILE:10-20; with one file 12 will do",
    )  # fmt: skip
    preview.add_argument(
        "--only", nargs="+", action="extend", default=[], type=one_of(PREVIEW_KINDS), metavar="KIND",
        help=f"only rows of a kind: {', '.join(PREVIEW_KINDS)}",
    )  # fmt: skip
    output = preview.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object a row")
    output.add_argument("--html", type=as_path, metavar="FILE", help="write an HTML page")
    check = add_command(commands, "check", "read a whole data set and report errors and oddities")
    add_config_flags(check, LABEL_KEYS)
    _add_stage_flag(check, "all")
    check.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")
    output = check.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object")
    output.add_argument("--html", type=as_path, metavar="FILE", help="also write an HTML page")
    lr_find = add_command(commands, "lr-find", "find a learning rate for a run, by short runs on its model and data")
    add_config_flags(lr_find, ("model", "data", "optim", "lora", "train"))
    _add_stage_flag(lr_find, "the first")
    tokenizer = add_command(commands, "tokenizer", "train a byte-level BPE tokenizer on your texts")
    add_config_flags(tokenizer, ("data",))
    _add_stage_flag(tokenizer, "the first")
    tokenizer.add_argument("--vocab-size", type=as_positive, default=6400, metavar="N", help="tokens (default: 6400)")
    tokenizer.add_argument("--output", required=True, type=as_path, metavar="DIR", help="folder to create")
    sample = "train on at most N MB of text, drawn evenly from all of it (default: 16)"
    tokenizer.add_argument("--sample-mb", type=as_positive, default=16, metavar="N", help=sample)
    add_use_commands(commands)
    return parser


def _add_stage_flag(parser: CommandParser, default: str) -> None:
    parser.add_argument("--stage", metavar="NAME", help=f"stage of a run file with stages (default: {default})")
