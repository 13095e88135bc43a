"""Data and defaults of TRL's SFT script and of the alignment handbook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.foreign.draft import Draft, Tree, is_number, number
from tunesmith.foreign.settings import Turn, turn_share

DEFAULTS: Tree = {
    "optim.lr": 2e-5, "optim.schedule": "linear", "optim.warmup_ratio": 0.0, "train.epochs": 3.0, "train.seed": 42,
    "train.gradient_checkpointing": True, "data.max_seq_len": 1024,
}  # fmt: skip
LORA_DEFAULTS: Tree = {"lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.05}
ROWS = 8


def _is_evaluated(draft: Draft) -> bool:
    strategy = draft.theirs.get("eval_strategy", draft.theirs.get("evaluation_strategy", "no"))
    return str(strategy) not in ("no", "False")


def turn_name(draft: Draft, key: str, value: Any) -> None:
    """dataset_name with its config and splits."""
    config, theirs = draft.theirs.get("dataset_config"), draft.theirs
    head = f"{value}:{config}" if config else str(value)
    draft.ours["data.train"] = [f"{head}:{theirs.get('dataset_train_split', 'train')}"]
    if _is_evaluated(draft):
        draft.ours["data.eval"] = [f"{head}:{theirs.get('dataset_test_split', 'test')}"]
    draft.seen |= {"dataset_config", "dataset_train_split", "dataset_test_split"}


def turn_mixture(draft: Draft, key: str, value: Any) -> None:
    """The alignment handbook's list of data sets with weights, or its older map of id to weight."""
    entries = value.get("datasets", []) if isinstance(value, Mapping) and "datasets" in value else value
    if isinstance(entries, Mapping):
        entries = [{"id": name, "weight": weight} for name, weight in entries.items()]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        draft.lose(key, value, "not a list of data sets")
        return
    draft.ours["data.train"] = [_name_of(draft, key, entry) for entry in entries]
    for name, below in value.items() if isinstance(value, Mapping) and "datasets" in value else ():
        if name == "test_split_size" and _is_evaluated(draft):
            turn_share(draft, f"{key}.{name}", below)
        elif name == "seed":
            draft.note(f"{key}.{name}", "rows are drawn by train.seed")


def _name_of(draft: Draft, key: str, entry: Mapping[str, Any]) -> str:
    """owner/name:config:split, with a share of the split for a weight below 1."""
    weight = number(entry.get("weight", 1))
    name = str(entry.get("id") or entry.get("path"))
    config = entry.get("config") or entry.get("name")
    split = str(entry.get("split") or "train")
    if not is_number(weight) or weight > 1:
        draft.lose(f"{key}.weight", weight, f"{name} is read once")
    elif weight < 1:
        split += f"[:{weight * 100:g}%]"
    for other in entry:
        if other == "columns":
            draft.note(f"{key}.columns", "columns are found by their names; data.ignore_columns leaves some out")
        elif other not in ("id", "path", "config", "name", "split", "weight"):
            draft.lose(f"{key}.{other}", entry[other], "a data set is named as owner/name:config:split")
    return ":".join([name, *([str(config)] if config else []), split])


def turn_data_options(draft: Draft, key: str, value: Any) -> None:
    for name, below in (value if isinstance(value, Mapping) else {"": value}).items():
        if name in ("add_special_tokens", "append_concat_token", "skip_prepare_dataset"):
            draft.note(f"{key}.{name}", "the template decides which tokens stand around a chat")
        else:
            draft.lose(f"{key}.{name}".rstrip("."), below, "no such option")


TURNS: dict[str, Turn] = {
    "dataset_name": turn_name,
    "dataset_mixture": turn_mixture,
    "datasets": turn_mixture,
    "dataset_mixer": turn_mixture,
    "dataset_kwargs": turn_data_options,
}
