"""Every part of a row is in the text, or the row is refused, or a note names it: templates x rows with tools and more.

The oracle is transformers' apply_chat_template. Each word, number, key and schema of a row is replaced, one at a time.
If the stock rendering does not change, the template has lost that part. Of our code only the outcome is used.
"""

from __future__ import annotations

import copy
import html
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import markupsafe
import pytest

import tokenizers_of_others as others
from proof_shapes import SHAPES, Row, messages_of
from test_matrix import HABITS, all_templates, encoder_for, label, tokenizer_for
from tunesmith.data.ledger import LabelledRow
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError

NOTES = {  # a part whose loss a note names
    "name": "the name of a turn is not written by the template",
    "description": "the description of a tool is not written by the template",
    "parameter": "parts of the parameters of a tool are not written by the template",
    "document": "a part of a document is not written by the template",
}
_OTHER = str.maketrans("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "nopqrstuvwxyzabcdefghijklmNOPQRSTUVWXYZABCDEFGHIJKLM")  # fmt: skip

Leaf = tuple[int, str, Any, Row]  # turn (-1: whole row), kind, its value, the row with another value there


def other(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_OTHER) if re.search("[A-Za-z]", value) else value + "x"
    return {"None": False, "False": None, "True": False}.get(repr(value), value if value is None else value + 1)


def leaves(row: Row) -> Iterator[Leaf]:
    def changed(path: tuple[Any, ...], value: Any, new_key: str | None = None) -> Row:
        made = copy.deepcopy(row)
        at = made
        for step in path[:-1]:
            at = at[step]
        if new_key is None:
            at[path[-1]] = value
        else:
            items = [(new_key if key == path[-1] else key, below) for key, below in at.items()]
            at.clear()
            at.update(items)
        return made

    def inside(value: Any, path: tuple[Any, ...], kind: str) -> Iterator[tuple[str, Any, Row]]:
        if isinstance(value, dict):
            for key, below in value.items():
                yield kind, key, changed((*path, key), None, other(key))
                yield from inside(below, (*path, key), kind)
        elif isinstance(value, list):
            for number, below in enumerate(value):
                yield from inside(below, (*path, number), kind)
        elif value != "":
            yield kind, value, changed(path, other(value))

    for turn, message in enumerate(row["messages"]):
        for key in ("content", "reasoning_content", "name"):
            if message.get(key) and not (key == "name" and message["role"] == "tool"):
                at = ("messages", turn, key)
                yield turn, key, message[key], changed(at, other(message[key]))
        for number, made in enumerate(message.get("tool_calls", ())):
            at = ("messages", turn, "tool_calls", number, "function")
            yield turn, "call", made["function"]["name"], changed((*at, "name"), other(made["function"]["name"]))
            arguments = made["function"]["arguments"]
            if isinstance(arguments, str):
                continue
            for leaf in inside(arguments, (*at, "arguments"), "call"):
                yield turn, *leaf
    for number, tool in enumerate(row.get("tools", ())):
        at = ("tools", number, "function")
        for key, kind in (("name", "schema"), ("description", "description")):
            yield -1, kind, tool["function"][key], changed((*at, key), other(tool["function"][key]))
        yield from ((-1, *leaf) for leaf in parameters(tool["function"]["parameters"], at, changed))
    for number, document in enumerate(row.get("documents", ())):
        for key, value in document.items():
            yield -1, "document", value, changed(("documents", number, key), other(value))


def parameters(schema: Row, at: tuple[Any, ...], changed: Any) -> Iterator[tuple[str, Any, Row]]:
    """Names and descriptions of a schema's parameters."""

    def below(value: Row, path: tuple[Any, ...]) -> Iterator[tuple[str, Any, Row]]:
        for key, inner in value.get("properties", {}).items():
            yield "parameter", key, changed((*path, "properties", key), None, other(key))
            if "description" in inner:
                where = (*path, "properties", key, "description")
                yield "parameter", inner["description"], changed(where, other(inner["description"]))
            for number, choice in enumerate(inner.get("enum", ())):
                yield "parameter", choice, changed((*path, "properties", key, "enum", number), other(choice))
            yield from below(inner, (*path, "properties", key))

    yield from below(schema, (*at, "parameters"))


class Stock:
    """transformers' rendering, with tool calls in the form that the template reads."""

    def __init__(self, tokenizer: Any, row: Row) -> None:
        self.tokenizer = tokenizer
        self.forms = [(as_text, as_none) for as_none in (False, True) for as_text in (False, True)]
        self.form = next((form for form in self.forms if self._reads(row, form)), (False, False))

    def _reads(self, row: Row, form: tuple[bool, bool]) -> bool:
        names = [c["function"]["name"] for m in row["messages"] for c in m.get("tool_calls", ())]
        if not names:
            return True
        probe = {"city": "Zagreb"}
        turns = copy.deepcopy(row["messages"])
        for turn in turns:
            for made in turn.get("tool_calls", ()):
                made["function"]["arguments"] = probe
        text = self.render({**row, "messages": turns}, form=form)
        return text is not None and "Zagreb" in text and "{'city'" not in text and '\\"city' not in text

    def render(self, row: Row, until: int | None = None, ask: bool = False, form: Any = None) -> str | None:
        as_text, as_none = form or self.form
        messages = copy.deepcopy(row["messages"][:until])
        for message in messages:
            if "reasoning_content" in message:
                message["thinking"] = message["reasoning_content"]
            for made in message.get("tool_calls", ()):
                arguments = made["function"]["arguments"]
                if as_text and not isinstance(arguments, str):
                    made["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
                if not as_text and isinstance(arguments, str):
                    made["function"]["arguments"] = json.loads(arguments)
            if message.get("tool_calls") and as_none and not message["content"]:
                message["content"] = None
        more = {**row.get("chat_template_kwargs", {})}
        if "documents" in row:
            more["documents"] = row["documents"]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=row.get("tools"), tokenize=False, add_generation_prompt=ask, **more
            )
        except Exception:
            return None
        return str(text)


def with_fields(row: Row) -> Row:
    """The row with leading <think> blocks as reasoning_content, the other way to write it."""
    made = copy.deepcopy(row)
    for message in made["messages"]:
        found = re.match(r"<think>\n(.*?)\n</think>\n\n", message["content"], re.DOTALL)
        if message["role"] == "assistant" and found:
            message["content"] = message["content"][found.end() :]
            message |= {"reasoning_content": found[1].strip()} if found[1].strip() else {}
    return made


def split_samples(row: LabelledRow) -> list[tuple[list[int], list[int]]]:
    """(ids before, trained ids) of each reply."""
    found = []
    for sample in row.samples:
        ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
        for start in (i for i, m in enumerate(mask) if m and (i == 0 or not mask[i - 1])):
            end = next((i for i in range(start, len(mask)) if not mask[i]), len(mask))
            found.append((ids[:start], ids[start:end]))
    return found


def spellings(value: Any) -> set[str]:
    if not isinstance(value, str):
        return {json.dumps(value), str(value)}
    escaped = json.dumps(value, ensure_ascii=False)[1:-1]
    return {
        value.strip(),
        escaped,
        json.dumps(value)[1:-1],
        repr(value)[1:-1],
        html.escape(value),
        str(markupsafe.escape(value)),
    }


def find_wrong(tokenizer: Any, encoder: Encoder, row: Row, labelled: LabelledRow) -> Iterator[str]:
    """Errors of a used row."""
    given, row = row, {**row, "messages": messages_of(row)}
    stock = Stock(tokenizer, row)
    turns = [i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    replies = split_samples(labelled)
    if len(replies) < len(turns) and any("begins with a reply" in note for note in labelled.notes):
        turns = turns[1:]
    if len(replies) != len(turns):
        yield f"{len(replies)} replies for {len(turns)} turns"
        return
    by_turn = dict(zip(turns, replies, strict=True))
    prefills = {len(given["prompt"]) - 1: given["prompt"][-1]["content"]} if "prompt" in given else {}
    bodies = {turn: prefills.get(turn, "") + tokenizer.decode(reply[:-1]) for turn, (_, reply) in by_turn.items()}
    for turn, (before, reply) in by_turn.items():
        if reply[-1] not in encoder.stop_ids or any(token in encoder.stop_ids for token in reply[:-1]):
            yield f"turn {turn}: its stop tokens"
        found = list(compare_with_stock(stock, row, turn, before, reply, labelled.how))
        yield from found and list(compare_with_stock(stock, with_fields(row), turn, before, reply, labelled.how))
    if any(m["content"].startswith("<think>") for m in row["messages"]):
        return
    for turn, kind, said, variant in find_lost(stock, row, labelled, turns, bodies):
        if labelled.how == "composed" and "messages" in given:  # reasoning that the template does not support
            again = label(encoder, variant)
            if again.status == "used" and split_samples(again) != replies:
                continue
        yield f"turn {turn}: {kind} {said!r} is silently lost"


def compare_with_stock(
    stock: Stock, row: Row, turn: int, before: list[int], reply: list[int], how: str
) -> Iterator[str]:
    prompt, finished = stock.render(row, turn, ask=True), stock.render(row, turn + 1)
    if prompt is None or finished is None or re.search(r"20\d\d", prompt):  # today's date
        return
    said = stock.tokenizer.decode(reply)
    if not stock.tokenizer.decode(before).startswith(prompt):
        yield f"turn {turn}: not behind the stock prompt"
    elif how in ("as_rendered", "unrolled"):
        prefill = stock.tokenizer.decode(before)[len(prompt) :]
        if not finished.startswith(prompt + prefill + said):
            yield f"turn {turn}: {said!r} is not what stock rendering has behind the prompt"


def find_lost(
    stock: Stock, row: Row, labelled: LabelledRow, turns: list[int], bodies: dict[int, str]
) -> Iterator[Leaf]:
    texts: dict[tuple[int, bool], str | None] = {}
    for turn, kind, said, variant in leaves(row):
        is_reply = turn in bodies and kind != "name"
        until = turn + 1 if is_reply else next((t for t in turns if t > turn), None)
        if until is None or (turn >= 0 and row["messages"][turn]["role"] == "assistant" and not is_reply):
            continue
        key = (until, not is_reply)
        if key not in texts:
            texts[key] = stock.render(row, until, ask=not is_reply)
        is_lost = texts[key] == stock.render(variant, until, ask=not is_reply)
        if is_reply:
            is_lost |= not any(spelled in bodies[turn] for spelled in spellings(said))
        if is_lost and NOTES.get(kind) not in labelled.notes:
            yield turn, kind, said, variant


def run(tokenizer: Any, templates: dict[str, str]) -> tuple[Counter[str], list[str]]:
    outcomes, wrong = Counter[str](), []
    for name, template in templates.items():
        own = tokenizer_for(tokenizer, template)
        try:
            encoder = encoder_for(own)
        except ModelError:
            outcomes["template"] += len(SHAPES)
            continue
        for shape_name, shape in SHAPES.items():
            labelled = label(encoder, shape)
            outcomes[labelled.how or labelled.status] += 1
            if labelled.status == "refused":
                assert labelled.reason
            else:
                wrong += [
                    f"{name} / {shape_name} ({labelled.how}): {w}" for w in find_wrong(own, encoder, shape, labelled)
                ]
    return outcomes, wrong


def assert_proven(tokenizer: Any, templates: dict[str, str], least_used: float) -> None:
    outcomes, wrong = run(tokenizer, templates)
    assert not wrong, "\n".join(wrong)
    used = outcomes["as_rendered"] + outcomes["unrolled"] + outcomes["composed"]
    assert used >= least_used * outcomes.total(), outcomes


def test_nothing_is_silently_lost_by_any_habit(tokenizer: Any) -> None:
    assert_proven(tokenizer, HABITS, 0.3)


@pytest.mark.parametrize("name", ["own", "minimind", "llama2"])
def test_nothing_is_silently_lost_by_any_template(tokenizer: Any, name: str) -> None:
    if name != "own" and not others.FOLDER.is_dir():
        pytest.skip("the shared tokenizers are not beside this checkout")
    if name != "own" and not os.environ.get("TUNESMITH_LONG"):
        pytest.skip("TUNESMITH_LONG=1 runs it")
    real = {key: text for key, text in all_templates().items() if key not in HABITS}
    assert_proven(tokenizer if name == "own" else others.build(name), real, 0.5)
