"""`tunesmith generate`: read the prompts, let the model answer them, choose among the answers, and write them."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.distillation.answers import Answers, holds_rejected, read_ledger
from tunesmith.distillation.prompts import Prompts, label_prompts, today
from tunesmith.distillation.samples import (
    FORMAT,
    Sample,
    SampleLog,
    WorkFolder,
    compare,
    read_state,
    write_state,
)
from tunesmith.distillation.select import Selector
from tunesmith.distillation.settings import GenerateSettings
from tunesmith.errors import DataError, InterruptedRun, RunError, TunesmithError, UsageError
from tunesmith.evaluation.candidates import Candidate, RowsToScore, find_candidates, find_rows
from tunesmith.evaluation.run import hash_weights, opened, require_packages
from tunesmith.evaluation.table import Progress
from tunesmith.files import is_no_room, sealed, sha256_file, sha256_text, write_text_atomic
from tunesmith.generation.batcher import Batcher
from tunesmith.generation.replies import Finished, answer_all
from tunesmith.generation.request import Request
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker
from tunesmith.hashes import hash_template, hash_tokenizer
from tunesmith.model.source import find_model
from tunesmith.reading import require_regular
from tunesmith.sources.folders import LEDGER_SUFFIX, matches_pattern
from tunesmith.sources.memory import sources_of, write_rows

_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
_KEPT_TOGETHER, _KEPT_S = 64, 1.0  # samples written to the disk at once, and seconds until they are


def generate_answers(settings: GenerateSettings, progress: Progress) -> Answers:
    """Generate answers and write them, or continue where an earlier process stopped.

    Raises:
        TunesmithError: the model or the data cannot be used, or the output holds other answers.
        InterruptedRun: Ctrl-C or SIGTERM; the same command continues.
    """
    rejected = settings.rejected
    settings = replace(
        settings,
        output=settings.output.expanduser().absolute(),
        rejected=rejected.expanduser().absolute() if rejected is not None else None,
    )
    _sampling(settings)
    if settings.selection.needs_library:
        require_packages(replace(settings.to_evaluate(), replies="last"))
    folder = WorkFolder(settings.output)
    _require_output(settings, folder)
    try:
        with folder.locked(), folder.scratch() as scratch:
            return _generate(settings, folder, scratch, progress)
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted; the samples so far are in {folder.path}, and the same command continues from there",
            code="generation-interrupted",
        ) from None
    except OSError as error:
        if not is_no_room(error):
            raise
        raise RunError(
            f"{settings.output}: no space left on its disk. Free space there; the samples so far are kept, and the "
            "same command continues.",
            code="disk-full",
        ) from None
    finally:
        progress.end()
        folder.remove_if_empty()


def _require_output(settings: GenerateSettings, folder: WorkFolder) -> None:
    """Raises:
    TunesmithError: the output, or the file for the rejected samples, is not a file of ours.
    """
    for path in (settings.output, settings.rejected):
        if "\0" in str(path):
            raise TunesmithError(f"{str(path)!r}: cannot be a file: its name has a NUL.", code="output-not-usable")
    if settings.rejected is not None and settings.rejected.resolve() in (
        settings.output.resolve(), folder.ledger.resolve(), folder.samples.resolve(), folder.state.resolve()
    ):  # fmt: skip
        raise UsageError(
            f"--rejected {settings.rejected}: is a file that holds the answers or what is known of them. Give it "
            "another name.",
            code="output-twice",
        )
    for path in (settings.output, settings.rejected):
        if path is not None and path.exists():
            if path.is_dir():
                raise TunesmithError(f"{path}: is a folder. Give --output a file.", code="output-is-folder")
            require_regular(path, path.stat().st_mode)
    if settings.overwrites:
        return
    if settings.rejected is not None and settings.rejected.exists() and not holds_rejected(settings.rejected):
        raise TunesmithError(
            f"{settings.rejected}: exists, and holds no rejected samples. Give --rejected another name, or --overwrite "
            "to replace it.",
            code="output-taken",
        )
    if not settings.output.exists():
        return
    ledger = read_ledger(folder.ledger)
    own = {read_state(folder).get("output"), ledger["output"].get("sha256") if ledger else None}
    if sha256_file(settings.output) not in own:
        raise TunesmithError(
            f"{settings.output}: exists, and is not as tunesmith generate wrote it. Give --output another name, or "
            "--overwrite to replace it.",
            code="output-taken",
        )


def _generate(settings: GenerateSettings, folder: WorkFolder, scratch: Path, progress: Progress) -> Answers:
    saved = {} if settings.overwrites else read_state(folder)
    date = today(saved.get("date"))
    candidate = find_candidates(settings.to_evaluate(), date)[0]
    wanted = _find_rows(settings, candidate, scratch)
    _refuse_own_input(settings, wanted)
    prompts = label_prompts(candidate, wanted, settings, scratch)
    fingerprint = json.loads(json.dumps(_fingerprint(settings, candidate, prompts)))
    if (ledger := _find_complete(settings, folder, fingerprint)) is not None:
        return Answers(settings.output, ledger)
    for path in (settings.output, folder.ledger, settings.rejected):
        if path is not None:
            _require_writable(path)
    _require_same(settings, folder, saved, fingerprint)
    write_state(folder, fingerprint, date.isoformat(), saved.get("output"))
    with SampleLog(folder.samples, len(prompts.store), settings.samples) as log:
        _fill(log, settings, candidate, prompts, progress)
        progress.end()
        selector = Selector(settings, prompts, candidate.data, candidate.name)
        hashes = _write(settings, folder, scratch, selector, log, fingerprint, date.isoformat())
    content = _describe(settings, candidate, prompts, selector, fingerprint, hashes)
    write_text_atomic(folder.ledger, sealed(content))
    return Answers(settings.output, content)


def _require_writable(path: Path) -> None:
    """Find out before hours of generating whether a file can be written at their end.

    Raises:
        OSError: it cannot.
    """
    place = Path(os.path.realpath(path))
    probe = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _find_rows(settings: GenerateSettings, candidate: Candidate, scratch: Path) -> RowsToScore:
    if settings.rows is None:
        return find_rows(settings.to_evaluate(), [candidate])
    write_rows("data", settings.rows, scratch / "rows.jsonl")
    return RowsToScore(sources_of(scratch / "rows.jsonl", "data"))


def _refuse_own_input(settings: GenerateSettings, wanted: RowsToScore) -> None:
    """Raises:
    UsageError: what is written would be read as prompts, now or the next time.
    """
    inputs = {path.resolve() for path in wanted.sources.files}
    given = settings.data.get("train") or []
    names = [name for name in ([given] if isinstance(given, str) else given) if isinstance(name, str)]
    folders = {Path(name).expanduser().resolve() for name in names}
    for flag, path in (("--output", settings.output), ("--rejected", settings.rejected)):
        if path is None:
            continue
        place = path.resolve()
        if place in inputs:
            raise UsageError(f"{flag} {path}: is one of the files with the prompts. Give it another name.",
                             code="output-is-input")  # fmt: skip
        ledger = place.with_name(f"{place.stem}{LEDGER_SUFFIX}")  # the rejected samples have none, but no matter
        is_matched = any(matches_pattern(one, name) for one in (place, ledger) for name in names)
        if place.parent in folders or is_matched:
            where = "has a name that the pattern of" if is_matched else "lies in the folder of"
            raise UsageError(
                f"{flag} {path}: {where} the prompts{' matches' * is_matched}, so that its answers would be read as "
                "prompts the next time. Write it to another folder.",
                code="output-is-input",
            )


def _fingerprint(settings: GenerateSettings, candidate: Candidate, prompts: Prompts) -> dict[str, Any]:
    """What the samples depend on; they are only continued where it is the same."""
    model = {
        "weights": hash_weights(candidate),
        "config": _hash_configs(candidate),
        "tokenizer": hash_tokenizer(prompts.encoder),
        "template": hash_template(prompts.encoder),
    }
    digest = hashlib.sha256()
    for number in prompts.asked:
        digest.update(prompts.digest(number))
    return {"format": FORMAT, "model": model, "settings": settings.to_json(), "rows": prompts.files,
            "prompts": digest.hexdigest()}  # fmt: skip


def _hash_configs(candidate: Candidate) -> str:
    """Of what the model's folders say beside its weights: its architecture, stop tokens and settings of sampling."""
    source = find_model(candidate.section.path, candidate.section.config)
    folders = [Path(source.name)] if source.kind == "local" else []
    folders += [source.adapter] if source.adapter else []
    paths = [folder / name for folder in folders for name in _CONFIGS]
    return sha256_text(json.dumps([[path.name, sha256_file(path)] for path in paths if path.is_file()]))


def _find_complete(
    settings: GenerateSettings, folder: WorkFolder, fingerprint: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The ledger of an output that is as this command would write it; None where there is something to do."""
    if settings.overwrites or not settings.output.exists():
        return None
    ledger = read_ledger(folder.ledger)
    if ledger is None or ledger["output"]["sha256"] != sha256_file(settings.output):
        return None
    if (path := settings.rejected) is not None and not (path.exists() and ledger.get("rejected") == sha256_file(path)):
        return None
    is_same = ledger["fingerprint"] == fingerprint and ledger["selection"] == settings.selection.to_json()
    return ledger if is_same else None


def _require_same(
    settings: GenerateSettings, folder: WorkFolder, saved: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> None:
    """Go on with the samples of an earlier process only where they answer the same.

    Raises:
        TunesmithError: naming what has changed.
    """
    if settings.overwrites:
        folder.clear()
        return
    before = saved.get("fingerprint")
    has_begun = folder.samples.exists() and folder.samples.stat().st_size > 0
    if before is None:
        ledger = read_ledger(folder.ledger) if settings.output.exists() else None
        before = ledger["fingerprint"] if ledger else None
        has_begun = before is not None
    if before is None or not has_begun:
        folder.clear()
        return
    if differences := list(compare(before, fingerprint)):
        lines = "\n".join(f"  {line}" for line in differences[:12])
        raise TunesmithError(
            f"{settings.output}: was begun with other settings:\n{lines}\nGive --output another name, or --overwrite "
            "to start again.",
            code="generation-differs",
        )


def _fill(
    log: SampleLog, settings: GenerateSettings, candidate: Candidate, prompts: Prompts, progress: Progress
) -> None:
    """Generate the samples that are not on the disk yet."""
    total = len(prompts.asked) * settings.samples
    if log.num_done == total:
        return
    progress.begin("generating", total, log.num_done)
    if log.num_done:
        progress.note(f"{log.num_done:,} samples of an earlier process are kept")
    with opened(candidate, prompts.encoder, settings.allow_changed_base) as speaker:
        batcher = Batcher(copy.copy(speaker), max_rows=settings.max_rows)
        answered = answer_all(speaker, batcher, _requests(log, settings, prompts))
        _keep(log, (_sample(speaker, key, reply) for key, reply in answered), total, progress)


def _requests(
    log: SampleLog, settings: GenerateSettings, prompts: Prompts
) -> Iterator[tuple[tuple[int, int], Request]]:
    sampling = _sampling(settings)
    for number, sample in itertools.product(prompts.asked, range(settings.samples)):
        if not log.has(number, sample):
            seed = prompts.seed(number, sample, settings.seed)
            yield (number, sample), Request(prompts.ids(number), replace(sampling, seed=seed), top_logprobs=0)


def _sampling(settings: GenerateSettings) -> Sampling:
    """Raises:
    UsageError: a value is out of range.
    """
    return Sampling(
        settings.max_new_tokens, settings.sampling_temperature, settings.seed, settings.top_p, settings.top_k,
        settings.min_p, settings.repetition_penalty, tuple(settings.stop),
    )  # fmt: skip


def _sample(speaker: Speaker, key: tuple[int, int], reply: Finished) -> Sample:
    encoder = speaker.encoder
    controls = sorted({encoder.added_text(one) for one in reply.ids if one in encoder.shield.ids})
    return Sample(*key, reply.text, reply.finish_reason, reply.error, len(reply.ids), reply.logprob, controls)


def _keep(log: SampleLog, samples: Iterable[Sample], total: int, progress: Progress) -> None:
    """Write samples to the log as they end."""
    waiting: list[Sample] = []
    began = last = time.monotonic()
    done = tokens = 0
    try:
        for sample in samples:
            waiting.append(sample)
            done, tokens = done + 1, tokens + sample.tokens
            now = time.monotonic()
            if len(waiting) >= _KEPT_TOGETHER or now - last > _KEPT_S:
                kept, waiting = waiting, []
                log.add(kept)
                last, seconds = now, max(now - began, 1e-6)
                speed = f"{done / seconds:,.1f} samples/s", f"{tokens / seconds:,.0f} tokens/s"
                progress.update(log.num_done, total, *speed)
    finally:
        log.add(waiting)
    progress.update(log.num_done, total)


def _write(
    settings: GenerateSettings, folder: WorkFolder, scratch: Path, selector: Selector, log: SampleLog,
    fingerprint: Mapping[str, Any], date: str,
) -> tuple[str, str | None]:  # fmt: skip
    """Choose among the samples, and write the files; each appears whole or not at all.

    Returns:
        hashes of the output and of the rejected samples; None where these are not wanted.

    Raises:
        DataError: no sample is kept.
    """
    kept, others = scratch / "kept.jsonl", scratch / "rejected.jsonl"
    with kept.open("wb") as answers, others.open("wb") as rejected:
        for outcome in selector.outcomes(log):
            line = f"{json.dumps(outcome.to_row(), ensure_ascii=False)}\n".encode()
            (rejected if outcome.reason else answers).write(line)
    if settings.rejected is not None:
        write_text_atomic(settings.rejected, _pieces(others))
    if not selector.tally.kept:
        reasons = "; ".join(f"{one.count:,}: {reason}" for reason, one in selector.tally.left_out.items())
        raise DataError(
            f"{settings.output}: is not written, since no sample is kept: {reasons}. The samples stay in "
            f"{folder.path}; the same command with another --keep or --check chooses among them.",
            code="no-answers",
        )
    sha256 = sha256_file(kept)
    write_state(folder, fingerprint, date, sha256)  # so that after a kill it is known that the output is ours
    write_text_atomic(settings.output, _pieces(kept))
    return sha256, sha256_file(others) if settings.rejected is not None else None


def _pieces(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        while piece := file.read(1 << 20):
            yield piece


def _describe(
    settings: GenerateSettings, candidate: Candidate, prompts: Prompts, selector: Selector,
    fingerprint: Mapping[str, Any], hashes: tuple[str, str | None],
) -> dict[str, Any]:  # fmt: skip
    """The content of the ledger."""
    template = prompts.encoder.template
    data = prompts.ledger.to_json()
    names = ("rows", "used", "refused", "passed_over", "codes", "files")
    return {
        "format": FORMAT,
        "tunesmith": tunesmith.__version__,
        "model": {
            "name": candidate.name, "path": candidate.path, "template": template.source if template else "none",
        },
        "settings": settings.to_json(),
        "selection": settings.selection.to_json(),
        "data": {name: data[name] for name in names},
        "drawn": min(settings.limit, prompts.num_rows) if settings.limit is not None else None,
        "samples": selector.tally.to_json(),
        "output": {"rows": selector.tally.kept, "sha256": hashes[0]},
        "rejected": hashes[1],
        "fingerprint": fingerprint,
    }  # fmt: skip
