"""Parse rows with a list: of turns, of question and answer pairs, of texts, or of rendered segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.columns import Draft, finish_draft, parse_transcript, read_column
from tunesmith.rows.conversation import Message, RawText, RowRefused, Segments
from tunesmith.rows.hints import not_json_hint
from tunesmith.rows.keys import Keys, Reading
from tunesmith.rows.tools import parse_tools
from tunesmith.rows.turns import parse_turns, read_flag, read_reasoning
from tunesmith.rows.values import as_text, json_type
from tunesmith.sources.jsontext import parse_json_list

TURNS_NAMES = ("messages", "conversations", "conversation", "contents")
PAIR_ASKED = ("input", "human", "query", "question", "user", "prompt")
PAIR_ANSWERED = ("output", "assistant", "response", "answer")
PAIR = "a pair"


def parse_messages(keys: Keys, fields: FieldsSection) -> Draft:
    """{"messages": [{"role", "content"}]}, ShareGPT's {"from", "value"}, Gemini's {"contents": [{"role", "parts"}]}."""
    name, turns = read_column(keys, fields.messages, TURNS_NAMES)
    turns = parse_json_list(turns)
    if isinstance(turns, str) and (messages := parse_transcript(turns)):
        return finish_draft(keys, fields, messages)
    if not isinstance(turns, list):
        raise RowRefused(
            not_json_hint(name, turns) or f"{name} is not a list of turns. Write it as [{{role, content}}]",
            code="turns-not-list",
        )
    if turns and all(isinstance(turn, str) for turn in turns):  # LIMA
        speakers = ("user", "assistant")
        return finish_draft(keys, fields, [Message(speakers[i % 2], text) for i, text in enumerate(turns)])
    messages, tools = parse_turns(turns, keys.reading, fields.role, fields.content)
    return finish_draft(keys, fields, messages, tools)


def parse_xtuner(keys: Keys, fields: FieldsSection) -> Draft:
    """{"conversation": [{"system", "input", "output"}, ...]}, ms-swift's [{"human", "assistant"}]."""
    name, pairs = read_column(keys, fields.messages, ("conversation",))
    pairs = parse_json_list(pairs)
    if not isinstance(pairs, list):
        raise RowRefused(f"{name} is not a list of turns. Write it as [{{input, output}}]", code="turns-not-list")
    messages: list[Message] = []
    first_system = ""
    for number, value in enumerate(pairs):
        if not isinstance(value, Mapping):
            raise RowRefused(
                f"turn {number} of {name} is {json_type(value)}, not an object with input and output",
                code="turn-not-object",
            )
        pair = Keys(value, PAIR, keys.reading)
        system = as_text(pair.get("system"), "system")
        if system.strip() and number == 0:
            first_system = system
            messages.append(Message("system", system))
        if system.strip() and system != first_system:
            raise RowRefused(
                f"turn {number} of {name} has a different system prompt than the first turn. Keep one per row",
                code="system-prompt-differs",
            )
        messages += _read_pair(pair, f"turn {number} of {name}")
        pair.drop("need_eos_token")  # xtuner's switch for a stop token; every reply gets one here
        pair.close()
    return finish_draft(keys, fields, messages)


def _read_pair(pair: Keys, where: str) -> list[Message]:
    asked, question = pair.first(PAIR_ASKED)
    answered, answer = pair.first(PAIR_ANSWERED)
    if not answered:
        raise RowRefused(f"{where} has no output. Write one, or remove the row", code="reply-missing")
    text = as_text(question, asked)
    thoughts = read_reasoning(pair, ("reasoning_content", "reasoning", "thinking"))
    is_trained = read_flag(pair, ("output_with_loss", "loss", "loss_weight", "weight", "train"), "assistant")
    reply = Message("assistant", as_text(answer, answered), thoughts, is_trained=is_trained)
    return [Message("user", text), reply] if text.strip() else [reply]  # xtuner: an output alone continues the reply


def parse_segments(keys: Keys, fields: FieldsSection) -> Segments:
    """Axolotl's input_output: {"segments": [{"text", "label"}]}, rendered text; label true: trained."""
    name, segments = read_column(keys, fields.messages, ("segments",))
    segments = parse_json_list(segments)
    if not isinstance(segments, list) or not segments:
        raise RowRefused(f"{name} is not a list of objects with text and label", code="segments-not-list")
    parts: list[tuple[str, bool]] = []
    for number, value in enumerate(segments):
        if not isinstance(value, Mapping):
            raise RowRefused(
                f"segment {number} is {json_type(value)}, not an object with text and label",
                code="segment-not-object",
            )
        segment = Keys(value, "a segment", keys.reading)
        label, text = segment.get("label"), segment.get("text")
        if not isinstance(label, bool) or not isinstance(text, str):
            raise RowRefused(f"segment {number} needs a text and a label of true or false", code="segment-incomplete")
        parts.append((text, label))
        segment.close()
    if not any(text and label for text, label in parts):
        raise RowRefused("no segment has label true; nothing to train", by_choice=True, code="nothing-to-train")
    return Segments(tuple(parts))


def parse_text(keys: Keys, fields: FieldsSection) -> RawText:
    """{"text"}: pre-training, every token trained. A list of strings is joined by line breaks."""
    name, value = read_column(keys, fields.text, ("text",))
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    text = as_text(value, name)
    if not text.strip():
        raise RowRefused(f"{name} is empty. Remove the row", code="text-empty")
    return RawText(text)


def read_question(turns: Any, tools: Any = ()) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """Turns that a model is asked to answer, and its tools; the same spellings as in training rows.

    Args:
        turns: a text, which becomes the user's turn, or a list of dicts.
        tools: schemas, a list or JSON text.

    Raises:
        RowRefused: a turn cannot be read, or holds a key that nothing reads.
    """
    if isinstance(turns, str):
        return [Message("user", turns)], parse_tools(tools)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowRefused(
            "the messages must be a text or a list of dicts with role and content", code="messages-not-a-list"
        )
    reading = Reading()
    messages, in_turns = parse_turns(turns, reading)
    reading.settle([message.content for message in messages])
    return messages, parse_tools(tools) or in_turns


def are_pairs(turns: Any) -> bool:
    """Whether a list has question and answer pairs rather than turns."""
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(
            isinstance(turn, Mapping)
            and not ("role" in turn or "from" in turn)
            and any(key in turn for key in PAIR_ANSWERED)
            for turn in turns
        )
    )
