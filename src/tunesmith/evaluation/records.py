"""What an evaluation writes to its folder: replies.jsonl, one reply a line, and evaluate.json with all scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import TunesmithError
from tunesmith.files import read_sealed, sealed, write_text_atomic
from tunesmith.reading import open_file

FORMAT = 1  # of evaluate.json and replies.jsonl
ReplyKind = Literal["text", "json", "tool_call"]
REPLY_KINDS: tuple[ReplyKind, ...] = ("text", "json", "tool_call")
"""Kinds of replies, by their reference."""


@dataclass(frozen=True, slots=True)
class ScoreKind:
    """How a score is named, grouped and shown.

    Attributes:
        label: in tables.
        group: likelihood, text (beside the reference), form (of the reply alone), json, tools or judge.
        better: "higher", "lower", or "" where neither is better.
        shown: "share" (0 to 1, shown in percent), or the format of a number.
        about: one sentence on what it measures.
    """

    label: str
    group: str
    better: Literal["higher", "lower", ""]
    shown: str
    about: str

    def show(self, value: float | None, sign: str = "") -> str:
        """The value as text; "-" where there is none.

        Args:
            sign: "+" to show the sign of a difference.
        """
        if value is None:
            return "-"
        if self.shown == "share":
            return f"{100 * value:{sign}.1f}%"
        return f"{value:{sign}{self.shown}}"


SCORES: dict[str, ScoreKind] = {
    "loss": ScoreKind("loss", "likelihood", "lower", ".4f", "cross-entropy a supervised token, in nats"),
    "perplexity": ScoreKind("perplexity", "likelihood", "lower", ".2f", "exp(loss)"),
    "token_accuracy": ScoreKind(
        "token accuracy", "likelihood", "higher", "share", "supervised tokens that are the model's first choice"
    ),
    "bits_per_byte": ScoreKind(
        "bits per byte", "likelihood", "lower", ".4f", "loss in bits a UTF-8 byte of the supervised text"
    ),
    "exact_match": ScoreKind("exact match", "text", "higher", "share", "equals the reference once both are normalised"),
    "exact_match_strict": ScoreKind(
        "exact match, strict", "text", "higher", "share", "equals the reference character for character"
    ),
    "rouge1": ScoreKind("ROUGE-1", "text", "higher", ".4f", "F1 of shared words"),
    "rouge2": ScoreKind("ROUGE-2", "text", "higher", ".4f", "F1 of shared pairs of words"),
    "rougeL": ScoreKind("ROUGE-L", "text", "higher", ".4f", "F1 of the longest common subsequence of words"),
    "bleu": ScoreKind("BLEU", "text", "higher", ".2f", "sacrebleu's corpus BLEU, 0 to 100"),
    "chrf": ScoreKind("chrF", "text", "higher", ".2f", "sacrebleu's corpus chrF2, 0 to 100"),
    "stopped": ScoreKind("stopped", "form", "higher", "share", "replies that end with a stop token"),
    "reply_tokens": ScoreKind("reply tokens", "form", "", ".1f", "mean length of a reply"),
    "length_ratio": ScoreKind("length ratio", "form", "", ".2f", "tokens of the replies over tokens of the references"),
    "distinct_1": ScoreKind("distinct-1", "form", "higher", ".3f", "different words over all words, mean of replies"),
    "distinct_2": ScoreKind("distinct-2", "form", "higher", ".3f", "different pairs of words over all pairs"),
    "loops": ScoreKind("loops", "form", "lower", "share", "replies whose end is one piece over and over"),
    "json_valid": ScoreKind("valid JSON", "json", "higher", "share", "replies that parse, where the reference is JSON"),
    "json_equal": ScoreKind("equal JSON", "json", "higher", "share", "replies that are the same JSON value"),
    "tool_choice": ScoreKind(
        "calls a tool or not", "tools", "higher", "share", "calls one exactly if the reference does; rows with tools"
    ),
    "tool_name": ScoreKind("tool exists", "tools", "higher", "share", "calls tools of the row, and at least one"),
    "tool_arguments": ScoreKind("arguments valid", "tools", "higher", "share", "by the schemas of the row's tools"),
    "tool_equal": ScoreKind("call equal", "tools", "higher", "share", "the same tools with the same arguments"),
}
"""Every score of evaluate.json, in the order of its tables."""


@dataclass(frozen=True, slots=True)
class ReplyRecord:
    """A line of replies.jsonl.

    Attributes:
        model: name of the model in this evaluation.
        row: FILE:ROW, as check names it.
        turn: which of the row's trained replies it is, from 0.
        kind: of the reference.
        prompt: what the model got, control tokens included.
        reference: the reply in the data, without its stop token.
        has_stopped: whether it ended with a stop token.
        tokens: its length, without the stop token.
        reference_tokens: that of the reference.
        has_tools: whether the row has tool schemas.
        error: code of the error because of which there is no reply ("context-full"); "" otherwise.
        scores: of this reply alone, by the names in SCORES; those that do not apply to it are missing.
    """

    model: str
    row: str
    turn: int
    kind: ReplyKind
    prompt: str
    reply: str
    reference: str
    has_stopped: bool
    tokens: int
    reference_tokens: int
    has_tools: bool = False
    error: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        """What the line is about; no two lines of a file have the same."""
        return self.model, self.row, self.turn

    def to_line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> ReplyRecord:
        """Raises:
        ValueError: the line is not such a record.
        """
        content = json.loads(line)
        if not isinstance(content, dict) or set(content) != {one.name for one in fields(cls)}:
            raise ValueError("is not a reply of this version")
        record = cls(**content)
        texts = (record.model, record.row, record.prompt, record.reply, record.reference, record.error)
        counts = (record.turn, record.tokens, record.reference_tokens)
        if (
            not all(isinstance(text, str) for text in texts)
            or not all(type(count) is int for count in counts)
            or record.kind not in REPLY_KINDS
            or not isinstance(record.scores, dict)
        ):
            raise ValueError("has a value of another type")
        return record


@dataclass(frozen=True, slots=True)
class Score:
    """A score, or a difference of scores, over all rows that it applies to.

    Attributes:
        low, high: its 95 % interval; None where none can be given.
        rows: how many rows it is over.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    rows: int = 0


@dataclass(frozen=True, slots=True)
class ModelResult:
    """A model's scores.

    Attributes:
        name: in replies.jsonl and tables; different for each model.
        path: as given.
        base_of: name of the model that it was put beside by --base; None for a model that was asked for.
        template: where its chat template comes from.
        scores: by the names in SCORES; those that apply to no row are missing.
        remarks: what a reader of the scores should know of this model.
    """

    name: str
    path: str
    base_of: str | None
    template: str
    scores: Mapping[str, Score]
    remarks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """Scores of `model` minus those of `reference`, on the same rows; intervals are of paired resamples."""

    model: str
    reference: str
    scores: Mapping[str, Score]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Rows that were left out for one reason.

    Attributes:
        rows: the first of them, as FILE:ROW.
    """

    reason: str
    count: int
    rows: Sequence[str]


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What became of the rows.

    Attributes:
        sources: files or hub data sets.
        rows: all that there are.
        labelled: those that were labelled; with a limit, the ones drawn and some spare ones.
        usable: those of them that every model can be scored on.
        scored: those of them that were scored.
        replies: trained replies in them, each of which is generated once a model.
        refused: why rows were left out.
    """

    sources: Sequence[str]
    rows: int
    labelled: int
    usable: int
    scored: int
    replies: int
    refused: Sequence[Refusal] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The content of evaluate.json.

    Attributes:
        settings: what was asked for (seed, limit, sampling, ...).
        methods: how scores were computed: normalisation, tokenizers, signatures, intervals.
        fingerprint: of models, data and settings; an evaluation with another one is not continued.
        judge: the judge's part; None without --judge.
    """

    models: Sequence[ModelResult]
    differences: Sequence[Difference]
    data: DataSummary
    settings: Mapping[str, Any]
    methods: Mapping[str, str]
    fingerprint: Mapping[str, Any]
    judge: Mapping[str, Any] | None = None
    tunesmith: str = ""
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """The object that `tunesmith evaluate --json` prints."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Evaluation:
        """Raises:
        KeyError, TypeError, ValueError: it is not what `to_json` gives.
        """
        if content["format"] != FORMAT:
            raise ValueError(f"has the format {content['format']}, not {FORMAT}")
        models = [ModelResult(**model | {"scores": _scores(model["scores"])}) for model in content["models"]]
        pairs = [Difference(**pair | {"scores": _scores(pair["scores"])}) for pair in content["differences"]]
        data = content["data"]
        summary = DataSummary(**data | {"refused": [Refusal(**refusal) for refusal in data["refused"]]})
        return cls(**dict(content) | {"models": models, "differences": pairs, "data": summary})

    def model(self, name: str) -> ModelResult:
        return next(model for model in self.models if model.name == name)


def _scores(content: Mapping[str, Any]) -> dict[str, Score]:
    return {name: Score(**score) for name, score in content.items()}


@dataclass(frozen=True, slots=True)
class EvaluationFolder:
    """Paths of the files of an evaluation."""

    path: Path

    @property
    def result(self) -> Path:
        """evaluate.json, written last."""
        return self.path / "evaluate.json"

    @property
    def replies(self) -> Path:
        return self.path / "replies.jsonl"

    @property
    def state(self) -> Path:
        """The fingerprint of an evaluation that is not finished, for its continuation."""
        return self.path / "evaluation-state.json"

    @property
    def page(self) -> Path:
        return self.path / "evaluate.html"

    @property
    def judgements(self) -> Path:
        """The judge's answers."""
        return self.path / "judge.jsonl"


def write_evaluation(folder: EvaluationFolder, evaluation: Evaluation) -> None:
    """Write evaluate.json atomically."""
    write_text_atomic(folder.result, sealed(evaluation.to_json()))


def read_evaluation(folder: EvaluationFolder) -> Evaluation:
    """Read evaluate.json.

    Raises:
        TunesmithError: it is missing or damaged.
    """
    try:
        return Evaluation.from_json(read_sealed(folder.result))
    except OSError as error:
        raise TunesmithError(
            f"{folder.result}: cannot be read: {error.strerror}. Run tunesmith evaluate to make it.",
            code="evaluation-unreadable",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TunesmithError(
            f"{folder.result}: is damaged ({type(error).__name__}: {error}). Delete it and run tunesmith evaluate "
            "again; the replies in replies.jsonl are kept.",
            code="evaluation-damaged",
        ) from None


def read_replies(folder: EvaluationFolder) -> Iterator[ReplyRecord]:
    """The lines of replies.jsonl.

    Raises:
        TunesmithError: the file is missing, or a line is damaged.
    """
    try:
        with open_file(folder.replies) as file:
            for number, line in enumerate(file, 1):
                try:
                    yield ReplyRecord.from_line(line.decode())
                except (ValueError, TypeError, RecursionError) as error:
                    raise TunesmithError(
                        f"{folder.replies}:{number}: is damaged: {error}. Run the same tunesmith evaluate again: it "
                        "keeps the whole lines and makes the others again.",
                        code="replies-damaged",
                    ) from None
    except OSError as error:
        raise TunesmithError(
            f"{folder.replies}: cannot be read: {error.strerror}. Run tunesmith evaluate to make it.",
            code="evaluation-unreadable",
        ) from None
