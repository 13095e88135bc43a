"""Build the config from a run file and flags; report all problems at once, with suggestions for typos."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tunesmith.config.foreign import convert, explain_key, nest
from tunesmith.config.plainyaml import MAX_CHARACTERS, dump, load, show
from tunesmith.config.schema import RunConfig, Section
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


def suggest_key(key: str, known: list[str], dashes: str = "") -> str:
    """ "; did you mean ...?" for a mistyped key; also finds a key that sits in another section."""
    last = key.rsplit(".", 1)[-1]
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == last]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        by_name = {k.rsplit(".", 1)[-1]: k for k in known}
        close = [by_name[m] for m in difflib.get_close_matches(last, list(by_name), n=1, cutoff=0.7)]
    return f"; did you mean {dashes}{close[0]}?" if close else ""


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


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        below = tree.get(name)
        if not isinstance(below, dict):
            below = tree[name] = {}
        tree = below
    tree[last] = value


def _unknown_keys(tree: Mapping[str, Any], known: list[str], prefix: str = "") -> list[str]:
    problems = []
    sections = {k.rsplit(".", depth)[0] for k in known for depth in range(1, k.count(".") + 1)}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if dotted in known or dotted in OPEN_MAPS:
            continue
        if dotted in sections:
            if isinstance(value, Mapping):
                problems += _unknown_keys(value, known, f"{dotted}.")
            elif value is not None:
                hint = explain_key(dotted)
                problems.append(
                    f"{dotted}: is a section and needs keys below it, not {show(value)}" + (f"; {hint}" if hint else "")
                )
        elif isinstance(value, Mapping) and not prefix:
            guess = difflib.get_close_matches(dotted, sections, n=1)
            problems.append(f"{dotted}: unknown section" + (f"; did you mean {guess[0]}?" if guess else ""))
        elif len(problems) < _MAX_GUESSES:
            hint = explain_key(dotted)
            problems.append(f"{dotted}: unknown key{f'; {hint}' if hint else suggest_key(dotted, known)}")
        else:
            problems.append(f"{dotted}: unknown key")
    return problems


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


def _explain(error: ValidationError, is_python: bool = False) -> list[str]:
    """One line for each problem; a missing key is named as a flag, or as an argument of the Python API."""
    flags = {dotted: flag for flag, dotted in SHORTHANDS.items()}
    problems = []
    for item in error.errors(include_url=False):
        names = [str(part) for part in item["loc"]]
        dotted = ".".join(name for name in names if not name.isdigit())
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
            problems.append(f"{dotted}: {item['ctx']['error']}, not {show(item['input'])}")
        elif item["type"] == "literal_error":
            expected = item["ctx"]["expected"].replace("'", "")
            guess = difflib.get_close_matches(str(item["input"]), expected.replace(" or ", ", ").split(", "), n=1)
            hint = f"; did you mean {guess[0]}?" if guess else ""
            problems.append(f"{dotted}: {show(item['input'])} is not one of {expected}{hint}")
        else:
            problems.append(f"{dotted}: {item['msg'][0].lower()}{item['msg'][1:]}, not {show(item['input'])}")
    return list(dict.fromkeys(problems))


C = TypeVar("C", bound=Section)


def resolve_config(
    model: type[C],
    yaml_path: Path | None,
    flags: Mapping[str, Any],
    unknown_flags: list[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> C:
    """Build the config from a YAML file and flags (flags win).

    Args:
        model: RunConfig or PreviewConfig.
        flags: dotted key -> value as given.
        unknown_flags: unknown flags; reported with all other problems.
        arguments: sections given in Python, as in a file; they win over the file.

    Raises:
        ConfigError: with every problem of file, flags and arguments at once.
    """
    known = list(leaf_fields(RunConfig))
    tree = read_yaml(yaml_path) if yaml_path else {}
    problems = _unknown_keys(tree, known)
    if arguments is not None:
        problems += _unknown_keys(arguments, known)
        tree = _join(tree, arguments)
    tree = _without(tree, list(leaf_fields(model)))
    for dotted, value in flags.items():
        _set_dotted(tree, dotted, value)
    flag_names = [*known, *(flag.removeprefix("--") for flag in SHORTHANDS)]
    for key in unknown_flags or []:
        dotted = SHORTHANDS.get(f"--{key}", key)
        if any(dotted == k or (k in OPEN_MAPS and dotted.startswith(f"{k}.")) for k in known):
            problems.append(f"--{key}: this command has no such flag (it ignores {dotted} in a run file)")
        else:
            hint = explain_key(key.replace("-", "_"))
            problems.append(f"--{key}: unknown flag{f'; {hint}' if hint else suggest_key(key, flag_names, '--')}")
    _split_lists(tree)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        problems += _explain(error, arguments is not None)
    if not problems and len(dump_yaml(config)) > MAX_CHARACTERS:
        problems.append(
            "the names and settings exceed the size limit of a run file, so the run could not be resumed; name a "
            "folder or a pattern (in quotes) instead of each file"
        )
    if problems:
        source = str(yaml_path or ("the command line" if arguments is None else "the arguments"))
        raise ConfigError(source, problems, exit_code=2 if unknown_flags else 1)
    return config


def flatten_sections(sections: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim": {"lr": 1e-5}} -> {"optim.lr": 1e-5}.

    Raises:
        ConfigError: a section or a key is unknown.
    """
    known = list(leaf_fields(RunConfig))
    if problems := _unknown_keys(sections, known):
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


def _join(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of sections; the second wins key by key."""
    joined = dict(tree)
    for name, value in over.items():
        below = joined.get(name)
        joined[name] = _join(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return joined


_LISTS = (
    ("data", "train"), ("data", "eval"), ("train", "trackers"), ("model", "add_tokens"), ("lora", "target_modules"),
    ("lora", "target_parameters"), ("lora", "modules_to_save"),
)  # fmt: skip


def _split_lists(tree: dict[str, Any]) -> None:
    """Turn single names into lists of one ("train: chats.jsonl", "trackers: wandb")."""
    for section, key in _LISTS:
        below = tree.get(section)
        if isinstance(below, dict) and isinstance(below.get(key), str):
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


def convert_config(path: Path) -> tuple[str, list[str]]:
    """Convert a TRL, LLaMA-Factory or Axolotl YAML: the run file and remarks.

    Raises:
        ConfigError: it cannot be read, or has no known key.
    """
    dotted, notes, lost = convert(read_yaml(path))
    if not dotted:
        raise ConfigError(str(path), ["has no known key of TRL, LLaMA-Factory or Axolotl"], code="no-known-keys")
    text = dump(nest(dotted))
    remarks = [*(f"note: {note}" for note in notes), *(f"no counterpart: {key}" for key in lost)]
    problems = []
    try:
        RunConfig.model_validate(nest({"model.path": "?", "data.train": ["?"], "train.output_dir": "?"} | dotted))
    except ValidationError as error:
        problems = _explain(error)
    return text, [*remarks, *(f"correct by hand: {problem}" for problem in problems)]


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
        own["anyOf"] = [options[0]["items"], *options]
    return schema
