"""Data and defaults of LLaMA-Factory, of its versions 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.config.plainyaml import load
from tunesmith.foreign.draft import Draft, Tree, is_number, number
from tunesmith.foreign.settings import Turn, turn_adapter, turn_quantizer
from tunesmith.sources.dataset_info import list_entries

DEFAULTS: Tree = {
    "optim.lr": 5e-5, "optim.schedule": "linear", "optim.warmup_ratio": 0.0, "train.epochs": 3.0, "train.seed": 42,
    "train.gradient_checkpointing": True, "data.max_seq_len": 2048,
}  # fmt: skip
DEFAULTS_1: Tree = DEFAULTS | {"optim.lr": 1e-4, "optim.schedule": "constant"}  # version 1 has no schedule by default
LORA_DEFAULTS: Tree = {"lora.rank": 8, "lora.dropout": 0.0}
ROWS, ROWS_1 = 8, 1
_DEFAULT_FOLDER = "data"


def flatten_version_1(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of version 1 by the names of version 0, where they mean the same."""
    names = {"model": "model_name_or_path", "lr_scheduler_config": "lr_scheduler_type"}
    flat = {names.get(key, key): value for key, value in theirs.items()}
    if isinstance(flat.get("lr_scheduler_type"), Mapping):
        flat["lr_scheduler_type"] = flat["lr_scheduler_type"].get("name")
    return flat


def turn_tuning(draft: Draft, key: str, value: Any) -> None:
    if value == "full":
        return
    if value == "freeze":
        draft.lose(key, value, "all weights are trained; no layers can be frozen")
        return
    turn_adapter(draft, key, value)


def turn_peft(draft: Draft, key: str, value: Any) -> None:
    """Version 1's adapter, with peft's names."""
    if not isinstance(value, Mapping):
        draft.lose(key, value, "not a map")
        return
    turn_tuning(draft, f"{key}.name", value.get("name"))
    names = {"r": "lora.rank", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout"}
    for name, below in value.items():
        if name in names and is_number(number(below)):
            draft.ours[names[name]] = number(below)
        elif name == "target_modules":
            draft.ours["lora.target_modules"] = ["all-linear"] if below == "all" else below
        elif name != "name" and below is not None:
            draft.lose(f"{key}.{name}", below, "an adapter is described by the section lora")


def turn_names(part: str) -> Turn:
    """Names in dataset_info.json; a folder with that file gives each its file and columns."""

    def turn(draft: Draft, key: str, value: Any) -> None:
        names = value if isinstance(value, list) else str(value).split(",")
        names = [str(name).strip() for name in names if str(name).strip()]
        folder = str(draft.theirs.get("dataset_dir", _DEFAULT_FOLDER))
        draft.seen.add("dataset_dir")
        found = find_dataset_info(draft)
        if folder.startswith(("REMOTE:", "ONLINE")):
            paths = [name if "/" in name else f"{folder.partition(':')[2]}:{name}" for name in names]
            draft.ours[part] = _limited(draft, part, paths)
            draft.lose("dataset_dir", folder, "its dataset_info.json is on the hub; download it and name its folder")
            return
        draft.ours[part] = _limited(draft, part, [f"{found or folder}:{name}" for name in names])
        if found is None:
            draft.note(
                key, f"names in {folder}/dataset_info.json, which is not here; name its folder with --dataset-info"
            )
            return
        entries = list_entries(found)
        for name in names:
            if name not in entries:
                draft.lose(key, name, f"{found / 'dataset_info.json'} has no such data set")
        if part == "data.train" and any(_has_pictures(entries.get(name)) for name in names):
            draft.lose(key, value, "a data set has pictures, sound or video, which are not trained")

    return turn


def _limited(draft: Draft, part: str, paths: list[str]) -> list[Any]:
    """Several data sets as sources of which max_samples rows are read, where it is given."""
    limit = number(draft.theirs.get("max_samples"))
    if part != "data.train" or len(paths) == 1 or not is_number(limit):
        return list(paths)
    return [{"path": path, "limit": limit} for path in paths]


def _has_pictures(entry: Any) -> bool:
    columns = entry.get("columns") if isinstance(entry, Mapping) else None
    return isinstance(columns, Mapping) and bool({"images", "videos", "audios"} & set(columns))


def find_dataset_info(draft: Draft) -> Path | None:
    """The folder with dataset_info.json: the one that the user names, else dataset_dir here or above the config."""
    if draft.dataset_info is not None:
        named = draft.dataset_info
        return named.parent if named.name == "dataset_info.json" else named
    name = Path(str(draft.theirs.get("dataset_dir", _DEFAULT_FOLDER)))
    above = [draft.folder, *draft.folder.resolve().parents]
    return next((place for place in (name, *(up / name for up in above)) if list_entries(place)), None)


def turn_data_file(draft: Draft, key: str, value: Any) -> None:
    """Version 1's train_dataset: a YAML file of data sets, a data file, or a hub id."""
    name = Path(str(value))
    if name.suffix not in (".yaml", ".yml"):
        draft.ours["data.train"] = [str(value)]
        return
    info = draft.dataset_info
    places = [name, *([info / name.name] if info else [])]
    places += [up / name for up in (draft.folder, *draft.folder.resolve().parents)]
    file = next((place for place in places if place.is_file()), None)
    entries = _load_entries(file) if file else {}
    if not entries:
        draft.ours["data.train"] = [str(value)]
        draft.lose(key, value, "the file that names the data is not here; set data.train to the data itself")
        return
    draft.ours["data.train"] = []
    for title, entry in entries.items():
        path = str(entry.get("path") or "")
        root = file.parent.parent if file else Path()
        local = root / path
        split = f":{entry['split']}" if entry.get("split") else ""
        draft.ours["data.train"].append(str(local) if local.exists() else path + split)
        for name_, below in entry.items():
            if name_ == "size":
                draft.lose(f"{key}.{title}.size", below, "data.limit counts the rows of all data sets together")
            elif name_ not in ("path", "split", "source", "converter"):
                draft.lose(f"{key}.{title}.{name_}", below, "no such option")


def _load_entries(file: Path) -> dict[str, Mapping[str, Any]]:
    try:
        loaded = load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = loaded if isinstance(loaded, dict) else {}
    return {name: entry for name, entry in entries.items() if isinstance(entry, Mapping)}


def turn_samples(draft: Draft, key: str, value: Any) -> None:
    """The first rows of each data set: data.limit of one, the limit of each source of several (see `turn_names`)."""
    names = draft.ours.get("data.train") or str(draft.theirs.get("dataset", "")).split(",")
    if not is_number(number(value)):
        draft.lose(key, value, "not a number of rows")
    elif len(names) == 1:
        draft.ours["data.limit"] = number(value)


def turn_mixing(draft: Draft, key: str, value: Any) -> None:
    if key == "mix_strategy" and value in ("concat", None):
        draft.note(key, "all rows of all data sets, in one random order")
    else:
        draft.lose(key, value, "it counts rows; in data.train each source has a weight, its share of the tokens")


def turn_global_batch(draft: Draft, key: str, value: Any) -> None:
    rows, total = number(draft.theirs.get("micro_batch_size", ROWS_1)), number(value)
    if is_number(total) and total >= 1 and is_number(rows) and rows:
        draft.ours["train.grad_accum_steps"] = max(1, int(total // rows))
    else:
        draft.lose(key, value, "not a number of rows")


def turn_optimizer_options(draft: Draft, key: str, value: Any) -> None:
    draft.lose(key, value, "adamw instead; optim.name has adamw and its 8-bit and paged forms")


TURNS: dict[str, Turn] = {
    "finetuning_type": turn_tuning, "peft_config": turn_peft, "quant_config": turn_quantizer,
    "dataset": turn_names("data.train"), "eval_dataset": turn_names("data.eval"), "train_dataset": turn_data_file,
    "mix_strategy": turn_mixing, "interleave_probs": turn_mixing,
    "max_samples": turn_samples, "global_batch_size": turn_global_batch, "optim_config": turn_optimizer_options,
}  # fmt: skip
