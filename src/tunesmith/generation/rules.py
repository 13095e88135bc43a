"""transformers' logits processors for the settings of a reply."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as process


def rules_of(
    config: GenerationConfig, prompt_length: int, max_new_tokens: int, stop_ids: Collection[int], device: str
) -> list[Any]:
    """transformers' logits processors for these settings, in the order in which `generate` applies them."""
    length, stops = prompt_length, sorted(stop_ids)
    rules: list[Any] = []
    if config.sequence_bias:
        rules.append(process.SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.repetition_penalty not in (None, 1.0):
        rules.append(process.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        rules.append(process.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        rules.append(process.NoBadWordsLogitsProcessor(config.bad_words_ids, stops or None))
    if config.min_length and stops:
        rules.append(process.MinLengthLogitsProcessor(config.min_length, stops, device=device))
    if config.min_new_tokens and stops:
        rules.append(process.MinNewTokensLengthLogitsProcessor(length, config.min_new_tokens, stops, device=device))
    if config.forced_bos_token_id is not None:
        rules.append(process.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        end = length + max_new_tokens
        rules.append(process.ForcedEOSTokenLogitsProcessor(end, config.forced_eos_token_id, device=device))
    if config.remove_invalid_values:
        rules.append(process.InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty and stops:
        ids = torch.tensor(stops, device=device)
        rules.append(process.ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, ids, length))
    if config.suppress_tokens:
        rules.append(process.SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    if config.begin_suppress_tokens:
        begin = length + (length == 1 and config.forced_bos_token_id is not None)
        rules.append(process.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device=device))
    if config.do_sample:
        rules += _warpers(config, device)
    if config.renormalize_logits:
        rules.append(process.LogitNormalization())
    return rules


def _warpers(config: GenerationConfig, device: str) -> list[Any]:
    """The processors that shape the probabilities of a sampled token."""
    rules: list[Any] = []
    if config.temperature not in (None, 1.0):
        rules.append(process.TemperatureLogitsWarper(config.temperature))
    if config.top_h is not None:
        rules.append(process.TopHLogitsWarper(config.top_h))
    if config.top_k:
        rules.append(process.TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        rules.append(process.TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        rules.append(process.MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1.0:
        rules.append(process.TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff:
        rules.append(process.EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff:
        rules.append(process.EtaLogitsWarper(config.eta_cutoff, device=device))
    return rules
