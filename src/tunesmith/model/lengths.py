"""Choose the length limits of samples and forwards; the same for train, preview and check."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from tunesmith.errors import ModelError

DEFAULT_MAX_SEQ_LEN = 2048
MIN_MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Lengths:
    """Limits for a model and a config.

    Attributes:
        max_seq_len: tokens of the longest sample.
        capacity: tokens of one packed forward.
        remark: the reason for max_seq_len, if it is not the configured value.
    """

    max_seq_len: int
    capacity: int
    remark: str = ""


def choose_lengths(
    model_config: PretrainedConfig, max_seq_len: int | None, micro_batch_tokens: int | None = None
) -> Lengths:
    """Lengths for data.max_seq_len and train.micro_batch_tokens.

    train.micro_batch_tokens lowers the default max_seq_len; config/schema.py refuses it below a max_seq_len that is set
    explicitly.
    """
    chosen, remark = choose_max_seq_len(model_config, max_seq_len)
    if micro_batch_tokens is None:
        return Lengths(chosen, max(chosen, MIN_MICRO_BATCH_TOKENS), remark)
    if max_seq_len is None and micro_batch_tokens < chosen:
        return Lengths(micro_batch_tokens, micro_batch_tokens, "from train.micro_batch_tokens")
    return Lengths(chosen, micro_batch_tokens, remark)


def choose_max_seq_len(config: PretrainedConfig, wanted: int | None) -> tuple[int, str]:
    """max_seq_len, and a remark if it exceeds the context of the model.

    Raises:
        ModelError: the model has learned position embeddings, and not enough of them.
    """
    text_config = config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_MAX_SEQ_LEN, context or DEFAULT_MAX_SEQ_LEN), ""
    if context is None or wanted <= context:
        return wanted, ""
    if getattr(text_config, "rope_parameters", None) is None:
        raise ModelError(
            f"data.max_seq_len {wanted}: the model has only {context} learned positions. Set it to {context} or less.",
            code="max-seq-len-too-long",
        )
    return wanted, f"longer than the model's own context of {context}"
