"""`tunesmith evaluate`: label, measure, generate, score, and write evaluate.json."""

from __future__ import annotations

import datetime
import gc
import hashlib
import importlib.util
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tunesmith
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import InterruptedRun, TunesmithError
from tunesmith.evaluation.candidates import Candidate, RowsToScore, find_candidates, find_rows, find_trained_on
from tunesmith.evaluation.intervals import METHOD
from tunesmith.evaluation.likelihood import Likelihood, measure
from tunesmith.evaluation.records import (
    FORMAT,
    DataSummary,
    Evaluation,
    EvaluationFolder,
    ModelResult,
    ReplyRecord,
    write_evaluation,
)
from tunesmith.evaluation.replies import Asked, EvaluationState, ReplyLog, ReplyScorer, find_asked, generate, open_state
from tunesmith.evaluation.rows import Key, LabelledRows, choose_common, draw_rows, label_wanted, summarise
from tunesmith.evaluation.scores import Measured, score_all
from tunesmith.evaluation.settings import EvaluateSettings
from tunesmith.evaluation.table import Progress
from tunesmith.evaluation.texts import ROUGE, TextScorer, choose_tokenizer, require_tokenizer
from tunesmith.generation.matching import NORMALISATION
from tunesmith.generation.reply_parts import reply_format
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker, load_speaker
from tunesmith.hashes import describe_weights
from tunesmith.model.source import find_model
from tunesmith.sources.memory import sources_of, write_rows
from tunesmith.staging import locked

_KEPT_TOGETHER, _KEPT_S = 64, 1.0  # replies written to the disk at once, and seconds until they are
_PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "jsonschema": "jsonschema"}


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that is known before any weights are loaded.

    Attributes:
        labelled: by model, in the order of the candidates.
        keys: the rows to score, which all models can be scored on.
        asked: by model, the replies to generate.
    """

    settings: EvaluateSettings
    folder: EvaluationFolder
    candidates: Sequence[Candidate]
    labelled: Sequence[LabelledRows]
    keys: Sequence[Key]
    asked: Sequence[Sequence[Asked]]
    data: DataSummary
    texts: TextScorer
    tokenizer_reason: str
    wanted: RowsToScore

    def fingerprint(self) -> dict[str, Any]:
        """What scores depend on; an evaluation is only continued where it is the same."""
        models = {
            one.candidate.name: {"weights": hash_weights(one.candidate), "labels": _hash_labels(one, self.keys)}
            for one in self.labelled
        }
        rows = [self.labelled[0].rows[key].where for key in self.keys]
        return {"settings": self.settings.to_json(), "rows": _hash(rows), "models": models, "format": FORMAT}


def evaluate_models(settings: EvaluateSettings, progress: Progress) -> Evaluation:
    """Evaluate models, or continue an evaluation that was interrupted.

    Raises:
        TunesmithError: a model or the data cannot be used, or the folder holds another evaluation.
        InterruptedRun: Ctrl-C or SIGTERM; the same command continues.
    """
    require_packages(settings)
    candidates = find_candidates(settings, datetime.datetime.now())
    folder = EvaluationFolder(choose_output(settings, candidates))
    try:
        with tempfile.TemporaryDirectory(prefix="tunesmith-") as scratch:
            prepared = prepare(settings, candidates, folder, Path(scratch))
            with _locked(folder):
                return _run(prepared, progress)
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; what is done is in {folder.path}, and the same command continues from there",
            code="evaluation-interrupted",
        ) from None
    finally:
        progress.end()


def require_packages(settings: EvaluateSettings) -> None:
    """Check the packages of the extra `evaluate`.

    Raises:
        TunesmithError: one of them is not installed.
    """
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing and settings.replies != "none":
        raise TunesmithError(
            f"evaluate: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install "
            "'tunesmith[evaluate]', or --replies none for likelihoods only.",
            code="package-missing",
        )
    if settings.bleu_tokenizer != "auto" and not missing:
        require_tokenizer(settings.bleu_tokenizer)


def choose_output(settings: EvaluateSettings, candidates: Sequence[Candidate]) -> Path:
    """The folder: as given, RUN/evaluate for a run, else evaluate/NAME.

    Raises:
        TunesmithError: it is a file.
    """
    first = next(candidate for candidate in candidates if not candidate.is_base)
    if settings.output is not None:
        output = settings.output.expanduser()
    elif first.run is not None:
        step = first.name.partition("/")[2]
        output = first.run.folder.path / (f"evaluate-{step}" if step else "evaluate")
    else:
        output = Path("evaluate") / (re.sub(r"[^\w.+-]+", "-", first.name).strip(".-") or "model")
    if output.exists() and not output.is_dir():
        raise TunesmithError(f"{output}: is not a folder. Give --output a folder.", code="output-not-folder")
    return output.absolute()


def prepare(
    settings: EvaluateSettings, candidates: Sequence[Candidate], folder: EvaluationFolder, scratch: Path
) -> Prepared:
    """Read and label the rows for each model, and find the replies to generate.

    Args:
        scratch: an empty folder for tokens.
    """
    if settings.rows is not None:
        write_rows("data", settings.rows, scratch / "rows.jsonl")
        wanted = RowsToScore(sources_of(scratch / "rows.jsonl", "data"))
    else:
        wanted = find_rows(settings, candidates)
    limit = settings.limit
    draw = draw_rows(candidates[0], wanted, limit, settings.seed) if limit is not None else None
    labelled = [label_wanted(one, wanted, draw, scratch / f"tokens-{place}") for place, one in enumerate(candidates)]
    keys, usable = choose_common(labelled, draw, limit)
    asked = [find_asked(one, keys, settings.replies, settings.seed) for one in labelled]
    shared = set.intersection(*({one.key for one in of_model} for of_model in asked))
    asked = [[one for one in of_model if one.key in shared] for of_model in asked]
    tokenizer, reason = settings.bleu_tokenizer, "as asked for"
    if tokenizer == "auto":
        tokenizer, reason = choose_tokenizer(one.reference for one in asked[0])
    names = [wanted.sources.name_of(path) for path in wanted.sources.files]
    names += [":".join(filter(None, name)) for name in wanted.sources.hub]
    held_out = [f"{name} (held-out rows)" for name in names] if wanted.is_held_out else names
    data = summarise(labelled, keys, usable, draw, len(asked[0]), held_out)
    return Prepared(settings, folder, candidates, labelled, keys, asked, data, TextScorer(tokenizer), reason, wanted)


@contextmanager
def _locked(folder: EvaluationFolder) -> Iterator[None]:
    """Make the folder, and let no other process write to it.

    Raises:
        TunesmithError: another process evaluates into it.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder.path):
            yield
    except TunesmithError as error:
        if error.code != "run-in-use":
            raise
        raise TunesmithError(
            f"{folder.path}: another process evaluates into it. Wait for it, or give --output another folder.",
            code="evaluation-in-use",
        ) from None


def _run(prepared: Prepared, progress: Progress) -> Evaluation:
    settings, folder = prepared.settings, prepared.folder
    fingerprint = prepared.fingerprint()
    state = open_state(folder, fingerprint, settings.overwrites)
    state.write(folder.state)
    measured: list[Measured] = []
    remarks: list[list[str]] = []
    with ReplyLog(folder) as log:
        for place, labelled in enumerate(prepared.labelled):
            one = _measure_model(prepared, place, state, log, progress)
            measured.append(one)
            remarks.append([*_remarks(labelled, prepared), *_reply_remarks(one)])
        log.arrange([record.key for one in measured for _, record in one.replies])
    progress.end()
    scores, differences = score_all(measured, settings.seed)
    models = [
        ModelResult(
            one.candidate.name, one.candidate.path, _base_of(prepared, one.candidate),
            one.encoder.template.source if one.encoder.template else "none", scores[one.candidate.name], found,
        )
        for one, found in zip(prepared.labelled, remarks, strict=True)
    ]  # fmt: skip
    evaluation = Evaluation(
        models, differences, prepared.data, settings.to_json(), _methods(prepared), fingerprint,
        tunesmith=tunesmith.__version__,
    )  # fmt: skip
    write_evaluation(folder, evaluation)
    return evaluation


def _base_of(prepared: Prepared, candidate: Candidate) -> str | None:
    if not candidate.is_base:
        return None
    return next(other.name for other in prepared.candidates if other.base == candidate.path)


def _measure_model(
    prepared: Prepared, place: int, state: EvaluationState, log: ReplyLog, progress: Progress
) -> Measured:
    """Likelihood and replies of one model: those that are on disk already, and the others."""
    labelled, asked, settings = prepared.labelled[place], prepared.asked[place], prepared.settings
    candidate = labelled.candidate
    name = candidate.name
    todo = [one for one in asked if (name, *one.key) not in log.done]
    scorer = ReplyScorer(prepared.texts, reply_format(labelled.encoder))
    if todo or name not in state.likelihoods:
        with opened(candidate, labelled.encoder, settings.allow_changed_base) as speaker:
            if name not in state.likelihoods:
                progress.begin(f"{name}: likelihood", len(labelled.samples_of(prepared.keys)))
                found = measure(speaker, labelled, prepared.keys, progress.update)
                state.likelihoods[name] = {"sums": found.sums.tolist(), "remark": found.remark}
                state.write(prepared.folder.state)
            _answer(speaker, name, asked, todo, scorer, settings, log, progress)
    saved = state.likelihoods[name]
    likelihood = Likelihood(np.array(saved["sums"], dtype=np.float64).reshape(-1, 4), saved["remark"])
    replies = [(one, log.done[(name, *one.key)]) for one in asked]
    base = next((other.name for other in prepared.candidates if other.path == candidate.base), None)
    return Measured(name, base, candidate.is_base, likelihood, replies, scorer)


def _answer(
    speaker: Speaker, name: str, asked: Sequence[Asked], todo: Sequence[Asked], scorer: ReplyScorer,
    settings: EvaluateSettings, log: ReplyLog, progress: Progress,
) -> None:  # fmt: skip
    if not todo:
        return
    done = len(asked) - len(todo)
    progress.begin(f"{name}: replies", len(asked), done)
    if done:
        progress.note(f"{name}: {done:,} replies of an earlier process are kept")
    sampling = Sampling(settings.max_new_tokens, settings.temperature)
    kept: list[ReplyRecord] = []
    last = time.monotonic()
    try:
        for one, record in generate(speaker, todo, sampling, name):
            kept.append(scorer.score(record, one))
            done += 1
            if len(kept) >= _KEPT_TOGETHER or time.monotonic() - last > _KEPT_S:
                log.add(kept)
                kept, last = [], time.monotonic()
                progress.update(done, len(asked))
    finally:
        log.add(kept)
    progress.update(done, len(asked))


@contextmanager
def opened(candidate: Candidate, encoder: Encoder, allow_changed_base: bool) -> Iterator[Speaker]:
    """The model with the encoder that its rows are labelled with; its memory is free again afterwards."""
    template = candidate.template or candidate.other_template
    speaker = load_speaker(candidate.section, template, allow_changed_base=allow_changed_base)
    try:
        yield replace(speaker, encoder=encoder)
    finally:
        del speaker
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _remarks(labelled: LabelledRows, prepared: Prepared) -> Iterator[str]:
    """What a reader of the scores should know of the rows, and of how they became tokens."""
    if trained := find_trained_on(labelled.candidate, prepared.wanted):
        more = f" and {len(trained) - 1:,} more files" if len(trained) > 1 else ""
        yield f"was trained on {trained[0]}{more}, so its scores say little about other data"
    template = labelled.encoder.template
    if template is not None and template.is_fallback:
        yield f"brings no chat template; the built-in {template.source} is used"
    if cut := sum(labelled.rows[key].is_cut for key in prepared.keys):
        verb = "row is" if cut == 1 else "rows are"
        yield f"{cut:,} {verb} cut at {labelled.lengths.max_seq_len:,} tokens; replies cut there are not generated"


def _reply_remarks(measured: Measured) -> Iterator[str]:
    if not measured.replies:
        yield "no replies are generated: likelihoods only"
        return
    if errors := sum(bool(record.error) for _, record in measured.replies):
        yield f"{errors:,} of the prompts got no reply (most often the context is full); they count as empty replies"
    has_calls = any(one.has_calls for one, _ in measured.replies)
    if has_calls and not measured.scorer.form.writes_calls:
        yield "its template writes no tool calls that can be told from text, so none are scored"
    if not measured.likelihood.remark.startswith("packed"):
        yield measured.likelihood.remark


def _methods(prepared: Prepared) -> dict[str, str]:
    """How the scores were computed, in words."""
    found = {"intervals": METHOD, "bits_per_byte": "bytes of the supervised text without stop tokens"}
    if not prepared.asked[0]:
        return found
    signatures = prepared.texts.signatures()
    return found | {
        "replies": "to the turns before each trained reply as they are in the data; reasoning is not compared",
        "exact_match": NORMALISATION,
        "rouge": ROUGE,
        "bleu": f"{signatures['bleu']} ({prepared.tokenizer_reason})",
        "chrf": signatures["chrf"],
        "distinct": "different n-grams of words over all, mean of replies",
    }


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def hash_weights(candidate: Candidate) -> str:
    """Of the contents of its files, wherever they are."""
    source = find_model(candidate.section.path, candidate.section.config)
    described: Mapping[str, Any] = describe_weights(source, candidate.section.revision)
    return _hash(sorted(json.dumps([Path(name).name, entry], default=str) for name, entry in described.items()))


def _hash_labels(labelled: LabelledRows, keys: Sequence[Key]) -> str:
    digest = hashlib.sha256()
    for number in labelled.samples_of(keys):
        sample = labelled.store[number]
        digest.update(len(sample.input_ids).to_bytes(8, "little"))
        digest.update(np.asarray(sample.input_ids, dtype=np.uint32).tobytes())
        digest.update(np.asarray(sample.loss_mask, dtype=np.uint8).tobytes())
    return digest.hexdigest()
