"""Convert a config of TRL, LLaMA-Factory or Axolotl to a run file; every key is converted or named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.config.deepspeed_file import find_refused
from tunesmith.config.foreign import SAME, explain_key
from tunesmith.config.foreign_reasons import HARMLESS_KEYS, MISSING_KEYS
from tunesmith.config.plainyaml import dump, show
from tunesmith.config.runfile import explain_problems, read_yaml
from tunesmith.config.schema import DEFAULT_WARMUP_RATIO, RunConfig
from tunesmith.errors import ConfigError
from tunesmith.foreign import axolotl, llamafactory, trl
from tunesmith.foreign.classify import AXOLOTL, LLAMA_FACTORY, find_method, find_tool
from tunesmith.foreign.draft import Draft, Tree, is_on, number
from tunesmith.foreign.settings import SWITCHES, TURNS, Turn, is_switch

_KEPT = ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "dist_config", "accelerator_config")  # as comments
_STRATEGIES = {"eval_strategy": "train.eval_steps", "evaluation_strategy": "train.eval_steps",
               "save_strategy": "train.save_steps"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Converted:
    """Attributes:
    tool: "axolotl", "llama-factory", "trl" or "minimind".
    method: "sft" or "pretraining"; "chat" for a script that talks to a model.
    ours: dotted key -> value.
    notes: about keys that were converted with a change.
    left_out: why -> keys that need no counterpart.
    lost: keys of theirs whose meaning the run file does not have.
    problems: what is to be corrected by hand.
    templates: file name -> chat template, to be written beside the run file.
    text: the run file; "" for a script that talks to a model.
    command: of tunesmith, in place of a command of theirs.
    differences: between a run of theirs and one of the run file.
    """

    tool: str
    method: str
    ours: Tree
    notes: list[str]
    left_out: dict[str, list[str]]
    lost: list[str]
    problems: list[str]
    templates: dict[str, str]
    text: str
    command: str = ""
    differences: list[str] = field(default_factory=list)

    def remarks(self) -> list[str]:
        return [
            *(f"note: {note}" for note in self.notes),
            *(f"left out: {', '.join(keys)}: {why}" for why, keys in self.left_out.items()),
            *(f"no counterpart: {lost}" for lost in self.lost),
            *(f"differs: {difference}" for difference in self.differences),
            *(f"correct by hand: {problem}" for problem in self.problems),
        ]


def convert_file(path: Path, output: Path | None = None, dataset_info: Path | None = None) -> Converted:
    """Raises:
    ConfigError: it cannot be read, has no known key, or is for something that tunesmith does not do.
    """
    theirs = read_yaml(path)
    method = find_method(theirs)
    if method in ("sft", "pretraining") and not find_tool(theirs):
        raise ConfigError(str(path), ["has no known key of TRL, LLaMA-Factory or Axolotl"], code="no-known-keys")
    if method not in ("sft", "pretraining"):
        raise ConfigError(
            str(path), [f"is {method}; tunesmith does supervised fine-tuning and pre-training"], code="other-method"
        )
    template = f"{(output or path).stem}.jinja"
    return convert(theirs, path.parent, dataset_info, str(output.parent / template) if output else template)


def convert(
    theirs: Mapping[str, Any],
    folder: Path = Path(),
    dataset_info: Path | None = None,
    template_file: str = "chat_template.jinja",
) -> Converted:
    """Convert the keys of a file that is for SFT or pre-training."""
    tool = find_tool(theirs)
    is_version_1 = tool == LLAMA_FACTORY and "model" in theirs
    flat = llamafactory.flatten_version_1(theirs) if is_version_1 else dict(theirs)
    given = {key: value for key, value in flat.items() if value is not None and value != "" and value != []}
    draft = Draft(tool, given, folder, dataset_info, template_file)
    turns, last, defaults, lora_defaults, draft.rows = _rules(tool, is_version_1)
    for key, value in given.items():
        if key not in last and key not in draft.seen and key not in _STRATEGIES:
            _turn(draft, key, value, turns)
    _choose_adapter(draft)
    written = _write_defaults(draft, defaults, lora_defaults)
    for key in [key for key in given if key in _STRATEGIES]:
        _turn_strategy(draft, key, given[key])
    for key in [key for key in given if key in last]:
        _turn(draft, key, given[key], last)
    if find_method(theirs) == "pretraining":
        draft.ours.setdefault("data.format", "text")
    _finish_batch(draft)
    _drop_evaluation(draft)
    if written:
        draft.notes.append(f"written out, as the default of {tool} is another one: {', '.join(written)}")
    text = "".join(f"# {line}\n" for comment in draft.comments for line in comment.splitlines())
    text += dump(nest(draft.ours))
    return Converted(
        tool=tool, method=find_method(theirs), ours=draft.ours, notes=draft.notes, left_out=draft.left_out,
        lost=draft.lost, problems=find_problems(draft), templates=draft.templates, text=text,
    )  # fmt: skip


def _rules(tool: str, is_version_1: bool) -> tuple[dict[str, Turn], dict[str, Turn], Tree, Tree, int]:
    """How keys of this tool are turned, those turned last, its defaults, those of an adapter, rows of a batch."""
    if tool == AXOLOTL:
        return TURNS | axolotl.TURNS, axolotl.LAST, axolotl.DEFAULTS, axolotl.LORA_DEFAULTS, axolotl.ROWS
    if tool == LLAMA_FACTORY:
        defaults = llamafactory.DEFAULTS_1 if is_version_1 else llamafactory.DEFAULTS
        rows = llamafactory.ROWS_1 if is_version_1 else llamafactory.ROWS
        return TURNS | llamafactory.TURNS, {}, defaults, llamafactory.LORA_DEFAULTS, rows
    return TURNS | trl.TURNS, {}, trl.DEFAULTS, trl.LORA_DEFAULTS, trl.ROWS


def _turn(draft: Draft, key: str, value: Any, turns: Mapping[str, Turn]) -> None:
    before = dict(draft.ours)
    _turn_key(draft, key, value, turns)
    draft.origins |= {ours: key for ours, now in draft.ours.items() if ours not in before or before[ours] is not now}


def _turn_key(draft: Draft, key: str, value: Any, turns: Mapping[str, Turn]) -> None:
    if is_on(value) and (file := _deepspeed_file(key, value)):
        _turn_deepspeed(draft, key, file)
    elif key in _KEPT and is_on(value):
        draft.comments.append(f"not used here, where one process trains:\n{dump({key: value}).rstrip()}")
    elif key in SWITCHES and not is_switch(value):
        draft.lose(key, value, "neither true nor false")
    elif key in turns:
        turns[key](draft, key, value)
    elif key in SAME:
        draft.ours[SAME[key]] = number(value)
    elif key in HARMLESS_KEYS:
        draft.leave_out(key, HARMLESS_KEYS[key])
    elif key in MISSING_KEYS:
        if is_on(value):
            draft.lose(key, value, MISSING_KEYS[key])
    elif is_on(value):
        draft.lose(key, value, explain_key(key) or "not known here")


def _deepspeed_file(key: str, value: Any) -> str:
    """The file of DeepSpeed's settings that a key names; "" if it names none."""
    if key == "deepspeed" and isinstance(value, str):
        return value
    if key == "dist_config" and isinstance(value, Mapping) and value.get("name") == "deepspeed":
        return str(value.get("config_file") or "")
    return ""


def _turn_deepspeed(draft: Draft, key: str, file: str) -> None:
    draft.ours["train.deepspeed"] = file
    draft.note(key, f"{file} is kept; start the run with torchrun --nproc-per-node N -m tunesmith train FILE")
    beside = draft.folder / file
    if reason := find_refused(str(beside if beside.is_file() else file)):
        draft.note(key, f"{file} will be refused: {reason}")


def _choose_adapter(draft: Draft) -> None:
    """An adapter is trained where the file says so; keys of one alone are left out where all weights are trained."""
    theirs, ours = draft.theirs, draft.ours
    if draft.tool == LLAMA_FACTORY:
        peft = theirs.get("peft_config")  # of version 1, which trains all weights by default
        kind = peft.get("name", "lora") if isinstance(peft, Mapping) else theirs.get("finetuning_type")
        is_adapter = kind not in ("full", "freeze") and (kind is not None or "train_dataset" not in theirs)
    else:
        named = next((theirs[name] for name in ("adapter", "use_peft") if name in theirs), None)
        is_adapter = is_on(named) if named is not None else "lora.rank" in ours and draft.tool != AXOLOTL
    if is_adapter:
        ours.setdefault("lora.kind", "lora")
        return
    for key in [key for key in ours if key.startswith("lora.")]:
        draft.leave_out(key, "the file trains all weights")
        del ours[key]


def _write_defaults(draft: Draft, defaults: Tree, lora_defaults: Tree) -> list[str]:
    """Their defaults where ours differ, so that the run is theirs."""
    ours, written = draft.ours, []
    steps, ratio = ours.get("optim.warmup_steps"), ours.get("optim.warmup_ratio")
    if steps is not None and ratio is not None:
        dropped = "optim.warmup_ratio" if steps else "optim.warmup_steps"
        draft.note(
            dropped, f"{ours.pop(dropped)} is left out; the other one of warmup_steps and warmup_ratio is given too"
        )
    model_defaults = RunConfig.model_fields
    for key, value in (defaults | (lora_defaults if "lora.kind" in ours else {})).items():
        section, name = key.split(".")
        own = model_defaults[section].annotation.model_fields[name].default  # type: ignore[union-attr]
        if key in ours or (key == "optim.warmup_ratio" and "optim.warmup_steps" in ours):
            continue
        if value == own and key not in ("optim.lr", "data.max_seq_len"):
            continue
        ours[key] = value
        written.append(f"{key} {show(value)}")
    return written


def _turn_strategy(draft: Draft, key: str, value: Any) -> None:
    """When to evaluate or save: by steps, each epoch, or not at all."""
    target = _STRATEGIES[key]
    if str(value) in ("no", "False"):
        draft.ours.pop(target, None)
        draft.note(key, "the end of a run is always saved, and evaluated where there is held-out data")
    elif str(value) == "epoch":
        share = draft.share_of_epochs(1, key)
        draft.ours.pop(target, None)
        if share:
            draft.ours[target] = share
    elif str(value) == "best":
        draft.note(key, "the best evaluated checkpoint is always kept")
    else:
        draft.leave_out(f"{key} {value}", "runs are evaluated and saved by steps")


def _finish_batch(draft: Draft) -> None:
    """Rows of a batch -> tokens of a pack."""
    ours, theirs = draft.ours, draft.theirs
    length = ours.get("data.max_seq_len")
    if not isinstance(length, int):
        return
    ours["train.micro_batch_tokens"] = draft.rows * length
    is_packed = is_on(theirs.get("sample_packing")) or is_on(theirs.get("packing")) or is_on(theirs.get("neat_packing"))
    more = "" if is_packed else "; shorter rows fill up a pack, so a step has more rows than there"
    draft.note("train.micro_batch_tokens", f"{draft.rows} x {length} tokens, packed{more}")


def _drop_evaluation(draft: Draft) -> None:
    """Keys of evaluation without held-out data, or of patience without evaluation."""
    ours = draft.ours
    if ours.get("data.eval") and ours.get("data.eval_split"):
        draft.note("data.eval_split", "left out; data.eval names held-out data")
        del ours["data.eval_split"]
    if "train.eval_steps" in ours and not (ours.get("data.eval") or ours.get("data.eval_split")):
        draft.note("train.eval_steps", "left out; there is no held-out data")
        del ours["train.eval_steps"]
    if "train.early_stop_patience" in ours and "train.eval_steps" not in ours:
        draft.note("train.early_stop_patience", "left out; nothing is evaluated on the way")
        del ours["train.early_stop_patience"]
    if ours.get("data.eval_split") == 0:
        del ours["data.eval_split"]
    if ours.get("train.trackers") == []:
        del ours["train.trackers"]
    if ours.get("optim.warmup_ratio") == DEFAULT_WARMUP_RATIO or "optim.warmup_steps" in ours:
        ours.pop("optim.warmup_ratio", None)


def find_problems(draft: Draft) -> list[str]:
    needed = {"model.path": "?", "data.train": ["?"], "train.output_dir": "?"}
    try:
        RunConfig.model_validate(nest(needed | draft.ours))
    except ValidationError as error:
        return [_name_origin(problem, draft.origins) for problem in explain_problems(error)]
    return []


def _name_origin(problem: str, origins: Mapping[str, str]) -> str:
    """The problem with a key of ours, with their key that has the value."""
    ours, colon, rest = problem.partition(":")
    theirs = origins.get(ours, ours)
    return problem if theirs == ours else f"{ours} (from {theirs}){colon}{rest}"


def nest(dotted: Mapping[str, Any]) -> Tree:
    """{"train.seed": 0} -> {"train": {"seed": 0}}, sections in the order of the docs."""
    tree: Tree = {section: {} for section in ("model", "data", "optim", "lora", "train")}
    for key, value in dotted.items():
        below = tree
        *parents, last = key.split(".")
        for name in parents:
            below = below.setdefault(name, {})
        below[last] = value
    return {section: keys for section, keys in tree.items() if keys}
