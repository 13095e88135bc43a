"""LLaMA-Factory's dataset_info.json: data sets of a folder by name, with the meaning of columns and tags.

A row is converted to {"messages", "system", "tools"} (or {"text"} where an entry names no answer). Columns that the
entry does not name stay in the row, so that they are reported as unused.
"""

from __future__ import annotations

import difflib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.sources.folders import load_object
from tunesmith.sources.jsontext import parse_json_list

_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_COLUMNS = (*_DEFAULT_COLUMNS, "history", "system", "tools", "images", "videos", "audios", "chosen", "rejected",
            "kto_tag")  # fmt: skip
_CARRIED = ("system", "tools", "images", "videos", "audios", "kto_tag")  # columns renamed to these names
_DEFAULT_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
                 "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}  # fmt: skip
_ROLES = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool",
          "function_tag": "function_call", "system_tag": "system"}  # fmt: skip
_ENTRY_KEYS = (*_PLACES, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags",
               "load_from", "file_sha1")  # fmt: skip
_FORMATTINGS = ("alpaca", "sharegpt", "openai")


@dataclass(frozen=True, slots=True)
class Entry:
    """One data set of a dataset_info.json.

    Attributes:
        where: file and entry name, for error messages.
        hub: (id, config, split) where the rows are on the hub, else None.
        file_name: file or folder, beside dataset_info.json.
        is_chat: the rows have a list of turns; else prompt and response.
        columns: part ("prompt", "system", ...) -> column.
        tags: LLaMA-Factory's name of a tag -> the tag.
        num_samples: rows to read, from the first; None for all.
    """

    where: str
    hub: tuple[str, str | None, str] | None
    file_name: str
    is_chat: bool
    columns: Mapping[str, str]
    tags: Mapping[str, str]
    num_samples: int | None


def list_entries(folder: Path) -> dict[str, Any]:
    """The entries by name; empty where dataset_info.json is missing or is not a list of data sets."""
    entries = load_object(folder / "dataset_info.json")
    is_ours = all(isinstance(entry, dict) and any(place in entry for place in _PLACES) for entry in entries.values())
    return entries if is_ours else {}


def find_entry(folder: Path, name: str | None) -> Entry:
    """The entry of this name, or the only one.

    Raises:
        DataError: no such entry, several entries and no name, or an entry that cannot be trained on.
    """
    entries = list_entries(folder)
    if name is None and len(entries) == 1:
        name = next(iter(entries))
    names = _shorten(entries)
    if name is None:
        raise DataError(
            f"{folder}: dataset_info.json has several data sets ({names}). Name one as {folder}:NAME.",
            code="several-datasets",
        )
    if name not in entries:
        close = difflib.get_close_matches(name, entries, n=1)
        hint = f" Did you mean {folder}:{close[0]}?" if close else ""
        raise DataError(
            f"{folder}: dataset_info.json has no data set {name!r}.{hint} Found: {names}.", code="unknown-dataset"
        )
    return _parse_entry(f"{folder / 'dataset_info.json'}: {name}", entries[name])


def _shorten(names: Iterable[str]) -> str:
    known = list(names)
    more = f" and {len(known) - 20} others" if len(known) > 20 else ""
    return ", ".join(known[:20]) + more


def _parse_entry(where: str, said: dict[str, Any]) -> Entry:
    for key in said:
        close = difflib.get_close_matches(key, _ENTRY_KEYS, n=1, cutoff=0.8)
        if close and key not in _ENTRY_KEYS:
            raise DataError(f"{where}: unknown key {key!r}. Did you mean {close[0]}?", code="unknown-entry-key")
    columns = _names_of(where, said, "columns", _COLUMNS)
    tags = _DEFAULT_TAGS | _names_of(where, said, "tags", _DEFAULT_TAGS)
    formatting = said.get("formatting", "alpaca")
    if formatting not in _FORMATTINGS:
        raise DataError(
            f"{where}: unknown formatting {formatting!r}. Known: {', '.join(_FORMATTINGS)}.", code="unknown-formatting"
        )
    if said.get("ranking") or "rejected" in columns:
        raise DataError(
            f"{where}: is preference data (ranking true); supervised training would also teach the rejected replies. "
            "Give the file itself (--data FILE); `tunesmith check` then names the mapping that trains the chosen side.",
            code="preference-data",
        )
    num_samples = said.get("num_samples")
    if num_samples is not None and (type(num_samples) is not int or not 1 <= num_samples <= sys.maxsize):
        raise DataError(
            f"{where}: num_samples is {str(num_samples)[:40]}, not a positive number. Correct or remove it.",
            code="bad-num-samples",
        )
    return Entry(
        where=where,
        hub=_hub_of(where, said),
        file_name=str(said.get("file_name", "")),
        is_chat=formatting != "alpaca",
        columns=columns if "columns" in said else _DEFAULT_COLUMNS | {"history": "history"},
        tags=tags,
        num_samples=num_samples,
    )


def _names_of(where: str, said: dict[str, Any], key: str, known: Iterable[str]) -> dict[str, str]:
    names = said.get(key) or {}
    if not isinstance(names, dict) or not all(isinstance(name, str) or name is None for name in names.values()):
        raise DataError(f"{where}: {key} must be an object whose values are column names.", code="entry-not-names")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            f"{where}: unknown key {unknown[0]!r} in {key}. Known: {', '.join(known)}.", code="unknown-entry-key"
        )
    return {part: name for part, name in names.items() if name}


def _hub_of(where: str, said: dict[str, Any]) -> tuple[str, str | None, str] | None:
    if said.get("hf_hub_url"):
        return str(said["hf_hub_url"]), said.get("subset"), str(said.get("split") or "train")
    if said.get("file_name"):
        return None
    place = next((place for place in _PLACES if said.get(place)), None)
    if place is None:
        raise DataError(f"{where}: file_name is empty. Name the file with the rows.", code="entry-without-file")
    raise DataError(
        f"{where}: the rows are at {place} {said[place]}, which tunesmith does not read. Download them into the "
        "folder and set file_name.",
        code="entry-place-unsupported",
    )


def convert_rows(rows: Iterable[tuple[int, Any]], entry: Entry) -> Iterator[tuple[int, Any]]:
    """The rows of an entry, each with its number.

    Raises:
        DataError: the first row has no column that the entry names for the prompt, the answer or the turns.
    """
    for place, (number, row) in enumerate(itertools.islice(rows, entry.num_samples)):
        if place == 0 and isinstance(row, dict):
            for part in ("messages",) if entry.is_chat else ("prompt", "response"):
                column = entry.columns.get(part)
                if column is not None and column not in row:
                    raise DataError(
                        f"{entry.where}: the first row has no column {column} (columns.{part}). Keys found: "
                        f"{', '.join(map(str, row))}. Correct columns in dataset_info.json.",
                        code="entry-column-missing",
                    )
        yield number, convert_row(row, entry)


def convert_row(row: Any, entry: Entry) -> Any:
    """The row in the form that rows/formats.py reads; a value that is not an object is returned unchanged."""
    if not isinstance(row, dict):
        return row
    columns = entry.columns
    if entry.is_chat:
        used = ["messages", *_CARRIED]
        made: dict[str, Any] = {"messages": _convert_turns(row.get(columns.get("messages", "")), entry.tags)}
    elif "response" in columns:
        used = ["prompt", "query", "response", "history", *_CARRIED]
        made = _convert_pairs(row, columns)
    else:  # pre-training data: the prompt column is the text
        used = ["prompt", "query", *_CARRIED]
        made = {"text": _join(row, columns)}
    made |= {part: row[columns[part]] for part in _CARRIED if columns.get(part) in row}
    read = {columns[part] for part in used if part in columns}
    return made | _unread(row, read, made)


def _unread(row: dict[str, Any], read: Iterable[str], made: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that the entry does not name, renamed where the name is read for something else."""
    return {f"{key} (unmapped)" if key in made else key: value for key, value in row.items() if key not in read}


def _join(row: dict[str, Any], columns: Mapping[str, str]) -> Any:
    """Prompt and query joined by a line break, as LLaMA-Factory does."""
    parts = [row[columns[part]] for part in ("prompt", "query") if row.get(columns.get(part, "")) not in (None, "")]
    if len(parts) < 2:
        return parts[0] if parts else ""
    is_plain = all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts)
    return "\n".join(map(str, parts)) if is_plain else parts


def _convert_pairs(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    turns = []
    history = parse_json_list(row.get(columns.get("history", "")))
    is_pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    for question, answer in history if is_pairs else ():
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns.append({"role": "user", "content": _join(row, columns)})
    answer = row.get(columns["response"])
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    made: dict[str, Any] = {"messages": turns}
    return made if is_pairs or not history else made | {"history": history}


def _convert_turns(value: Any, tags: Mapping[str, str]) -> Any:
    turns = parse_json_list(value)
    return [_convert_turn(turn, tags) for turn in turns] if isinstance(turns, list) else turns


def _convert_turn(turn: Any, tags: Mapping[str, str]) -> Any:
    if not isinstance(turn, dict):
        return turn
    roles = {tags[tag]: role for tag, role in _ROLES.items()}
    made: dict[str, Any] = {}
    if tags["role_tag"] in turn:
        said = turn[tags["role_tag"]]
        made["role"] = roles.get(said, said) if isinstance(said, str) else said
    if tags["content_tag"] in turn:
        made["content"] = turn[tags["content_tag"]]
    return made | _unread(turn, (tags["role_tag"], tags["content_tag"]), made)
