"""Hashes of what a run is made from: its model, tokenizer and template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from tunesmith.adapters.base import hub_commit
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError
from tunesmith.files import sha256_ends, sha256_text
from tunesmith.model.source import ModelSource

_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin")
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "attn_implementation", "use_cache")


def hash_template(encoder: Encoder) -> str:
    """Of the template with its variables."""
    template = encoder.template
    return sha256_text(json.dumps([template.text, dict(encoder.defaults.variables)]) if template else "none")


def hash_tokenizer(encoder: Encoder) -> str:
    tokenizer = encoder.tokenizer
    return sha256_text(tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.special_tokens_map, default=str))


def hash_config(config: PretrainedConfig) -> str:
    own = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k not in _VOLATILE}
    return sha256_text(json.dumps(own, sort_keys=True, default=str))


def describe_weights(source: ModelSource, revision: str | None) -> dict[str, Any]:
    """Size, time and SHA-256 of the ends of a local model's files, or the commit of a hub model."""
    if source.kind == "preset":
        return {}
    if source.kind == "hub":
        return {source.name: hub_commit(source.name, source.revision or revision)}
    folders = [*([] if source.file else [Path(source.name)]), *([source.adapter] if source.adapter else [])]
    files = [path for folder in folders for pattern in _WEIGHTS for path in sorted(folder.glob(pattern))]
    files += [source.file] if source.file else []
    for path in files:
        if not path.exists():
            raise ModelError(
                f"{path}: links to {os.readlink(path)}, which does not exist. Restore that file.", code="broken-link"
            )
    return {str(path.resolve()): {"size": path.stat().st_size, "ends": sha256_ends(path)} for path in files}
