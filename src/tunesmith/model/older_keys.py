"""Keys of config.json from which transformers 4, mlx-lm and other readers take what transformers 5 writes elsewhere.

Where they miss such a key they take a default of their own, and compute something else without an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

OLDER_KEYS = frozenset({
    "n_ctx", "num_experts", "partial_rotary_factor", "rope_local_base_freq", "rope_scaling", "rope_theta",
    "sliding_window_pattern", "torch_dtype",
})  # fmt: skip


def add_older_keys(folder: Path, kind: type[PretrainedConfig]) -> None:
    """Write older names beside the new ones into config.json; those that would change what transformers reads stay out.

    Args:
        kind: class of the config.
    """
    path = folder / "config.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    meant = _read(kind, content)
    for key, value in _older_keys(content, kind):
        if key not in content and _read(kind, content | {key: value}) == meant:
            content[key] = value
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(kind: type[PretrainedConfig], content: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config, but for keys that it keeps as they are."""
    found = json.loads(kind.from_dict(json.loads(json.dumps(content))).to_json_string(use_diff=False))
    return {key: value for key, value in found.items() if key not in OLDER_KEYS}


def _older_keys(content: Mapping[str, Any], kind: type[PretrainedConfig]) -> Iterator[tuple[str, Any]]:
    """Keys in an order in which each can be added alone."""
    rope = content.get("rope_parameters") or {}
    full, sliding = rope.get("full_attention") or rope, rope.get("sliding_attention") or {}
    if "rope_theta" in full:
        yield "rope_theta", full["rope_theta"]
        if "partial_rotary_factor" in full:
            yield "partial_rotary_factor", full["partial_rotary_factor"]
        if full.get("rope_type", "default") != "default":
            yield "rope_scaling", {key: value for key, value in full.items() if key != "rope_theta"}
    if "rope_theta" in sliding:
        yield "rope_local_base_freq", sliding["rope_theta"]
    if (period := _period(content.get("layer_types") or [])) > 1:
        yield "sliding_window_pattern", period
    if "num_local_experts" in content and kind.attribute_map.get("num_experts") == "num_local_experts":
        yield "num_experts", content["num_local_experts"]
    if content.get("model_type") == "gpt2" and "n_positions" in content:
        yield "n_ctx", content["n_positions"]
    if "dtype" in content:
        yield "torch_dtype", content["dtype"]


def _period(layers: list[str]) -> int:
    """Each how many-th layer has full attention and all others a window; 0 without such a pattern."""
    period = layers.index("full_attention") + 1 if "full_attention" in layers else 0
    usual = [period > 0 and (place + 1) % period == 0 for place in range(len(layers))]
    return period if usual == [layer == "full_attention" for layer in layers] else 0
