"""Settings for sampling a reply, and those of the model's generation_config."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import GenerationConfig

from tunesmith.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings for sampling a reply. None: as the model's generation_config says.

    Attributes:
        max_new_tokens: limit in tokens, the stop token included.
        temperature: 0 is greedy.
        seed: of the row's own random generator, so that its reply does not depend on the other rows of the batch.
        top_p: draw from the likeliest tokens whose probabilities sum up to this. Where the model's own setting is
            greedy and no temperature is given, top_p, top_k and min_p sample at temperature 1.
        top_k: draw from this many of the likeliest tokens; 0: from all.
        min_p: leave out tokens less likely than this share of the likeliest token's probability.
        repetition_penalty: divides the positive logits of tokens that the conversation has already, and multiplies
            the negative ones; 1: none.
        stop: texts that end the reply and are left out of it.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    seed: int = 0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: a value is out of range or of the wrong type.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if isinstance(stop, list):
            stop = tuple(stop)
        for name, value, is_right, needed in (
            ("max_new_tokens", self.max_new_tokens, _is_count(self.max_new_tokens), "a whole number of 0 or more"),
            ("temperature", self.temperature, _is_size(self.temperature), "a number of 0 or more"),
            ("seed", self.seed, _is_count(self.seed) and self.seed < 2**63, "a whole number from 0 to 2**63 - 1"),
            ("top_p", self.top_p, _is_size(self.top_p, 1) and self.top_p != 0, "a number above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k is None or _is_count(self.top_k), "a whole number of 0 or more"),
            ("min_p", self.min_p, _is_size(self.min_p, 1), "a number from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty,
             _is_size(self.repetition_penalty) and self.repetition_penalty != 0, "a number above 0"),
            ("stop", self.stop, isinstance(stop, tuple) and all(isinstance(one, str) and one for one in stop),
             "a text or a list of texts, none of them empty"),
        ):  # fmt: skip
            if not is_right:
                raise UsageError(f"{name}: must be {needed}, not {value!r}.", code="sampling-value")
        object.__setattr__(self, "stop", stop)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any, largest: float = math.inf) -> bool:
    if value is None:
        return True
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= largest and value < math.inf


def settings_of(model: nn.Module, sampling: Sampling) -> GenerationConfig:
    """The model's generation_config, overridden by `sampling`, with transformers' defaults for the rest."""
    own = getattr(model, "generation_config", None)
    config = copy.copy(own) if own is not None else GenerationConfig()
    if sampling.temperature == 0:
        config.do_sample = False
    elif sampling.temperature is not None:
        config.do_sample, config.temperature = True, sampling.temperature
    elif not config.do_sample and not (sampling.top_p is sampling.top_k is sampling.min_p is None):
        config.do_sample, config.temperature = True, 1.0
    for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
        value = getattr(sampling, name)
        if value is not None:
            setattr(config, name, value)
    if config.top_k is None:
        config.top_k = _DEFAULT_TOP_K
    return config


_DEFAULT_TOP_K = 50  # transformers' default


# settings that choose by more than one token's scores, or that need more than a row's own tokens
_NOT_APPLIED = {
    "num_beams": (None, 1), "guidance_scale": (None, 1, 1.0), "penalty_alpha": (None, 0, 0.0), "dola_layers": (None,),
    "constraints": (None,), "force_words_ids": (None,), "prompt_lookup_num_tokens": (None,), "stop_strings": (None,),
    "max_time": (None,), "token_healing": (None, False), "watermarking_config": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0), "encoder_no_repeat_ngram_size": (None, 0),
}  # fmt: skip


def unapplied_settings(config: GenerationConfig | None) -> list[str]:
    """Names of settings in a generation_config that generation does not apply."""
    return [name for name, unset in _NOT_APPLIED.items() if getattr(config, name, None) not in unset]
