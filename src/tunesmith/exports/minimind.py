"""Export a model or an adapter as MiniMind's .pth files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.adapters.adapter_config import find_adapter
from tunesmith.adapters.deltas import Delta
from tunesmith.adapters.open_adapter import TOLERANCE, open_adapter
from tunesmith.display import format_bytes
from tunesmith.errors import ModelError
from tunesmith.exports.compare import add_products, compare_models, difference_of, logits_differ, prompt_logits
from tunesmith.exports.request import Export, Lines
from tunesmith.exports.whole import ON_CHANGED, load_export_encoder, open_whole
from tunesmith.minimind.lora import lora_state, read_lora
from tunesmith.minimind.opened import open_weights
from tunesmith.minimind.read import read_tensors
from tunesmith.minimind.write import choose_generation, find_unlike, minimind_state, what_to_set, write_pth
from tunesmith.model.load import load_config, load_model, require_own_base
from tunesmith.model.source import find_model, open_path
from tunesmith.model.tokenizer import write_tokenizer


def write_minimind(export: Export, partial: Path) -> Lines:
    section = export.section(export.name)
    _, encoder, model = open_whole(section)
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
    before = prompt_logits(model, encoder)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    said = compare_models(model, again, encoder)
    rounding = difference_of(before, prompt_logits(model, encoder))
    to_set = what_to_set(config, generation)
    (partial / "README.md").write_text(_minimind_card(file.name, weight, config, generation, to_set), encoding="utf-8")
    lines = [("file", f"{file.name}, {format_bytes(file.stat().st_size)}, MiniMind {generation}"), ("proof", said)]
    lines.append(("rounding", f"half precision, MiniMind's own, changes logits by {rounding:.1e} of the largest"))
    if to_set:
        lines.append(("note", f"set in MiniMind's config class before loading: {', '.join(to_set)}"))
    return lines


def write_lora(export: Export, partial: Path) -> Lines:
    """An adapter as MiniMind's LoRA file."""
    path = open_path(export.name)
    folder = find_adapter(path) if path.is_dir() else None
    if folder is None:
        raise ModelError(
            f"{export.name}: is not an adapter. Export the model: --format minimind.", code="not-an-adapter"
        )
    section = export.section(export.name)
    source = find_model(export.name)
    encoder = load_export_encoder(section)
    base_section = section.model_copy(update={"path": source.name})
    model: Any = load_model(base_section, load_config(base_section, encoder.tokenizer), torch.float32, seed=0)
    require_own_base(source, False, ON_CHANGED)
    generation = choose_generation(export.name, model.config.model_type, export.generation)
    state, rank = lora_state(export.name, model, _plain_factors(export.name, folder), generation)
    config = model.config
    file = partial / f"{export.weight or 'lora'}_{config.hidden_size}{_suffix(config)}.pth"
    write_pth(file, state)
    pairs = read_lora(file, read_tensors(file), config.num_attention_heads, config.num_key_value_heads)
    wrapped = open_adapter(model, folder)
    wanted = prompt_logits(wrapped, encoder)
    difference = difference_of(wanted, prompt_logits(add_products(wrapped.unload(), pairs), encoder))
    if not difference <= TOLERANCE[torch.float16]:
        raise logits_differ(difference, TOLERANCE[torch.float16])
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


def _suffix(config: Any) -> str:
    return "_moe" if config.model_type.endswith("_moe") else ""


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
