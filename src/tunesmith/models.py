"""The Python API for models: open one for replies, evaluate, merge adapters, export to other tools' files, push."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tunesmith.arguments import read_arguments
from tunesmith.config.choices import (
    ANSWER_CHOICES,
    BLEU_TOKENIZERS,
    EXPORT_FORMATS,
    GGUF_DIFFERENCES,
    GGUF_TYPES,
    KEEP_CHOICES,
    PUSH_PARTS,
    REPLY_CHOICES,
    WEIGHT_GENERATIONS,
)
from tunesmith.config.runfile import explain_problems
from tunesmith.config.schema import ModelSection
from tunesmith.errors import ConfigError, UsageError
from tunesmith.process import embedded, one_run
from tunesmith.use.model import Model

if TYPE_CHECKING:
    from tunesmith.arguments import Name
    from tunesmith.distillation.answers import Answers
    from tunesmith.distillation.settings import GenerateSettings
    from tunesmith.evaluation.records import Evaluation
    from tunesmith.evaluation.settings import EvaluateSettings
    from tunesmith.publish.plan import Push


def merge(
    *adapters: Name,
    output: Name,
    method: str = "sequential",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    seed: int = 0,
    base: Name | None = None,
    allow_changed_base: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Merge adapters into their base model; the result is checked before it appears under its name.

    Args:
        adapters: PEFT folders, or runs that trained an adapter.
        output: the folder to make.
        method: how several adapters are combined (peft's `add_weighted_adapter`), or sequential: one after another.
        weights: of each adapter; default: 1.
        density: share of values that ties, dare and prune keep.
        base: the base in full precision, where it is in another place by now.

    Returns:
        The folder of the merged model.
    """
    from tunesmith.use.merge import run_merge

    if not adapters:
        raise UsageError("merge: no adapter is given.", code="no-adapter")
    names = [os.fspath(adapter) for adapter in adapters]
    given = os.fspath(base) if base is not None else None
    shares = None if weights is None else [float(weight) for weight in weights]
    with embedded():
        run_merge(names, os.fspath(output), method, shares, density, seed, given, allow_changed_base, trust_remote_code)
    return Path(output).expanduser().absolute()


def load(
    model: Name,
    *adapters: Name,
    tokenizer: Name | None = None,
    config: Mapping[str, Any] | None = None,
    chat_template: Name | None = None,
    allow_changed_base: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """Open a model, a run or an adapter for replies.

    Args:
        model: a folder, a RUN, a checkpoint, a hub id or a .pth of MiniMind.
        adapters: further adapters of the same base, for `Model.switch`.
        tokenizer: its folder or hub id; default: the model's own. A .pth has none.
        config: what a .pth does not say, as in {"num_attention_heads": 16}.
        chat_template: a .jinja file, chatml, alpaca or none; default: the model's own.
    """
    from tunesmith.generation.speaker import load_speaker

    name = os.fspath(model)
    if not name.strip():
        raise UsageError("model: is empty; give a folder or a hub id.", code="empty-name")
    section = _section(name, tokenizer, config, trust_remote_code)
    template = os.fspath(chat_template) if chat_template is not None else None
    with embedded():
        return Model(load_speaker(section, template, [os.fspath(name) for name in adapters], allow_changed_base))


def evaluate(
    *models: Name,
    data: Any = None,
    base: bool = False,
    replies: str = "all",
    limit: int | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = 0.0,
    seed: int = 0,
    bleu_tokenizer: str = "auto",
    output: Name | None = None,
    overwrite: bool = False,
    tokenizer: Name | None = None,
    config: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    allow_changed_base: bool = False,
    judge: str | None = None,
    judge_model: str | None = None,
    judge_key_env: str | None = None,
) -> Evaluation:
    """Score models on the same rows: by likelihood, and by the replies that they write.

    The same call continues an evaluation that was interrupted.

    Args:
        models: runs, model folders, adapters or hub ids.
        data: names of files, folders or hub data sets; or rows, as in `train`; or a dict of keys of the data section
            (train, format, fields, ...). Default: the rows that the first run held out. A run's rows are labelled as
            in its training.
        base: put the base of each run or adapter beside it.
        replies: to generate: all trained ones, the last of each row, or none: likelihoods only.
        limit: score only so many rows, drawn by the seed.
        temperature: 0: greedy; None: as each model's generation_config says.
        bleu_tokenizer: sacrebleu's; auto: by the script of the references.
        output: the folder of evaluate.json, replies.jsonl and evaluate.html; default: RUN/evaluate, or evaluate/NAME.
        overwrite: replace another evaluation in that folder.
        tokenizer, config: as in `load`.
        judge, judge_model, judge_key_env: address of an OpenAI-compatible server, the model there that compares the
            replies, and the environment variable with its key (default: OPENAI_API_KEY, for api.openai.com only).

    Raises:
        TunesmithError: a model or the data cannot be used, or the folder holds another evaluation.
        InterruptedRun: Ctrl-C or SIGTERM.
    """
    from tunesmith.evaluation.table import Progress
    from tunesmith.judging.command import evaluate_and_show
    from tunesmith.judging.settings import judge_settings

    judging = judge_settings(judge, judge_model, judge_key_env)
    options = {
        "has_base": base, "replies": replies, "limit": limit, "max_new_tokens": max_new_tokens,
        "temperature": temperature, "seed": seed, "bleu_tokenizer": bleu_tokenizer, "overwrites": overwrite,
        "trust_remote_code": trust_remote_code, "allow_changed_base": allow_changed_base, "config": dict(config or {}),
        "tokenizer": os.fspath(tokenizer) if tokenizer is not None else None,
        "output": Path(output) if output is not None else None,
    }  # fmt: skip
    settings = _evaluate_settings(models, data, options)
    with one_run(), embedded():
        return evaluate_and_show(settings, judging, Progress(is_shown=False))[1]


def _evaluate_settings(models: Sequence[Name], data: Any, options: Mapping[str, Any]) -> EvaluateSettings:
    """Raises:
    UsageError: a value is not allowed.
    """
    from tunesmith.evaluation.settings import EvaluateSettings

    if not models:
        raise UsageError("evaluate: no model is given.", code="no-model")
    for name, known in (("replies", REPLY_CHOICES), ("bleu_tokenizer", BLEU_TOKENIZERS)):
        if options[name] not in known:
            raise UsageError(f"{name}: {options[name]!r} is not one of {', '.join(known)}.", code="unknown-choice")
    for name, least in (("limit", 1), ("max_new_tokens", 1), ("seed", 0)):
        value = options[name]
        if not (type(value) is int and value >= least) and not (name == "limit" and value is None):
            raise UsageError(f"{name}: must be a whole number of {least} or more, not {value!r}.", code="bad-number")
    tree, rows = read_arguments(None, data, None, None, {})
    section = {name: value for name, value in tree.get("data", {}).items() if not (name == "train" and rows)}
    return EvaluateSettings([os.fspath(model) for model in models], section, rows.get("train"), **options)


def generate(
    model: Name,
    *,
    data: Any,
    output: Name,
    samples: int = 1,
    replies: str = "last",
    keep: str = "all",
    check: str | Sequence[str] = (),
    score: str | None = None,
    keep_per_row: int | None = None,
    keep_cut: bool = False,
    rejected: Name | None = None,
    overwrite: bool = False,
    tokenizer: Name | None = None,
    **sampling: Any,
) -> Answers:
    """Let a model answer prompts, and keep the answers as data for `train`.

    The same call continues where an earlier one stopped. With other arguments for what is kept it chooses anew among
    the samples that it has.

    Args:
        model: a run, a model folder, an adapter or a hub id.
        data: as in `evaluate`. A row needs no reply; where it has one, that is the reference.
        output: the .jsonl to write. NAME.ledger.json beside it says what became of each row and sample.
        samples: drawn for each prompt.
        replies: which replies of a row are answered anew: its last, or all, each in a row of its own.
        keep, check, score, keep_per_row, keep_cut, rejected: which samples are kept, as in the command; `check` is one
            name or several.
        overwrite: start again if the output holds other answers.
        tokenizer: of a .pth, which has none.
        sampling: max_new_tokens (512), temperature (0 for one sample, 1 for several), top_p, top_k, min_p,
            repetition_penalty, stop, seed (0), system (prompt for rows without one), limit (rows, drawn by the seed),
            max_rows (64; generated at once), config (as in `load`), trust_remote_code, allow_changed_base.

    Raises:
        TunesmithError: the model or the data cannot be used, or the output holds other answers.
        InterruptedRun: Ctrl-C or SIGTERM.
    """
    from tunesmith.distillation.command import select
    from tunesmith.distillation.run import generate_answers
    from tunesmith.evaluation.table import Progress

    for name, value, known in (("replies", replies, ANSWER_CHOICES), ("keep", keep, KEEP_CHOICES)):
        if value not in known:
            raise UsageError(f"{name}: {value!r} is not one of {', '.join(known)}.", code="unknown-choice")
    numbers = {"samples": samples, "keep_per_row": keep_per_row}
    _require_counts(numbers | {name: sampling.get(name) for name in ("limit", "max_rows", "max_new_tokens")})
    stop = sampling.pop("stop", ())
    options = sampling | {
        "replies": replies, "samples": samples, "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "selection": select(keep, [check] if isinstance(check, str) else check, score, keep_per_row, keep_cut),
        "rejected": Path(rejected) if rejected is not None else None, "overwrites": overwrite,
        "tokenizer": os.fspath(tokenizer) if tokenizer is not None else None,
    }  # fmt: skip
    settings = _generate_settings(model, data, output, options)
    with one_run(), embedded():
        return generate_answers(settings, Progress(is_shown=False))


def _generate_settings(model: Name, data: Any, output: Name, options: Mapping[str, Any]) -> GenerateSettings:
    from tunesmith.distillation.settings import GenerateSettings

    tree, rows = read_arguments(None, data, None, None, {})
    section = {name: value for name, value in tree.get("data", {}).items() if not (name == "train" and rows)}
    return GenerateSettings(os.fspath(model), Path(output), section, rows.get("train"), **options)


def _require_counts(numbers: Mapping[str, Any]) -> None:
    """Raises:
    UsageError: a number is not a whole one of 1 or more; None is allowed.
    """
    for name, value in numbers.items():
        if value is not None and not (type(value) is int and value >= 1):
            raise UsageError(f"{name}: must be a whole number of 1 or more, not {value!r}.", code="bad-number")


def export(
    model: Name,
    *,
    output: Name,
    format: str,
    generation: str | None = None,
    weight: str | None = None,
    tokenizer: Name | None = None,
    base: Name | None = None,
    config: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    type: str | None = None,
    allow: Sequence[str] = (),
) -> Path:
    """Write a model in another tool's files; they are read back and compared before they appear under their name.

    Args:
        model: a RUN, a model folder, a hub id, an adapter or a .pth of MiniMind.
        output: the folder to make; of gguf, the file.
        format: gguf, hf (from a .pth), minimind (a .pth) or minimind-lora (an adapter as its LoRA .pth).
        generation: of MiniMind's files: minimind-3, 2025, 2024; default: the newest that the architecture has.
        weight: begin of the file's name; default: full_sft, or lora.
        base: of a LoRA .pth, which does not name its own.
        tokenizer, config: as in `load`.
        type: of a GGUF file's matrices: f32, f16, bf16, q8_0; default: the model's own.
        allow: write a GGUF file although llama.cpp differs in tokens or template.

    Returns:
        The folder or file.

    Raises:
        ModelError: the model cannot be opened, or has no place in that format.
        RunError: what was written differs, or the disk is full.
    """
    from tunesmith.exports.request import Export
    from tunesmith.exports.run import run_export

    generation = None if generation is None else str(generation)  # 2025 may be given as a number
    _require_choices(
        format=(format, EXPORT_FORMATS), generation=(generation, WEIGHT_GENERATIONS), type=(type, GGUF_TYPES)
    )
    for part in allow:
        _require_choices(allow=(part, GGUF_DIFFERENCES))
    section = _section(os.fspath(model), tokenizer, config, trust_remote_code)
    given = os.fspath(base) if base is not None else None
    what = Export(
        section.path, os.fspath(output), format, generation, None if weight is None else str(weight),
        section.tokenizer, given, section.config, trust_remote_code, type, tuple(allow),
    )  # fmt: skip
    with embedded():
        run_export(what)
    return Path(output).expanduser().absolute()


def push(
    model: Name,
    repository: str,
    *,
    yes: bool = False,
    public: bool = False,
    replace: bool = False,
    license: str | None = None,
    base: str | None = None,
    include: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Push:
    """Publish a model or adapter on the Hugging Face hub, with its card. Without `yes` nothing is uploaded.

    The token is the one of `hf auth login`, or HF_TOKEN.

    Args:
        model: a RUN, a model folder or an adapter on this machine.
        repository: owner/name; created if there is none.
        public: for everybody; default: private.
        replace: replace files that the repository has already.
        license: its id on the hub; default: the base's, if known.
        base: where the base of an adapter is on the hub, if it was a folder.
        include: of a run, also: config, metrics, report, and replies (sample replies, which quote the data).

    Returns:
        What is pushed, or would be: files, card, visibility; `commit` is None where nothing was.

    Raises:
        UsageError: the name or an argument is wrong.
        ModelError: the folder cannot be published, or not there.
        RunError: the hub cannot be reached, or holds other bytes afterwards.
    """
    from tunesmith.publish.plan import PushSettings
    from tunesmith.publish.push import run_push

    unknown = [part for part in include if part not in PUSH_PARTS] if not isinstance(include, str) else [include]
    if unknown:
        raise UsageError(f"include: {unknown[0]!r}; give a list of {', '.join(PUSH_PARTS)}.", code="unknown-choice")
    name = os.fspath(model)
    with embedded():
        return run_push(PushSettings(name, repository, public, license, base, include, replace, yes, trust_remote_code))


def _require_choices(**given: tuple[str | None, Sequence[str]]) -> None:
    """Raises:
    UsageError: a value is not among those allowed; None means the default.
    """
    for name, (value, known) in given.items():
        if value is not None and value not in known:
            raise UsageError(f"{name}: {value!r} is not one of {', '.join(known)}.", code="unknown-choice")


def _section(
    name: str, tokenizer: Name | None, config: Mapping[str, Any] | None, trust_remote_code: bool
) -> ModelSection:
    own = os.fspath(tokenizer) if tokenizer is not None else None
    try:
        return ModelSection(path=name, tokenizer=own, config=dict(config or {}), trust_remote_code=trust_remote_code)
    except ValidationError as error:
        raise ConfigError("the call", explain_problems(error, is_python=True)) from None
