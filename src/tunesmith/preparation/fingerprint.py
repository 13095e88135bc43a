"""The fingerprint of a prepared store: equal only where every token, label and ledger entry would be equal."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.portable import PortableEncoder
from tunesmith.preparation.cache import hash_data_file
from tunesmith.preparation.labelled import LabelRules
from tunesmith.sources.read import Sources

_UNUSED = (
    "train", "eval", "eval_split", "max_refused", "max_cut_replies", "workers", "cache", "share_prefix",
    "chat_template", "template_kwargs", "system_prompts", "system_prompt_share", "empty_think_share",
)  # fmt: skip
"""Keys of `data` that decide no label, or that are compared by what they stand for."""
_PACKAGES = ("tokenizers", "jinja2", "pyarrow", "openpyxl", "numpy")
_LABELLING = ("config", "sources", "rows", "chat_template", "tokens", "encode", "data", "preparation")
_DATED = re.compile(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)|strftime_now\s+is\s+(?:not\s+)?defined")
_DAILY = re.compile(r"(?:[^%]|%-?[aAbBdjmuUwWyY%])*")


def fingerprint(sources: Sources, rules: LabelRules, more: Any = None) -> str | None:
    """The key of a store in the cache; None where it cannot be told whether the rows will be the same again.

    Args:
        more: what else decides the store, as JSON.
    """
    portable = PortableEncoder.of(rules.encoder)
    if sources.hub or sources.names or portable is None:
        return None
    data = rules.data.model_dump(mode="json")
    content = {
        "files": [[str(path), hash_data_file(path), repr(sources.entries.get(place))]
                  for place, path in enumerate(sources.files)],
        "parts": [[part.files.start, part.files.stop, part.limit] for part in sources.parts],
        "data": {key: value for key, value in data.items() if key not in _UNUSED},
        "max_seq_len": rules.max_seq_len,
        "draws": dataclasses.asdict(rules.draws) if rules.draws else None,
        "encoder": {**dataclasses.asdict(portable), "defaults": dict(portable.defaults.variables)},
        "date": _date_of(rules.encoder),
        "more": more,
        "code": _hash_code(),
        "versions": {"python": sys.version_info[:2], **{name: _version(name) for name in _PACKAGES}},
    }  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()[:40]


def _date_of(encoder: Encoder) -> str | None:
    """The date as far as the template may print it: nothing, the day, or the second where that cannot be told."""
    template = encoder.template
    if template is None or "strftime_now" not in template.reads:
        return None
    date = encoder.defaults.date
    found = list(_DATED.finditer(template.text))
    is_daily = len(found) == template.text.count("strftime_now") and all(
        _DAILY.fullmatch(match[2] or "") for match in found
    )
    return date.date().isoformat() if is_daily else date.isoformat()


@lru_cache(maxsize=1)
def _hash_code() -> str:
    """Of our own modules that take part in labelling."""
    folder = Path(tunesmith.__file__).parent
    digest = hashlib.sha256(tunesmith.__version__.encode())
    for name in _LABELLING:
        for path in sorted((folder / name).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
