"""Export a .pth of MiniMind in Hugging Face form: a model as a folder, a LoRA file as an adapter of peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tunesmith.adapters.base import describe_base, write_record
from tunesmith.adapters.open_adapter import TOLERANCE, open_adapter
from tunesmith.cards.card import load_model_lines
from tunesmith.errors import ModelError
from tunesmith.exports.compare import add_products, compare_models, difference_of, logits_differ, prompt_logits
from tunesmith.exports.request import Export, Lines
from tunesmith.exports.whole import load_export_encoder, open_whole, random_weights
from tunesmith.minimind.lora import read_lora, require_modules
from tunesmith.minimind.read import is_weight_file, read_tensors
from tunesmith.model.load import check_vocabulary, load_config, load_model
from tunesmith.model.reopen import require_reads_as
from tunesmith.model.save import write_model
from tunesmith.model.source import ModelSource, find_model, open_path
from tunesmith.model.tokenizer import write_tokenizer
from tunesmith.tensors import write_tensors
from tunesmith.use.proof import PROMPTS


def write_hf(export: Export, partial: Path) -> Lines:
    """A .pth as a Hugging Face folder, in the file's own precision."""
    if not is_weight_file(open_path(export.name)):
        source = find_model(export.name)
        if source.kind == "preset":
            raise random_weights(export.name)
        how = f"merge it: tunesmith merge {export.name} --output DIR" if source.adapter else f"copy {source.name}"
        raise ModelError(
            f"{export.name}: is in Hugging Face form already; {how}. --format hf is for the .pth of MiniMind.",
            code="already-hf",
        )
    section = export.section(export.name)
    source = find_model(section.path, section.config)
    encoder = load_export_encoder(section)
    config = load_config(section, encoder.tokenizer, source)
    dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    model: Any = load_model(section, config, dtype, seed=0, source=source)
    check_vocabulary(model, encoder.tokenizer)
    write_model(model, encoder, partial)
    (partial / "README.md").write_text(_card(source, load_model_lines()), encoding="utf-8")
    require_reads_as(partial, export.output, encoder, model)
    again = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32)
    said = compare_models(model.float(), again, encoder)
    return [("model", f"{export.name}: {source.remark}"), ("proof", said)]


def write_peft(export: Export, partial: Path) -> Lines:
    """MiniMind's LoRA file as an adapter of peft."""
    from peft import LoraConfig

    path, base = open_path(export.name), str(export.base)
    section = export.section(base)
    source, encoder, model = open_whole(section)
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
    require_reads_as(partial, export.output, encoder, model, is_adapter=True)
    wrapped = open_adapter(model, partial)
    found = prompt_logits(wrapped, encoder)
    difference = difference_of(prompt_logits(add_products(wrapped.unload(), pairs), encoder), found)
    if not difference <= TOLERANCE[torch.float32]:
        raise logits_differ(difference, TOLERANCE[torch.float32])
    return [
        ("adapter", f"{len(pairs)} layers, rank {rank}, alpha {rank} (MiniMind's LoRA has no scale)"),
        ("base", f"{named}: {source.remark}".rstrip(": ")),
        ("proof", f"logits on {len(PROMPTS)} prompts differ by {difference:.1e} of the largest"),
    ]


def _card(source: ModelSource, lines: str) -> str:
    name = source.file.name if source.file else source.name
    return f"# {name}\n\nMade from MiniMind's {name} by `tunesmith export`: {source.remark}.\n\n{lines}"
