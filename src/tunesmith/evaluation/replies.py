"""Generate the replies, and keep each on disk as soon as it is there, so that a killed evaluation continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tunesmith.errors import TunesmithError
from tunesmith.evaluation.calls import score_calls
from tunesmith.evaluation.forms import INVALID, distinct_share, is_loop, is_same_json, read_like, read_reference
from tunesmith.evaluation.records import EvaluationFolder, ReplyKind, ReplyRecord
from tunesmith.evaluation.rows import Key, LabelledRows
from tunesmith.evaluation.texts import TextScorer, chrf_of, sentence_bleu
from tunesmith.files import read_sealed, sealed, sync_path, write_text_atomic
from tunesmith.generation.decode import decode_reply
from tunesmith.generation.matching import matches_exactly, rouge_l
from tunesmith.generation.replies import answer_all
from tunesmith.generation.reply_parts import ReplyFormat, ReplyParts
from tunesmith.generation.request import Request
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker


@dataclass(frozen=True, slots=True)
class Asked:
    """A reply to generate.

    Attributes:
        row: place of the row among those that are scored.
        ids: the prompt.
        seed: of sampling, so that a reply does not depend on the others.
    """

    row: int
    where: str
    turn: int
    ids: Sequence[int]
    reference: str
    reference_tokens: int
    tools: tuple[dict[str, Any], ...]
    has_calls: bool
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        return self.where, self.turn


def find_asked(labelled: LabelledRows, keys: Sequence[Key], replies: str, seed: int) -> list[Asked]:
    """The replies to generate: all trained ones of each row, its last, or none."""
    asked: list[Asked] = []
    for place, key in enumerate(keys):
        row = labelled.rows[key]
        spans = list(enumerate(row.replies))
        for turn, span in {"all": spans, "last": spans[-1:], "none": []}[replies]:
            ids = labelled.store[span.sample].input_ids
            said = ids[span.start : span.end].tolist()
            asked.append(
                Asked(
                    place, row.where, turn, ids[: span.start].tolist(), decode_reply(labelled.encoder, said),
                    len(said) - 1, row.tools, row.has_calls, seed + len(asked),
                )
            )  # fmt: skip
    return asked


def kind_of(reference: ReplyParts) -> ReplyKind:
    if reference.tool_calls:
        return "tool_call"
    return "json" if read_reference(reference.content) is not None else "text"


@dataclass(frozen=True, slots=True)
class ReplyScorer:
    """Score one reply after another.

    Attributes:
        texts: None where ROUGE-1 and -2, BLEU and chrF are left out, which need the extra `evaluate`.
        form: how this model's template writes reasoning, content and tool calls.
    """

    texts: TextScorer | None
    form: ReplyFormat

    def score(self, record: ReplyRecord, asked: Asked) -> ReplyRecord:
        """The record with its kind and its scores. Only in a row with tools or calls a reply is read as a call."""
        texts, tools = (record.reply, record.reference), asked.tools
        said, wanted = (self.form.parse(text, asked.has_calls, tools) for text in texts)
        reply, reference = answer_of(record.reply, said), answer_of(record.reference, wanted)
        scores = {
            "exact_match": float(matches_exactly(reply, reference)),
            "exact_match_strict": float(reply == reference),
            **(text_scores(self.texts, reply, reference) if self.texts else {"rougeL": rouge_l(reply, reference)}),
            "stopped": float(record.has_stopped),
            "reply_tokens": float(record.tokens),
            "loops": float(is_loop(record.reply)),
        }
        for order in (1, 2):
            share = distinct_share(record.reply, order)
            scores |= {f"distinct_{order}": share} if share is not None else {}
        expected = read_reference(wanted.content) if not wanted.tool_calls else None
        if expected is not None:
            found = read_like(expected, said.content)
            scores["json_valid"] = float(found is not INVALID)
            scores["json_equal"] = float(found is not INVALID and is_same_json(found, expected.value))
        scores |= score_calls(said.tool_calls, wanted.tool_calls, tools)
        return replace(record, kind=kind_of(wanted), has_tools=bool(tools), scores=scores)

    def corpus_counts(self, record: ReplyRecord, asked: Asked) -> tuple[list[int], list[int]]:
        """What BLEU and chrF sum over all replies."""
        assert self.texts is not None
        texts = (record.reply, record.reference)
        reply, reference = (answer_of(text, self.form.parse(text, asked.has_calls, asked.tools)) for text in texts)
        return self.texts.bleu_counts(reply, reference), self.texts.chrf_counts(reply, reference)


def text_scores(texts: TextScorer, reply: str, reference: str) -> dict[str, float]:
    return {
        **texts.rouge(reply, reference),
        "bleu": sentence_bleu(texts.bleu_counts(reply, reference)),
        "chrf": float(chrf_of(np.array(texts.chrf_counts(reply, reference)))),
    }


def answer_of(text: str, parts: ReplyParts) -> str:
    """What text scores compare: a reply without its reasoning, its tool calls as NAME ARGUMENTS."""
    if parts.content == text:
        return text
    calls = (f"{call.name} {call.text}" for call in parts.tool_calls)
    return "\n".join(filter(None, (parts.content.strip(), *calls)))


def generate(
    speaker: Speaker, asked: Sequence[Asked], sampling: Sampling, model: str
) -> Iterator[tuple[Asked, ReplyRecord]]:
    """The replies as they end, without their scores; each is what the model replies to its prompt alone."""
    requests = ((one, Request(one.ids, replace(sampling, seed=one.seed))) for one in asked)
    for one, reply in answer_all(speaker, speaker.batcher, requests):
        prompt = str(speaker.encoder.tokenizer.backend_tokenizer.decode(list(one.ids), skip_special_tokens=False))
        record = ReplyRecord(
            model, one.where, one.turn, "text", prompt, decode_reply(speaker.encoder, reply.ids), one.reference,
            reply.finish_reason == "stop", len(reply.ids), one.reference_tokens, error=reply.error,
        )  # fmt: skip
        yield one, record


class ReplyLog:
    """replies.jsonl of an evaluation that may be continued: every line is on the disk before the next is made.

    Attributes:
        done: the records that an earlier process left.
    """

    def __init__(self, folder: EvaluationFolder) -> None:
        self._path = folder.replies
        self.done = self._recover()
        self._file = self._path.open("ab")

    def _recover(self) -> dict[tuple[str, str, int], ReplyRecord]:
        """The whole lines; damaged ones (a kill cuts the last) are dropped, and made again."""
        if not self._path.exists():
            return {}
        found: dict[tuple[str, str, int], ReplyRecord] = {}
        data = self._path.read_bytes()
        lines = []
        for line in data.split(b"\n"):
            with suppress(ValueError, TypeError, RecursionError):
                record = ReplyRecord.from_line(line.decode())
                found[record.key] = record
                lines.append(line + b"\n")
        if (kept := b"".join(lines)) != data:
            write_text_atomic(self._path, kept.decode())
        return found

    def arrange(self, keys: Sequence[tuple[str, str, int]]) -> None:
        """Put the finished file into this order, so that it does not depend on when each reply ended; none follows."""
        if list(self.done) == list(keys):
            return
        self._file.close()
        self.done = {key: self.done[key] for key in keys}
        write_text_atomic(self._path, "".join(f"{record.to_line()}\n" for record in self.done.values()))

    def add(self, records: Sequence[ReplyRecord]) -> None:
        """Append lines, which are on the disk when this returns."""
        if not records:
            return
        self._file.write("".join(f"{record.to_line()}\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done |= {record.key: record for record in records}

    def __enter__(self) -> ReplyLog:
        sync_path(self._path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


@dataclass(slots=True)
class EvaluationState:
    """evaluation-state.json: the fingerprint, and the likelihoods that are done.

    Attributes:
        likelihoods: name of a model -> {"sums": ..., "remark": ...}.
    """

    fingerprint: Mapping[str, Any]
    likelihoods: dict[str, dict[str, Any]]

    def write(self, path: Path) -> None:
        write_text_atomic(path, sealed({"fingerprint": self.fingerprint, "likelihoods": self.likelihoods}))


def open_state(folder: EvaluationFolder, fingerprint: Mapping[str, Any], overwrites: bool) -> EvaluationState:
    """The state of this evaluation: of an earlier process, or new.

    Raises:
        TunesmithError: the folder holds another evaluation, or other files.
    """
    plain = json.loads(json.dumps(fingerprint))
    if not folder.state.exists():
        others = [path.name for path in folder.path.iterdir()] if folder.path.is_dir() else []
        if others and not overwrites:
            raise TunesmithError(
                f"{folder.path}: is not empty ({', '.join(sorted(others)[:3])}) and holds no evaluation. Give --output "
                "another folder.",
                code="output-taken",
            )
        return EvaluationState(plain, {})
    try:
        saved = read_sealed(folder.state)
        before, likelihoods = saved["fingerprint"], saved["likelihoods"]
        differences = list(compare(before, plain))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if overwrites:
            return EvaluationState(plain, {})
        raise TunesmithError(
            f"{folder.state}: is damaged, so that nobody knows what the replies beside it are of. Give --overwrite to "
            "start again, or another --output.",
            code="evaluation-damaged",
        ) from None
    if not differences:
        return EvaluationState(plain, likelihoods)
    has_begun = bool(likelihoods) or (folder.replies.exists() and folder.replies.stat().st_size)
    if overwrites or not has_begun:
        for path in (folder.state, folder.replies, folder.result, folder.page, folder.judgements):
            path.unlink(missing_ok=True)
        return EvaluationState(plain, {})
    lines = "\n".join(f"  {line}" for line in differences[:12])
    raise TunesmithError(
        f"{folder.path}: holds another evaluation, with which this one would be mixed:\n{lines}\n"
        "Give --output another folder, or --overwrite to replace it.",
        code="evaluation-differs",
    )


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two fingerprints, in words."""
    for name in dict.fromkeys([*before["settings"], *now["settings"]]):
        old, new = before["settings"].get(name), now["settings"].get(name)
        if old != new:
            yield f"{name.replace('_', ' ')}: {old} -> {new}"
    if before["rows"] != now["rows"]:
        yield "the rows to score are others"
    old_models, new_models = before["models"], now["models"]
    yield from (f"{name} is not among the models now" for name in old_models if name not in new_models)
    for name, model in new_models.items():
        if name not in old_models:
            yield f"{name} is a new model"
        elif old_models[name]["weights"] != model["weights"]:
            yield f"{name}: its weights have changed"
        elif old_models[name]["labels"] != model["labels"]:
            yield f"{name}: its labels have changed (the text of the rows, the tokenizer or the template)"
    if before["format"] != now["format"]:
        yield "it was made by another version"
