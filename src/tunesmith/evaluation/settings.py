"""What `tunesmith evaluate` is asked for; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

DEFAULT_REPLY_TOKENS = 512


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """An evaluation as asked for.

    Attributes:
        models: runs, model folders, adapters or hub ids.
        data: keys of the data section as given ("train", "format", ...), which win over those of a run; without
            "train", the rows that the first run held out.
        rows: rows given in Python, in place of data["train"].
        has_base: put the base of each run or adapter beside it.
        replies: which trained replies are generated: all, the last of each row, or none (likelihoods only).
        temperature: 0 is greedy; None: as each model's generation_config says.
        limit: score this many rows, drawn by the seed.
        seed: of the draw, of sampling and of the intervals.
        bleu_tokenizer: sacrebleu's; auto: by the script of the references.
        output: the folder; default: RUN/evaluate, or evaluate/NAME.
        overwrites: start again if the folder holds another evaluation.
        tokenizer, config: of a .pth, which has none.
    """

    models: Sequence[str]
    data: Mapping[str, Any] = field(default_factory=dict)
    rows: Any = None
    has_base: bool = False
    replies: Literal["all", "last", "none"] = "all"
    max_new_tokens: int = DEFAULT_REPLY_TOKENS
    temperature: float | None = 0.0
    limit: int | None = None
    seed: int = 0
    bleu_tokenizer: str = "auto"
    output: Path | None = None
    overwrites: bool = False
    tokenizer: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    allow_changed_base: bool = False

    def to_json(self) -> dict[str, Any]:
        """What decides the scores, for evaluate.json and the fingerprint."""
        return {
            "replies": self.replies,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "limit": self.limit,
            "seed": self.seed,
            "bleu_tokenizer": self.bleu_tokenizer,
        }


def data_section(flags: Mapping[str, Any]) -> dict[str, Any]:
    """{"data.fields.prompt": "q"} -> {"fields": {"prompt": "q"}}; "null" is None, as in flags of train."""
    section: dict[str, Any] = {}
    for dotted, value in flags.items():
        *parents, last = dotted.split(".")[1:]
        below = section
        for name in parents:
            below = below.setdefault(name, {})
        below[last] = None if value in ("null", ["null"]) else value
    return section
