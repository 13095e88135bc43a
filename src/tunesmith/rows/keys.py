"""A mapping that records which of its keys are read, so that no key of a row is lost silently.

Parsers read rows, turns, typed parts and tool calls through `Keys`. A key that no parser reads is known to be
irrelevant (ids, sources, scores), is context (then the row is refused), or is named in the row's notes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tunesmith.rows.conversation import RowRefused, UnknownFormat
from tunesmith.rows.values import holds_content, is_missing


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


IRRELEVANT_NAMES = _names("""
    id ids idx index uuid guid key hash sha sha1 sha256 md5 checksum fingerprint
    no number num count rank row line position
    source sources src origin provenance dataset datasets subset config configs split fold shard version revision
    license licence copyright url urls uri link links href website host site file filename path filepath
    repo repository commit branch author authors username annotator annotators annotations creator owner worker
    model models model_name dataset_name generator engine provider ip
    date time datetime timestamp timestamps created updated modified created_at updated_at year month day
    lang langs language languages locale country region dialect encoding charset
    score scores rating ratings quality difficulty level grade votes upvotes likes confidence probability prob logprobs
    perplexity ppl toxicity reward rewards similarity distance embedding embeddings length len size tokens
    duration latency cost price usage
    category categories subcategory type types kind class tag tags genre domain skill skills ability intent
    status meta metadata signature
    toxic redacted moderation
""")  # fmt: skip
"""Names of metadata about a row; also as the last word of a name (prompt_id)."""

NOT_AS_LAST_WORD = _names("key no row line position file path class")
"""Irrelevant only as a whole name: answer_key and first_line may be text of the chat."""

CONTEXT_WORDS = _names("""
    system sys systemprompt persona history histories input inputs context contexts ctx background document documents
    doc docs passage passages evidence knowledge reference references memory
    tool tools function functions schema schemas
    thinking thought thoughts think reasoning rationale cot prefix prefill instruction instructions
    choices options article story premise excerpt
    系统 系统提示 系统提示词 历史 历史对话 输入 上下文 背景 参考 参考资料 资料 工具 思考 思维链 推理过程
    systemprompt kontext hintergrund eingabe verlauf werkzeuge contexto contexte contesto контекст
""")  # fmt: skip
"""Words in names of texts that a reply may depend on; if unread, the row is refused."""

FLAG_WORDS = _names("loss weight weights train trained training trainable mask masked masks")
"""Words in names of flags that decide what is trained; if unread, the row is refused, even for numbers."""

NO_OP_FLAGS = _names("loss loss_weight loss_weights weight weights train trained training trainable")
"""Flags whose value 1 or true is the default."""

FLAG_TEXTS = _names("""
    true false yes no on off none all 0 1 system user human assistant gpt model tool prompt completion last turn turns
""")
"""Values that make a column such as `train` or `mask` a flag; others ("Ultra", a split's name) only cause a note."""

NOT_FLAG_WORDS = _names("attention padding pad special causal runtime step steps epoch epochs samples")
"""Words beside which a flag word has another meaning: attention_mask, train_samples."""

NAMING_WORDS = _names("name names title titles label labels choice effort budget mode window method")
"""Last words of names that cause a note but are not refused as context: tool_name, tool_choice, reasoning_effort."""

LONG_TEXT = 80
"""Characters above which a text of several words causes a note even under an irrelevant name (source, type)."""

_INDEX_NAME = re.compile(r"(?:Unnamed: \d+|__index_level_\d+__)(?:\.\d+)*")  # row numbers of pandas
_NUMBERS = re.compile(r"\s*[\[{]?\s*[-+]?\.?\d")  # a weight, or a list of them, as text
_WORD = re.compile(r"[^\W_]+")
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^A-Z\W\d_]+|\d+")


@lru_cache(maxsize=4096)
def words_of(name: str) -> tuple[str, ...]:
    """The words of a key's name in lower case: system_prompt, systemPrompt, Complex_CoT."""
    words: list[str] = []
    for chunk in _WORD.findall(name):
        parts = [part.lower() for part in _CAMEL.findall(chunk)]
        words += [chunk.lower()] if chunk.lower() in CONTEXT_WORDS or len(parts) < 2 else parts
    return tuple(words)


@lru_cache(maxsize=4096)
def is_irrelevant(name: str) -> bool:
    """Whether a name is one of IRRELEVANT_NAMES, or ends in one of them."""
    words = words_of(name)
    if name.lower() in IRRELEVANT_NAMES or _INDEX_NAME.fullmatch(name):
        return True
    return len(words) > 1 and words[-1] in IRRELEVANT_NAMES - NOT_AS_LAST_WORD


@lru_cache(maxsize=4096)
def is_context(name: str) -> bool:
    """Whether a name looks like context that a reply depends on."""
    words = words_of(name)
    return not is_irrelevant(name) and bool(CONTEXT_WORDS & {*words}) and words[-1] not in NAMING_WORDS


@lru_cache(maxsize=4096)
def is_flag(name: str) -> bool:
    return not is_irrelevant(name) and bool(FLAG_WORDS & {*words_of(name)})


def find_fate(name: Any, value: Any) -> str:
    """What happens to an unread key: "irrelevant", "named" or "refused"."""
    name = str(name)
    if is_missing(value):
        return "irrelevant"
    if is_irrelevant(name):
        return "named" if _holds_long_text(value) else "irrelevant"
    if is_flag(name) and (fate := _fate_of_flag(name, value)):
        return fate
    if not holds_content(value):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "named" if is_number and len(words_of(name)) == 1 and is_context(name) else "irrelevant"
    if not name.strip() and isinstance(value, str) and value.isdecimal():
        return "irrelevant"  # row numbers that pandas writes into CSV
    if not holds_content(value, with_flags=False):  # has_context, use_tools: no text is lost
        return "named"
    if isinstance(value, str) and value in ("auto", "none", "required", "any"):  # OpenAI's tool_choice
        return "named"
    return "refused" if is_context(name) or (is_flag(name) and not isinstance(value, str)) else "named"


def _fate_of_flag(name: str, value: Any) -> str:
    """What happens to an unread flag that decides what is trained; "" where it means something else."""
    words = words_of(name)
    if NOT_FLAG_WORDS & {*words}:
        return ""
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not (items and all(isinstance(item, (bool, int, float, str)) for item in items)):
        return ""
    if all(_changes_nothing(name, item) for item in items):
        return "irrelevant"
    if all(isinstance(item, (int, float)) for item in items):
        is_weight = any(word.startswith("weight") for word in words)
        return "refused" if is_weight or all(item in (0, 1) for item in items) else "named"  # a measured train_loss
    return "refused" if any(item in (0, 1) or _is_flag_text(item) for item in items) else ""


def _is_flag_text(item: Any) -> bool:
    return isinstance(item, str) and (item.strip().lower() in FLAG_TEXTS or bool(_NUMBERS.match(item)))


def _changes_nothing(name: str, item: Any) -> bool:
    return name.lower() in NO_OP_FLAGS and item in (1, True)


def _holds_long_text(value: Any) -> bool:
    """Whether a value, or a list of texts, has a sentence or more."""
    for text in value if isinstance(value, list) else (value,):
        if isinstance(text, str) and len(text) > LONG_TEXT and len(text.split()) > 8:
            return True
    return False


def _repeats(value: Any, said: set[str]) -> bool:
    """Whether all texts in a value (at least one, ids and roles aside) were read elsewhere."""
    if isinstance(value, str):
        return value.strip() in said
    texts: list[str] = []
    left, seen = [value], set[int]()
    while left and len(texts) <= len(said):
        item = left.pop()
        if isinstance(item, (Mapping, list)):
            if id(item) in seen:  # a row made in Python may contain itself
                return False
            seen.add(id(item))
        if isinstance(item, str) and item.strip():
            texts.append(item.strip())
        elif isinstance(item, Mapping):
            left += [below for key, below in item.items() if not (key in ("role", "from") or is_irrelevant(str(key)))]
        elif isinstance(item, list):
            left += item
        elif item is not None and not isinstance(item, (int, float)):
            return False
    return bool(texts) and not left and said.issuperset(texts)


def note_unread(place: str, key: str) -> str:
    """The note for an unread key."""
    return f"column {key} is not read" if place == ROW else f"key {key} of {place} is not read"


ROW = "a row"


@dataclass(slots=True)
class Reading:
    """Notes and unread keys collected while one row is parsed.

    Attributes:
        ignored: columns and keys in data.ignore_columns.
        notes: in order, without repetition.
        unread: (place, key, value) of each unread key with content.
    """

    ignored: frozenset[str] = frozenset()
    notes: dict[str, None] = field(default_factory=dict)
    unread: list[tuple[str, str, Any]] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes[text] = None

    def settle(self, texts: Iterable[str]) -> None:
        """Add notes for unread keys, or refuse the row.

        Args:
            texts: contents that were read; a column that only repeats them is not lost (UltraChat's prompt,
                OpenRouter's reasoning_details).

        Raises:
            UnknownFormat: a column of the row looks like context.
            RowRefused: a key below it does.
        """
        if not self.unread:
            return
        said = {text.strip() for text in texts}
        lost = []
        for place, key, value in self.unread:
            name = key.rpartition(".")[2] if place == ROW else key
            if not is_flag(name) and _repeats(value, said):
                continue
            if find_fate(name, value) == "refused":
                lost.append((place, key))
            else:
                self.note(note_unread(place, key))
        columns = list(dict.fromkeys(key for place, key in lost if place == ROW))
        if columns:
            raise LostColumns(columns)
        if lost:
            named = ", ".join(f"key {key} of {place}" for place, key in dict.fromkeys(lost))
            ignored = " ".join(map(shlex.quote, dict.fromkeys(key for _, key in lost)))
            raise RowRefused(
                f"{named} would not be read, but the replies may depend on it. To leave it out: --data.ignore_columns "
                f"{ignored}",
                loses_context=True,
                code="unread-context",
            )


class LostColumns(UnknownFormat):
    """Unread columns that look like context; formats.py adds a mapping that reads them."""

    def __init__(self, columns: list[str]) -> None:
        super().__init__(f"columns {', '.join(columns)} are not read", code="unread-context")
        self.columns = columns


class Keys:
    """A mapping whose reads are recorded.

    Attributes:
        values: the mapping itself, for access that does not count as reading.
        place: what kind of object it is ("a turn"), for notes.
    """

    __slots__ = ("_paths", "_unread", "place", "reading", "values")

    def __init__(self, values: Mapping[str, Any], place: str, reading: Reading) -> None:
        self.values = values
        self.place = place
        self.reading = reading
        self._unread = set(values)
        self._paths: list[str] = []

    def get(self, name: str) -> Any:
        """Read a key; None where it is absent, null or NaN."""
        self._unread.discard(name)
        value = self.values.get(name)
        return None if value is None or is_missing(value) else value

    def find(self, path: str) -> tuple[bool, Any]:
        """Read a column: whether it exists, and its value; dots reach inside ("instances.0.output")."""
        if path in self.values:
            return True, self.get(path)
        found, value = find_column(self.values, path)
        if found:
            self._paths.append(path)
            self._unread.discard(path.partition(".")[0])
        return found, None if is_missing(value) else value

    def first(self, names: Sequence[str]) -> tuple[str, Any]:
        """The first of these keys that has content, with its value, counted as read; ("", None) if none has.

        The other keys stay unread. An empty value is returned only where no key has content.
        """
        empty: tuple[str, Any] = ("", None)
        for name in names:
            if name in self.values and (value := self.get(name)) is not None:
                if not (isinstance(value, (str, list, dict)) and not value):
                    return name, value
                empty = empty if empty[0] else (name, value)
        return empty

    def was_read(self, path: str) -> bool:
        """Whether a column, or a part of it, was read."""
        return path in self._paths or not (path in self._unread or path.partition(".")[0] in self._unread)

    def drop(self, *names: str) -> None:
        """Count keys as read that the format defines as irrelevant."""
        self._unread.difference_update(names)

    def close(self) -> None:
        """Report the unread keys to the reading."""
        if self._paths:
            for head in dict.fromkeys(path.partition(".")[0] for path in self._paths):
                self._report_unread(_leftovers(head, self.values[head], self._paths))
        if self._unread:
            self._report_unread((str(name), self.values[name]) for name in self.values if name in self._unread)

    def _report_unread(self, items: Iterable[tuple[str, Any]]) -> None:
        for name, value in items:
            if name in self.reading.ignored or find_fate(name.rpartition(".")[2], value) == "irrelevant":
                continue
            self.reading.unread.append((self.place, name, value))


def find_column(row: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Whether a column exists, and its value; dots reach into lists and dicts ("instances.0.output")."""
    if path in row:
        return True, row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None
    return True, value


def _leftovers(path: str, value: Any, read: list[str]) -> Iterator[tuple[str, Any]]:
    """Parts of a column that dotted reads left unread, each with its dotted path."""
    if path in read:
        return
    if not any(one.startswith(path + ".") for one in read):
        yield path, value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leftovers(f"{path}.{key}", below, read)
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from _leftovers(f"{path}.{number}", below, read)
