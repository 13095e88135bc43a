"""Find the pre-tokenizer of llama.cpp that cuts texts as a tokenizer does, and measure where it does not.

llama.cpp does not read tokenizer.json: a GGUF file names one of the pre-tokenizers that are compiled into it
(`tokenizer.ggml.pre`), and it normalizes no text. Each of them is written here as expressions for the `tokenizers`
library, so that the comparison needs no llama.cpp; tests/test_gguf_llama_cpp.py compares the table with the real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from tunesmith.errors import ModelError
from tunesmith.gguf.fuzz import draw_texts

NUM_FUZZ = 3000
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # contractions, in either case
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = (
    r"((?=[\p{L}])([^a-z]))",
    r"((?=[\p{L}])([^A-Z]))",
)  # llama.cpp: letters but ASCII ones of the other case
_HEAD = r"[^\r\n\p{L}\p{N}]?"


def _cased(ending: str) -> str:
    """Words that a change from small to capital letters ends."""
    return f"{_HEAD}{_UPPER}*{_LOWER}+{ending}|{_HEAD}{_UPPER}+{_LOWER}*{ending}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A pre-tokenizer of llama.cpp.

    Attributes:
        name: value of tokenizer.ggml.pre.
        patterns: each cuts the pieces of those before it.
        ignore_merges: whether a word that is in the vocabulary is taken whole, without its merges.
    """

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("smollm", (r"\p{N}", _GPT2)),
    PreTokenizer("qwen2", (rf"{_SHORT}|{_WORD}|\p{{N}}|{_REST}",)),
    PreTokenizer("llama-bpe", (rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",), ignore_merges=True),
    PreTokenizer("smaug-bpe", (rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",)),
    PreTokenizer(
        "qwen35",
        (rf"{_SHORT}|{_HEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
    ),
    PreTokenizer("gpt-4o", (rf"{_cased(f'{_SHORT}?')}|\p{{N}}{{1,3}}|{_REST_SLASH}",)),
    PreTokenizer("tekken", (rf"{_cased('')}|\p{{N}}|{_REST_SLASH}",), ignore_merges=True),
    PreTokenizer(
        "deepseek-v3",
        (
            r"\p{N}{1,3}",
            "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    ),
    PreTokenizer(
        "deepseek-coder",
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "(?:(?!\\s)[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff])+", r"\p{N}"),
    ),
    PreTokenizer("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer("bloom", (" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",)),
    PreTokenizer("viking", (" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}")),
    PreTokenizer("seed-coder", (rf"{_SHORT}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)),
    PreTokenizer(
        "bailingmoe",
        (
            rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]"
            r"|\s+(?!\S)|\s+",
        ),
    ),
    PreTokenizer("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)

# Other spellings in tokenizer.json files -> ours. The first mean the same for all texts; the others differ for a few
# letters, for which llama.cpp has no exact form.
_SAME = ((r"\p{N}{1}", r"\p{N}"),)
_NEARLY_SAME = (
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _SHORT),
    ("'(?i:[sdmt]|ll|ve|re)", "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"),
    (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", _UPPER),
    (r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", _LOWER),
    ("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", "(?:(?!\\s)[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff])+"),
    ("?+", "?"),
    ("++", "+"),
)


@dataclass(frozen=True, slots=True)
class Twin:
    """The tokenizer of llama.cpp nearest to one of ours.

    Attributes:
        model: value of tokenizer.ggml.model: "gpt2" for byte-level BPE, "llama" for SentencePiece's BPE.
        name: value of tokenizer.ggml.pre; "default" for SentencePiece's, which has no pre-tokenizers.
        add_space_prefix: value of tokenizer.ggml.add_space_prefix.
        exact: both have the same expressions and settings, and the tokenizer does not normalize: the ids of every text
            are equal, but for characters added to Unicode since 15.1, which the libraries classify differently.
            Otherwise ids were only measured.
        is_meant: llama.cpp has it for this very kind. What may differ is normalization, letters for which llama.cpp
            writes the expression in another way, and the order of merges.
        differs: share of the texts whose ids differ.
        fuzz_differs: share of NUM_FUZZ random texts whose ids differ.
        example: the shortest text whose ids differ; None without one.
        reasons: why ids may differ.
    """

    model: str
    name: str
    add_space_prefix: bool
    exact: bool
    is_meant: bool
    differs: float
    fuzz_differs: float
    example: str | None
    reasons: tuple[str, ...]


Ids = list[list[int]]
Encode = Callable[[Sequence[str]], Ids]


def find_twin(tokenizer: Any, texts: Sequence[str]) -> Twin:
    """The nearest pre-tokenizer of llama.cpp, by its expressions, else by the ids of the texts and of random ones.

    Args:
        tokenizer: of transformers, with byte-level BPE.
        texts: without control tokens.

    Raises:
        ModelError: llama.cpp has none of this kind.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model = settings["model"]
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    steps = _read_steps(settings["pre_tokenizer"])
    if model.get("type") == "BPE" and not odd and steps and steps[-1][0] == "bytes":
        return _find_byte_level(settings, steps, _Comparison(settings, texts))
    kind = ", ".join([str(model.get("type")), *odd])
    raise ModelError(
        f"llama.cpp has no tokenizer of this kind ({kind}): it has byte-level BPE and SentencePiece's BPE. The model "
        "cannot be written as GGUF.",
        code="tokenizer-has-no-twin",
    )


class _Comparison:
    """Ids of a tokenizer for the texts and for random ones, compared with those of others."""

    def __init__(self, settings: dict[str, Any], texts: Sequence[str]) -> None:
        plain = settings | {"truncation": None, "padding": None, "post_processor": None}
        self._texts, self._number = [*texts, *draw_texts(NUM_FUZZ)], len(texts)
        self._ids = _encode(Tokenizer.from_str(json.dumps(plain)), self._texts)

    def with_ids_of(self, encode: Encode) -> tuple[float, float, str | None]:
        """Share of the texts and of the random texts whose ids differ, and the shortest of them."""
        pairs = zip(self._texts, self._ids, encode(self._texts), strict=True)
        other = [(place, text) for place, (text, own, theirs) in enumerate(pairs) if own != theirs]
        given = sum(place < self._number for place, _ in other)
        example = min((text for _, text in other), key=len, default=None)
        return given / max(1, self._number), (len(other) - given) / NUM_FUZZ, example


def _find_byte_level(settings: dict[str, Any], steps: Sequence[tuple[str, Any]], comparison: _Comparison) -> Twin:
    own = _ByteLevel(settings, steps)
    same = [pre for pre in PRE_TOKENIZERS if own.has_patterns_of(pre)]
    candidates = [pre for pre in same if pre.ignore_merges == own.ignore_merges] or same or PRE_TOKENIZERS
    measured = {pre: comparison.with_ids_of(partial(own.encode_as, pre)) for pre in candidates}
    pre = min(measured, key=lambda pre: measured[pre][:2])  # of equal ones the first
    reasons = tuple(own.find_reasons(pre))
    is_exact = not reasons and measured[pre][:2] == (0, 0)
    return Twin("gpt2", pre.name, False, is_exact, bool(same), *measured[pre], reasons)


class _ByteLevel:
    """A byte-level BPE tokenizer, and the same with pre-tokenizers of llama.cpp."""

    def __init__(self, settings: dict[str, Any], steps: Sequence[tuple[str, Any]]) -> None:
        self._settings = settings | {"truncation": None, "padding": None, "post_processor": None, "normalizer": None}
        self._steps, self._normalizer = steps, settings["normalizer"]
        self.ignore_merges = bool(settings["model"].get("ignore_merges"))

    def has_patterns_of(self, pre: PreTokenizer) -> bool:
        """Whether it cuts with these expressions, in this or another spelling."""
        if any(kind == "other" for kind, _ in self._steps):
            return False
        return [_canonical(pattern) for pattern in self._written] == [_canonical(pattern) for pattern in pre.patterns]

    def find_reasons(self, pre: PreTokenizer) -> list[str]:
        reasons = []
        if self._normalizer:
            reasons.append(f"the tokenizer normalizes texts ({_type(self._normalizer)}), llama.cpp does not")
        if not self.has_patterns_of(pre):
            reasons.append("the tokenizer cuts texts with other expressions")
        elif self._written != [_respell(pattern, _SAME) for pattern in pre.patterns]:
            reasons.append("llama.cpp writes the expression in another way, which differs for a few letters")
        if self._steps[-1][1]:
            reasons.append("the tokenizer puts a space before a text (add_prefix_space), llama.cpp does not")
        if pre.ignore_merges != self.ignore_merges:
            reasons.append(f"ignore_merges is {self.ignore_merges} in the tokenizer, not in llama.cpp")
        return reasons

    def encode_as(self, pre: PreTokenizer, texts: Sequence[str]) -> Ids:
        backend = self._ignoring if pre.ignore_merges else self._merging
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        return _encode(backend, texts)

    @cached_property
    def _ignoring(self) -> Any:
        return self._build(ignore_merges=True)

    @cached_property
    def _merging(self) -> Any:
        return self._build(ignore_merges=False)

    def _build(self, ignore_merges: bool) -> Any:
        model = self._settings["model"] | {"ignore_merges": ignore_merges}
        return Tokenizer.from_str(json.dumps(self._settings | {"model": model}))

    @property
    def _written(self) -> list[str]:
        return [_respell(pattern, _SAME) for kind, pattern in self._steps if kind == "split"]


def _read_steps(settings: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """Steps of a pre-tokenizer: ("split", pattern), ("bytes", whether a space is put in front) or ("other", type)."""
    if settings is None:
        return []
    kind = settings["type"]
    if kind == "Sequence":
        return [step for part in settings["pretokenizers"] for step in _read_steps(part)]
    if kind == "ByteLevel":
        splits = [("split", _GPT2)] if settings.get("use_regex", True) else []
        return [*splits, ("bytes", settings.get("add_prefix_space", True))]
    if kind == "Digits":
        return [("split", r"\p{N}" if settings["individual_digits"] else r"\p{N}+")]
    if kind == "Split" and settings["behavior"] == "Isolated" and not settings["invert"]:
        return [("split", pattern)] if (pattern := settings["pattern"].get("Regex")) else [("other", kind)]
    return [("other", kind)]


def _respell(pattern: str, spellings: Sequence[tuple[str, str]]) -> str:
    for other, ours in spellings:
        pattern = pattern.replace(other, ours)
    return pattern


def _canonical(pattern: str) -> str:
    return _respell(_respell(pattern, _SAME), _NEARLY_SAME)


def _encode(backend: Any, texts: Sequence[str]) -> Ids:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _type(settings: dict[str, Any]) -> str:
    """Name of a normalizer, of a sequence those of its parts."""
    return ", ".join(map(_type, settings["normalizers"])) if settings["type"] == "Sequence" else str(settings["type"])
