"""`tunesmith export`: a model in another tool's files, read back and compared before they appear."""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.adapters.adapter_config import find_adapter
from tunesmith.adapters.base import describe_base, write_record
from tunesmith.adapters.deltas import Delta
from tunesmith.adapters.open_adapter import TOLERANCE, open_adapter
from tunesmith.config.schema import ModelSection
from tunesmith.display import format_bytes
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError, RunError, UsageError
from tunesmith.files import atomic_directory, is_no_room
from tunesmith.minimind.lora import lora_state, read_lora, require_modules
from tunesmith.minimind.opened import open_weights
from tunesmith.minimind.read import is_weight_file, lora_names, read_tensors
from tunesmith.minimind.write import choose_generation, find_unlike, minimind_state, what_to_set, write_pth
from tunesmith.model.card import load_model_lines
from tunesmith.model.load import check_vocabulary, load_config, load_model, require_own_base
from tunesmith.model.save import write_model, write_tokenizer
from tunesmith.model.source import ModelSource, find_model, open_path
from tunesmith.model.tokenizer import build_encoder, load_tokenizer
from tunesmith.tensors import write_tensors
from tunesmith.use.merge_output import is_ours, resolve_target
from tunesmith.use.proof import PROMPTS, logits_of

logger = logging.getLogger(__name__)
_FILE_NAME = re.compile(r"\w[\w.\- ]{0,59}")
_ON_CHANGED = "To use this base anyway, merge first: tunesmith merge ADAPTER --allow-changed-base --output MERGED."


@dataclass(frozen=True, slots=True)
class Export:
    """What to export.

    Attributes:
        name: a RUN, model folder, hub id, adapter or .pth.
        generation: of MiniMind's files; None: the newest that the architecture allows.
        weight: begin of the file's name, as MiniMind's `--weight`.
        base: the base of a LoRA .pth.
    """

    name: str
    output: str
    format: str
    generation: str | None = None
    weight: str | None = None
    tokenizer: str | None = None
    base: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def section(self, path: str) -> ModelSection:
        values = {"tokenizer": self.tokenizer, "config": dict(self.config), "trust_remote_code": self.trust_remote_code}
        return ModelSection(path=path, **values)  # type: ignore[arg-type]


def run_export(export: Export) -> Path:
    """Write, read back, compare, save; returns the folder.

    Raises:
        ModelError: the model cannot be opened, or has no place in that format.
        RunError: what was written differs, or the disk is full; no files are left.
    """
    path = open_path(export.name)
    if is_weight_file(path) and not path.exists():
        find_model(export.name)  # raises an error that names a similar file
    is_lora = is_weight_file(path) and bool(lora_names(read_tensors(path)))
    _refuse_unused(export, is_lora)
    folder = resolve_target(export.output)
    write = {"hf": _write_hf, "minimind": _write_minimind, "minimind-lora": _write_lora}[export.format]
    if is_lora:
        write = _write_peft
    try:
        with atomic_directory(folder) as partial:
            lines = write(export, partial)
    except Exception as error:
        if is_no_room(error):
            raise RunError(
                f"{export.output}: no space left on the disk. No files were written.", code="disk-full"
            ) from None
        if isinstance(error, OSError) and is_ours(error.filename, folder):
            raise RunError(
                f"{export.output}: cannot be written: {error.strerror}. No files were written.",
                code="output-not-writable",
            ) from None
        raise
    for name, text in lines:
        logger.info(f"{name:<10} {text}")
    logger.info(f"exported: {export.output}")
    return folder


def _refuse_unused(export: Export, is_lora: bool) -> None:
    """Refuse options that this export does not read.

    Raises:
        UsageError: names each.
    """
    is_minimind = export.format.startswith("minimind")
    problems = []
    if export.generation and not is_minimind:
        problems.append("--generation: is for --format minimind and minimind-lora")
    if export.weight and not is_minimind:
        problems.append("--weight: is for --format minimind and minimind-lora")
    if export.base and not is_lora:
        problems.append("--base: is for a LoRA .pth, which does not name its base")
    if is_lora and is_minimind:
        problems.append("--format: the file is a LoRA .pth of MiniMind already; --format hf makes an adapter of it")
    if is_lora and not export.base and not problems:
        problems.append(f"--base: {export.name} holds LoRA matrices; give the model that they were trained on")
    if export.weight is not None and not _FILE_NAME.fullmatch(export.weight):
        problems.append(f"--weight: {export.weight[:60]!r} cannot begin a file's name; use letters, digits, - and _")
    if problems:
        raise UsageError("\n".join(["tunesmith export:", *(f"  {line}" for line in problems)]), code="unused-option")


Lines = list[tuple[str, str]]


def _write_hf(export: Export, partial: Path) -> Lines:
    """A .pth as a Hugging Face folder, in the file's own precision."""
    if not is_weight_file(open_path(export.name)):
        source = find_model(export.name)
        if source.kind == "preset":
            raise _random_weights(export.name)
        how = f"merge it: tunesmith merge {export.name} --output DIR" if source.adapter else f"copy {source.name}"
        raise ModelError(
            f"{export.name}: is in Hugging Face form already; {how}. --format hf is for the .pth of MiniMind.",
            code="already-hf",
        )
    section = export.section(export.name)
    source = find_model(section.path, section.config)
    encoder = _encoder(section)
    config = load_config(section, encoder.tokenizer, source)
    dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    model: Any = load_model(section, config, dtype, seed=0, source=source)
    check_vocabulary(model, encoder.tokenizer)
    write_model(model, encoder, partial)
    (partial / "README.md").write_text(_card(source, load_model_lines()), encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32)
    said = _compare(model.float(), again, encoder)
    return [("model", f"{export.name}: {source.remark}"), ("proof", said)]


def _write_minimind(export: Export, partial: Path) -> Lines:
    section = export.section(export.name)
    _, encoder, model = _open(section)
    config: Any = model.config
    generation = choose_generation(export.name, config.model_type, export.generation)
    state = minimind_state(export.name, model, generation)
    weight = export.weight or "full_sft"
    file = partial / f"{weight}_{config.hidden_size}{_suffix(config)}.pth"
    write_pth(file, state)
    write_tokenizer(encoder, partial)
    reread = AutoConfig.from_pretrained(open_weights(file, {}).folder)
    given, others = find_unlike(config, reread, generation)
    if others:
        values = ", ".join(f"{key} {getattr(config, key, None)!r}" for key in others)
        raise ModelError(
            f"{export.name}: MiniMind's model of generation {generation} has no place for {values} of its config. The "
            "Hugging Face folder is the model's form for other tools.",
            code="not-a-minimind-model",
        )
    again = AutoModelForCausalLM.from_pretrained(open_weights(file, given).folder, dtype=torch.float32)
    before = _logits(model, encoder)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    said = _compare(model, again, encoder)
    rounding = _difference(before, _logits(model, encoder))
    to_set = what_to_set(config, generation)
    (partial / "README.md").write_text(_minimind_card(file.name, weight, config, generation, to_set), encoding="utf-8")
    lines = [("file", f"{file.name}, {format_bytes(file.stat().st_size)}, MiniMind {generation}"), ("proof", said)]
    lines.append(("rounding", f"half precision, MiniMind's own, changes logits by {rounding:.1e} of the largest"))
    if to_set:
        lines.append(("note", f"set in MiniMind's config class before loading: {', '.join(to_set)}"))
    return lines


def _write_lora(export: Export, partial: Path) -> Lines:
    """An adapter as MiniMind's LoRA file."""
    path = open_path(export.name)
    folder = find_adapter(path) if path.is_dir() else None
    if folder is None:
        raise ModelError(
            f"{export.name}: is not an adapter. Export the model: --format minimind.", code="not-an-adapter"
        )
    section = export.section(export.name)
    source = find_model(export.name)
    encoder = _encoder(section)
    base_section = section.model_copy(update={"path": source.name})
    model: Any = load_model(base_section, load_config(base_section, encoder.tokenizer), torch.float32, seed=0)
    require_own_base(source, False, _ON_CHANGED)
    generation = choose_generation(export.name, model.config.model_type, export.generation)
    state, rank = lora_state(export.name, model, _plain_factors(export.name, folder), generation)
    config = model.config
    file = partial / f"{export.weight or 'lora'}_{config.hidden_size}{_suffix(config)}.pth"
    write_pth(file, state)
    pairs = read_lora(file, read_tensors(file), config.num_attention_heads, config.num_key_value_heads)
    wrapped = open_adapter(model, folder)
    wanted = _logits(wrapped, encoder)
    difference = _difference(wanted, _logits(_added(wrapped.unload(), pairs), encoder))
    if not difference <= TOLERANCE[torch.float16]:
        raise _differs(difference, TOLERANCE[torch.float16])
    return [
        ("file", f"{file.name}, {format_bytes(file.stat().st_size)}, MiniMind {generation}"),
        ("proof", f"logits differ by {difference:.1e} of the largest, by rounding to half precision"),
        ("note", f"MiniMind must call apply_lora(model, rank={rank}); its default is 16, from 2025-04 to 2026-03: 8"),
    ]


def _plain_factors(name: str, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Raises:
    ModelError: the adapter is more than matrices beside linear layers.
    """
    delta = Delta(folder)
    parts = {part for tensors in delta.parts.values() for part in tensors}
    if delta.whole or delta.rows or delta.stored or delta.has_experts or parts != {"lora_A", "lora_B"}:
        raise ModelError(
            f"{name}: has more than LoRA's two matrices beside linear layers (DoRA, embeddings, biases, experts), "
            "which MiniMind's LoRA file cannot hold. Export the merged model: --format minimind.",
            code="lora-does-not-fit",
        )
    return {key.removesuffix(".weight"): delta.factors(key) for key in delta.parts}


def _write_peft(export: Export, partial: Path) -> Lines:
    """MiniMind's LoRA file as an adapter of peft."""
    from peft import LoraConfig

    path, base = open_path(export.name), str(export.base)
    section = export.section(base)
    source, encoder, model = _open(section)
    if source.adapter:
        raise ModelError(f"{base}: is itself an adapter. Merge it first: tunesmith merge.", code="base-is-adapter")
    config: Any = model.config
    pairs = read_lora(path, read_tensors(path), config.num_attention_heads, config.num_key_value_heads)
    require_modules(path, pairs, model)
    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    rank = max(ranks.values())
    named = str(open_path(base).resolve()) if source.kind == "local" else base
    others = {name: own for name, own in ranks.items() if own != rank}
    made = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=sorted(pairs), base_model_name_or_path=named,
        rank_pattern=others, alpha_pattern=dict(others), inference_mode=True,
    )  # fmt: skip
    made.save_pretrained(str(partial))
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    write_tensors(partial / "adapter_model.safetensors", tensors, {"format": "pt"})
    if source.kind == "local":
        write_record(describe_base(Path(source.name)), partial)
    write_tokenizer(encoder, partial)
    wrapped = open_adapter(model, partial)
    found = _logits(wrapped, encoder)
    difference = _difference(_logits(_added(wrapped.unload(), pairs), encoder), found)
    if not difference <= TOLERANCE[torch.float32]:
        raise _differs(difference, TOLERANCE[torch.float32])
    return [
        ("adapter", f"{len(pairs)} layers, rank {rank}, alpha {rank} (MiniMind's LoRA has no scale)"),
        ("base", f"{named}: {source.remark}".rstrip(": ")),
        ("proof", f"logits on {len(PROMPTS)} prompts differ by {difference:.1e} of the largest"),
    ]


def _open(section: ModelSection) -> tuple[ModelSource, Encoder, Any]:
    """A model in fp32 with its tokenizer; an adapter is merged into its base."""
    source = find_model(section.path, section.config)
    if source.kind == "preset":
        raise _random_weights(section.path)
    encoder = _encoder(section)
    config = load_config(section, encoder.tokenizer, source)
    model = load_model(section, config, torch.float32, seed=0, source=source)
    check_vocabulary(model, encoder.tokenizer)
    return source, encoder, model.eval().requires_grad_(False)


def _random_weights(name: str) -> ModelError:
    return ModelError(f"{name}: has random weights. Train it first.", code="random-weights")


def _encoder(section: ModelSection) -> Encoder:
    tokenizer = load_tokenizer(section)
    return build_encoder(tokenizer, None if tokenizer.chat_template else "none", {}, datetime.datetime.now())


@torch.no_grad()
def _added(model: Any, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """The model with the products added to its weights."""
    for name, (a, b) in pairs.items():
        weight: Any = model.get_submodule(name).weight
        weight += b @ a
    return model


def _logits(model: nn.Module, encoder: Encoder) -> Tensor:
    prompts: Sequence[Tensor] = [torch.tensor(encoder.tokenizer(text)["input_ids"]) for text in PROMPTS]
    return logits_of(model, [ids for ids in prompts if len(ids)])


def _difference(wanted: Tensor, found: Tensor) -> float:
    largest = wanted.abs().max().item()
    return (wanted - found).abs().max().item() / (largest or 1.0)


def _compare(wanted: nn.Module, found: nn.Module, encoder: Encoder) -> str:
    """Compare logits in fp32; returns a description.

    Raises:
        RunError: they differ by more than rounding explains.
    """
    difference = _difference(_logits(wanted, encoder), _logits(found, encoder))
    allowed = TOLERANCE[torch.float32]
    if not difference <= allowed:
        raise _differs(difference, allowed)
    prompts = f"logits on {len(PROMPTS)} prompts"
    return f"read back; {prompts} differ by {difference:.1e} of the largest (allowed: {allowed:.0e})"


def _differs(difference: float, allowed: float) -> RunError:
    return RunError(
        f"the exported files' logits differ by {difference:.1e} of the largest logit, more than {allowed:.0e}. No "
        "files were kept.",
        code="exported-logits-differ",
    )


def _suffix(config: Any) -> str:
    return "_moe" if config.model_type.endswith("_moe") else ""


def _card(source: ModelSource, lines: str) -> str:
    name = source.file.name if source.file else source.name
    return f"# {name}\n\nMade from MiniMind's {name} by `tunesmith export`: {source.remark}.\n\n{lines}"


def _minimind_card(file: str, weight: str, config: Any, generation: str, to_set: Sequence[str]) -> str:
    moe = 1 if config.model_type.endswith("_moe") else 0
    flags = f"--hidden_size {config.hidden_size} --num_hidden_layers {config.num_hidden_layers} --use_moe {moe}"
    if generation == "2024":
        flags = f"--dim {config.hidden_size} --n_layers {config.num_hidden_layers} --use_moe {bool(moe)}"
    text = f"# {file}\n\nWeights for MiniMind, generation {generation}, written by `tunesmith export`.\n\n"
    if to_set:
        text += (
            "MiniMind's config class has other defaults; set there: "
            + ", ".join(f"`{word}`" for word in to_set)
            + ".\n\n"
        )
    script = "eval_llm.py" if generation == "minimind-3" else "eval_model.py (later eval_llm.py)"
    return (
        f"{text}In a checkout of MiniMind, copy `{file}` to `out/`, and `tokenizer.json` and `tokenizer_config.json` "
        f"to `model/` if they are not MiniMind's own. Then `{script}` opens it:\n\n    {flags}"
        + (f" --weight {weight}\n" if generation != "2024" else "\n")
    )
