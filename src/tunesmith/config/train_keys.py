"""The section `train`: how long, in what steps, how exactly, and what is kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from tunesmith.config.plainyaml import show
from tunesmith.config.section import Section

RouterLoss = Literal["transformers", "layers", "sequences"]
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


def _require_steps(steps: str) -> str:
    parse_steps(steps)
    return steps


_Steps = Annotated[
    str,
    BeforeValidator(lambda steps: str(steps) if type(steps) is int else steps),
    AfterValidator(_require_steps),
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
    """bf16: computes in bf16, trains fp32 weights; fp16: the same by autocast; bf16_pure: bf16 weights and averages;
    auto: bf16 on a GPU or CPU that is faster with it (AMX; on AMD AVX512_BF16), else fp32. A resumed run keeps what it
    began with."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    parallel: Literal["auto", "ddp", "fsdp", "deepspeed", "none"] = "auto"
    """How several processes of a launcher (torchrun) share the model. fsdp: each keeps a shard of weights, gradients
    and averages; ddp: each has the whole model; deepspeed: as train.deepspeed says. auto: deepspeed with
    train.deepspeed, ddp for an adapter, else fsdp; one process needs none of them."""
    deepspeed: str | None = None
    """JSON file of DeepSpeed's settings (ZeRO stage 1, 2 or 3); the extra tunesmith[deepspeed]."""
    sharded_checkpoints: bool | Literal["auto"] = "auto"
    """With parallel fsdp: each process writes its shards, instead of the first one gathering a model folder. auto: if
    that does not fit into the first one's memory. An adapter is always gathered."""
    resume: bool = False
    """Continue the run in output_dir if it has begun, instead of refusing: for launchers that start a command again."""
    compile: bool = False
    """torch.compile each block of the model at the start, which takes about a minute; for long runs."""
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
    profile_steps: _Steps | None = None
    """Step, or first and last step (10-12), whose time torch's profiler records: a trace for each process goes to
    RUN/profile, a short table to the log."""
    trackers: list[Literal["tensorboard", "wandb", "swanlab", "trackio"]] = Field(default_factory=list)
    """Trackers to log to (each an extra: pip install 'tunesmith[wandb]')."""


def parse_steps(steps: str) -> tuple[int, int]:
    """First and last step: "10-12" -> (10, 12), "10" -> (10, 10).

    Raises:
        ValueError: it is neither a step nor a range of steps.
    """
    first, separator, last = (part.strip() for part in steps.partition("-"))
    if not first.isascii() or not first.isdigit() or (separator and not (last.isascii() and last.isdigit())):
        raise ValueError(f"must be a step (10), or the first and the last step (10-12), not {show(steps)}")
    numbers = int(first), int(last or first)
    if not 1 <= numbers[0] <= numbers[1] <= 2**53:
        raise ValueError(f"steps count from 1, and the first comes before the last, not {show(steps)}")
    return numbers


def interval_steps(every: float, total_steps: int) -> int:
    """Steps between two evaluations or checkpoints, of a number of steps or a share of all."""
    return int(every) if every >= 1 else max(1, round(every * total_steps))
