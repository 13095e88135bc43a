"""Data and defaults of Axolotl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.config.foreign_reasons import MISSING_KEYS
from tunesmith.foreign.draft import Draft, Tree, is_number, number
from tunesmith.foreign.settings import Turn, turn_template

DEFAULTS: Tree = {
    "optim.schedule": "cosine", "optim.warmup_ratio": 0.03, "train.epochs": 1.0, "train.seed": 42,
    "train.gradient_checkpointing": False, "data.max_seq_len": 512,
}  # fmt: skip
LORA_DEFAULTS: Tree = {"lora.dropout": 0.0}
ROWS = 1
# type of a data set -> column -> data.fields
_TYPES: dict[str, dict[str, str]] = {
    "alpaca": {},
    "chat_template": {},
    "sharegpt": {},
    "completion": {},
    "pretrain": {},
    "input_output": {},
    "alpaca_w_system.load_open_orca": {"system": "system_prompt", "prompt": "question", "completion": "response"},
    "alpaca_chat.load_qa": {"prompt": "question", "completion": "answer"},
    "alpaca_chat.load_concise": {},
    "context_qa": {"prompt": "question", "completion": "answer", "input": "context"},
    "summarizetldr": {"prompt": "article", "completion": "summary"},
    "jeopardy": {"prompt": "question", "completion": "answer", "input": "category"},
}
_FIELDS = {  # key of a data set -> data.fields
    "field_messages": "messages", "field_tools": "tools", "field_system": "system",
    "field_instruction": "prompt", "field_input": "input", "field_output": "completion",
    "field_human": "prompt", "field_model": "completion", "message_field_role": "role",
    "message_field_content": "content", "text_column": "text",
}  # fmt: skip
_PROPERTIES = {"role": "role", "content": "content"}
_THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts")  # keys of a turn that are read
_ROLES = {"user": ("human", "user"), "assistant": ("gpt", "assistant", "model", "chatgpt"),
          "system": ("system",), "tool": ("tool", "observation", "function")}  # fmt: skip
_PLACE = ("path", "name", "split", "data_files", "ds_type")


def turn_datasets(part: str) -> Turn:
    def turn(draft: Draft, key: str, value: Any) -> None:
        entries = [entry if isinstance(entry, Mapping) else {"path": entry} for entry in _as_list(value)]
        draft.ours[part] = [name for entry in entries for name in _names(draft, key, entry)]
        fields = [_read_entry(draft, key, entry) for entry in entries]
        if part == "data.train":
            _agree(draft, key, fields)
            _choose_text(draft, key, [str(_type_of(entry)) for entry in entries])

    return turn


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _names(draft: Draft, key: str, entry: Mapping[str, Any]) -> list[str]:
    """owner/name:config:split, or the files."""
    path, files = str(entry.get("path")), _as_list(entry.get("data_files") or [])
    if files and (
        path in ("json", "csv", "parquet", "text", "arrow") or all(str(f).startswith(("/", ".")) for f in files)
    ):
        return [str(file) for file in files]
    if files:
        draft.lose(f"{key}.data_files", files, f"the whole of {path} is named; download these files and name them")
    parts = [str(entry[name]) for name in ("name", "split") if entry.get(name)]
    if entry.get("name") and not entry.get("split"):
        parts.append("train")
    return [":".join([path, *parts])]


def _type_of(entry: Mapping[str, Any]) -> str:
    kind = entry.get("type")
    return "fields" if isinstance(kind, Mapping) else str(kind or "").partition(":")[0].removesuffix(".default")


def _read_entry(draft: Draft, key: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """The data.fields that a data set needs; what cannot be said is named."""
    kind, said = entry.get("type"), dict(entry)
    fields = dict(_TYPES.get(_type_of(entry), {}))
    if isinstance(kind, Mapping):
        said |= kind
    elif kind and _type_of(entry) not in _TYPES:
        draft.lose(f"{key}.type", kind, "the format of its rows is found from their keys; tunesmith preview shows it")
    elif ":" in str(kind):
        draft.lose(f"{key}.type", kind, "its prompt is not known here; another text: data.chat_template")
    for name, value in said.items():
        if name in (*_PLACE, "type") or value is None:
            continue
        if name in _FIELDS:
            fields[_FIELDS[name]] = str(value)
        elif name == "field":
            fields["text"] = str(value)
        elif name == "message_property_mappings" and isinstance(value, Mapping):
            fields |= _properties(draft, f"{key}.{name}", value)
        else:
            _read_option(draft, f"{key}.{name}", name, value)
    return fields


def _properties(draft: Draft, key: str, value: Mapping[str, Any]) -> dict[str, str]:
    fields = {}
    for name, column in value.items():
        if name in _PROPERTIES:
            fields[_PROPERTIES[name]] = str(column)
        elif name != column and column not in _THOUGHTS:
            draft.lose(f"{key}.{name}", column, "keys of a turn other than role and content keep their names")
    return fields


def _read_option(draft: Draft, key: str, name: str, value: Any) -> None:
    """An option of a data set that is not a column."""
    if name in ("chat_template", "chat_template_jinja"):
        turn_template(draft, key, value)
    elif name in ("field_thinking", "template_thinking_key") and value in _THOUGHTS:
        draft.note(key, f"{value} of a turn is read as its reasoning")
    elif name == "roles" and isinstance(value, Mapping):
        for role, words in value.items():
            if others := [word for word in _as_list(words) if word not in (*_ROLES.get(str(role), ()), role)]:
                draft.lose(f"{key}.{role}", others, "roles are known by their usual names")
    elif (name, value) in (("roles_to_train", ["assistant"]), ("train_on_eos", "turn"), ("train_on_eot", "turn")):
        draft.note(key, "replies and their stop tokens are trained, always")
    elif name in ("roles_to_train",) and value in (["assistant", "user"], ["user", "assistant"]):
        draft.ours["data.train_on"] = "all"
    elif name in ("trust_remote_code", "preprocess_shards"):
        draft.note(key, "data never runs code, and is prepared once")
    else:
        draft.lose(key, value, "data sets have no such option")


def _agree(draft: Draft, key: str, fields: list[dict[str, str]]) -> None:
    """One mapping for all data sets, which is what data.fields is."""
    for name in dict.fromkeys(name for found in fields for name in found):
        values = list(dict.fromkeys(found.get(name) for found in fields))
        if len(values) == 1:
            draft.ours[f"data.fields.{name}"] = values[0]
        elif all(value in _FOUND.get(name, ()) for value in values if value is not None):
            draft.note(f"{key}.{name}", "differs between the data sets; each is found by its name")
        else:
            draft.lose(f"{key}.{name}", values, "differs between the data sets; data.fields is the same for all")


_FOUND = {  # columns that are found without data.fields
    "messages": ("messages", "conversations", "conversation"), "role": ("role", "from"),
    "content": ("content", "value"), "system": ("system", "system_prompt"), "text": ("text",),
    "prompt": ("prompt", "question", "query", "instruction"), "completion": ("completion", "answer", "response"),
    "tools": ("tools",),
}  # fmt: skip


def _choose_text(draft: Draft, key: str, kinds: list[str]) -> None:
    """The text around the rows: raw text has none; Axolotl puts alpaca's prompt around all but chats."""
    raw = [kind in ("completion", "pretrain") for kind in kinds]
    if kinds and all(raw):
        draft.ours["data.format"] = "text"
        draft.ours.setdefault("data.fields.text", "text")
    elif any(raw):
        draft.lose(f"{key}.type", kinds, "raw text and chats in one run: data.format is the same for all")
    is_chat = "chat_template" in kinds or "chat_template" in draft.theirs or "chat_template_jinja" in draft.theirs
    if not is_chat and not any(raw) and "input_output" not in kinds:
        draft.ours["data.chat_template"] = "alpaca"
        draft.note(f"{key}.type", "rows are trained with alpaca's prompt, as there (data.chat_template alpaca)")


def turn_per_epoch(target: str) -> Turn:
    def turn(draft: Draft, key: str, value: Any) -> None:
        times = number(value)
        if not is_number(times) or times < 0:
            draft.lose(key, value, "not a number of times in an epoch")
            return
        if not times:
            return
        if target == "train.eval_steps" and not _has_eval(draft):
            draft.note(key, "nothing to evaluate on")
            return
        share = draft.share_of_epochs(times, key)
        if share:
            draft.ours[target] = share
        elif not draft.ours.get("train.max_steps"):
            draft.note(key, "the end of a run is always evaluated and saved")

    return turn


def _has_eval(draft: Draft) -> bool:
    return bool(draft.ours.get("data.eval") or draft.ours.get("data.eval_split"))


_KNOWN_PLUGINS = ("cut_cross_entropy", "liger", "kernels", "expert_parallel", "swanlab")  # speed, and a tracker


def turn_plugins(draft: Draft, key: str, value: Any) -> None:
    for name in _as_list(value):
        if any(f".{known}." in str(name) for known in _KNOWN_PLUGINS):
            draft.leave_out(str(name).rpartition(".")[2], "kernels change the speed, not the result")
        else:
            draft.lose(key, name, "plugins are not loaded")


def turn_total_batch(draft: Draft, key: str, value: Any) -> None:
    """Rows of a step; their older name for micro_batch_size times gradient_accumulation_steps."""
    rows, total = number(draft.theirs.get("micro_batch_size", ROWS)), number(value)
    if not is_number(total) or total < 1:
        draft.lose(key, value, "not a number of rows")
    elif is_number(rows) and rows and "gradient_accumulation_steps" not in draft.theirs:
        draft.ours["train.grad_accum_steps"] = max(1, int(total // rows))
    else:
        draft.note(key, "micro_batch_size and gradient_accumulation_steps say it")


def turn_peft(draft: Draft, key: str, value: Any) -> None:
    for name, below in (value if isinstance(value, Mapping) else {"": value}).items():
        draft.lose(
            f"{key}.{name}".rstrip("."), below, MISSING_KEYS.get(name, "an adapter is described by the section lora")
        )


TURNS: dict[str, Turn] = {
    "plugins": turn_plugins,
    "batch_size": turn_total_batch,
    "peft": turn_peft,
    "datasets": turn_datasets("data.train"),
    "pretraining_dataset": turn_datasets("data.train"),
    "test_datasets": turn_datasets("data.eval"),
}
LAST: dict[str, Turn] = {  # after epochs and data are known
    "saves_per_epoch": turn_per_epoch("train.save_steps"),
    "evals_per_epoch": turn_per_epoch("train.eval_steps"),
}
