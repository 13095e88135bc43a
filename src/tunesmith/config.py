"""The config of a run: YAML sections that are dotted flags, every problem reported at once, no torch needed.

The text under each field is its help in `tunesmith train --help`, in README and in the JSON schema.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from tunesmith.errors import ConfigError
from tunesmith.files import StrictLoader


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1, so `lr: yes` would train at a learning rate of 1."""
        has_bool = any(isinstance(item, bool) for item in (value if isinstance(value, list | tuple) else [value]))
        if has_bool and _means_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("must be a number; YAML reads yes, no, on and off as true and false")
        return value


def _means_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(_means_number(part) for part in get_args(annotation))


class ModelSection(Section):
    path: str
    """What to train: a local Hugging Face folder, a run of ours, a hub id, or new:PRESET for random weights."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: the model's own. A new:PRESET model needs one."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model's folder. Off: such a model is refused."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Overrides of a preset's transformers config, as in --model.config.hidden_size 256."""


class FieldsSection(Section):
    prompt: str | None = None
    """Column with the question: a string, or a list of messages. Dots reach inside: instances.0.input."""
    completion: str | None = None
    """Column with the answer: a string, one message, or a list of messages."""
    messages: str | None = None
    """Column with the list of turns."""
    role: str | None = None
    """Key of a turn that says who speaks (default: role or from)."""
    content: str | None = None
    """Key of a turn that holds its text (default: content or value)."""
    system: str | None = None
    """Column with the system prompt."""
    history: str | None = None
    """Column with earlier [question, answer] pairs."""
    tools: str | None = None
    """Column with the tool schemas, a list or JSON text."""
    instruction: str | None = None
    """Column with an alpaca instruction."""
    input: str | None = None
    """Column with an alpaca input."""
    output: str | None = None
    """Column with an alpaca output."""
    text: str | None = None
    """Column with raw text, a string or a list of lines."""
    label: str | None = None
    """Column of true/false (as in KTO data): rows with false are left out."""


class DataSection(Section):
    train: list[str]
    """File(s), folder, glob or hub id (owner/name, owner/name:split) to train on."""
    eval: list[str] | None = None
    """Held-out data in the same forms, never trained on."""
    eval_split: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training rows held out for evaluation, drawn by the seed."""
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "xtuner", "text"] = "auto"
    """How to read a row; auto recognises it from its keys."""
    fields: FieldsSection = Field(default_factory=FieldsSection)
    """Which column plays which part, as in --data.fields.prompt question."""
    chat_template: str | None = None
    """A .jinja file, chatml, alpaca, or none (prompt + completion + EOS); default: the model's own."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the template, as in --data.template_kwargs.enable_thinking false."""
    max_seq_len: int | None = Field(default=None, ge=8)
    """Longest sample in tokens; default: 2048, or the model's context where that is shorter."""
    overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    """A chat longer than max_seq_len: cut its end, leave it out, cut it in pieces, or end. Raw text is always split."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens of a chat are trained: every reply, the last reply, or everything, the questions too."""
    train_reasoning: bool = True
    """Train what a reply thinks before its </think>; off, it is context only."""
    history: Literal["auto", "unroll", "last_turn"] = "auto"
    """One sample for all turns where the template allows it (auto), one a turn (unroll), or the last turn only."""
    control_text: Literal["plain", "refuse", "allow"] = "plain"
    """A text that spells a control token (<|im_end|>): encode it as plain text, refuse its row, or let it be one."""
    max_refused: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of bad rows above which the command ends."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows of the training data."""


_Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
DEFAULT_WARMUP_RATIO = 0.03


class OptimSection(Section):
    name: Literal["adamw"] = "adamw"
    """Optimizer: AdamW (Loshchilov and Hutter 2019), fused where torch has it."""
    lr: float = Field(default=2e-5, gt=0.0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "minimind"] = "cosine"
    """Course of the learning rate after warmup; minimind: lr * (0.1 + 0.5 * (1 + cos)), from 1.1 lr to 0.1 lr."""
    warmup_ratio: float = Field(default=DEFAULT_WARMUP_RATIO, ge=0.0, lt=1.0)
    """Share of the steps over which lr rises from 0."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Number of steps over which lr rises from 0; wins over warmup_ratio."""
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where cosine and linear end, as a share of lr."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decay of the weight matrices; biases, norms and embeddings have none."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    """AdamW's running averages."""
    eps: float = Field(default=1e-8, gt=0.0)
    """AdamW's divisor floor."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Gradients are scaled down to this norm; 0 turns clipping off."""


LARGEST_SEED = 2**63 - 1  # torch takes no larger one


class TrainSection(Section):
    output_dir: str
    """The RUN folder; must not exist yet, or be empty."""
    epochs: float = Field(default=1.0, gt=0.0, le=10_000)
    """Passes over the data; fractions count."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps; wins over epochs."""
    micro_batch_tokens: int | None = Field(default=None, ge=8)
    """Tokens of one packed forward, at least max_seq_len; default: max(max_seq_len, 2048)."""
    grad_accum_steps: int = Field(default=1, ge=1)
    """Forwards per optimizer step. The loss is the mean over all their supervised tokens."""
    precision: Literal["auto", "fp32", "bf16", "bf16_pure", "fp16"] = "auto"
    """bf16, fp16: autocast over fp32 weights; bf16_pure: bf16 weights; auto: bf16 on a GPU that has it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    compile: bool = False
    """torch.compile the model; pays off on long GPU runs only."""
    deterministic: bool = False
    """Only deterministic kernels (slower on a GPU; the CPU path is deterministic anyway)."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Decides everything random: new weights, eval split, order, dropout."""
    log_steps: int = Field(default=1, ge=1)
    """A line in metrics.jsonl every so many steps."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate every so many steps and at the end; default: at the end only."""
    save_steps: int | None = Field(default=None, ge=1)
    """A checkpoint every so many steps; default: 500."""
    save_minutes: float | None = Field(default=10.0, gt=0.0)
    """A checkpoint also every so many minutes; null: by steps only."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints stay, besides the best one."""
    early_stop_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a lower eval_loss."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or infinite: end the run, or leave it out (up to 10 in a row)."""
    trackers: list[Literal["tensorboard", "wandb", "swanlab", "trackio"]] = Field(default_factory=list)
    """Also log to these (each an extra: pip install 'tunesmith[wandb]')."""


class RunConfig(Section):
    """One training run, as resolved from YAML and flags and saved as RUN/config.yaml."""

    model: ModelSection
    data: DataSection
    optim: OptimSection = Field(default_factory=OptimSection)
    train: TrainSection

    @model_validator(mode="after")
    def _validate_across(self) -> RunConfig:
        """Rules between keys; each names both keys and a way out."""
        data, train = self.data, self.train
        problems = []
        if train.micro_batch_tokens and data.max_seq_len and train.micro_batch_tokens < data.max_seq_len:
            problems.append(
                f"train.micro_batch_tokens: {train.micro_batch_tokens} cannot hold one sample of data.max_seq_len "
                f"{data.max_seq_len}; set it to {data.max_seq_len} or more, or lower data.max_seq_len"
            )
        if data.eval and data.eval_split:
            problems.append("data.eval_split: data.eval is given too; keep one of the two")
        has_eval = bool(data.eval or data.eval_split)
        if train.eval_steps and not has_eval:
            problems.append("train.eval_steps: nothing to evaluate on; give data.eval or data.eval_split")
        if train.early_stop_patience and not train.eval_steps:
            problems.append("train.early_stop_patience: needs train.eval_steps and data to evaluate on")
        # a resolved config holds both keys, so a ratio at its default, or at 0, counts as not given
        if self.optim.warmup_steps is not None and self.optim.warmup_ratio not in (0.0, DEFAULT_WARMUP_RATIO):
            problems.append(
                f"optim.warmup_steps: optim.warmup_ratio {self.optim.warmup_ratio} is given too; keep one of the two "
                "(set warmup_ratio to 0, or warmup_steps to null)"
            )
        if self.model.config and not self.model.path.startswith("new:"):
            problems.append("model.config: overrides are for new:PRESET models; this one has weights of its own")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class TokenizerConfig(Section):
    """What tokenizer needs of a run's config."""

    data: DataSection


class PreviewConfig(Section):
    """What preview and check need of a run's config."""

    model: ModelSection
    data: DataSection


SHORTHANDS = {
    "--model": "model.path",
    "--tokenizer": "model.tokenizer",
    "--data": "data.train",
    "--eval-data": "data.eval",
    "--output": "train.output_dir",
}
OPEN_MAPS = ("model.config", "data.template_kwargs")  # any key below these is the user's own


def leaf_fields(model: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted key -> field, for every key that a person can set, in the order of the page."""
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
    """recipe:NAME -> the file in the package; other paths as they are."""
    name = str(path).removeprefix("recipe:")
    if name == str(path):
        return path
    folder = Path(__file__).parent / "recipes"
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(str(path), [f"no such recipe; known: {', '.join(known)}"])
    return folder / f"{name}.yaml"


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a run file."""
    try:
        text = find_recipe(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(str(path), [f"cannot be read: {reason}. Give the path of a YAML run file."]) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), ["is not UTF-8 text, so not a YAML run file"]) from None
    try:
        loaded = yaml.load(text, Loader=StrictLoader)  # a SafeLoader: plain data only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(str(path), [f"{where}{getattr(error, 'problem', None) or error}"]) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(str(path), ["must hold sections (model:, data:, optim:, train:)"])
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
                problems.append(f"{dotted}: is a section and needs keys below it, not {value!r}")
        elif isinstance(value, Mapping) and not prefix:
            guess = difflib.get_close_matches(dotted, sections, n=1)
            problems.append(f"{dotted}: unknown section" + (f"; did you mean {guess[0]}?" if guess else ""))
        else:
            problems.append(f"{dotted}: unknown key{suggest_key(dotted, known)}")
    return problems


def _without(tree: Mapping[str, Any], known: list[str], prefix: str = "") -> dict[str, Any]:
    """The tree less its unknown keys, so that the other problems are found in the same go."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if dotted in known or dotted in OPEN_MAPS:
            kept[name] = value
        elif any(k.startswith(f"{dotted}.") for k in known) and isinstance(value, Mapping):
            kept[name] = _without(value, known, f"{dotted}.")
    return kept


def _explain(error: ValidationError) -> list[str]:
    flags = {dotted: flag for flag, dotted in SHORTHANDS.items()}
    problems = []
    for item in error.errors(include_url=False):
        names = [str(part) for part in item["loc"]]
        dotted = ".".join(name for name in names if not name.isdigit())
        if item["type"] in ("missing", "too_long") and dotted == "optim.betas":
            problems.append("optim.betas: needs two numbers, as in --optim.betas 0.9 0.999")
        elif item["type"] == "missing":
            if dotted in ("model", "data", "train"):  # the whole section is missing: name its required keys
                dotted = {"model": "model.path", "data": "data.train", "train": "train.output_dir"}[dotted]
            problems.append(f"{dotted}: missing; give {flags.get(dotted, '--' + dotted)} or set it in the YAML")
        elif item["type"] == "value_error" and not dotted:
            problems += str(item["ctx"]["error"]).split("\n")
        elif item["type"] == "value_error":
            problems.append(f"{dotted}: {item['ctx']['error']}, not {item['input']!r}")
        elif item["type"] == "literal_error":
            expected = item["ctx"]["expected"].replace("'", "")
            guess = difflib.get_close_matches(str(item["input"]), expected.replace(" or ", ", ").split(", "), n=1)
            hint = f"; did you mean {guess[0]}?" if guess else ""
            problems.append(f"{dotted}: {item['input']!r} is not one of {expected}{hint}")
        else:
            problems.append(f"{dotted}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}")
    return list(dict.fromkeys(problems))


C = TypeVar("C", bound=Section)


def resolve_config(
    model: type[C], yaml_path: Path | None, flags: Mapping[str, Any], unknown_flags: list[str] | None = None
) -> C:
    """Build the config from a YAML file and flags (flags win).

    Args:
        model: RunConfig or PreviewConfig.
        flags: dotted key -> value as typed.
        unknown_flags: flags that no command knows; reported with everything else.

    Raises:
        ConfigError: with every problem of file and flags at once.
    """
    known = list(leaf_fields(RunConfig))
    tree = read_yaml(yaml_path) if yaml_path else {}
    problems = _unknown_keys(tree, known)
    tree = _without(tree, list(leaf_fields(model)))
    for dotted, value in flags.items():
        _set_dotted(tree, dotted, value)
    flag_names = [*known, *(flag.removeprefix("--") for flag in SHORTHANDS)]
    for key in unknown_flags or []:
        dotted = SHORTHANDS.get(f"--{key}", key)
        if any(dotted == k or (k in OPEN_MAPS and dotted.startswith(f"{k}.")) for k in known):
            problems.append(f"--{key}: this command has no such flag (a run file may hold {dotted}; it is not read)")
        else:
            problems.append(f"--{key}: unknown flag{suggest_key(key, flag_names, '--')}")
    _split_lists(tree)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        problems += _explain(error)
    if problems:
        source = str(yaml_path) if yaml_path else "the command line"
        raise ConfigError(source, problems, exit_code=2 if unknown_flags else 1)
    return config


_LISTS = (("data", "train"), ("data", "eval"), ("train", "trackers"))


def _split_lists(tree: dict[str, Any]) -> None:
    """One name where a list is meant ("train: chats.jsonl", "trackers: wandb") counts as a list of one."""
    for section, key in _LISTS:
        below = tree.get(section)
        if isinstance(below, dict) and isinstance(below.get(key), str):
            below[key] = [below[key]]


def dump_yaml(config: Section) -> str:
    """The resolved config as YAML; reads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON schema of a run file, for editors (yaml-language-server)."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "tunesmith run"
    # in a file, every section may be left to flags, and one name may stand for a list of one
    schema.pop("required", None)
    for definition in schema["$defs"].values():
        definition.pop("required", None)
    for section, key in _LISTS:
        own = schema["$defs"][f"{section.title()}Section"]["properties"][key]
        options = own.pop("anyOf", None) or [{"type": own.pop("type"), "items": own.pop("items")}]
        own["anyOf"] = [options[0]["items"], *options]
    return schema
