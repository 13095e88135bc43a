"""Check that a template writes the parameters of tool schemas.

Most templates print a schema as JSON; some rewrite it in a form of their own and leave out what that form cannot
express. Each text in the parameters gets a mark, and the marks in the rendering show what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith.chat_template.habits import TemplateRefused

_FIRST_MARK = 0xF0000  # private use
_READ = frozenset({"type", "format", "$ref", "title", "$schema"})  # titles, and keys that templates only interpret
_Tools = Sequence[Mapping[str, Any]]


def writes_all_parameters(tools: _Tools, render: Callable[[_Tools], str]) -> bool:
    """Whether the template writes everything in the parameters of these schemas."""
    marker = _Marker()
    marked = [marker.mark_tool(tool) for tool in tools]
    if not marker.marks:
        return True
    try:
        text = render(marked)
    except TemplateRefused:
        return False
    return all(mark in text for mark in marker.marks)


class _Marker:
    def __init__(self) -> None:
        self.marks: list[str] = []

    def mark_tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        function = tool.get("function", tool)
        made = {key: self._mark(below) if key == "parameters" else below for key, below in function.items()}
        return {**tool, "function": made} if "function" in tool else made

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, (list, tuple)):
            return [self._mark(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        properties = value.get("properties")
        names: dict[Any, Any] = {}
        if isinstance(properties, Mapping):
            names = {name: self._mark_text(name) if isinstance(name, str) else name for name in properties}
        made: dict[Any, Any] = {}
        for key, below in value.items():
            if key == "properties" and names:
                made[key] = {names[name]: self._mark(inner) for name, inner in below.items()}
            elif key == "required" and isinstance(below, (list, tuple)):
                made[key] = [names.get(name, name) if isinstance(name, str) else name for name in below]
            else:
                made[key] = below if key in _READ else self._mark(below)
        return made

    def _mark_text(self, text: str) -> str:
        if not text.strip():
            return text
        self.marks.append(chr(_FIRST_MARK + len(self.marks) % 0xFFFD))
        return text + self.marks[-1]
