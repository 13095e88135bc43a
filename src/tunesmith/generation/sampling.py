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
    """Settings for sampling a reply.

    Attributes:
        max_new_tokens: limit in tokens, the stop token included.
        temperature: 0 is greedy; None uses the model's generation_config.
        seed: of the row's own random generator, so that its reply does not depend on the other rows of the batch.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: a value is out of range or of the wrong type.
        """
        for name, value, is_right in (
            ("max_new_tokens", self.max_new_tokens, _is_count(self.max_new_tokens)),
            ("temperature", self.temperature, self.temperature is None or _is_size(self.temperature)),
            ("seed", self.seed, _is_count(self.seed) and self.seed < 2**63),
        ):
            if not is_right:
                raise UsageError(
                    f"{name}: {value!r} is not allowed; see the help of tunesmith.Model.", code="sampling-value"
                )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def settings_of(model: nn.Module, sampling: Sampling) -> GenerationConfig:
    """The model's generation_config, overridden by `sampling`, with transformers' defaults for the rest."""
    own = getattr(model, "generation_config", None)
    config = copy.deepcopy(own) if own is not None else GenerationConfig()
    if sampling.temperature == 0:
        config.do_sample = False
    elif sampling.temperature is not None:
        config.do_sample, config.temperature = True, sampling.temperature
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
