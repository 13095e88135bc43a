"""What the labelling process needs to know: sources, settings, and an encoder that can be sent to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.chat_template.template import ChatTemplate, RenderSettings
from tunesmith.config.data_keys import DataSection
from tunesmith.encode.draws import RowDraws
from tunesmith.encode.encoder import Encoder
from tunesmith.sources.read import Sources
from tunesmith.streaming.cursor import Start

_MIN_STEPS = 16
_MAX_SAMPLES = 1 << 18


@dataclass(frozen=True, slots=True)
class EncoderParts:
    """An encoder as what it is made from; a compiled template cannot be pickled."""

    tokenizer: Any
    template: tuple[str, str, Mapping[str, str], bool] | None
    defaults: RenderSettings
    control_text: str

    @classmethod
    def of(cls, encoder: Encoder) -> EncoderParts:
        made = encoder.template
        template = (made.text, made.source, made.special_tokens, made.is_fallback) if made else None
        return cls(encoder.tokenizer, template, encoder.defaults, encoder.control_text)

    def build(self) -> Encoder:
        template = ChatTemplate(*self.template) if self.template else None
        return Encoder(self.tokenizer, template, self.defaults, self.control_text)


@dataclass(frozen=True, slots=True)
class WindowSize:
    """When a window is full.

    Attributes:
        min_samples, min_tokens: of which it has one or the other.
        step_tokens: tokens of one optimizer step, at most; it has enough for several steps.
    """

    min_samples: int
    min_tokens: int
    step_tokens: int

    def is_reached(self, num_samples: int, num_tokens: int) -> bool:
        has_many = num_samples >= self.min_samples or num_tokens >= self.min_tokens
        return num_samples >= _MAX_SAMPLES or (has_many and num_tokens >= _MIN_STEPS * self.step_tokens)


@dataclass(frozen=True, slots=True)
class Job:
    """Labelling of a run's stream, from a place on.

    Attributes:
        sources: with absolute paths.
        stamps: size and modification time of each file when the run began, or was resumed.
        seed: for the draws.
    """

    encoder: EncoderParts
    data: DataSection
    sources: Sources
    stamps: Sequence[tuple[Path, tuple[int, int] | None]]
    max_seq_len: int
    seed: int
    size: WindowSize
    start: Start

    @property
    def draws(self) -> RowDraws | None:
        return RowDraws.of(self.data, self.seed)
