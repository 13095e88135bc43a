"""Keys of config.json from which transformers 4, mlx-lm and other readers take what transformers 5 writes elsewhere.

Where they miss such a key they take a default of their own, and compute something else without an error.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_ROPE = "rope_parameters"
OLDER_KEYS = {
    "n_ctx": "n_positions", "num_experts": "num_local_experts", "partial_rotary_factor": _ROPE,
    "rope_local_base_freq": _ROPE, "rope_scaling": _ROPE, "rope_theta": _ROPE, "rotary_emb_base": _ROPE,
    "rotary_pct": _ROPE, "sliding_window_pattern": "layer_types", "torch_dtype": "dtype",
}  # fmt: skip
"""Older key -> where transformers 5 has its value."""


def add_older_keys(folder: Path, kind: Any) -> None:
    """Write older keys beside the new ones into config.json; those that would change what transformers reads stay out.

    Args:
        kind: transformers' class of the config.
    """
    path = folder / "config.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="tunesmith-config-") as name:
        meant = _read(content, kind, Path(name))
        for key, value in _older_keys(meant, kind):
            if key in content and (content[key] == value or not isinstance(value, str | int | float)):
                continue
            found = _read(content | {key: value}, kind, Path(name))
            if all(name in found and found[name] == own for name, own in meant.items()):
                content[key] = value
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(content: Mapping[str, Any], kind: Any, folder: Path) -> dict[str, Any]:
    """What transformers makes of a config; empty where the class refuses it."""
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    try:
        config = kind.from_pretrained(folder)
        found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    except Exception:  # of the class
        return {}
    return found


def _older_keys(read: Mapping[str, Any], kind: Any) -> Iterator[tuple[str, Any]]:
    """Keys in an order in which each can be added alone."""
    rope = read.get(_ROPE) or {}
    full, sliding = rope.get("full_attention") or rope, rope.get("sliding_attention") or {}
    if "rope_theta" in full:
        is_neox = read.get("model_type") == "gpt_neox"
        yield "rotary_emb_base" if is_neox else "rope_theta", full["rope_theta"]
        if "partial_rotary_factor" in full:
            yield "rotary_pct" if is_neox else "partial_rotary_factor", full["partial_rotary_factor"]
        is_scaled = full.get("rope_type", "default") != "default"
        scaling = {key: value for key, value in full.items() if key not in ("rope_theta", "partial_rotary_factor")}
        yield "rope_scaling", scaling if is_scaled else None
    if "rope_theta" in sliding:
        yield "rope_local_base_freq", sliding["rope_theta"]
    if (period := _period(read.get("layer_types") or [])) > 1:
        yield "sliding_window_pattern", period
    if "num_local_experts" in read and kind.attribute_map.get("num_experts") == "num_local_experts":
        yield "num_experts", read["num_local_experts"]
    if read.get("model_type") == "gpt2":
        yield "n_ctx", read["n_positions"]
    if read.get("dtype"):
        yield "torch_dtype", read["dtype"]


def _period(layers: Sequence[str]) -> int:
    """Each how many-th layer has full attention and all others a window; 0 without such a pattern."""
    period = layers.index("full_attention") + 1 if "full_attention" in layers else 0
    usual = [period > 0 and (place + 1) % period == 0 for place in range(len(layers))]
    return period if usual == [layer == "full_attention" for layer in layers] else 0
