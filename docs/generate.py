"""Write what the docs say about the config from the config itself: README's table and run.schema.json (`make docs`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from pydantic_core import PydanticUndefined

from tunesmith.config import RunConfig
from tunesmith.runfile import SHORTHANDS, json_schema, leaf_fields

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- config: made by `make docs` -->", "<!-- /config -->"


def config_table() -> str:
    short = {dotted: flag for flag, dotted in SHORTHANDS.items()}
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for dotted, field in leaf_fields(RunConfig).items():
        name = f"`{dotted}`" + (f" (`{short[dotted]}`)" if dotted in short else "")
        if dotted in ("model.config", "data.template_kwargs"):
            name = f"`{dotted}.*`"
        text = (field.description or "").replace("|", "\\|")
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


def readme_with_table(readme: str) -> str:
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{config_table()}\n{END}{tail}"


def schema_text() -> str:
    return json.dumps(json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme_with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "run.schema.json").write_text(schema_text(), encoding="utf-8")
