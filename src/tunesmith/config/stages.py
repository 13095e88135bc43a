"""Resolve a run file with `stages`: several trainings, one after another, as one run.

A stage is the file's common sections with its own sections over them. The first stage has the model of the file; each
later one starts from the model of the stage before.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tunesmith.config.plainyaml import show
from tunesmith.config.runfile import (
    STAGES,
    build_config,
    join_trees,
    leaf_fields,
    name_source,
    read_tree,
    resolve_config,
    set_dotted,
    unknown_keys,
)
from tunesmith.config.schema import PreviewConfig, RunConfig
from tunesmith.config.section import Section
from tunesmith.config.suggest import did_you_mean, suggest_words
from tunesmith.errors import ConfigError
from tunesmith.runfolder import RunFolder, name_stage

_NAME = re.compile(r"\w[\w-]*")
_LONGEST_NAME = 100  # bytes of UTF-8
_MAX_STAGES = 99
_MODEL_OF_FIRST = ("path", "tokenizer", "revision")  # a later stage has them from the stage before
_FORM = "must be a list of stages, each with a name and its sections: - {name: sft, data: {train: [chats.jsonl]}}"
Tree = dict[str, Any]
C = TypeVar("C", bound=Section)


@dataclass(frozen=True, slots=True)
class Stage(Generic[C]):
    """One stage of a run file.

    Attributes:
        number: from 1.
    """

    name: str
    number: int
    config: C

    @property
    def folder(self) -> str:
        """Name of its folder in RUN."""
        return name_stage(self.number, self.name)


@dataclass(frozen=True, slots=True)
class StagedConfig:
    """A run file with stages, as train resolves it.

    Attributes:
        output_dir: the RUN folder as it was given; each stage has its own folder in it.
    """

    output_dir: str
    stages: tuple[Stage[RunConfig], ...]


def resolve_training(
    yaml_path: Path | None,
    flags: Mapping[str, Any],
    flag_problems: list[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> RunConfig | StagedConfig:
    """The config of a run, or of all its stages; arguments as in `resolve_config`.

    Raises:
        ConfigError: with every problem of all stages at once.
    """
    draft = _read_draft(RunConfig, yaml_path, flags, flag_problems, arguments)
    if draft is None:
        return resolve_config(RunConfig, yaml_path, flags, flag_problems, arguments)
    return StagedConfig(str(draft.output_dir), tuple(draft.build(RunConfig)))


def resolve_stages(
    model: type[C],
    yaml_path: Path | None,
    flags: Mapping[str, Any],
    flag_problems: list[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> list[Stage[C]]:
    """The stages as a command reads them that trains no run; a run file without stages is one stage without a name.

    Args:
        model: PreviewConfig, LrFindConfig or TokenizerConfig.
        name: only this stage.

    Raises:
        ConfigError: with every problem at once; or no stage has this name.
    """
    draft = _read_draft(model, yaml_path, flags, flag_problems, arguments)
    if draft is None:
        if name is not None:
            source = name_source(yaml_path, arguments)
            raise ConfigError(source, [f"stage {show(name)}: there are no stages; leave it out"])
        return [Stage("", 1, resolve_config(model, yaml_path, flags, flag_problems, arguments))]
    if name is not None and name not in draft.names:
        hint = did_you_mean(suggest_words(name, draft.names)) or f"; the stages are {', '.join(draft.names)}"
        raise ConfigError(draft.source, [f"stage {show(name)}: no such stage{hint}"])
    return [stage for stage in draft.build(model) if name in (None, stage.name)]


@dataclass(frozen=True, slots=True)
class _Draft:
    """The stages before their values are checked.

    Attributes:
        trees: for each stage its own sections over the common ones.
        problems: with the names of keys and stages.
        exit_code: of a ConfigError.
    """

    source: str
    names: list[str]
    trees: list[Tree]
    problems: list[str]
    output_dir: Any
    exit_code: int
    is_python: bool

    def build(self, model: type[C]) -> list[Stage[C]]:
        """Raises:
        ConfigError: with every problem of all stages.
        """
        built = [build_config(model, tree, {}, self.is_python) for tree in self.trees]
        configs = [config for config, _ in built if config is not None]
        problems = [*self.problems, *_name_problems(self.names, [found for _, found in built])]
        if len(configs) == len(built):
            problems += _check_adapters(self.names, configs)
        if problems:
            raise ConfigError(self.source, problems, exit_code=self.exit_code)
        return [Stage(name, n, config) for n, (name, config) in enumerate(zip(self.names, configs, strict=True), 1)]


def _name_problems(names: Sequence[str], found: Sequence[Sequence[str]]) -> Iterator[str]:
    """Each problem with its stage; one that all stages have is of the common sections."""
    counts = Counter(problem for problems in found for problem in set(problems))
    shared = {problem for problem, count in counts.items() if count == len(found) > 1}
    yield from dict.fromkeys(problem for problem in found[0] if problem in shared)
    for name, problems in zip(names, found, strict=True):
        yield from (f"stage {name}: {problem}" for problem in problems if problem not in shared)


def _check_adapters(names: Sequence[str], configs: Sequence[Section]) -> Iterator[str]:
    kinds = [config.lora.kind if isinstance(config, RunConfig) else "none" for config in configs]
    for place in range(1, len(names)):
        if "none" not in (kinds[place - 1], kinds[place]):
            yield (
                f"stage {names[place]}: lora.kind {kinds[place]}: the stage before, {names[place - 1]}, trains an "
                "adapter too, and no adapter can be trained on top of another. Train one adapter on the data of both, "
                "or set lora.kind none in one of the two (a full stage merges the adapter before it)"
            )


def _read_draft(
    model: type[Section],
    yaml_path: Path | None,
    flags: Mapping[str, Any],
    flag_problems: list[str] | None,
    arguments: Mapping[str, Any] | None,
) -> _Draft | None:
    """None for a run file without stages."""
    common, problems = read_tree(yaml_path, arguments)
    of_all: Tree = {}
    of_stages: Tree = {}
    for dotted, value in flags.items():
        is_of_stage = dotted.startswith(f"{STAGES}.")
        set_dotted(of_stages if is_of_stage else of_all, dotted.removeprefix(f"{STAGES}."), value)
    if STAGES not in common and not of_stages:
        return None
    items, found = _read_items(common.pop(STAGES, []))
    found += _add_flags(items, of_stages)
    problems += [*(flag_problems or []), *found, *_check_items(items, of_all)]
    source, exit_code = name_source(yaml_path, arguments), 2 if flag_problems else 1
    if not items:
        raise ConfigError(source, problems, exit_code)
    names = [str(item["name"]) for item in items]
    output = _below(join_trees(common, of_all), "train").get("output_dir")
    trees = [_join_stage(model, common, items, place, of_all, output) for place in range(len(items))]
    return _Draft(source, names, trees, problems, output, exit_code, arguments is not None)


def _read_items(given: Any) -> tuple[list[Tree], list[str]]:
    """The stages that have a usable name, and the problems of all."""
    if not isinstance(given, list) or not given:
        return [], [f"{STAGES}: {_FORM}"]
    if len(given) > _MAX_STAGES:
        return [], [f"{STAGES}: has {len(given)} stages; the limit is {_MAX_STAGES}"]
    items: list[Tree] = []
    problems = []
    for number, item in enumerate(given, start=1):
        if not isinstance(item, Mapping):
            problems.append(f"{STAGES}: item {number} is {show(item)}; {_FORM}")
        elif problem := _explain_name(item.get("name"), [one["name"] for one in items]):
            problems.append(f"{STAGES}: item {number}: {problem}")
        else:
            items.append(dict(item))
    return items, problems


def _explain_name(name: Any, others: Sequence[str]) -> str:
    """Why this cannot be the name of a stage; "" if it can."""
    if name is None:
        return "has no name; add one, as in name: sft"
    if not isinstance(name, str):
        return f"name: must be text, not {show(name)}; put it in quotes"
    if not _NAME.fullmatch(name) or len(name.encode(errors="replace")) > _LONGEST_NAME:
        return (
            f"name: {show(name)} cannot name a folder everywhere; use letters, digits, - and _, at most "
            f"{_LONGEST_NAME} bytes"
        )
    return f"name: {show(name)} is the name of another stage" if name in others else ""


def _add_flags(items: list[Tree], of_stages: Mapping[str, Any]) -> list[str]:
    """Join the values of --stages.NAME.KEY to their stages; returns the problems."""
    names = [item["name"] for item in items]
    problems = []
    for name, sections in of_stages.items():
        if name not in names:
            hint = did_you_mean(suggest_words(name, names), f"--{STAGES}.")
            problems.append(f"--{STAGES}.{name}: no such stage{hint or '; the stages are ' + ', '.join(names)}")
        elif not isinstance(sections, Mapping):
            problems.append(f"--{STAGES}.{name}: needs a key, as in --{STAGES}.{name}.train.epochs 2")
        else:
            place = names.index(name)
            items[place] = {"name": name, **join_trees(_without_name(items[place]), sections)}
    return problems


def _check_items(items: Sequence[Tree], of_all: Tree) -> Iterator[str]:
    """Unknown keys, and keys that a stage cannot have."""
    known = list(leaf_fields(RunConfig))
    for place, item in enumerate(items):
        begin = f"stage {item['name']}: "
        yield from (f"{begin}{problem}" for problem in unknown_keys(_without_name(item), known))
        if "output_dir" in _below(item, "train"):
            yield f"{begin}train.output_dir: all stages share one; set it outside of {STAGES}"
        for key in _MODEL_OF_FIRST if place else ():
            if key in _below(item, "model"):
                yield (
                    f"{begin}model.{key}: a stage after the first starts from the model and tokenizer of the stage "
                    f"before, {items[place - 1]['name']}; leave it out"
                )
    for key in ("train", "eval"):
        owners = [item["name"] for item in items if key in _below(item, "data")]
        if owners and key in _below(of_all, "data"):
            yield (
                f"--data.{key}: is meant for all stages, and stages have their own ({', '.join(owners)}); give "
                f"--{STAGES}.{owners[0]}.data.{key}"
            )


def _join_stage(
    model: type[Section], common: Tree, items: Sequence[Tree], place: int, of_all: Tree, output: Any
) -> Tree:
    """The sections of a stage: flags for all stages win over its own, and these over the common ones.

    Args:
        output: the RUN folder.
    """
    item = _without_name(items[place])
    train = _below(common, "train")
    if "epochs" in _below(item, "train") and "max_steps" not in _below(item, "train"):
        train = {key: value for key, value in train.items() if key != "max_steps"}  # which would win over its epochs
    tree = join_trees(join_trees(common | {"train": train}, item), of_all)
    own, given = _below(item, "model"), _below(of_all, "model")
    shared = join_trees(_below(common, "model"), _below(items[0], "model"))
    if issubclass(model, PreviewConfig):  # labels depend on tokenizer and template, which all stages share
        tree["model"] = shared | {key: own[key] for key in own if key == "add_tokens"} | given
        templates = [_below(one, "data").get("chat_template") for one in (common, *items[: place + 1])]
        template = next((name for name in reversed(templates) if name), None)
        tree["data"] = {"chat_template": template} | _below(tree, "data")  # which is saved with the model
    elif place and "path" in given and model is not RunConfig:
        tree["model"] = own | given
    elif place:
        code = {key: value for key, value in (shared | given).items() if key == "trust_remote_code"}
        before = Path(str(output or ""), name_stage(place, items[place - 1]["name"]))
        kinds = [_below(sections, "lora").get("kind") for sections in (of_all, items[place - 1], common)]
        kind = next((kind for kind in kinds if kind is not None), "none")
        saved = RunFolder(before).model if kind == "none" else RunFolder(before).adapter
        tree["model"] = {"path": str(saved)} | code | own
    if isinstance(output, str):
        folder = os.path.join(output, name_stage(place + 1, items[place]["name"]))
        tree["train"] = _below(tree, "train") | {"output_dir": folder}
    return tree


def _without_name(item: Tree) -> Tree:
    """The sections of a stage; one with nothing below it counts as left out."""
    return {key: value for key, value in item.items() if key != "name" and value is not None}


def _below(tree: Mapping[str, Any], section: str) -> Tree:
    below = tree.get(section)
    return dict(below) if isinstance(below, Mapping) else {}
