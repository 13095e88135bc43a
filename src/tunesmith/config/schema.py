"""Schema of a run's config: keys, types, defaults and help; imports no torch.

The text under each field is its help in `tunesmith train --help`, in docs/config.md and in the JSON schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.config.data_keys import DataSection
from tunesmith.config.deepspeed_file import check_deepspeed
from tunesmith.config.plainyaml import require_plain, show
from tunesmith.config.rules import check_draws, check_held_out, check_lengths, check_stream
from tunesmith.config.section import Section
from tunesmith.config.train_keys import LARGEST_SEED, TrainSection

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
        problems += check_deepspeed(train)
        problems += check_stream(data, train)
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
