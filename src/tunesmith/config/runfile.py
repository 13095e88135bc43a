"""Build the config from a run file and flags; report all problems at once, with suggestions for typos."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tunesmith.config.foreign import explain_key, explain_typo
from tunesmith.config.plainyaml import MAX_CHARACTERS, dump, load, show
from tunesmith.config.ranges import explain_value
from tunesmith.config.schema import RunConfig
from tunesmith.config.section import Section
from tunesmith.config.suggest import did_you_mean, edit_distance, suggest_keys, suggest_words
from tunesmith.errors import ConfigError
from tunesmith.reading import read_text_or_pipe

SHORTHANDS = {
    "--model": "model.path",
    "--tokenizer": "model.tokenizer",
    "--data": "data.train",
    "--eval-data": "data.eval",
    "--output": "train.output_dir",
}
_MAX_GUESSES = 100  # unknown keys that get a suggestion
OPEN_MAPS = ("model.config", "data.template_kwargs")  # free keys below these
STAGES = "stages"  # the list of a run file with several stages; see config/stages.py


def leaf_fields(model: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted key -> field for every key, in the order of docs/config.md."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            leaves |= leaf_fields(annotation, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = field
    return leaves


def takes_list(field: FieldInfo) -> bool:
    options = [field.annotation, *get_args(field.annotation)]
    return any(get_origin(option) in (list, tuple) for option in options)


def explain_flag(typed: str, flags: Sequence[str]) -> str:
    """The problem with a flag that a command does not have.

    Args:
        typed: with its dashes.
        flags: what the command has, without dashes.
    """
    known, name = leaf_fields(RunConfig), typed.lstrip("-")
    dotted = SHORTHANDS.get(f"--{name}", name)
    if name in flags:
        return f"{typed}: unknown flag; did you mean --{name}?"
    if dotted in known or dotted.startswith(tuple(f"{open_map}." for open_map in OPEN_MAPS)):
        return f"{typed}: this command has no such flag (it ignores {dotted} in a run file)"
    return f"{typed}: unknown flag{explain_unknown(name, list(flags), '--')}"


_SHORT_NAMES = {flag[2:].replace("-", "_"): dotted for flag, dotted in SHORTHANDS.items()}
_SECTION_HINTS = {
    "model": "model.path names the model",
    "data": "data.train names the data",
    "data.fields": "as in data.fields.prompt question",
    "model.config": "as in model.config.hidden_size 256",
    "data.template_kwargs": "as in data.template_kwargs.enable_thinking false",
    "optim": "optim.name is the optimizer, optim.lr the learning rate",
    "lora": "lora.kind lora trains an adapter",
    "train": "train.epochs and train.max_steps say how long",
}


def explain_unknown(key: str, known: list[str], dashes: str = "") -> str:
    """What was probably meant by an unknown key or flag, as "; ..."; "" where nothing is near.

    Args:
        known: dotted keys, and the short names of flags.
        dashes: "--" for a flag.
    """
    plain = key.replace("-", "_")
    if re.fullmatch(r"data\.(train\..*|weights?|mix\w*|probs|ratios?)", plain):
        return "; a source with a weight, epochs or a limit is an item of data.train in a YAML run file"
    if plain in _SECTION_HINTS:
        return f"; it is a section: {dashes}{_SECTION_HINTS[plain]}".replace(": --as in ", ": as in --")
    name = plain.rpartition(".")[2]
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    if name in _SHORT_NAMES and "fields" not in plain:
        same_name.insert(0, _SHORT_NAMES[name])
    if same_name:
        return did_you_mean(list(dict.fromkeys(same_name))[:2], dashes)
    limit = 1 if "." in plain else 0  # a slip in a key of ours comes before a name of another tool
    if slips := [k for k in known if edit_distance(plain, k.replace("-", "_"), limit) <= limit]:
        return did_you_mean(slips[:2], dashes)
    if hint := explain_key(plain):
        return f"; {hint}"
    if found := did_you_mean(suggest_keys(key, known), dashes):
        return found
    name, hint = explain_typo(plain)
    return f"; {name}: {hint}" if hint else ""


def find_recipe(path: Path) -> Path:
    """The file of recipe:NAME in the package; other paths unchanged."""
    name = str(path).removeprefix("recipe:")
    if name == str(path):
        return path
    folder = Path(__file__).parents[1] / "recipes"
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(str(path), [f"no such recipe; known: {', '.join(known)}"], code="unknown-recipe")
    return folder / f"{name}.yaml"


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a run file."""
    try:
        text = read_text_or_pipe(find_recipe(path))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            str(path), [f"cannot be read: {reason}. Give the path of a YAML run file."], code="file-unreadable"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), ["is not UTF-8 text, so not a YAML run file"], code="wrong-encoding") from None
    try:
        loaded = load(text)
    except ValueError as error:
        raise ConfigError(str(path), [str(error)], code="broken-yaml") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            str(path), ["must contain sections (model:, data:, optim:, lora:, train:)"], code="no-sections"
        )
    return loaded


def set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        below = tree.get(name)
        if not isinstance(below, dict):
            below = tree[name] = {}
        tree = below
    tree[last] = value


def unknown_keys(tree: Mapping[str, Any], known: list[str], prefix: str = "") -> list[str]:
    problems = []
    sections = {k.rsplit(".", depth)[0] for k in known for depth in range(1, k.count(".") + 1)}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if dotted in known or dotted in OPEN_MAPS:
            continue
        if dotted in sections:
            if isinstance(value, Mapping):
                problems += unknown_keys(value, known, f"{dotted}.")
            elif value is not None:
                hint = explain_key(dotted) or _SECTION_HINTS[dotted]
                problems.append(f"{dotted}: is a section and needs keys below it, not {show(value)}; {hint}")
        elif isinstance(value, Mapping) and not (prefix and explain_key(dotted)):
            problems.append(f"{dotted}: unknown section" + _explain_section(dotted, list(value), known))
        elif isinstance(value, list) and STAGES in known and suggest_words(dotted, [STAGES]):
            problems.append(f"{dotted}: unknown key; did you mean {STAGES}?")
        elif len(problems) < _MAX_GUESSES:
            problems.append(f"{dotted}: unknown key{explain_unknown(dotted, known)}")
        else:
            problems.append(f"{dotted}: unknown key")
    return problems


def _explain_section(name: str, keys: list[str], known: list[str]) -> str:
    """What an unknown section was meant to be: by its name, else by the keys in it."""
    sections = list(dict.fromkeys(key.rpartition(".")[0] or key for key in known))  # STAGES is a key and a section
    if found := suggest_keys(name, sections):
        return did_you_mean(found)
    if hint := explain_key(name):
        return f"; {hint}"
    owners = [section for section in sections if keys and all(f"{section}.{key}" in known for key in keys)]
    return did_you_mean(owners[:2]) or f"; the sections are {', '.join(s for s in sections if '.' not in s)}"


def _without(tree: Mapping[str, Any], known: list[str], prefix: str = "") -> dict[str, Any]:
    """The tree without unknown keys, so that other problems are found in the same pass."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if dotted in known or dotted in OPEN_MAPS:
            kept[name] = value
        elif any(k.startswith(f"{dotted}.") for k in known) and isinstance(value, Mapping):
            kept[name] = _without(value, known, f"{dotted}.")
    return kept


_EITHER = {
    "data.cache": "auto, true or false",
    "data.share_prefix": "auto, true or false",
    "data.workers": "auto or a whole number",
    "train.sharded_checkpoints": "auto, true or false",
}
"""Keys that take a word or a value of another kind."""


def explain_problems(error: ValidationError, is_python: bool = False) -> list[str]:
    """One line for each problem; a missing key is named as a flag, or as an argument of the Python API."""
    flags = {dotted: flag for flag, dotted in SHORTHANDS.items()}
    fields = leaf_fields(RunConfig)
    problems = []
    for item in error.errors(include_url=False):
        names = [str(part) for part in item["loc"]]
        dotted = ".".join(name for name in names if not name.isdigit())
        if dotted not in fields and (whole := dotted.rpartition(".")[0]) in _EITHER:  # one error for each alternative
            problems.append(f"{whole}: must be {_EITHER[whole]}, not {show(item['input'])}")
            continue
        if item["type"] in ("missing", "too_long") and dotted == "optim.betas":
            problems.append("optim.betas: needs two numbers, as in --optim.betas 0.9 0.999")
        elif item["type"] == "missing":
            if dotted in ("model", "data", "train"):  # the section is missing: name its required key
                dotted = {"model": "model.path", "data": "data.train", "train": "train.output_dir"}[dotted]
            flag = flags.get(dotted, f"--{dotted}")
            given = f"{flag[2:].replace('-', '_')}=..." if is_python else flag
            problems.append(f"{dotted}: missing; give {given} or set it in the YAML")
        elif item["type"] == "value_error" and not dotted:
            problems += str(item["ctx"]["error"]).split("\n")
        elif item["type"] == "value_error":
            problems += [f"{dotted}: {line}" for line in str(item["ctx"]["error"]).split("\n")]
        elif item["type"] == "literal_error":
            expected = item["ctx"]["expected"].replace("'", "")
            hint = did_you_mean(suggest_words(str(item["input"])[:100], expected.replace(" or ", ", ").split(", ")))
            problems.append(f"{dotted}: {show(item['input'])} is not one of {expected}{hint}")
        else:
            needed = explain_value(dotted, fields.get(dotted), item["type"], item["input"])
            other = f"{item['msg'][0].lower()}{item['msg'][1:]}, not {show(item['input'])}"
            problems.append(f"{dotted}: {needed or other}")
    return list(dict.fromkeys(problems))


C = TypeVar("C", bound=Section)


def resolve_config(
    model: type[C],
    yaml_path: Path | None,
    flags: Mapping[str, Any],
    flag_problems: list[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> C:
    """Build the config from a YAML file and flags (flags win).

    Args:
        model: RunConfig or PreviewConfig.
        flags: dotted key -> value as given.
        flag_problems: from `explain_flag`; reported with all other problems.
        arguments: sections given in Python, as in a file; they win over the file.

    Raises:
        ConfigError: with every problem of file, flags and arguments at once.
    """
    tree, problems = read_tree(yaml_path, arguments)
    if STAGES in tree:
        problems.append(f"{STAGES}: this command takes a run file without stages")
    config, more = build_config(model, tree, flags, is_python=arguments is not None)
    problems += [*(flag_problems or []), *more]
    if problems or config is None:
        raise ConfigError(name_source(yaml_path, arguments), problems, exit_code=2 if flag_problems else 1)
    return config


def name_source(yaml_path: Path | None, arguments: Mapping[str, Any] | None) -> str:
    """Where a config comes from, for the first line of its problems."""
    return str(yaml_path or ("the command line" if arguments is None else "the arguments"))


def read_tree(yaml_path: Path | None, arguments: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """The sections of the file, overridden by those given in Python; and the problems with their keys."""
    known = [*leaf_fields(RunConfig), STAGES]
    tree = read_yaml(yaml_path) if yaml_path else {}
    problems = unknown_keys(tree, known)
    if arguments is not None:
        problems += unknown_keys(arguments, known)
        tree = join_trees(tree, arguments)
    return tree, problems


def build_config(
    model: type[C], tree: Mapping[str, Any], flags: Mapping[str, Any], is_python: bool
) -> tuple[C | None, list[str]]:
    """The config of sections and flags, and the problems with their values; None if there are any.

    Args:
        tree: of which unknown keys, and keys that the model does not have, are left out.
        is_python: names a missing key as an argument of the Python API.
    """
    tree = _without(tree, list(leaf_fields(model)))
    for dotted, value in flags.items():
        set_dotted(tree, dotted, value)
    _split_lists(tree)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        return None, explain_problems(error, is_python)
    if len(dump_yaml(config)) > MAX_CHARACTERS:
        return None, [
            "the names and settings exceed the size limit of a run file, so the run could not be resumed; name a "
            "folder or a pattern (in quotes) instead of each file"
        ]
    return config, []


def flatten_sections(sections: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim": {"lr": 1e-5}} -> {"optim.lr": 1e-5}.

    Raises:
        ConfigError: a section or a key is unknown.
    """
    known = list(leaf_fields(RunConfig))
    if problems := unknown_keys(sections, known):
        raise ConfigError("the arguments", problems)
    return {
        f"{section}.{name}": value
        for section, below in sections.items()
        if isinstance(below, Mapping)
        for name, value in _leaves(below, section, known)
    }


def _leaves(tree: Mapping[str, Any], prefix: str, known: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}.{name}" not in known:
            yield from ((f"{name}.{below}", v) for below, v in _leaves(value, f"{prefix}.{name}", known))
        else:
            yield name, value


def join_trees(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of sections; the second wins key by key."""
    joined = dict(tree)
    for name, value in over.items():
        below = joined.get(name)
        joined[name] = join_trees(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return joined


_LISTS = (
    ("data", "train"), ("data", "eval"), ("data", "system_prompts"), ("train", "trackers"), ("model", "add_tokens"),
    ("lora", "target_modules"), ("lora", "target_parameters"), ("lora", "modules_to_save"),
)  # fmt: skip


_ALONE: dict[str, Any] = {"train": (str, Mapping)}  # what may stand without a list around it


def _split_lists(tree: dict[str, Any]) -> None:
    """Turn single names into lists of one ("train: chats.jsonl", "trackers: wandb")."""
    for section, key in _LISTS:
        below = tree.get(section)
        if isinstance(below, dict) and isinstance(below.get(key), _ALONE.get(key, str)):
            below[key] = [below[key]]


def list_recipes() -> list[tuple[str, str]]:
    """Name and first sentence of every recipe in the package."""
    recipes = []
    for file in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")):
        comment = []
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("# ") or line.startswith("#  "):
                break
            comment.append(line.removeprefix("# "))
        recipes.append((file.stem, " ".join(comment).split(": ")[0].split(". ")[0].rstrip(".")))
    return recipes


def dump_yaml(config: Section) -> str:
    """The resolved config as YAML; reads back to the same config."""
    return dump(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON schema of a run file, for editors (yaml-language-server)."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "tunesmith run"
    # in a file, every section may be left to flags, and one name may replace a list of one
    schema.pop("required", None)
    for definition in schema["$defs"].values():
        definition.pop("required", None)
    for section, key in _LISTS:
        own = schema["$defs"][f"{section.title()}Section"]["properties"][key]
        options = own.pop("anyOf", None) or [{"type": own.pop("type"), "items": own.pop("items")}]
        items = options[0]["items"]
        first, *others = items.get("anyOf", [items])  # a name, or a source
        own["anyOf"] = [first, *options, *others]
    schema["properties"][STAGES] = _stages_schema(schema["properties"])
    return schema


def _stages_schema(sections: Mapping[str, Any]) -> dict[str, Any]:
    name = {
        "type": "string",
        "pattern": r"^[\w][\w-]*$",
        "description": "Name of the stage: letters, digits, - and _. Its folder is RUN/N-NAME.",
    }
    return {
        "type": "array",
        "minItems": 1,
        "description": "Trainings to do one after another as one run, each from the model of the one before.",
        "items": {
            "type": "object",
            "properties": {"name": name, **sections},
            "required": ["name"],
            "additionalProperties": False,
        },
    }
