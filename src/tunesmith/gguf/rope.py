"""Rotary position embeddings of a transformers config as GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_KNOWN = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_OF_TYPE = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"}
    ),
}


class NoRopeForm(Exception):
    """The parameters have no GGUF form; the text says which."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embeddings in GGUF.

    Attributes:
        metadata: keys without the architecture's prefix.
        factors: divisors of the frequencies (the tensor rope_freqs.weight), for the llama3 type.
    """

    metadata: Mapping[str, Any]
    factors: list[float] = field(default_factory=list)


def describe_rope(parameters: Mapping[str, Any], head_dim: int, context: int, reads_factors: bool = False) -> Rope:
    """Rope parameters as llama.cpp reads them.

    Args:
        parameters: config.rope_parameters, of one layer type.
        context: max_position_embeddings.
        reads_factors: whether llama.cpp's graph of the architecture applies rope_freqs.weight.

    Raises:
        NoRopeForm: llama.cpp computes another embedding.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    types = [name for name in _OF_TYPE if name != "llama3" or reads_factors]
    if kind not in types:
        raise NoRopeForm(f"rope_type {kind!r} (llama.cpp reads {', '.join(types)} for this architecture)")
    if unknown := sorted(
        key for key, value in parameters.items() if value is not None and key not in _KNOWN | _OF_TYPE[kind]
    ):
        raise NoRopeForm(f"rope_parameters.{unknown[0]} {parameters[unknown[0]]!r}")
    if (share := parameters.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise NoRopeForm(f"rope_parameters.partial_rotary_factor {share!r}")
    base = float(parameters["rope_theta"])
    metadata: dict[str, Any] = {"rope.dimension_count": head_dim, "rope.freq_base": base}
    if kind == "linear":
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        metadata |= _yarn(parameters, context)
    factors = _llama3_factors(parameters, head_dim, base, context) if kind == "llama3" else []
    return Rope(metadata, factors)


def _yarn(parameters: Mapping[str, Any], context: int) -> dict[str, Any]:
    trained = parameters.get("original_max_position_embeddings") or context
    factor = float(parameters.get("factor") or context / trained)  # as transformers
    if parameters.get("truncate") is False:
        raise NoRopeForm("rope_parameters.truncate False")
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    attention = parameters.get("attention_factor")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(trained),
        "rope.scaling.attn_factor": float(attention) / usual if attention is not None else 1.0,
        "rope.scaling.yarn_beta_fast": float(parameters.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(parameters.get("beta_slow") or 1),
    }


def _llama3_factors(parameters: Mapping[str, Any], head_dim: int, base: float, context: int) -> list[float]:
    """The divisor of each frequency: 1 for short wavelengths, `factor` for long ones, smooth in between."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    trained = float(parameters.get("original_max_position_embeddings") or context)
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * base ** (2 * pair / head_dim)
        if wavelength < trained / high:
            divisors.append(1.0)
        elif wavelength > trained / low:
            divisors.append(factor)
        else:
            share = (trained / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - share) / factor + share))
    return divisors
