"""A flag for every key of the config."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from tunesmith.config.choices import FIXED_KEYS, FREE_KEYS, NAME_KEYS, RESUME_PARTS, part_of
from tunesmith.parser.command import CommandParser, FlagGroup
from tunesmith.parser.texts import SECTIONS
from tunesmith.parser.values import as_path

LABEL_KEYS = ("model", "data", "lora.kind", "train.micro_batch_tokens", "train.seed")
"""Sections and keys that decide the labels."""


def add_config_flags(parser: CommandParser, names: tuple[str, ...]) -> None:
    """Add a flag for every config key of these sections or names; its help is the docstring of the key."""
    from tunesmith.config.runfile import leaf_fields
    from tunesmith.config.schema import RunConfig

    parser.add_argument("run_yaml", nargs="?", type=as_path, metavar="run.yaml", help="the config; flags win over it")
    parser.add_argument("--stages.NAME.KEY", metavar="VALUE", help="a key of one stage of run.yaml")  # take_open_maps
    sections = dict.fromkeys(name.partition(".")[0] for name in names)
    groups = {name: parser.add_section(f"{name} ({SECTIONS[name]})") for name in sections}
    for dotted, field in leaf_fields(RunConfig).items():
        section = dotted.partition(".")[0]
        if section in names or dotted in names:
            _add_config_flag(groups[section], dotted, field)


EVALUATE_KEYS = (
    "data.train", "data.format", "data.fields", "data.ignore_columns", "data.chat_template", "data.template_kwargs",
    "data.max_seq_len", "data.overlong", "data.train_on", "data.train_reasoning", "data.history", "data.control_text",
    "data.max_refused", "data.encoding", "data.max_row_mb",
)  # fmt: skip
"""Keys of data that evaluate takes: those that decide how rows are read and labelled."""


def add_data_flags(parser: CommandParser) -> None:
    """Add a flag for every config key that evaluate takes; those of a run need not be given again."""
    _add_keys(parser, EVALUATE_KEYS)


def _add_keys(parser: CommandParser, names: tuple[str, ...]) -> None:
    from tunesmith.config.runfile import leaf_fields
    from tunesmith.config.schema import RunConfig

    group = parser.add_section(f"data ({SECTIONS['data']}; a run keeps its own)")
    for dotted, field in leaf_fields(RunConfig).items():
        if dotted.startswith(names):
            _add_config_flag(group, dotted, field)


PROMPT_KEYS = (
    "data.train", "data.format", "data.fields", "data.ignore_columns", "data.chat_template", "data.template_kwargs",
    "data.control_text", "data.max_refused", "data.encoding", "data.max_row_mb",
)  # fmt: skip
"""Keys of data that generate takes: those that decide how rows are read and become prompts."""


def add_prompt_flags(parser: CommandParser) -> None:
    """Add a flag for every config key that generate takes; those of a run need not be given again."""
    _add_keys(parser, PROMPT_KEYS)


def add_resume_flags(parser: CommandParser) -> None:
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


def _add_config_flag(group: FlagGroup, dotted: str, field: Any, is_hidden: bool = False) -> None:
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
