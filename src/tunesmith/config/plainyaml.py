"""Read and write YAML as plain data: bounded in size, values survive a round trip."""

from __future__ import annotations

import math
from typing import Any

import yaml

MAX_CHARACTERS = 8 * 2**20  # of a run file: about 60,000 file names
_GROWTH = 20  # limit on expansion by aliases; each value counts its characters and 16
_MAX_DEPTH = 50
_LARGEST = 2**63
_STR_TAG = "tag:yaml.org,2002:str"
_BREAKS = "\x85\u2028\u2029"  # line breaks to YAML, which would read back as \n


class StrictLoader(yaml.SafeLoader):
    """YAML loader without surprises: a duplicate key is an error, dates stay text, tags (!!set, !!python/object) are
    refused, and the expansion of aliases is limited.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._size = 0
        self._max_size = _GROWTH * max(len(stream), 50_000)
        self._sizes: dict[int, int] = {}  # of finished nodes, by id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        is_alias = isinstance(event, yaml.AliasEvent)
        self._require_plain(event)
        self._depth += 1
        before = self._size
        self._size += 16 + len(getattr(event, "value", ""))
        node = super().compose_node(parent, index)
        if is_alias:
            if id(node) not in self._sizes:
                raise _problem("this alias is inside the value that it repeats", event)
            self._size += self._sizes[id(node)]
        else:
            self._sizes[id(node)] = self._size - before
        if self._size > self._max_size:
            raise _problem("the aliases (*name) repeat too much; write the values out", event)
        self._depth -= 1
        return node

    def _require_plain(self, event: Any) -> None:
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", _STR_TAG):
            shown = tag.replace("tag:yaml.org,2002:", "!!")[:60]
            raise _problem(f"the tag {shown} is not supported; write the value as text, number, list or keys", event)
        if self._depth >= _MAX_DEPTH:
            raise _problem(f"nested more than {_MAX_DEPTH} levels deep", event)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Check keys before `<<: *other` adds the keys of another mapping."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key must be a word", key)
            if key.value in seen:
                raise _problem(f"the key {show(key.value)} appears twice", key)
            seen.add(key.value)
        return node


def _problem(text: str, where: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, where.start_mark)


class _Dumper(yaml.SafeDumper):
    pass


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(_STR_TAG, text, style='"' if any(mark in text for mark in _BREAKS) else None)


_Dumper.add_representer(str, _represent_text)


def dump(value: Any) -> str:
    """YAML that StrictLoader reads back to the same value, if `require_plain` accepts it."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load(text: str) -> Any:
    """Plain data.

    Raises:
        ValueError: what is wrong, with the line.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"has {len(text):,} characters; the limit is {MAX_CHARACTERS:,}. Name a folder or a pattern "
            "(data/*.jsonl in quotes) instead of each file."
        )
    try:
        return yaml.load(text, Loader=StrictLoader)  # a SafeLoader: plain data only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{getattr(error, 'problem', None) or str(error).partition(chr(10))[0]}") from None


def show(value: Any, length: int = 200) -> str:
    """A value for a message: its repr, of bounded length."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # contains itself; an integer with too many digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= length else f"{text[:length]}..."


def require_plain(value: Any, depth: int = 0) -> None:
    """Accept values that YAML and JSON keep exactly.

    Raises:
        ValueError: names the value that they do not keep.
    """
    if depth > _MAX_DEPTH - 10:  # below the sections and keys of a run file
        raise ValueError(f"is nested more than {_MAX_DEPTH - 10} levels deep")
    if isinstance(value, dict):
        for key, below in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the key {show(key)} must be text; put it in quotes")
            require_plain(key, depth)
            require_plain(below, depth + 1)
    elif isinstance(value, list):
        for below in value:
            require_plain(below, depth + 1)
    elif isinstance(value, str):
        if any(0xD800 <= ord(char) < 0xE000 for char in value):
            raise ValueError(f"the text {show(value)} contains half a character (a surrogate)")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
    elif isinstance(value, int):
        if not -_LARGEST <= value < _LARGEST:
            raise ValueError("an integer in it has more than 64 bits")
    elif value is not None:
        raise ValueError(
            f"contains a {type(value).__name__}; allowed are text, numbers, true, false, null, lists and keys"
        )
