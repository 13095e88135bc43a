"""What to tell a person whose rows we cannot train on: keys found, formats known, the mapping that would help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunesmith.config import FieldsSection
from tunesmith.data.turns import ROLE_KEYS, ROLES

Row = Mapping[str, Any]

FORMATS_KNOWN = (
    "Formats known: messages [{role, content}], conversations [{role, content} or {from, value}], "
    "prompt + completion, instruction + input + output, conversation [{system, input, output}], text."
)
QUESTION_NAMES = ("question", "query", "prompt", "problem", "instruction", "input", "source", "document", "q")
ANSWER_NAMES = ("answer", "response", "completion", "output", "solution", "canonical_solution", "target", "reply",
                "summary", "a")  # fmt: skip
RENDERED_MARKS = ("<|im_start|>", "[INST]", "<start_of_turn>", "<|start_header_id|>", "<|assistant|>",
                  "### Response:", "<|user|>", "<｜Assistant｜>")  # fmt: skip

_PLACEHOLDER = re.compile(r"\{\{[A-Za-z_]\w*\}\}")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


def find_placeholder(text: str) -> str | None:
    """A fill-me-in mark like {{name}} outside of code, where it is somebody's forgotten template."""
    if "{{" not in text:
        return None
    found = _PLACEHOLDER.search(_CODE.sub("", text))
    return found.group() if found else None


def find_rendered_template(text: str) -> str | None:
    """The mark of a chat template that raw text was already rendered with."""
    return next((mark for mark in RENDERED_MARKS if mark in text), None)


def preference_hint(row: Row, fields: FieldsSection) -> str | None:
    """For DPO and KTO rows: what they are, and the mapping that trains the chosen side.

    None where the person has already said which side to train.
    """
    if "chosen" in row and "rejected" in row and not (fields.completion or fields.messages):
        mapping = _chosen_mapping(row)
        return (
            f"preference data (keys {_keys(row)}): training on it as it stands would also teach the rejected "
            f"replies. To train the chosen side: {mapping}"
        )
    is_labelled = isinstance(row.get("label"), bool) and not fields.label
    if is_labelled and any(k in row for k in ("messages", "conversations", "completion")):
        return (
            f"preference data (keys {_keys(row)}): rows with label false hold replies that their readers rejected. "
            "To train the rows with label true only: --data.fields.label label"
        )
    return None


def _chosen_mapping(row: Row) -> str:
    chosen = row["chosen"]
    if isinstance(chosen, list) and chosen and _role_of(chosen[0]) in ("user", "system"):
        return "--data.fields.messages chosen"  # the whole chat stands in it
    question = next(
        (k for k in ("prompt", "conversations", "messages", "question", "instruction", "input") if k in row), "prompt"
    )
    return f"--data.format prompt_completion --data.fields.prompt {question} --data.fields.completion chosen"


def _role_of(turn: Any) -> str | None:
    if not isinstance(turn, Mapping):
        return None
    said = next((turn[key] for key in ROLE_KEYS if key in turn), None)
    return ROLES.get(said) if isinstance(said, str) else None


def describe_unknown(row: Row) -> str:
    """Keys found, why they do not fit, the mapping where there is one, formats known."""
    return f"no known format. Keys found: {_keys(row)}. {_why_unknown(row)}{FORMATS_KNOWN}"


def _keys(row: Row) -> str:
    return ", ".join(str(key) for key in row) or "none"


def _why_unknown(row: Row) -> str:
    for guess in (_roleless_turns, _tree, _nested_instances, _unanswered, _two_columns, _text_column):
        found = guess(row)
        if found:
            return found + " "
    return ""


def _roleless_turns(row: Row) -> str | None:
    for name in ("messages", "conversations", "conversation", "dialog", "dialogue", "turns"):
        turns = row.get(name)
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], Mapping):
            continue
        for key, value in turns[0].items():
            if isinstance(value, str) and value.lower() in ROLES:
                text = next((k for k, v in turns[0].items() if k != key and isinstance(v, str)), "content")
                return (
                    f"Train it with --data.fields.messages {name} --data.fields.role {key} "
                    f"--data.fields.content {text}."
                )
        return (
            f"The turns in {name} have the keys {_keys(turns[0])}, and none says who speaks; add a role "
            "(user or assistant) to each turn."
        )
    return None


def _tree(row: Row) -> str | None:
    prompt = row.get("prompt")
    if isinstance(prompt, Mapping) and "replies" in prompt:
        return (
            "It is a message tree with several replies to one message; choose one path through it and write "
            "it as messages."
        )
    return None


def _nested_instances(row: Row) -> str | None:
    instances = row.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], Mapping) and "output" in instances[0]:
        return (
            "Train the first instance of each row with --data.format alpaca "
            "--data.fields.input instances.0.input --data.fields.output instances.0.output."
        )
    return None


def _unanswered(row: Row) -> str | None:
    question = next((row[k] for k in ("question", "prompt", "messages", "instruction") if k in row), None)
    if question is None:
        if any(key in row for key in ("ground_truth", *ANSWER_NAMES)):
            return "It holds answers without their questions."
        return None
    if any(name in row for name in ANSWER_NAMES if name not in ("prompt", "input")):
        return None
    if isinstance(question, list) or not any(isinstance(v, str) for k, v in row.items() if k not in ("id", "question")):
        return "It holds questions without answers: there is nothing to learn to say."
    return None


def _two_columns(row: Row) -> str | None:
    texts = [key for key, value in row.items() if isinstance(value, str)]
    question = next((name for name in QUESTION_NAMES if name in texts), None)
    answer = next((name for name in ANSWER_NAMES if name in texts and name != question), None)
    if question and answer:
        return f"Train it with --data.fields.prompt {question} --data.fields.completion {answer}."
    if len(texts) == 2:
        first, second = texts
        return f"If {second} answers {first}: --data.fields.prompt {first} --data.fields.completion {second}."
    return None


def _text_column(row: Row) -> str | None:
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
            return f"To train {key} as raw text: --data.format text --data.fields.text {key}."
    texts = [key for key, value in row.items() if isinstance(value, str) and len(value) > 40]
    if len(texts) == 1:
        return f"To train {texts[0]} as raw text: --data.format text --data.fields.text {texts[0]}."
    return None
