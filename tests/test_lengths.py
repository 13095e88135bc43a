"""max_seq_len and tokens per forward, as used by train, preview and check."""

from __future__ import annotations

import pytest

from conftest import tiny_config
from tunesmith.errors import ModelError
from tunesmith.model.lengths import DEFAULT_MAX_SEQ_LEN, MIN_MICRO_BATCH_TOKENS, Lengths, choose_lengths


def test_the_models_context_limits_the_default_and_a_small_forward_lowers_it() -> None:
    short, long = tiny_config("qwen3"), tiny_config("qwen3", max_position_embeddings=40_960)
    assert choose_lengths(short, None) == Lengths(512, MIN_MICRO_BATCH_TOKENS)
    assert choose_lengths(long, None) == Lengths(DEFAULT_MAX_SEQ_LEN, MIN_MICRO_BATCH_TOKENS)
    assert choose_lengths(long, 4096) == Lengths(4096, 4096)
    assert choose_lengths(long, 100, 128) == Lengths(100, 128)
    lowered = choose_lengths(long, None, 256)
    assert (lowered.max_seq_len, lowered.capacity) == (256, 256)
    assert "micro_batch_tokens" in lowered.remark


def test_learned_positions_end_where_the_model_ends() -> None:
    assert "512" in choose_lengths(tiny_config("qwen3"), 513).remark  # rotary positions go on
    with pytest.raises(ModelError):
        choose_lengths(tiny_config("gpt2"), 257)
