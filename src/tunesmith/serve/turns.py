"""Whose turn each token of a stored sample is in, told by the tokens alone: the rows themselves need not be at hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.data.labels import Sample
from tunesmith.encode.encoder import Encoder
from tunesmith.sources.read import RawRow
from tunesmith.use.turns import Turn, find_turns

Opening = tuple[int, ...]
_PROBE_TOKENS = 1 << 14
_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "x"}}}
_TOOL = {"type": "function", "function": {"name": "look_up", "description": "Look up a word.", "parameters": {
    "type": "object", "properties": {"word": {"type": "string"}}}}}  # fmt: skip


def learn_openings(encoder: Encoder, data: DataSection) -> dict[Opening, str]:
    """The token ids with which the template begins a turn of each role -> the role.

    They are what all turns of a role have in common in chats made for this; a role without such tokens is left out.
    """
    plain = data.model_copy(update={"system_prompts": None, "history": "all", "train_on": "assistant", "limit": None})
    turns: dict[str, list[list[int]]] = {}
    questions: list[tuple[Sample, int]] = []  # samples without a system prompt, and their numbers of questions
    for number, chat in enumerate(_probes()):
        row = next(label_rows([RawRow("probe", number, chat)], encoder, plain, _PROBE_TOKENS))
        if row.status != "used":  # the template has no such role
            continue
        for sample, found in zip(row.samples, find_turns(row, encoder, plain), strict=True):
            if chat["messages"][0]["role"] == "user":
                questions.append((sample, sum(turn.role == "user" for turn in found)))
            for place, turn in enumerate(found):
                # the template may write a system prompt of its own before the first question, or that of the row in it
                if turn.role != "user" or (place and found[place - 1].role == "assistant"):
                    turns.setdefault(turn.role, []).append(_without_bos(sample, turn, encoder))
    openings: dict[Opening, str] = {}
    for role in ("tool", "system", "user", "assistant"):  # one opening may serve several; the last of these has it
        common = _common_start(turns.get(role, []))
        if common and len(turns[role]) > 1:
            openings[common] = role
    if any(sum(turn.role == "user" for turn in split_turns(sample, openings)) < count for sample, count in questions):
        return {opening: role for opening, role in openings.items() if role != "system"}  # it begins questions too
    return openings


def _common_start(several: Sequence[Sequence[int]]) -> Opening:
    columns = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*several, strict=False))
    return tuple(ids[0] for ids in columns)


def _without_bos(sample: Sample, turn: Turn, encoder: Encoder) -> list[int]:
    ids: list[int] = sample.input_ids[turn.start : turn.end].tolist()
    while turn.start == 0 and ids and ids[0] in (*encoder.bos_ids, encoder.bos_id):
        ids = ids[1:]
    return ids


def _probes() -> Iterator[dict[str, Any]]:
    """Chats whose texts differ from their first token on."""
    for system, *texts in (
        ("Alpha.", "7 days", "Zoo", "why?", "Echo"),
        ("9 lives", "Bravo", "42", "Mike", "so it is"),
        ("the end", "(one)", "hello", "What is it?", "I am"),
        ("你好", '"x"', "世界", "好吗？", "{}"),
    ):
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        yield {"messages": [{"role": "system", "content": system}, *messages]}
        yield {"messages": messages}
        called = [messages[0], {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
        result = {"role": "tool", "content": system}
        yield {"messages": [*called, result, {"role": "assistant", "content": texts[1]}], "tools": [_TOOL]}


def split_turns(sample: Sample, openings: dict[Opening, str]) -> list[Turn]:
    """The turns of a sample, in order and without gaps; trained tokens are the assistant's where no opening says so."""
    ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
    if not any(mask) or (all(mask) and not _has_opening(ids, openings)):
        return _by_openings(ids, openings) or [Turn("", 0, len(ids))]
    turns: list[Turn] = []
    for turn in _by_openings(ids, openings) or [Turn("", 0, len(ids))]:
        turns += _split_by_mask(turn, mask) if turn.role != "assistant" else [turn]
    return _joined(turns)


def _has_opening(ids: Sequence[int], openings: dict[Opening, str]) -> bool:
    return any(role for _, role in _starts(ids, openings))


def _starts(ids: Sequence[int], openings: dict[Opening, str]) -> Iterator[tuple[int, str]]:
    """Where turns begin, and whose; the longest opening counts."""
    by_first: dict[int, list[Opening]] = {}
    for opening in sorted(openings, key=len, reverse=True):
        by_first.setdefault(opening[0], []).append(opening)
    at = 0
    while at < len(ids):
        found = next((o for o in by_first.get(ids[at], ()) if tuple(ids[at : at + len(o)]) == o), None)
        if found is not None:
            yield at, openings[found]
        at += len(found) if found else 1


def _by_openings(ids: Sequence[int], openings: dict[Opening, str]) -> list[Turn]:
    starts = list(_starts(ids, openings))
    if not starts:
        return []
    ends = [*(at for at, _ in starts[1:]), len(ids)]
    turns = [Turn(role, at, end) for (at, role), end in zip(starts, ends, strict=True)]
    head = starts[0][0]
    if head > 2:  # more than a token of begin: the end of a text that was split, or a template's preamble
        return [Turn("", 0, head), *turns]
    return [Turn(turns[0].role, 0, turns[0].end), *turns[1:]]


def _split_by_mask(turn: Turn, mask: Sequence[int]) -> list[Turn]:
    """A template may begin replies without tokens of their own, as after [/INST]."""
    parts: list[Turn] = []
    start = turn.start
    for at in range(turn.start + 1, turn.end + 1):
        if at == turn.end or mask[at] != mask[start]:
            parts.append(Turn("assistant" if mask[start] else turn.role, start, at))
            start = at
    return parts


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbours of the assistant joined: the trained beginning of a reply may stand before its opening ends."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role == "assistant":
            joined[-1] = Turn("assistant", joined[-1].start, turn.end)
        else:
            joined.append(turn)
    return joined
