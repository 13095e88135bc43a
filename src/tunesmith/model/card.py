"""The model card: README.md beside the weights, in the form that the hub reads, with the lines that load them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from tunesmith.model.source import ModelSource

# where huggingface_hub keeps what it downloads; a hub model is often named by that folder
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|$)")

_LOAD_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
"""
_LOAD_ADAPTER = """from peft import {peft}
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = "."  # this folder, or its name on the hub
{name}base = AutoModelForCausalLM.from_pretrained({base})
{resize}tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(base, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)  # the stop tokens
"""
_TRAIN_ADAPTER = "model = PeftModel.from_pretrained(base, folder, is_trainable=True)\n"


def hub_id(source: ModelSource) -> tuple[str, str | None]:
    """The base's name on the hub and its revision; "" where it has none. Paths of this machine are not for others."""
    if source.kind == "hub":
        return source.name, source.revision
    found = _CACHED.search(Path(source.name).as_posix()) if source.kind == "local" and not source.file else None
    return (f"{found[1]}/{found[2]}", found[3]) if found else ("", None)


def describe_base(source: ModelSource) -> str:
    """The base for a reader elsewhere."""
    name, _ = hub_id(source)
    if name:
        return name
    local = source.file or Path(source.name)
    return f"new:{source.name}" if source.kind == "preset" else f"a local model ({local.name})"


def front_matter(source: ModelSource, is_adapter: bool) -> str:
    """The card's metadata."""
    name, _ = hub_id(source)
    front: dict[str, object] = {"library_name": "peft" if is_adapter else "transformers"}
    front["pipeline_tag"] = "text-generation"
    if name:
        front["base_model"] = name
    front["tags"] = ["tunesmith", "sft", *(["lora"] if is_adapter else [])]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, default_flow_style=None)}---\n"


def load_model_lines() -> str:
    return f"## Load\n\n```python\n{_LOAD_MODEL}```\n"


def load_adapter_lines(source: ModelSource, revision: str | None, rows: int | None) -> str:
    """How peft opens the adapter, for use and for further training.

    Args:
        revision: of a hub base, that it was trained on.
        rows: of the embedding, where tokens were added.
    """
    name, cached = hub_id(source)
    revision = revision or cached
    base = f'"{name}"' + (f', revision="{revision}"' if revision else "")
    named = "name = PeftConfig.from_pretrained(folder).base_model_name_or_path  # or the base's folder\n"
    values: Mapping[str, str] = {
        "peft": "PeftModel" if name else "PeftConfig, PeftModel",
        "name": "" if name else named,
        "base": base if name else "name",
        "resize": f"base.resize_token_embeddings({rows})  # rows for the added tokens\n" if rows else "",
    }
    return (
        f"## Load\n\n```python\n{_LOAD_ADAPTER.format(**values)}```\n\n"
        f"To train it further, load it so:\n\n```python\n{_TRAIN_ADAPTER}```\n"
    )
