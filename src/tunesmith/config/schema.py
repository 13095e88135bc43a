"""Schema of a run's config: keys, types, defaults and help; imports no torch.

The text under each field is its help in `tunesmith train --help`, in docs/config.md and in the JSON schema.
"""

from __future__ import annotations

import difflib
import encodings.aliases
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tunesmith.config.plainyaml import require_plain, show
from tunesmith.config.rules import check_draws, check_held_out, check_lengths


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number_and_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1, so `lr: yes` would train at a learning rate of 1."""
        if isinstance(value, str) and not value.strip():  # a shell variable that is not set
            raise ValueError("is empty; give a value, or leave it out")
        has_bool = any(isinstance(item, bool) for item in (value if isinstance(value, list | tuple) else [value]))
        if has_bool and _means_number(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError(f"must be a number, not {show(value)}; YAML reads yes, no, on and off as true and false")
        return value


def _means_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(_means_number(part) for part in get_args(annotation))


RouterLoss = Literal["transformers", "layers", "sequences"]
ROUTER_COEFFICIENT = "router_aux_loss_coef"  # of a transformers config


class ModelSection(Section):
    path: str
    """Model to train: a Hugging Face folder, a RUN, a hub id, a .pth of MiniMind, or new:PRESET for random weights."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: the model's own. A new:PRESET model and a .pth need one."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code in the model's folder. Off: such a model is refused."""
    add_tokens: list[str] = Field(default_factory=list)
    """Tokens to add to the tokenizer; with an adapter, only their rows of the embedding are trained. A token that the
    tokenizer has already keeps its id and its row."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Overrides of a preset's transformers config (hidden_size 256), and what a .pth does not say (num_attention_heads
    16); of other models only dropout (resid_pdrop 0.1) and the router loss (router_aux_loss_coef 0.01)."""

    @field_validator("config")
    @classmethod
    def _keep_config(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        require_plain(overrides)
        if type(overrides.get(ROUTER_COEFFICIENT)) is int:  # transformers takes no int for it
            return overrides | {ROUTER_COEFFICIENT: float(overrides[ROUTER_COEFFICIENT])}
        return overrides


class FieldsSection(Section):
    prompt: str | None = None
    """Column with the question: a string, or a list of messages. Dots reach inside: instances.0.input."""
    completion: str | None = None
    """Column with the answer: a string, one message, or a list of messages."""
    messages: str | None = None
    """Column with the list of turns."""
    role: str | None = None
    """Key of a turn with the speaker (default: role or from)."""
    content: str | None = None
    """Key of a turn with the text (default: content or value)."""
    system: str | None = None
    """Column with the system prompt."""
    history: str | None = None
    """Column with earlier turns: [question, answer] pairs, dicts of the two, or messages."""
    reasoning: str | None = None
    """Column with the reasoning before the answer (chain of thought)."""
    tools: str | None = None
    """Column with the tool schemas, a list or JSON text."""
    instruction: str | None = None
    """Column with an alpaca instruction."""
    input: str | None = None
    """Column with an alpaca input or other context; appended to the question after a line break."""
    output: str | None = None
    """Column with an alpaca output."""
    text: str | None = None
    """Column with raw text, a string or a list of lines."""
    label: str | None = None
    """Column of true/false (as in KTO data): rows with false are left out."""


def explain_encoding(name: str) -> str | None:
    """Why a name is not a text encoding; None if it is one."""
    try:
        "a".encode(name)
    except (LookupError, ValueError):
        known = {*encodings.aliases.aliases, *encodings.aliases.aliases.values()} - {"u8", "u16", "u32", "utf"}
        close = difflib.get_close_matches(name.lower().replace("-", "_"), sorted(known), n=1, cutoff=0.6)
        hint = f"did you mean {close[0].replace('_', '-')}?" if close else "give utf-8, gb18030 or cp1252, for one"
        return f"{name!r} is not the name of a text encoding; {hint}"
    return None


class DataSection(Section):
    train: list[str]
    """File(s), folder, glob or hub id (owner/name, owner/name:split) to train on."""
    eval: list[str] | None = None
    """Held-out data in the same forms, never trained on."""
    eval_split: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training rows held out for evaluation, drawn by the seed."""
    format: Literal[
        "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "query_response", "input_output", "xtuner",
        "xlam", "chatgpt_export", "segments", "text",
    ] = "auto"  # fmt: skip
    """Format of the rows; auto detects it from their keys."""
    fields: FieldsSection = Field(default_factory=FieldsSection)
    """Column of each part, as in --data.fields.prompt question."""
    ignore_columns: list[str] = Field(default_factory=list)
    """Columns and keys of turns to ignore; other unread ones are named, or refuse the row as context."""
    chat_template: str | None = None
    """A .jinja file, chatml, alpaca, or none (prompt + completion + EOS); default: the model's own."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the template, as in --data.template_kwargs.enable_thinking false."""
    max_seq_len: int | None = Field(default=None, ge=8)
    """Longest sample in tokens; default: 2048, or the model's context where that is shorter."""
    overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    """A chat longer than max_seq_len: cut its end, drop it, split it, or fail. Raw text is always split."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens of a chat are trained: every reply, the last reply, or everything, the questions too."""
    train_reasoning: bool = True
    """Train the reasoning before </think>; off: it is context only."""
    system_prompts: list[str] = Field(default_factory=list)
    """System prompts to add to training chats without one and without tools, one drawn for each by the seed."""
    system_prompt_share: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of these chats that get a system prompt, drawn by the seed."""
    empty_think_share: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the training rows that keep the empty think block which the template writes, drawn by the seed."""
    history: Literal["auto", "unroll", "last_turn"] = "auto"
    """One sample for all turns where the template allows it (auto), one per turn (unroll), or only the last turn."""
    control_text: Literal["plain", "refuse", "allow"] = "plain"
    """Text that spells a control token (<|im_end|>): encode it as plain text, refuse the row, or allow the token."""
    max_refused: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of bad rows above which the command fails."""
    max_cut_replies: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of the trained replies cut before their stop token (overlong truncate) above which a run does not start."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows of the training data."""
    encoding: str = "utf-8"
    """Encoding of text files (CSV, JSON, text): gb18030, cp1252, utf-16 or another Python name."""
    max_row_mb: float = Field(default=16.0, gt=0.0, le=1000.0)
    """Largest row in MB; a larger one is refused and never parsed. A .txt or .md file may have any size."""

    @field_validator("template_kwargs")
    @classmethod
    def _keep_template_kwargs(cls, variables: dict[str, Any]) -> dict[str, Any]:
        require_plain(variables)
        ours = ("messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception")
        if own := [name for name in ours if name in variables]:
            raise ValueError(f"sets {own[0]}, which tunesmith sets itself; leave it out")
        return variables

    @field_validator("system_prompts")
    @classmethod
    def _keep_system_prompts(cls, prompts: list[str]) -> list[str]:
        if any(not prompt.strip() for prompt in prompts):
            raise ValueError("holds an empty text")
        if any("\ud800" <= char <= "\udfff" for prompt in prompts for char in prompt):
            raise ValueError("holds a lone surrogate (half a character), which no tokenizer can encode")
        return prompts

    @field_validator("encoding")
    @classmethod
    def _know_encoding(cls, name: str) -> str:
        problem = explain_encoding(name)
        if problem:
            raise ValueError(problem)
        return name


_Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
DEFAULT_WARMUP_RATIO = 0.03


class OptimSection(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """Fused AdamW (Loshchilov and Hutter 2019); 8-bit or paged state needs the extra `qlora`."""
    lr: float = Field(default=2e-5, gt=0.0)
    """Peak learning rate; with an adapter (lora.kind) the default is 2e-4."""
    schedule: Literal["cosine", "linear", "constant", "minimind"] = "cosine"
    """Learning rate schedule after warmup; minimind: lr * (0.1 + 0.5 * (1 + cos)), from 1.1 lr to 0.1 lr."""
    warmup_ratio: float = Field(default=DEFAULT_WARMUP_RATIO, ge=0.0, lt=1.0)
    """Share of the steps over which lr rises from 0."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Number of steps over which lr rises from 0; wins over warmup_ratio."""
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Final value of cosine and linear, as a share of lr."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decay of weight matrices; biases, norms and embeddings are not decayed."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    """Coefficients of AdamW's running averages."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Term added to AdamW's divisor."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Largest gradient norm; 0 disables clipping."""


DEFAULT_LORA_LR = 2e-4


LoraKind = Literal["none", "lora", "rslora", "dora", "pissa", "olora"]


class LoraSection(Section):
    kind: LoraKind = "none"
    """Train an adapter instead of all weights: LoRA (Hu et al. 2021) or a variant; none: full fine-tuning."""
    rank: int = Field(default=16, ge=1)
    """Inner dimension of the adapter's two matrices."""
    alpha: float | None = Field(default=None, gt=0.0)
    """The adapter is scaled by alpha / rank (rslora: alpha / sqrt(rank)); default: 2 * rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    target_modules: list[str] = Field(default_factory=lambda: ["all-linear"])
    """all-linear (each linear layer but the head and MoE routers), names of modules, or one regex of whole names."""
    target_parameters: list[str] | None = None
    """Weights that are not modules, such as MoE experts; default: with all-linear, the fused experts."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter, as in lm_head embed_tokens."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained too."""
    lr_ratio: float = Field(default=1.0, gt=0.0)
    """Learning rate of the B matrices over that of the A matrices (LoRA+, Hayou et al. 2024, suggests 16)."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen weights in 4 bits (QLoRA, Dettmers et al. 2023) or 8: bitsandbytes, the extra `qlora`."""
    double_quant: bool = True
    """nf4: also quantise the quantisation constants."""

    @property
    def scale_alpha(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * self.rank


LARGEST_SEED = 2**63 - 1  # torch takes no larger one


def _whole_or_share(every: float) -> float:
    if every >= 1 and every != int(every):
        raise ValueError(f"must be a whole number of steps, or a share of all steps below 1, not {every:g}")
    return int(every) if every >= 1 else every


_Interval = Annotated[
    float,
    Field(gt=0.0, le=2**53),
    AfterValidator(_whole_or_share),
    PlainSerializer(lambda every: every, return_type=int | float),  # 5, not 5.0
]


class TrainSection(Section):
    output_dir: str
    """The RUN folder; must be new or empty."""
    epochs: float = Field(default=1.0, gt=0.0, le=10_000)
    """Passes over the data; fractions count."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps; wins over epochs."""
    micro_batch_tokens: int | None = Field(default=None, ge=8)
    """Tokens of one packed forward pass, at least max_seq_len; default: max(max_seq_len, 2048)."""
    grad_accum_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step. The loss is the mean over all their supervised tokens."""
    router_loss: RouterLoss = "transformers"
    """Load balancing loss of a mixture of experts, times model.config.router_aux_loss_coef. transformers: a mean over
    layers; layers: a sum over layers (MiniMind 3); sequences: that of each document by itself, divided by the experts a
    token (MiniMind before 2026-03-24)."""
    precision: Literal["auto", "fp32", "bf16", "bf16_pure", "fp16"] = "auto"
    """bf16, fp16: autocast over fp32 weights; bf16_pure: bf16 weights; auto: bf16 on a GPU that has it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    compile: bool = False
    """torch.compile the model; worth it only for long GPU runs."""
    deterministic: bool = False
    """Use only deterministic kernels (slower on a GPU; the CPU path is always deterministic)."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of all randomness: new weights, eval split, order, dropout."""
    log_steps: int = Field(default=1, ge=1)
    """Steps between lines in metrics.jsonl."""
    eval_steps: _Interval | None = None
    """Steps between evaluations, or a share of all steps (0.1); the end is always evaluated. Default: only the end."""
    save_steps: _Interval | None = None
    """Steps between checkpoints, or a share of all steps (0.25); default: 500."""
    save_minutes: float | None = Field(default=10.0, gt=0.0)
    """Minutes between checkpoints, besides save_steps; null: only save_steps."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of checkpoints to keep, besides the best one."""
    early_stop_patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without a lower eval_loss."""
    eval_generate: int = Field(default=0, ge=0, le=100)
    """Number of held-out rows to answer at each evaluation, greedily and with at most 128 tokens each: exact match,
    ROUGE-L and the share that stops go to metrics.jsonl, the replies to the report. 0: none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a NaN or infinite loss or gradient: stop the run, or skip the step (up to 10 in a row)."""
    trackers: list[Literal["tensorboard", "wandb", "swanlab", "trackio"]] = Field(default_factory=list)
    """Trackers to log to (each an extra: pip install 'tunesmith[wandb]')."""


def interval_steps(every: float, total_steps: int) -> int:
    """Steps between two evaluations or checkpoints, of a number of steps or a share of all."""
    return int(every) if every >= 1 else max(1, round(every * total_steps))


class RunConfig(Section):
    """One training run, as resolved from YAML and flags and saved as RUN/config.yaml."""

    model: ModelSection
    data: DataSection
    optim: OptimSection = Field(default_factory=OptimSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    train: TrainSection

    @model_validator(mode="before")
    @classmethod
    def _choose_lr(cls, tree: Any) -> Any:
        """The default lr of an adapter is ten times that of full fine-tuning (Schulman et al. 2025)."""
        if not isinstance(tree, dict):
            return tree
        lora, optim = tree.get("lora") or {}, tree.get("optim") or {}
        is_adapter = isinstance(lora, dict) and lora.get("kind", "none") != "none"
        if is_adapter and isinstance(optim, dict) and optim.get("lr") is None:
            return tree | {"optim": optim | {"lr": DEFAULT_LORA_LR}}
        return tree

    @model_validator(mode="after")
    def _validate_across(self) -> RunConfig:
        """Rules between keys; each message names both keys and a fix."""
        data, train = self.data, self.train
        problems = [*check_lengths(data, train.micro_batch_tokens), *check_draws(data), *check_held_out(data, train)]
        # a resolved config has both keys, so a ratio at its default or at 0 counts as not given
        if self.optim.warmup_steps is not None and self.optim.warmup_ratio not in (0.0, DEFAULT_WARMUP_RATIO):
            problems.append(
                f"optim.warmup_steps: optim.warmup_ratio {self.optim.warmup_ratio} is given too; keep one of the two "
                "(set warmup_ratio to 0, or warmup_steps to null)"
            )
        lora = self.lora
        if lora.kind == "none":
            default = LoraSection()  # a resolved config has all keys, so a key at its default counts as not given
            given = sorted(key for key in lora.model_fields_set if getattr(lora, key) != getattr(default, key))
            problems += [f"lora.{key}: lora.kind is none; give a kind (lora) or leave it out" for key in given]
        if lora.quantize != "none" and lora.kind in ("pissa", "olora"):
            problems.append(
                f"lora.quantize: {lora.kind} changes the base weights at its start, so they cannot be {lora.quantize}"
            )
        if lora.quantize != "none" and self.model.path.startswith("new:"):
            problems.append("lora.quantize: a new:PRESET model has random weights; train it in full first")
        is_free = self.model.path.startswith("new:") or self.model.path.lower().endswith(PTH_SUFFIXES)
        problems += _check_overrides(self.model.config, is_free)
        if problems:
            raise ValueError("\n".join(problems))
        return self


class _LrFindTrain(TrainSection):
    output_dir: str = ""


class LrFindConfig(RunConfig):
    """A run's config for lr-find, which writes no folder: train.output_dir may be left out."""

    train: _LrFindTrain = Field(default_factory=_LrFindTrain)


PTH_SUFFIXES = (".pth", ".pt")  # of MiniMind's weights, whose names and shapes do not say everything


def is_dropout(name: str) -> bool:
    """Whether a key of a transformers config is a probability of dropout: attention_dropout, resid_pdrop."""
    return "dropout" in name or name.endswith("pdrop")


def _check_overrides(overrides: dict[str, Any], is_free: bool) -> list[str]:
    """Of a model with weights only dropout and the router loss's coefficient may be set: anything else would change
    what its weights mean."""
    problems = []
    for name, value in overrides.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == ROUTER_COEFFICIENT:
            if not (is_number and value >= 0):
                problems.append(f"model.config.{name}: must be a number of at least 0, not {show(value)}")
        elif is_free:
            continue
        elif not is_dropout(name):
            problems.append(
                f"model.config.{name}: overrides are for new:PRESET models; of a model with weights of its own only "
                f"dropout and {ROUTER_COEFFICIENT} can be set"
            )
        elif not (is_number and 0 <= value < 1):
            problems.append(f"model.config.{name}: must be at least 0 and below 1, not {show(value)}")
    return problems


class TokenizerConfig(Section):
    """What tokenizer needs of a run's config."""

    data: DataSection


class _PreviewLora(Section):
    kind: LoraKind = "none"


class _PreviewTrain(Section):
    micro_batch_tokens: int | None = Field(default=None, ge=8)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)


class PreviewConfig(Section):
    """The keys of a run's config that decide its labels: what preview and check read."""

    model: ModelSection
    data: DataSection
    lora: _PreviewLora = Field(default_factory=_PreviewLora)
    train: _PreviewTrain = Field(default_factory=_PreviewTrain)

    @model_validator(mode="after")
    def _validate_across(self) -> PreviewConfig:
        if problems := [*check_lengths(self.data, self.train.micro_batch_tokens), *check_draws(self.data)]:
            raise ValueError("\n".join(problems))
        return self
