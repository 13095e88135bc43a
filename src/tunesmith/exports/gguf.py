"""Export a model as a GGUF file for llama.cpp, Ollama and LM Studio, with a Modelfile beside it."""

from __future__ import annotations

import datetime
import logging
import os
import shlex
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tunesmith
from tunesmith.adapters.adapter import find_zero_gates
from tunesmith.adapters.open_adapter import TOLERANCE, merge_adapter, open_adapter
from tunesmith.data.store import has_store, open_store
from tunesmith.display import format_bytes
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError, RunError, TunesmithError, UsageError
from tunesmith.exports.compare import difference_of, logits_differ, prompt_logits
from tunesmith.exports.request import Export, Lines
from tunesmith.exports.whole import ON_CHANGED, random_weights
from tunesmith.files import is_no_room, sync_path
from tunesmith.generation.speaker import find_stop_ids, trained_data
from tunesmith.gguf.architecture import Form, describe_model
from tunesmith.gguf.file import find_changed, write_gguf
from tunesmith.gguf.modelfile import write_modelfile
from tunesmith.gguf.pretokenizer import NUM_FUZZ
from tunesmith.gguf.proof import prove, prove_in_f32
from tunesmith.gguf.reader import reader_version
from tunesmith.gguf.seal import find_seal, hash_unsealed, write_seal
from tunesmith.gguf.tensors import list_tensors
from tunesmith.gguf.variables import set_variables
from tunesmith.gguf.vocabulary import Vocabulary, adds_bos, describe_vocabulary
from tunesmith.model.load import check_vocabulary, load_config, load_model, require_own_base
from tunesmith.model.reopen import PLAIN_TEXTS
from tunesmith.model.source import ModelSource, find_model
from tunesmith.model.tokenizer import build_encoder, load_tokenizer
from tunesmith.use.proof import PROMPTS, available_memory

logger = logging.getLogger(__name__)
_TYPE_OF = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_MOST_ROWS, _MOST_CHARACTERS = 200, 4000


def export_gguf(export: Export) -> Path:
    """Write FILE.gguf and FILE.Modelfile, prove the file with llama.cpp, and give both their names.

    Raises:
        ModelError: the model has no GGUF form, or llama.cpp would read its tokens or its template otherwise.
        RunError: what was written differs, or the disk is full; no files are left.
    """
    path = _target(export.output)
    modelfile = path.with_suffix(".Modelfile")
    _require_extra()
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        lines, text = _write(export, partial, path)
        _take_name(partial, path, modelfile, text)
    except OSError as error:
        if is_no_room(error) or error.filename is None or Path(os.fsdecode(error.filename)).parent == path.parent:
            raise _explain(error, export.output) from None
        raise  # about the model
    finally:
        partial.unlink(missing_ok=True)
    for name, line in lines:
        logger.info(f"{name:<10} {line}")
    logger.info(f"exported: {export.output}\nOllama: ollama create NAME -f {shlex.quote(str(modelfile))}")
    return path


def _target(output: str) -> Path:
    """The real path of the file to create.

    Raises:
        UsageError: it is not named .gguf.
        TunesmithError: it exists already, or its folder cannot be written.
    """
    if not output.endswith(".gguf"):
        raise UsageError(
            f"tunesmith export: --output {output!r}: --format gguf writes one file; end its name in .gguf.",
            code="output-not-gguf",
        )
    if not output.isprintable():
        raise TunesmithError(
            f"{output!r}: cannot be used as --output: a Modelfile cannot name a file with control characters.",
            code="output-not-usable",
        )
    path = Path(output).expanduser()
    path = path.parent.resolve() / path.name
    for taken in (path, path.with_suffix(".Modelfile")):
        if os.path.lexists(taken):
            raise TunesmithError(f"{taken}: already exists; give --output a new name.", code="output-exists")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explain(error, output) from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise TunesmithError(
            f"{output}: cannot be used as --output: {path.parent} is not writable.", code="output-not-usable"
        )
    try:
        path.with_suffix(".Modelfile").lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a longer name than the file system takes
        raise _explain(error, output) from None
    return path


def _require_extra() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UsageError(
            "tunesmith export: --format gguf needs the package gguf. To install it with its reader: pip install "
            "'tunesmith[gguf]'",
            code="extra-missing",
        ) from None


def _explain(error: OSError, output: str) -> TunesmithError:
    if is_no_room(error):
        return RunError(f"{output}: no space left on the disk. No files were written.", code="disk-full")
    return RunError(
        f"{output}: cannot be written: {error.strerror or error}. No files were written. Give --output another name or "
        "folder.",
        code="output-not-writable",
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """A model to export.

    Attributes:
        model: in fp32, an adapter merged.
        kind: type of the file's matrices.
        texts: of the run's rows, or usual ones.
        stops: ids that end a reply.
        template: with the run's variables set in it; None without one.
        context: largest number of tokens of a chat.
        lines: to print.
    """

    model: Any
    encoder: Encoder
    kind: str
    texts: Sequence[str]
    stops: Sequence[int]
    template: str | None
    context: int
    lines: Lines


def _open(export: Export) -> _Opened:
    section = export.section(export.name)
    source = find_model(section.path, section.config)
    if source.kind == "preset":
        raise random_weights(section.path)
    trained, folder = trained_data(export.name)
    tokenizer = load_tokenizer(section)
    is_bare = trained.get("chat_template") == "none" or not tokenizer.chat_template
    variables = trained.get("template_kwargs") or {}
    encoder = build_encoder(tokenizer, "none" if is_bare else None, variables, datetime.datetime.now())
    template = set_variables(encoder.template.text, variables) if encoder.template else None
    config: Any = load_config(section, tokenizer, source)
    describe_model(export.name, config, has_zero_gates=True)  # refuses before the weights are read
    context = _context(export.name, config, trained.get("max_seq_len") or 0)
    kind = export.type or _TYPE_OF.get(config.dtype or torch.float32, "f16")
    lines: Lines = []
    if source.adapter:
        model, said = _merge(section.model_copy(update={"path": source.name}), source, config, encoder)
        lines.append(("adapter", said))
    else:
        model = load_model(section, config, torch.float32, seed=0, source=source)
    check_vocabulary(model, tokenizer)
    model = model.eval().requires_grad_(False)
    texts = _texts_of_run(folder, encoder) if folder else []
    stops = find_stop_ids(model, encoder)
    return _Opened(model, encoder, kind, texts or [*PROMPTS, *PLAIN_TEXTS], stops, template, context, lines)


def _context(name: str, config: Any, trained: int) -> int:
    """The model's context, or the run's where its samples were longer.

    Raises:
        ModelError: llama.cpp cannot have it.
    """
    found = max(int(config.max_position_embeddings), trained)
    if not 2 <= found < 2**31:
        raise ModelError(
            f"{name}: max_position_embeddings {found} has no GGUF form: llama.cpp takes 2 to {2**31 - 1:,} tokens.",
            code="no-gguf-form",
        )
    return found


def _merge(section: Any, source: ModelSource, config: Any, encoder: Encoder) -> tuple[Any, str]:
    """The base with the adapter merged in fp32, compared with the adapter beside the base.

    Raises:
        RunError: the logits differ.
    """
    base = load_model(section, config, torch.float32, seed=0)
    require_own_base(source, False, ON_CHANGED)
    assert source.adapter is not None
    wrapped = open_adapter(base, source.adapter)
    wanted = prompt_logits(wrapped, encoder)
    merged = merge_adapter(wrapped)
    difference = difference_of(wanted, prompt_logits(merged, encoder))
    if not difference <= TOLERANCE[torch.float32]:
        raise logits_differ(difference, TOLERANCE[torch.float32])
    said = f"logits on {len(PROMPTS)} prompts differ by {difference:.1e} of the largest"
    return merged, f"merged into {source.shown}; {said}"


def _texts_of_run(folder: Any, encoder: Encoder) -> list[str]:
    """Texts of a run's samples, evenly spaced; control tokens are spelled."""
    if not has_store(folder.tokens):
        return []
    store = open_store(folder.tokens)
    picked = range(0, len(store), max(1, len(store) // _MOST_ROWS))
    decode = encoder.tokenizer.backend_tokenizer.decode
    texts = (decode([int(i) for i in store[n].input_ids], skip_special_tokens=False)[:_MOST_CHARACTERS] for n in picked)
    return [text for text in texts if text]


def _write(export: Export, partial: Path, path: Path) -> tuple[Lines, str]:
    """Write the file under a hidden name and prove it; returns what to print, and the Modelfile."""
    opened = _open(export)
    model, encoder, kind = opened.model, opened.encoder, opened.kind
    form = describe_model(export.name, model.config, has_zero_gates=bool(find_zero_gates(model)))
    rows = model.get_input_embeddings().num_embeddings
    vocabulary = describe_vocabulary(export.name, encoder, rows, opened.texts, opened.stops)
    problems = _token_problem(vocabulary, len(opened.texts))
    _refuse(export.name, problems, set(export.allow))
    tensors = list_tensors(export.name, model, form, kind)
    size = sum(tensor.nbytes for tensor in tensors)
    if (free := shutil.disk_usage(path.parent).free) < size:
        raise RunError(
            f"{export.output}: the file needs {format_bytes(size)}; {format_bytes(free)} are free.",
            code="disk-too-small",
        )
    metadata = _metadata(path.stem, opened, form, vocabulary)
    hashes = write_gguf(partial, form.name, metadata, tensors, kind)
    seal = find_seal(partial)
    assert seal is not None
    written = hash_unsealed(partial, seal)
    lines = [*opened.lines, ("file", f"{path.name}, {format_bytes(partial.stat().st_size)}, {form.name}, {kind}")]
    if form.remark:
        lines.append(("note", form.remark))
    lines += [("note", text) for text in _twin_notes(vocabulary)]
    if kind != "f32" and reader_version():
        lines.append(_prove_in_f32(export, partial, opened, form, metadata))
    said, is_proven = _prove(export, partial, opened, vocabulary, hashes, problems)
    lines += said
    if hash_unsealed(partial, seal) != written:
        raise RunError(
            f"{export.output}: was changed by another process while it was proven. No files were kept.",
            code="written-differently",
        )
    write_seal(partial, is_proven)
    bos = encoder.tokenizer.bos_token if adds_bos(encoder) else ""
    decode = encoder.tokenizer.backend_tokenizer.decode
    stops = [decode([number], skip_special_tokens=False) for number in opened.stops]
    return lines, write_modelfile(path.name, encoder.renderer(), bos, stops, opened.context)


def _metadata(name: str, opened: _Opened, form: Form, vocabulary: Vocabulary) -> dict[str, Any]:
    reader = reader_version()
    return {
        "tunesmith.version": tunesmith.__version__,
        **({"tunesmith.reader": reader} if reader else {}),
        "general.name": name,
        "general.type": "model",
        **{f"{form.name}.{key}": value for key, value in form.metadata.items()},
        f"{form.name}.context_length": opened.context,
        **vocabulary.metadata,
        **({"tokenizer.chat_template": opened.template} if opened.template else {}),
    }


def _prove_in_f32(
    export: Export, partial: Path, opened: _Opened, form: Form, metadata: Mapping[str, Any]
) -> tuple[str, str]:
    """Compare logits with the same metadata and weights in f32, where there is room; returns a line to print."""
    tensors = list_tensors(export.name, opened.model, form, "f32")
    size = sum(tensor.nbytes for tensor in tensors)
    if not (size < shutil.disk_usage(partial.parent).free and 1.5 * size < available_memory()):
        return "note", f"not compared with weights in f32, which needs {format_bytes(1.5 * size)} of memory and disk"
    whole = partial.with_name(f"{partial.name}.f32")
    try:
        write_gguf(whole, form.name, metadata, tensors, "f32")
        return "proof", prove_in_f32(str(whole), opened.model, opened.encoder, opened.texts, opened.context)
    finally:
        whole.unlink(missing_ok=True)


def _prove(
    export: Export,
    partial: Path,
    opened: _Opened,
    vocabulary: Vocabulary,
    hashes: Mapping[str, str],
    problems: dict[str, str],
) -> tuple[Lines, bool]:
    """Compare the file as written; what the user must allow is added to `problems`. Returns what to print, and whether
    all was compared and is equal.

    Raises:
        RunError: a tensor reads back differently, or llama.cpp computes something else.
        ModelError: llama.cpp reads tokens or template otherwise, and this is not allowed.
    """
    if (changed := find_changed(partial, hashes)) is not None:
        raise RunError(
            f"{export.output}: {changed} reads back differently from what was written. No files were kept; check the "
            "disk.",
            code="written-differently",
        )
    lines: Lines = [("tensors", f"{len(hashes)} read back, byte by byte as written")]
    reader = reader_version()
    if reader is None:
        text = "llama.cpp is not installed, so nothing has opened the file: pip install 'tunesmith[gguf]'"
        return [*lines, ("NOT PROVEN", text)], False
    fits = 1.5 * partial.stat().st_size < available_memory()  # the model is in memory already
    finding = prove(
        str(partial), opened.model if fits else None, opened.encoder, vocabulary, opened.texts, opened.stops,
        opened.kind, opened.context,
    )  # fmt: skip
    problems |= finding.problems
    _refuse(export.name, problems, set(export.allow))
    lines += [("proof", line) for line in finding.lines]
    lines += [("NOT PROVEN", f"{text} (--allow {part})") for part, text in problems.items()]
    if not finding.has_logits:
        lines.append(("NOT PROVEN", "the logits were not compared; export it on a machine with more memory"))
    is_proven = finding.has_logits and not problems
    return [*lines, *([("proven", f"by {reader}")] if is_proven else [])], is_proven


def _token_problem(vocabulary: Vocabulary, num_texts: int) -> dict[str, str]:
    """Texts of the run, or usual ones, whose ids llama.cpp's nearest tokenizer would not give."""
    twin = vocabulary.twin
    if twin.exact or not (twin.differs or (twin.fuzz_differs and not twin.is_meant)):
        return {}
    return {
        "tokens": f"llama.cpp has no pre-tokenizer that cuts texts as this tokenizer does. The nearest, {twin.name}, "
        f"gives other ids for {twin.differs:.1%} of {num_texts} texts and {twin.fuzz_differs:.1%} of random ones"
        + (f", as for {twin.example[:60]!r}" if twin.example else "")
    }


def _twin_notes(vocabulary: Vocabulary) -> list[str]:
    twin = vocabulary.twin
    if twin.exact:
        return []
    shown = f", as for {twin.example[:40]!r}" if twin.example else ""
    share = f"{twin.fuzz_differs:.1%}" if twin.fuzz_differs else "none"
    return [f"{'; '.join(twin.reasons)}: {share} of {NUM_FUZZ:,} random texts get other ids{shown}"]


def _refuse(name: str, problems: Mapping[str, str], allowed: set[str]) -> None:
    """Raises:
    ModelError: a difference that the user has not allowed.
    """
    for part, text in problems.items():
        if part in allowed:
            continue
        said = (
            f"{name}: {text}. The model would answer worse than it was trained to. To export it all the same: --allow "
        )
        if part == "tokens":
            raise ModelError(f"{said}tokens", code="tokens-differ")
        raise ModelError(f"{said}template", code="template-differs")


def _take_name(partial: Path, path: Path, modelfile: Path, text: str) -> None:
    """Give the files their names, the Modelfile first; no other file is replaced."""
    half = partial.with_name(f"{partial.name}.Modelfile")
    made: list[Path] = []
    try:
        half.write_text(text, encoding="utf-8")
        sync_path(half)
        for source, target in ((half, modelfile), (partial, path)):
            if os.path.lexists(target):
                raise TunesmithError(
                    f"{target}: another process created it meanwhile. Give --output a new name.", code="output-taken"
                )
            source.rename(target)
            made.append(target)
    except BaseException:
        for target in made:
            target.unlink(missing_ok=True)
        raise
    finally:
        half.unlink(missing_ok=True)
    sync_path(path.parent)
