"""Suggest data.fields.* flags that read all columns of a row, or name those that they leave out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.columns import HISTORY_NAMES, REASONING_NAMES, SYSTEM_NAMES, TOOLS_NAMES
from tunesmith.rows.keys import find_column, find_fate, is_context, words_of
from tunesmith.rows.turns import is_lines
from tunesmith.sources.jsontext import parse_json_list

Row = Mapping[str, Any]

BESIDE_CHATS = (*SYSTEM_NAMES, *TOOLS_NAMES, "documents", "chat_template_kwargs")
BESIDE_PAIRS = (*BESIDE_CHATS, *HISTORY_NAMES, *REASONING_NAMES)
BESIDE_ALPACA = (*BESIDE_PAIRS, "instruction", "input", "context")
CHAT_FORMATS = ("messages", "sharegpt", "xtuner", "chatgpt_export")
PAIR_PARTS = ("system", "history", "tools", "reasoning", "instruction", "input")
CHAT_PARTS = ("system", "tools")
_PART_OF_WORD = {
    **dict.fromkeys(("system", "sys", "systemprompt", "persona"), "system"),
    **dict.fromkeys(("history", "histories"), "history"),
    **dict.fromkeys(("tool", "tools", "function", "functions"), "tools"),
    **dict.fromkeys(("thinking", "thought", "thoughts", "think", "reasoning", "rationale", "cot"), "reasoning"),
    **dict.fromkeys(("instruction", "instructions"), "instruction"),
}


def complete_mapping(
    row: Row, parts: Mapping[str, str], format_name: str = "", beside: Sequence[str] = (), allowed: Sequence[str] = ()
) -> str:
    """Flags that read these columns and every other column of the row, or ignore it by name.

    Args:
        parts: part -> column, where already known.
        beside: columns that the format reads without a flag.
        allowed: parts that other columns may take.
    """
    chosen = dict(parts)
    read = {column.partition(".")[0] for column in parts.values()}
    left: list[str] = []
    system = [name for name in row if name in SYSTEM_NAMES and name in beside]
    if len(system) == 1 and system[0] != "system" and "system" in allowed:
        chosen["system"] = system[0]
    for key, value in row.items():
        if key in read or key in beside:
            continue
        if part := _choose_part(key, value, {*allowed} - {*chosen}):
            chosen[part] = key
        elif find_fate(key, value) != "irrelevant":
            left.append(str(key))
    return " ".join([f"--data.format {format_name}"] * bool(format_name) + _flags(chosen, left))


def _flags(parts: Mapping[str, str], left: Sequence[str]) -> list[str]:
    flags = [f"--data.fields.{part} {shlex.quote(column)}" for part, column in parts.items()]
    return flags + ([f"--data.ignore_columns {' '.join(map(shlex.quote, left))}"] if left else [])


def _choose_part(key: Any, value: Any, free: set[str]) -> str:
    part = find_part(key, value)
    if part == "instruction" and part not in free:
        part = "system"  # beside a question or a chat, instructions are the system prompt
    return part if part in free else ""


def find_part(key: Any, value: Any) -> str:
    """The part that fits a context column by its name and type of value, "" for none."""
    name = str(key)
    if not isinstance(key, str) or not is_context(name):
        return ""
    part = next((_PART_OF_WORD[word] for word in words_of(name) if word in _PART_OF_WORD), "input")
    is_list = isinstance(parse_json_list(value), list)
    are_lines = is_lines(value)
    if value is None:
        return part
    fits = {
        "history": is_list,
        "tools": is_list or _is_json_object(value),
        "input": isinstance(value, (str, int, float)) or are_lines,
        "reasoning": isinstance(value, str) or are_lines,
    }
    return part if fits.get(part, isinstance(value, str)) else ""


def _is_json_object(value: Any) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return isinstance(json.loads(value), dict)
        except (ValueError, RecursionError):
            return False
    return isinstance(value, dict)


def explain_lost_columns(row: Row, columns: Sequence[str], format_name: str, fields: FieldsSection) -> str:
    """Why a row with unread context columns is refused, and the flags that would read them."""
    allowed = _parts_of(row, format_name, fields)
    chosen: dict[str, str] = {}
    left = []
    for column in columns:
        if part := _choose_part(column.rpartition(".")[2], find_column(row, column)[1], allowed - {*chosen}):
            chosen[part] = column
        else:
            left.append(column)
    what, it = ("columns", "them") if len(columns) > 1 else ("column", "it")
    because = f"{what} {', '.join(columns)} would not be read, but the replies may depend on {it}"
    leave = f"to leave {it} out: --data.ignore_columns {' '.join(map(shlex.quote, columns))}"
    if not chosen:
        return f"{because}. The format {format_name} cannot read such a value; {leave}"
    return f"{because}. Add {' '.join(_flags(chosen, left))} (or, {leave})"


def _parts_of(row: Row, format_name: str, fields: FieldsSection) -> set[str]:
    """Parts that a column of such a row may be mapped to."""
    if format_name in CHAT_FORMATS:
        allowed = {*CHAT_PARTS} - ({*CHAT_PARTS} if format_name == "chatgpt_export" else set())
    elif format_name in ("text", "segments"):
        allowed = set()
    else:
        allowed = {*PAIR_PARTS}
        if format_name != "prompt_completion":
            allowed.discard("instruction")
        elif isinstance(find_column(row, fields.prompt or "prompt")[1], list):
            allowed -= {"instruction", "input"}
    extra = {"alpaca": ("input", "context"), "input_output": ("context",)}.get(format_name, ())
    names = {"system": SYSTEM_NAMES, "tools": TOOLS_NAMES, "history": HISTORY_NAMES, "reasoning": REASONING_NAMES}
    taken = {part for part, read in (names | {"input": extra}).items() if any(name in row for name in read)}
    return {part for part in allowed - taken if not getattr(fields, part)}
