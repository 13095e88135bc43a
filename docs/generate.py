"""Write the generated parts of the docs from the code (`make docs`).

docs/config.md gets the table of config keys, docs/data.md the formats, columns and names that the reader knows,
docs/architecture.md the file map and the imports, docs/errors.md the codes and messages of errors,
docs/run.schema.json the JSON schema of a run file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import architecture
import errors
from pydantic_core import PydanticUndefined

from tunesmith.config.data_keys import FieldsSection
from tunesmith.config.runfile import SHORTHANDS, json_schema, leaf_fields
from tunesmith.config.schema import RunConfig
from tunesmith.rows import chats, columns, formats, keys, parts, textmarks, tools, turns
from tunesmith.rows.format_table import FORMAT_TABLE, Shape

ROOT = Path(__file__).resolve().parents[1]
FREE_FORM = ("tools", "functions", "arguments", "args", "input", "response", "mapping", "documents",
             "chat_template_kwargs")  # fmt: skip
"""Keys whose objects are shown as {...}: the names inside belong to the data."""


def config_table() -> str:
    short = {dotted: flag for flag, dotted in SHORTHANDS.items()}
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for dotted, field in leaf_fields(RunConfig).items():
        name = f"`{dotted}`" + (f" (`{short[dotted]}`)" if dotted in short else "")
        if dotted in ("model.config", "data.template_kwargs"):
            name = f"`{dotted}.*`"
        text = escape(field.description or "")
        choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
        if choices:
            text = f"{' · '.join(f'`{c}`' for c in choices)}. {text}"
        lines.append(f"| {name} | {show_default(field.default)} | {text} |")
    return "\n".join(lines)


def show_default(default: Any) -> str:
    if default in (None, PydanticUndefined):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{' '.join(map(str, default)) if isinstance(default, tuple) else default}`"


def format_table() -> str:
    """A table of every kind of row, and an example row for each."""
    lines = ["| `data.format` | written by | row | becomes |", "| --- | --- | --- | --- |"]
    for shape in FORMAT_TABLE:
        lines.append(f"| `{shape.format}` | {shape.whose} | `{outline(shape.example)}` | {describe_result(shape)} |")
    examples = [json.dumps(shape.example, ensure_ascii=False) for shape in FORMAT_TABLE]
    return "\n".join([*lines, "", "An example of each, in the same order:", "", "```jsonl", *examples, "```"])


def describe_result(shape: Shape) -> str:
    flags = " ".join(f"--data.fields.{part} {column}" for part, column in shape.fields.items())
    return escape(shape.becomes + (f"; with `{flags}`" if flags else ""))


def outline(value: Any) -> str:
    """The keys of a value without their contents; the objects of a list are merged into one."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(outline_key(key, below) for key, below in value.items())}}}"
    if isinstance(value, list) and value:
        objects = [item for item in value if isinstance(item, Mapping)]
        return f"[{outline(merge(objects)) if objects else ', '.join(map(outline, value))}]"
    return "text"


def outline_key(key: str, value: Any) -> str:
    if isinstance(value, str) and value[:1] in ("[", "{"):
        return f'"{key}": JSON text'
    if not isinstance(value, (Mapping, list)):
        return f'"{key}"'
    if key in FREE_FORM:
        return f'"{key}": {"{...}" if isinstance(value, Mapping) else "[...]"}'
    return f'"{key}": {outline(value)}'


def merge(objects: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One object with the keys of all objects, also of nested lists and objects."""
    merged: dict[str, Any] = {}
    for item in objects:
        for key, value in item.items():
            known = merged.get(key)
            if isinstance(known, list) and isinstance(value, list):
                merged[key] = known + value
            elif isinstance(known, Mapping) and isinstance(value, Mapping):
                merged[key] = merge([known, value])
            elif key not in merged or isinstance(value, (Mapping, list)):
                merged[key] = value
    return merged


def key_table() -> str:
    """The keys that are read in every format."""
    rows = [
        ("row", chats.TURNS_NAMES, "the list of turns"),
        ("row", columns.SYSTEM_NAMES, "system prompt"),
        ("row", columns.TOOLS_NAMES, "tool schemas, a list or JSON text"),
        ("row", ("documents",), "documents for the template (RAG)"),
        ("row", ("chat_template_kwargs",), "variables for the template; one that it does not read refuses the row"),
        ("row of a question and its answer", columns.HISTORY_NAMES, "earlier turns; their answers are trained too"),
        ("row of a question and its answer", columns.REASONING_NAMES, "reasoning before the answer"),
        ("item of history, an object", columns.ASKED_NAMES, "question"),
        ("item of history, an object", columns.ANSWERED_NAMES, "answer"),
        ("item of conversation (`xtuner`)", chats.PAIR_ASKED, "question"),
        ("item of conversation (`xtuner`)", chats.PAIR_ANSWERED, "answer"),
        ("turn", turns.ROLE_KEYS, "role"),
        ("turn without role", ("type",), f"role ({', '.join(turns.TYPE_ROLES)}), or kind of item (OpenAI)"),
        ("turn", turns.CONTENT_KEYS, "content: a text, or a list of parts"),
        ("turn", turns.REASONING_KEYS, "reasoning before the reply"),
        ("turn", ("tool_calls", "function_call"), "tool calls of an assistant turn"),
        ("turn", ("tool_call_id", "tool_use_id", "call_id"), "the call that a tool turn answers"),
        ("turn", ("name",), "name of the speaker or tool"),
        ("turn", ("tools",), "tool schemas of the chat (MiniMind)"),
        ("turn", turns.TRAIN_KEYS, "1 or true: trained, 0 or false: context; other weights refuse the row"),
        ("turn", turns.DETAIL_KEYS, "characters of the content that are trained or context"),
        ("tool call", tools.ARGUMENT_KEYS, "arguments, an object or JSON text"),
        ("tool call", tools.CALL_ID_KEYS, "id"),
        ("part, by its type", parts.TEXT_PARTS, "text"),
        ("part, by its type", parts.REASONING_PARTS, "reasoning"),
        ("part, by its type", parts.CALL_PARTS, "tool call"),
        ("part, by its type", parts.RESULT_PARTS, "tool result, which becomes a turn of role tool"),
        ("part, by its type", parts.MEDIA_PARTS, "refuses the row: text only"),
        ("row", formats.MEDIA_COLUMNS, "refuses the row unless empty: text only"),
    ]
    lines = ["| in a | keys | meaning |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {place} | {code(names)} | {meaning} |" for place, names, meaning in rows])


def role_table() -> str:
    lines = ["| role | spellings, in any case |", "| --- | --- |"]
    for role in dict.fromkeys(turns.ROLES.values()):
        lines.append(f"| {role} | {code(name for name, stands_for in turns.ROLES.items() if stands_for == role)} |")
    return "\n".join(lines)


def field_table() -> str:
    lines = ["| flag | meaning |", "| --- | --- |"]
    for name, field in leaf_fields(FieldsSection).items():
        lines.append(f"| `--data.fields.{name}` | {escape(field.description or '')} |")
    return "\n".join(lines)


def name_table() -> str:
    """The words that decide what happens to an unread key."""
    also_last = keys.IRRELEVANT_NAMES - keys.NOT_AS_LAST_WORD
    rows = [
        ("irrelevant: as the whole name, or as its last word (`prompt_id`)", also_last),
        ("irrelevant: as the whole name only", keys.NOT_AS_LAST_WORD),
        ("context: as any word of the name (`system_prompt`, `systemPrompt`)", keys.CONTEXT_WORDS),
        ("flag for training: as any word of the name", keys.FLAG_WORDS),
        ("not a flag: beside such a word (`attention_mask`)", keys.NOT_FLAG_WORDS),
        ("not context: as the last word (`tool_name`)", keys.NAMING_WORDS),
    ]
    lines = ["| counts as | names |", "| --- | --- |"]
    lines += [f"| {what} | {', '.join(sorted(names))} |" for what, names in rows]
    flag_texts = ", ".join(sorted(keys.FLAG_TEXTS))
    return "\n".join(
        [
            *lines,
            "",
            f"A text of more than {keys.LONG_TEXT} characters is named under an irrelevant name too. "
            f"Of texts, only these make a flag: {flag_texts}.",
        ]
    )


def placeholder_list() -> str:
    return ", ".join(f"`{{{{{name}}}}}`" for name in sorted(textmarks.PLACEHOLDER_NAMES))


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def escape(text: str) -> str:
    return text.replace("|", "\\|")


CONFIG_PARTS = {"config": config_table}
ARCHITECTURE_PARTS = {"imports": architecture.import_picture, "files": architecture.file_map}
DATA_PARTS = {
    "formats": format_table,
    "keys": key_table,
    "roles": role_table,
    "fields": field_table,
    "names": name_table,
    "placeholders": placeholder_list,
}
ERROR_PARTS = {"classes": errors.class_table, "errors": errors.command_errors, "rows": errors.row_errors}
PAGES = {
    "docs/config.md": CONFIG_PARTS,
    "docs/data.md": DATA_PARTS,
    "docs/architecture.md": ARCHITECTURE_PARTS,
    "docs/errors.md": ERROR_PARTS,
}


def fill_page(page: str) -> str:
    """The text of a page with its generated parts replaced."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        start, end = f"<!-- {name}: made by `make docs` -->\n", f"\n<!-- /{name} -->"
        head, found_start, rest = text.partition(start)
        _, found_end, tail = rest.partition(end)
        if not found_start or not found_end:
            raise SystemExit(f"{page}: lacks the line {start.strip() if not found_start else end.strip()}")
        text = f"{head}{start}{make()}{end}{tail}"
    return text


def schema_text() -> str:
    return json.dumps(json_schema(), indent=2) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    options = parser.parse_args()
    texts = {page: fill_page(page) for page in PAGES} | {"docs/run.schema.json": schema_text()}
    stale = [page for page, text in texts.items() if (ROOT / page).read_text(encoding="utf-8") != text]
    if options.check and stale:
        raise SystemExit(f"out of date: {', '.join(stale)}. Run `make docs`.")
    for page in stale:
        (ROOT / page).write_text(texts[page], encoding="utf-8")


if __name__ == "__main__":
    main()
