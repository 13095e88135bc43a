"""The model card: README.md beside the weights, in the form that the hub reads, with the lines that load them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tunesmith.model.source import ModelSource

# where huggingface_hub keeps what it downloads; a hub model is often named by that folder
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|$)")

HERE = 'folder = "."  # this folder, or its name on the hub\n'
_LOAD_MODEL = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

{HERE}tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
"""
_LOAD_ADAPTER = """from peft import {peft}
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

{here}{name}base = AutoModelForCausalLM.from_pretrained({base})
{resize}tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(base, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)  # the stop tokens
"""
_ASK = """messages = [{"role": "user", "content": "Hello!"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
reply = model.generate(**prompt, max_new_tokens=200)
print(tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_TRAIN_ADAPTER = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
"""
COMMANDS_HERE = "tunesmith chat .   # in this folder\ntunesmith serve .  # answers as OpenAI's API does\n"


def hub_id(source: ModelSource) -> tuple[str, str | None]:
    """The base's name on the hub and its revision; "" where it has none. Paths of this machine are not for others."""
    if source.kind == "hub":
        return source.name, source.revision
    found = find_cached(source.name) if source.kind == "local" and not source.file else None
    return found or ("", None)


def find_cached(folder: str) -> tuple[str, str] | None:
    """Name and commit of a hub model, from its folder in the hub's cache."""
    found = _CACHED.search(Path(folder).as_posix())
    return (f"{found[1]}/{found[2]}", found[3]) if found else None


def describe_base(source: ModelSource) -> str:
    """The base for a reader elsewhere."""
    name, _ = hub_id(source)
    if name:
        return name
    local = source.file or Path(source.name)
    return f"new:{source.name}" if source.kind == "preset" else f"a local model ({local.name})"


def front_matter(
    source: ModelSource, is_adapter: bool, licence: Mapping[str, str] | None = None, datasets: Sequence[str] = ()
) -> str:
    """The card's metadata.

    Args:
        licence: keys of the licence, where it is known.
        datasets: hub ids of the data.
    """
    name, _ = hub_id(source)
    front: dict[str, object] = {"library_name": "peft" if is_adapter else "transformers"}
    front["pipeline_tag"] = "text-generation"
    front |= licence or {}
    if name:
        front["base_model"] = name
    if datasets:
        front["datasets"] = list(datasets)
    front["tags"] = ["tunesmith", "sft", *(["lora"] if is_adapter else [])]
    return write_front(front)


def write_front(front: Mapping[str, object]) -> str:
    text = yaml.safe_dump(dict(front), sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"


def load_model_lines(is_chat: bool = False) -> str:
    """How transformers and tunesmith open the model.

    Args:
        is_chat: it has a chat template.
    """
    return f"## Use\n\n```python\n{_LOAD_MODEL}```\n\n{_ask_lines(is_chat)}"


def _ask_lines(is_chat: bool) -> str:
    ask = f"```python\n{_ASK}```\n\n" if is_chat else ""
    return f"{ask}```sh\n{COMMANDS_HERE}```\n"


def load_adapter_lines(source: ModelSource, revision: str | None, rows: int | None, is_chat: bool = False) -> str:
    """How peft and tunesmith open the adapter, for use and for further training.

    Args:
        revision: of a hub base, that it was trained on.
        rows: of the embedding, where tokens were added.
        is_chat: it has a chat template.
    """
    name, cached = hub_id(source)
    revision = revision or cached
    base = f'"{name}"' + (f', revision="{revision}"' if revision else "")
    named = "name = PeftConfig.from_pretrained(folder).base_model_name_or_path  # or the base's folder\n"
    values: Mapping[str, str] = {
        "here": HERE,
        "peft": "PeftModel" if name else "PeftConfig, PeftModel",
        "name": "" if name else named,
        "base": base if name else "name",
        "resize": f"base.resize_token_embeddings({rows})  # rows for the added tokens\n" if rows else "",
    }
    return (
        f"## Use\n\n```python\n{_LOAD_ADAPTER.format(**values)}```\n\n{_ask_lines(is_chat)}\n"
        f"To train it further, here or with TRL's trainers:\n\n```python\n{_TRAIN_ADAPTER}```\n"
    )
