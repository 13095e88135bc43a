"""Rules between the keys of a config, each a list of problems that name the keys and a fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.config.sources import SourceSection

if TYPE_CHECKING:
    from tunesmith.config.data_keys import DataSection
    from tunesmith.config.train_keys import TrainSection

NO_AMOUNT = (None, None, None)


def check_lengths(data: DataSection, micro_batch_tokens: int | None) -> list[str]:
    """The problem, if a packed forward is too small for one sample."""
    if not (micro_batch_tokens and data.max_seq_len and micro_batch_tokens < data.max_seq_len):
        return []
    return [
        f"train.micro_batch_tokens: {micro_batch_tokens} cannot hold one sample of data.max_seq_len "
        f"{data.max_seq_len}; set it to {data.max_seq_len} or more, or lower data.max_seq_len"
    ]


def check_held_out(data: DataSection, train: TrainSection) -> list[str]:
    """Held-out rows given twice, and keys that need some."""
    problems = []
    if data.eval and data.eval_split:
        problems.append("data.eval_split: data.eval is given too; keep one of the two")
    if not (data.eval or data.eval_split):
        for name in ("eval_steps", "eval_generate"):
            if getattr(train, name):
                problems.append(f"train.{name}: nothing to evaluate on; give data.eval or data.eval_split")
    if train.early_stop_patience and not train.eval_steps:
        problems.append("train.early_stop_patience: needs train.eval_steps and data to evaluate on")
    return problems


def check_draws(data: DataSection) -> list[str]:
    """A share of nothing, and shares that need a chat template."""
    problems = []
    if data.system_prompt_share < 1 and not data.system_prompts:
        problems.append("data.system_prompt_share: nothing to add; give data.system_prompts")
    for name, is_given in (("system_prompts", data.system_prompts), ("empty_think_share", data.empty_think_share < 1)):
        if is_given and data.chat_template == "none":
            problems.append(f"data.{name}: needs a chat template; data.chat_template is none")
    return problems


def check_stream(data: DataSection, train: TrainSection) -> list[str]:
    """What a stream, which is never read as a whole before training, cannot know."""
    problems = []
    if data.stream and train.max_steps is None:
        problems.append(
            "train.max_steps: data.stream needs it, since the number of rows is not known before training; at the end "
            "of the data the next epoch begins"
        )
    if data.stream and data.share_prefix is True:
        problems.append("data.share_prefix: data.stream packs rows as they come; leave one of the two out")
    if data.stream and data.eval_split:
        problems.append("data.eval_split: data.stream cannot hold rows out; give files of their own with data.eval")
    if data.stream and any(isinstance(source, SourceSection) and source.amount != NO_AMOUNT for source in data.train):
        problems.append(
            "data.train: data.stream reads its sources one after another, without weight, epochs or limit; leave these "
            "out, or data.stream, or write mixed files first"
        )
    return problems
