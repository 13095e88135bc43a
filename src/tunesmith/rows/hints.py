"""Messages for rows of unknown format: keys found, likely mapping, known formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunesmith.config.data_keys import FieldsSection
from tunesmith.rows.advice import (
    BESIDE_ALPACA,
    BESIDE_CHATS,
    BESIDE_PAIRS,
    CHAT_PARTS,
    PAIR_PARTS,
    complete_mapping,
    find_part,
)
from tunesmith.rows.columns import REASONING_NAMES, parse_transcript
from tunesmith.rows.keys import NAMING_WORDS, find_column, find_fate, is_context, is_irrelevant, words_of
from tunesmith.rows.textmarks import is_transcript
from tunesmith.rows.turns import ROLE_KEYS, ROLES, is_lines, normal_role
from tunesmith.rows.values import holds_content, show

Row = Mapping[str, Any]

FORMATS_KNOWN = (
    "Formats known: messages [{role, content}], conversations [{role, content} or {from, value}], prompt + "
    "completion, instruction + input + output, query + response, input + output, conversation [{system, input, "
    "output}], contents [{role, parts}], segments [{text, label}], text."
)
NAME_THE_COLUMNS = (
    "Map the columns: data.fields.prompt and data.fields.completion (with data.fields.system, history, input, "
    "reasoning and tools), data.fields.messages for a list of turns, or data.fields.text for raw text. "
)
LABEL_NAMES = ("label", "kto_tag")
CHAT_NAMES = ("messages", "conversations", "conversation", "completion")
LIST_NAMES = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "contents")
_QUESTIONS = """
    question query prompt problem instruction user human input q
    inputs input_text user_input user_prompt user_message question_text inputs_pretokenized src
    frage anfrage pregunta domanda вопрос 问题 提问 问 指令 質問 질문
    document article text source_text eingabe 输入 source
"""
_ANSWERS = """
    answer response completion output solution canonical_solution target reply assistant summary a
    targets target_text output_text answer_text assistant_response bot_response model_response model_output
    targets_pretokenized tgt highlights long_answer
    antwort ausgabe respuesta reponse réponse risposta ответ 回答 答案 答 回复 输出 答え 답변
"""
QUESTION_NAMES, ANSWER_NAMES = tuple(_QUESTIONS.split()), tuple(_ANSWERS.split())
CONTENT_GUESSES = ("content", "value", "text", "message", "utterance", "body")
ABOUT_NAMES = ("title", "name", "headline", "heading", "subject", "topic", "chapter", "author", "artist", "dynasty",
               "rhythmic", "role", "speaker", "sender", "talker", "path", "preamble")  # fmt: skip
"""Names of texts that describe another text; two of them are not a question and an answer."""


def chosen_side_hint(row: Row, fields: FieldsSection) -> str | None:
    """Message for DPO rows with the mapping that trains the chosen side.

    None where the mapping already names one side.
    """
    if "chosen" not in row or "rejected" not in row or fields.completion or fields.messages or fields.output:
        return None
    if not holds_content([row["chosen"], row["rejected"]]):  # columns that only other rows fill
        return None
    return (
        f"preference data (keys {list_keys(row)}): training on it unchanged would also teach the rejected replies. To "
        f"train the chosen side: {_chosen_mapping(row)}"
    )


def rejected_label_hint(row: Row, fields: FieldsSection, format_name: str | None) -> str | None:
    """Message for KTO rows, whose label says whether the reply is good, with the mapping that trains the good ones.

    0 and 1 may be other classes, so they count only beside the columns of chats.
    """
    if fields.label or format_name in (None, "text", "segments"):
        return None
    has_chat = any(key in row for key in CHAT_NAMES)
    for column in LABEL_NAMES:
        if column not in row:
            continue
        value = row[column]
        said = value.strip().lower() if isinstance(value, str) else value
        is_truth = isinstance(said, bool) or said in ("true", "false")
        is_bit = isinstance(said, (str, int, float)) and said in (0, 1, "0", "1")
        if is_truth or (is_bit and (has_chat or column == "kto_tag")):
            return (
                f"preference data (keys {list_keys(row)}): rows with {column} false have rejected replies. To train "
                f"only the rows with {column} true: --data.fields.label {column} (if {column} means something else: "
                f"--data.ignore_columns {column})"
            )
    return None


def lone_turn_hint(row: Row) -> str | None:
    """Message for a row that is one turn of a chat."""
    role = next((row[key] for key in ROLE_KEYS if normal_role(row.get(key)) in ROLES), None)
    content = next((key for key in CONTENT_GUESSES if isinstance(row.get(key), str)), None)
    if role is None or content is None:
        return None
    hint = (
        f"the row is one turn of a chat ({show(role)}). Put all turns of a chat into one row: "
        '{"messages": [{"role": ..., "content": ...}, ...]}'
    )
    return f"{hint} (or, to train {content} as raw text: --data.format text --data.fields.text {content})"


def not_json_hint(column: str, value: Any) -> str | None:
    """Why a text cannot be parsed as a list of turns."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    if re.match(r"\s*\[\s*\{\s*'", value):
        return f"{column} is a Python repr, not JSON. Write the column with json.dumps(turns), not str(turns)"
    return f"{column} begins like a list of turns but is not JSON"


def _chosen_mapping(row: Row) -> str:
    chosen = row["chosen"]
    is_chat = isinstance(chosen, list) and bool(chosen) and _role_of(chosen[0]) in ("user", "system")
    if is_chat or (isinstance(chosen, str) and len(parse_transcript(chosen)) > 1):  # the whole chat
        return complete_mapping(row, {"messages": "chosen"}, "", BESIDE_CHATS, CHAT_PARTS)
    if isinstance(row.get("instruction"), str) and isinstance(chosen, str):
        return complete_mapping(row, {"output": "chosen"}, "alpaca", BESIDE_ALPACA, PAIR_PARTS)
    names = ("prompt", "conversations", "messages", "question", "query", "instruction", "input")
    question = next((name for name in names if name in row), "prompt")
    allowed = CHAT_PARTS if isinstance(row.get(question), list) else PAIR_PARTS
    parts = {"prompt": question, "completion": "chosen"}
    return complete_mapping(row, parts, "prompt_completion", BESIDE_PAIRS, allowed)


def _role_of(turn: Any) -> str | None:
    if not isinstance(turn, Mapping):
        return None
    said = next((turn[key] for key in ROLE_KEYS if key in turn), None)
    return ROLES.get(normal_role(said))


def describe_unknown(row: Row) -> str:
    """Message for a row of unknown format: keys found, likely mapping, formats known."""
    return f"no known format. Keys found: {list_keys(row)}. {_why_unknown(row)}{FORMATS_KNOWN}"


def list_keys(row: Row) -> str:
    return ", ".join(str(key) for key in row) or "none"


def _why_unknown(row: Row) -> str:
    guesses = (_quoted_turns, _roleless_turns, _tree, _openai_preference, _nested_instances, _nested_turns,
               _question_and_answer, _one_sided, _dialog, _lines, _two_texts, _rows_below_key, _transcript,
               _long_text)  # fmt: skip
    return next((found + " " for guess in guesses if (found := guess(row))), NAME_THE_COLUMNS)


def _quoted_turns(row: Row) -> str | None:
    hints = (not_json_hint(name, row.get(name)) for name in CHAT_NAMES)
    return next((hint + "." for hint in hints if hint), None)


def _roleless_turns(row: Row) -> str | None:
    for name in LIST_NAMES:
        turns = row.get(name)
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], Mapping):
            continue
        for key, value in turns[0].items():
            content = _content_key(turns[0], key)
            if normal_role(value) in ROLES and content:
                parts = {"messages": name, "role": str(key), "content": content}
                return f"Train it with {complete_mapping(row, parts, '', BESIDE_CHATS, CHAT_PARTS)}."
        return (
            f"The turns in {name} have the keys {list_keys(turns[0])}, and none of them gives the speaker; add a role "
            "(user or assistant) to each turn."
        )
    return None


def _content_key(turn: Row, role_key: str) -> str | None:
    """The key of a turn that most likely has its text: by name, else the longest text."""
    texts = {k: v for k, v in turn.items() if k != role_key and isinstance(k, str) and isinstance(v, str)}
    texts = {k: v for k, v in texts.items() if not is_irrelevant(k)}
    named = next((name for name in CONTENT_GUESSES if name in texts), None)
    return named or max(texts, key=lambda key: len(texts[key]), default=None)


def _tree(row: Row) -> str | None:
    prompt = row.get("prompt")
    if isinstance(prompt, Mapping) and "replies" in prompt:
        return "It is a message tree with several replies to one message; choose one path and write it as messages."
    return None


def _openai_preference(row: Row) -> str | None:
    """{"input": {"messages"}, "preferred_output": [...], "non_preferred_output": [...]}."""
    asked = row.get("input")
    if "preferred_output" not in row or not isinstance(asked, Mapping) or "messages" not in asked:
        return None
    parts = {"prompt": "input.messages", "completion": "preferred_output"}
    parts |= {"tools": "input.tools"} if asked.get("tools") else {}
    mapping = complete_mapping(row, parts, "prompt_completion", BESIDE_CHATS, CHAT_PARTS)
    return f"It is preference data. To train the preferred side: {mapping}."


def _nested_instances(row: Row) -> str | None:
    instances = row.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], Mapping) and "output" in instances[0]:
        parts = {"input": "instances.0.input"} if "input" in instances[0] else {}
        parts["output"] = "instances.0.output"
        mapping = complete_mapping(row, parts, "alpaca", BESIDE_ALPACA, PAIR_PARTS)
        return f"Train the first instance of each row with {mapping}."
    return None


def _one_sided(row: Row) -> str | None:
    """Questions alone or answers alone."""
    held = [str(key) for key in row if not is_irrelevant(str(key)) or key == "source"]
    questions = [
        key
        for key in held
        if key.lower() in (*QUESTION_NAMES, "messages") and not (key == "text" and is_lines(row[key]))
    ]
    answers = [key for key in held if key.lower() in (*ANSWER_NAMES, "answers", "ground_truth")]
    if answers and len(answers) == len(held):
        return "It has answers without questions."
    others = [key for key in held if not (key in questions or is_context(key)) and holds_content(row.get(key))]
    if len(questions) == 1 and not answers and (isinstance(row[questions[0]], list) or not others):
        return "It has questions without answers; nothing to train."
    return None


def _question_and_answer(row: Row) -> str | None:
    """Two columns named like question and answer, and the other columns."""
    texts = {key.strip().lower(): key for key, value in row.items() if isinstance(value, str) and isinstance(key, str)}
    question = next((texts[name] for name in QUESTION_NAMES if name in texts), None)
    answer = next((texts[name] for name in ANSWER_NAMES if name in texts and texts[name] != question), None)
    if question and not answer and find_column(row, "answers.text.0")[0]:  # SQuAD
        answer = "answers.text.0"
    if question and not answer and any(name in row for name in REASONING_NAMES):
        answer = texts.get("content")  # DeepSeek's API
    if (
        not question or not answer or (question == "source" and answer != "target")
    ):  # source alone is the name of a data set
        return None
    worked = texts.get("solution")
    if worked and answer == texts.get("answer") and len(row[worked]) > len(row[answer]):
        answer = worked  # MATH: the answer is the last word of the solution
    if question == "instruction":
        return f"Train it with {complete_mapping(row, {'output': answer}, 'alpaca', BESIDE_ALPACA, PAIR_PARTS)}."
    parts = {"prompt": question, "completion": answer}
    text = row.get("text")
    if "text" in row and question != "text" and isinstance(text, str) and str(row[question]).strip() not in text:
        parts["input"] = "text"  # context of the question, not both rendered together
    return f"Train it with {complete_mapping(row, parts, '', BESIDE_PAIRS, PAIR_PARTS)}."


def _dialog(row: Row) -> str | None:
    """A list of texts in a column named like a dialogue (DailyDialog, UltraChat's first release)."""
    name = next((name for name in (*LIST_NAMES, "data", "utterances") if is_lines(row.get(name)) and row[name]), None)
    if name is None or len(row[name]) < 2:
        return None
    as_text = complete_mapping(row, {"text": name}, "text")
    mapping = complete_mapping(row, {"messages": name}, "", BESIDE_CHATS, CHAT_PARTS)
    return f"If user and assistant speak in turn in {name}: {mapping} (or, to train it as raw text: {as_text})."


def _lines(row: Row) -> str | None:
    if any(str(key).lower() in QUESTION_NAMES and str(key) != "text" for key in row):
        return None  # then the lines are its context
    for key, value in row.items():
        if value and is_lines(value) and not is_irrelevant(str(key)) and not is_context(str(key)):
            others = [name for name in row if name != key and str(name).lower() not in ABOUT_NAMES]
            if any(find_fate(name, row[name]) != "irrelevant" for name in others):
                return None
            return f"To train {key} as raw text: {complete_mapping(row, {'text': str(key)}, 'text')}."
    return None


def _two_texts(row: Row) -> str | None:
    """Two text columns of unknown names, unless one describes the other or there are more columns."""
    held = [key for key, value in row.items() if find_fate(key, value) != "irrelevant"]
    texts = [str(key) for key in held if isinstance(row[key], str)]
    if len(texts) != 2 or any(not isinstance(row[key], str) and not find_part(key, row[key]) for key in held):
        return None
    if any(key.lower() in ABOUT_NAMES or is_context(key) or {*words_of(key)[-1:]} & NAMING_WORDS for key in texts):
        return None
    asked, answered = sorted(texts, key=lambda key: key.lower() != "question")
    mapping = complete_mapping(row, {"prompt": asked, "completion": answered}, "", BESIDE_PAIRS, PAIR_PARTS)
    return f"If {answered} answers {asked}: {mapping}."


def _rows_below_key(row: Row) -> str | None:
    lists = [k for k, v in row.items() if isinstance(v, list) and v and all(isinstance(item, Mapping) for item in v)]
    others = [value for key, value in row.items() if key not in lists and isinstance(value, (list, Mapping))]
    if (
        len(lists) != 1
        or is_context(str(lists[0]))
        or any(map(holds_content, others))
        or any(str(key).lower() in QUESTION_NAMES for key in row)
    ):
        return None
    return f"The rows seem to be under the key {lists[0]}: save that list alone, as a JSON array or JSON Lines."


def _transcript(row: Row) -> str | None:
    name = next((key for key, value in row.items() if isinstance(value, str) and is_transcript(value)), None)
    if name is None:
        return None
    return (
        f"{name} is a transcript of several speakers in one text: split it by speaker and write the turns as "
        "messages [{role, content}]."
    )


def _nested_turns(row: Row) -> str | None:
    """A list of turns in or below a column of any name (Axolotl's field_messages), or a request and its response."""
    chats, turns = dict[str, Any](), dict[str, Any]()
    for key, value in row.items():
        if isinstance(key, str) and not is_context(key):
            _collect_turns(key, value, chats, turns, 4)
    if len(chats) != 1 or len(turns) > 1:
        return None
    path, chat = next(iter(chats.items()))
    if not turns and any(_role_of(turn) == "assistant" for turn in chat):
        return f"Train it with {complete_mapping(row, {'messages': path}, '', BESIDE_CHATS, CHAT_PARTS)}."
    if not turns or _role_of(next(iter(turns.values()))) != "assistant":
        return None
    parts = {"prompt": path, "completion": next(iter(turns))}
    return f"Train it with {complete_mapping(row, parts, 'prompt_completion', BESIDE_CHATS, CHAT_PARTS)}."


def _collect_turns(path: str, value: Any, chats: dict[str, Any], turns: dict[str, Any], depth: int) -> None:
    """Lists of turns and single turns, each by its dotted path."""
    if isinstance(value, Mapping) and _role_of(value):
        turns[path] = value
    elif isinstance(value, list) and value and all(_role_of(item) for item in value):
        chats[path] = value
    elif depth and isinstance(value, Mapping):
        for key, below in value.items():
            if isinstance(key, str) and "." not in key:
                _collect_turns(f"{path}.{key}", below, chats, turns, depth - 1)
    elif depth and isinstance(value, list) and len(value) == 1:
        _collect_turns(f"{path}.0", value[0], chats, turns, depth - 1)


def _long_text(row: Row) -> str | None:
    texts = [key for key, value in row.items() if isinstance(value, str) and len(value) > 40]
    if len(texts) == 1:
        return f"To train {texts[0]} as raw text: {complete_mapping(row, {'text': str(texts[0])}, 'text')}."
    return None
