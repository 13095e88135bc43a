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
LABEL_NAMES = ("label", "kto_tag")
CHAT_NAMES = ("messages", "conversations", "conversation", "completion")
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


def chosen_side_hint(row: Row, fields: FieldsSection) -> str | None:
    """For DPO rows: what they are, and the mapping that trains the chosen side.

    None where the person has already said which side to train.
    """
    if "chosen" not in row or "rejected" not in row or fields.completion or fields.messages or fields.output:
        return None
    return (
        f"preference data (keys {list_keys(row)}): training on it as it stands would also teach the rejected "
        f"replies. To train the chosen side: {_chosen_mapping(row)}"
    )


def rejected_label_hint(row: Row, fields: FieldsSection, format_name: str | None) -> str | None:
    """For KTO rows, whose label says whether readers liked the reply: the mapping that trains the liked ones.

    0 and 1 may as well be classes of something else, so they count next to the columns of chats only.
    """
    if fields.label or format_name in (None, "text"):
        return None
    has_chat = any(key in row for key in CHAT_NAMES)
    for column in LABEL_NAMES:
        value = row.get(column)
        said = value.strip().lower() if isinstance(value, str) else value
        is_truth = isinstance(said, bool) or said in ("true", "false")
        is_bit = isinstance(said, (str, int, float)) and said in (0, 1, "0", "1")
        if is_truth or (is_bit and (has_chat or column == "kto_tag")):
            return (
                f"preference data (keys {list_keys(row)}): rows with {column} false hold replies that their readers "
                f"rejected. To train the rows with {column} true only: --data.fields.label {column} "
                f"(if {column} means something else, rename that column)"
            )
    return None


def not_json_hint(column: str, value: Any) -> str | None:
    """Why a text that should be a list of turns is none."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    if re.match(r"\s*\[\s*\{\s*'", value):
        return f"{column} is a Python repr, not JSON. Write the column with json.dumps(turns), not str(turns)"
    return f"{column} is not JSON, though it begins like a list of turns"


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
    return f"no known format. Keys found: {list_keys(row)}. {_why_unknown(row)}{FORMATS_KNOWN}"


def list_keys(row: Row) -> str:
    return ", ".join(str(key) for key in row) or "none"


def _why_unknown(row: Row) -> str:
    guesses = (_quoted_turns, _roleless_turns, _tree, _nested_instances, _unanswered, _two_columns, _rows_below_key)
    for guess in (*guesses, _text_column):
        found = guess(row)
        if found:
            return found + " "
    return ""


def _quoted_turns(row: Row) -> str | None:
    hints = (not_json_hint(name, row.get(name)) for name in CHAT_NAMES)
    return next((hint + "." for hint in hints if hint), None)


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
            f"The turns in {name} have the keys {list_keys(turns[0])}, and none says who speaks; add a role "
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


def _rows_below_key(row: Row) -> str | None:
    lists = [k for k, v in row.items() if isinstance(v, list) and v and all(isinstance(item, Mapping) for item in v)]
    if len(lists) != 1:
        return None
    return f"The rows seem to lie below the key {lists[0]}: save that list alone, as a JSON array or as JSON Lines."


def _text_column(row: Row) -> str | None:
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
            return f"To train {key} as raw text: --data.format text --data.fields.text {key}."
    texts = [key for key, value in row.items() if isinstance(value, str) and len(value) > 40]
    if len(texts) == 1:
        return f"To train {texts[0]} as raw text: --data.format text --data.fields.text {texts[0]}."
    return None
