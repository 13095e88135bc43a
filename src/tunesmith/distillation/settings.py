"""What `tunesmith generate` is asked for; imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import regex

from tunesmith.errors import UsageError
from tunesmith.evaluation.records import SCORES
from tunesmith.evaluation.settings import DEFAULT_REPLY_TOKENS, EvaluateSettings
from tunesmith.files import sha256_text

_GROUPS = ("text", "form", "json", "tools")  # of scores that a single reply has
_LIBRARY_SCORES = ("rouge1", "rouge2", "bleu", "chrf")  # which need the extra `evaluate`
CHECKS = (
    "reference",
    "number",
    *(name for name, kind in SCORES.items() if kind.group in _GROUPS and kind.shown == "share"),
)
"""Checks by name: `reference` (by the kind of the reference), `number`, and the scores that are right or wrong."""
RANKINGS = ("logprob", *(name for name, kind in SCORES.items() if kind.group in _GROUPS and kind.better))
"""What samples of a row can be ranked by: the mean log-probability, and the scores of which one side is better."""


@dataclass(frozen=True, slots=True)
class Check:
    """A condition on a sample.

    Attributes:
        name: one of CHECKS, "regex" or "json_schema".
        text: as given.
        pattern: of regex.
        schema: of json_schema.
    """

    name: str
    text: str
    pattern: Any = None
    schema: Any = None

    def to_json(self) -> str:
        """The text, with a hash of the schema's content."""
        return f"{self.text} ({sha256_text(json.dumps(self.schema))[:16]})" if self.name == "json_schema" else self.text


def read_check(text: str) -> Check:
    """A check as given: a name, regex=PATTERN or json_schema=FILE.

    Raises:
        UsageError: there is no such check, or its pattern or schema cannot be used.
    """
    name, equals, value = text.partition("=")
    if name in CHECKS and not equals:
        return Check(name, text)
    if name == "regex" and value:
        try:
            return Check(name, text, pattern=regex.compile(value))
        except regex.error as error:
            raise UsageError(f"--check {text}: is not a regular expression: {error}.", code="check-pattern") from None
    if name == "json_schema" and value:
        return Check(name, text, schema=_read_schema(text, Path(value).expanduser()))
    from tunesmith.config.suggest import did_you_mean, suggest_words

    hint = did_you_mean(suggest_words(name, [*CHECKS, "regex", "json_schema"]))
    raise UsageError(
        f"--check {text}: unknown check{hint}; there are {', '.join(CHECKS)}, regex=PATTERN and json_schema=FILE.",
        code="unknown-check",
    )


def _read_schema(text: str, path: Path) -> Any:
    from tunesmith.reading import read_text

    try:
        schema = json.loads(read_text(path))
    except OSError as error:
        why = f"cannot be read: {error.strerror}. Check the name."
        raise UsageError(f"--check {text}: {why}", code="check-schema") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--check {text}: is not JSON: {error}.", code="check-schema") from None
    from tunesmith.evaluation.calls import is_schema

    if not is_schema(schema):
        raise UsageError(f"--check {text}: is not a JSON schema that can be used.", code="check-schema")
    return schema


@dataclass(frozen=True, slots=True)
class Selection:
    """Which samples are kept. It may change without generating anew.

    Attributes:
        keep: all samples that end by themselves, those that pass the checks, or the best of each row.
        checks: what "correct" means; given with another `keep`, they hold too.
        score: one of RANKINGS, by which the samples of a row are ranked; None: `keep` best by ROUGE-L beside the
            reference, without one by logprob; the others are in the order in which they were drawn.
        keep_per_row: at most this many samples of a row; None: 1 with best, else all.
        keeps_cut: keep samples that were cut by max_new_tokens or the context.
    """

    keep: Literal["all", "correct", "best"] = "all"
    checks: Sequence[Check] = ()
    score: str | None = None
    keep_per_row: int | None = None
    keeps_cut: bool = False

    @property
    def most(self) -> int | None:
        return self.keep_per_row or (1 if self.keep == "best" else None)

    @property
    def all_checks(self) -> Sequence[Check]:
        return self.checks or ([Check("reference", "reference")] if self.keep == "correct" else [])

    @property
    def needs_library(self) -> bool:
        """Whether it needs the extra `evaluate`."""
        return self.score in _LIBRARY_SCORES

    def to_json(self) -> dict[str, Any]:
        return {
            "keep": self.keep,
            "check": [check.to_json() for check in self.all_checks],
            "score": self.score,
            "keep_per_row": self.most,
            "keep_cut": self.keeps_cut,
        }


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """Answers as asked for.

    Attributes:
        model: a run, a model folder, an adapter or a hub id.
        output: the file to write (.jsonl).
        data: keys of the data section as given ("train", "format", ...), as in EvaluateSettings.
        rows: rows given in Python, in place of data["train"].
        replies: which replies of a row are generated: the last, or all.
        samples: of each reply.
        temperature: None: 0 (greedy) for one sample, 1 for several.
        top_p, top_k, min_p, repetition_penalty: None: as the model's generation_config says.
        stop: texts that end a reply.
        system: system prompt for rows that have none.
        limit: answer this many rows, drawn by the seed.
        max_rows: replies that are generated at once.
        rejected: file for the samples that are left out.
        overwrites: start again if the output holds other answers.
        tokenizer, config: of a .pth, which has none.
    """

    model: str
    output: Path
    data: Mapping[str, Any] = field(default_factory=dict)
    rows: Any = None
    replies: Literal["last", "all"] = "last"
    samples: int = 1
    max_new_tokens: int = DEFAULT_REPLY_TOKENS
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: Sequence[str] = ()
    system: str | None = None
    limit: int | None = None
    seed: int = 0
    max_rows: int = 64
    selection: Selection = field(default_factory=Selection)
    rejected: Path | None = None
    overwrites: bool = False
    tokenizer: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    allow_changed_base: bool = False

    def __post_init__(self) -> None:
        """Raises:
        UsageError: values that do not go together.
        """
        if not self.data.get("train") and self.rows is None:
            raise UsageError("generate: no data is given. Give --data D with the prompts.", code="no-data")
        if self.output.suffix != ".jsonl":
            raise UsageError(
                f"--output {self.output}: answers are JSON Lines. Give it a name that ends in .jsonl.",
                code="output-not-jsonl",
            )
        if self.samples > 1 and self.temperature == 0:
            raise UsageError(
                f"--samples {self.samples}: --temperature 0 gives the same reply each time. Give a temperature above "
                "0, or one sample.",
                code="samples-greedy",
            )
        if self.rejected is not None and self.rejected.absolute() == self.output.absolute():
            raise UsageError("--rejected: is the same file as --output. Give it another name.", code="output-twice")

    @property
    def sampling_temperature(self) -> float:
        return self.temperature if self.temperature is not None else 1.0 if self.samples > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        """What decides the samples."""
        names = ("replies", "samples", "max_new_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "system",
                 "limit", "seed")  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        return values | {"temperature": self.sampling_temperature, "stop": list(self.stop)}

    def to_evaluate(self) -> EvaluateSettings:
        """The same models and rows as an evaluation has them."""
        return EvaluateSettings(
            models=[self.model], data=self.data, rows=self.rows, limit=self.limit, seed=self.seed,
            tokenizer=self.tokenizer, config=self.config, trust_remote_code=self.trust_remote_code,
            allow_changed_base=self.allow_changed_base,
        )  # fmt: skip
