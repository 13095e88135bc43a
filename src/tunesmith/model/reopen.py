"""Check, before training and before a folder appears, that others open it as what was trained.

AutoTokenizer does not always use all of tokenizer.json. For some classes and model types it takes only the vocabulary
from it and rebuilds the rest: with `model_type: qwen2`, any tokenizer gets Qwen2's pre-tokenizer and NFC.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from tunesmith.config.schema import ModelSection
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError
from tunesmith.model.source import telling_text
from tunesmith.model.tokenizer import TokenizerSource, find_tokenizer, write_tokenizer
from tunesmith.older_keys import OLDER_KEYS

# ordinary content: no control tokens, no white space at the ends, NFC
PLAIN_TEXTS = (
    "Hello, world!", "It's what we've got, I'LL say; don't they'd", "In 2026, 12345 x 67.89 = 838205.05", "a1b22c333",
    "one  two   three    four", "first\nsecond\n\nthird\n\n\nfourth", "tabs\tand\r\nlines", "naïve café über",
    "猫は好きです。你好，世界！1 月", "한국어", "Привет", "مرحبا ٠١", "नमस्ते", "x 😀👍🏽 y",
    "def f(x):\n    if x >= 10:\n\t\treturn x ** 2  # why?", '{"key": [1, 2.5, null], "b": "c\\n"}',
    "https://example.com/a?b=c&d=%20", "$\\frac{a}{b}$ ~ <b>...</b> --- !!! ###",
)  # fmt: skip
# texts on which loaders of one tokenizer.json often differ without harm: compared only for the tokenizer that we save
_OTHER_TEXTS = (
    "  two in front",
    "two behind  ",
    "\n\n",
    "cafe\u0301",
    "\ufb01 \u2460 \uff21",
    "soft\u00adhyphen",
    "\ue000 \U0010fffd",
)
_NUM_CONTROL, _NUM_TOKENS = 200, 3000
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
_NOT_COMPARED = {"architectures", "dtype", "transformers_version", "use_cache", "experts_implementation"}
_PARTS = {
    "normalizer": "the normalizer",
    "pre_tokenizer": "the pre-tokenizer",
    "model": "the vocabulary",
    "added_tokens": "the added tokens",
}


def require_one_reading(
    section: ModelSection,
    encoder: Encoder,
    model_config: PretrainedConfig,
    is_adapter: bool = False,
    source: TokenizerSource | None = None,
) -> None:
    """Check that everyone who opens the tokenizer gets the ids used in training.

    Args:
        source: from find_tokenizer, if already known.

    Raises:
        ModelError: libraries read the given tokenizer.json differently, or would do so with the saved one.
    """
    _require_as_given(source or find_tokenizer(section), encoder.tokenizer)
    # an adapter's tokenizer is opened next to adapter_config.json, and next to config.json after merging
    for config in [None, model_config] if is_adapter else [model_config]:
        differences = find_reopened_differences(encoder, config, section.trust_remote_code)
        if differences:
            raise ModelError(
                f"{section.tokenizer or section.path}: saved with this model, the tokenizer would be reopened as a "
                f"different one: {', '.join(differences)}. {_explain_class(config)} Use the model's own tokenizer, or "
                "a model of another model_type.",
                code="tokenizer-reopens-differently",
            )


def _explain_class(config: PretrainedConfig | None) -> str:
    given = f" with model_type {config.model_type}" if config is not None else ""
    return f"transformers' AutoTokenizer changes its tokenizer.json when it opens it{given}."


def _require_as_given(source: TokenizerSource, tokenizer: Any) -> None:
    """Check that tokenizer.json as read by tokenizers, vLLM and llama.cpp gives the same ids as AutoTokenizer."""
    path = _find_file(source)
    if path is None:
        return
    stands, backend = Tokenizer.from_file(path), tokenizer.backend_tokenizer
    stands.no_truncation()
    stands.no_padding()
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    for text in [*PLAIN_TEXTS, *_written_texts(backend)]:
        opened, read = _read(backend, text), _read(stands, text)
        if opened != read and not any(token in text for token in added):
            raise ModelError(
                f"{source.folder}: libraries read its tokenizer.json differently. transformers opens it as "
                f"{type(tokenizer).__name__} and reads {text!r} as {_part(opened, read)}; tokenizers, vLLM and "
                f"llama.cpp read {_part(read, opened)}. A model trained with one and used with the other is worse. "
                f"{_how_to_settle(source.folder)}",
                code="tokenizer-ambiguous",
            )


def _read(backend: Any, text: str) -> list[str]:
    """Tokens of a text after another word. A space that some folders prepend to the very first word does not matter,
    since a control token comes first in a chat."""
    tokens = backend.encode(f"a {text}", add_special_tokens=False).tokens
    first = [token.removeprefix("\u2581") for token in tokens[:1]]
    return [*filter(None, first), *tokens[1:]]


def _find_file(source: TokenizerSource) -> str | None:
    """Path of tokenizer.json in a folder, or in the hub cache after AutoTokenizer has downloaded it."""
    return cached_file(
        source.folder,
        "tokenizer.json",
        revision=source.revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _how_to_settle(folder: str) -> str:
    return (
        "If the model was trained with transformers' ids, save that tokenizer to a folder: python -c \"from "
        f"transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{folder}').save_pretrained('FIXED')\" and "
        "add --tokenizer FIXED. If it was trained with tokenizer.json's ids, transformers cannot open it with the "
        "model_type in config.json; use the tokenizer that belongs to that model_type."
    )


def _written_texts(backend: Any) -> Iterator[str]:
    """Texts of tokens from all over the vocabulary, inside a word; finds tokens that one loader never writes."""
    size = backend.get_vocab_size(with_added_tokens=False)
    for token in range(0, size, max(1, size // _NUM_TOKENS)):
        text = f"a{backend.decode([token], skip_special_tokens=False)}b"
        if "\ufffd" not in text and unicodedata.is_normalized("NFC", text):
            yield text


def _part(tokens: Sequence[str], others: Sequence[str]) -> str:
    """A few tokens, from the first difference on."""
    start = next((i for i, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1]), 0)
    return " ".join(tokens[start : start + 4])


def find_reopened_differences(encoder: Encoder, config: PretrainedConfig | None, trust: bool) -> list[str]:
    """Differences after the tokenizer is saved as for a finished model and opened again; usually none.

    Args:
        config: of the model, saved along with it; None as in an adapter's folder.
        trust: model.trust_remote_code.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if config is not None:
            config.to_json_file(folder / "config.json")
        write_tokenizer(encoder, folder)
        try:
            reopened = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        except Exception as error:
            return [f"it cannot be opened ({telling_text(error)})"]
    return list(_compare(encoder.tokenizer, reopened))


def require_reads_as(folder: Path, name: str, encoder: Encoder, model: Any, is_adapter: bool = False) -> None:
    """Check that transformers alone opens a finished folder, before it appears, as what was trained.

    Args:
        name: of the folder, for the message.
        model: whose configs are in the folder; an adapter's has no config.json.

    Raises:
        ModelError: names each difference.
    """
    trust = _is_remote(encoder.tokenizer) or _is_remote(model.config)
    try:
        differences = [*_compare(encoder.tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust))]
        if not is_adapter:
            opened = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
            differences += _compare_configs(model.config, opened)
        if (folder / "generation_config.json").is_file():
            differences += _compare_stops(model.generation_config, GenerationConfig.from_pretrained(folder))
    except Exception as error:
        differences = [f"it cannot be opened ({telling_text(error)})"]
    if differences:
        raise ModelError(
            f"{name}: transformers opens the saved folder as something else: {', '.join(differences)}. The folder was "
            "not kept; a run's checkpoints are complete.",
            code="folder-reopens-differently",
        )


def require_same_tokenizer(given: Path, folder: Path, trust: bool) -> None:
    """Check that transformers opens the tokenizer of a finished folder as in the folder from which it was copied.

    Raises:
        ModelError: names each difference; e.g. the model_type beside it now calls for another class.
    """
    opened, copied = (AutoTokenizer.from_pretrained(path, trust_remote_code=trust) for path in (given, folder))
    if differences := [*_compare(opened, copied)]:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        raise ModelError(
            f"{given}: with the merged model, its tokenizer would be opened as a different one: "
            f"{', '.join(differences)}. transformers' AutoTokenizer changes it for model_type {model_type}. No files "
            "were written. Train with the tokenizer of the base.",
            code="tokenizer-reopens-differently",
        )


def _is_remote(part: Any) -> bool:
    """Whether its class comes with the model, from code that the user trusted."""
    return type(part).__module__.partition(".")[0] == "transformers_modules"


def _compare_stops(ours: Any, theirs: Any) -> Iterator[str]:
    if ours.eos_token_id != theirs.eos_token_id:
        yield f"the stop tokens {ours.eos_token_id} become {theirs.eos_token_id}"


def _compare_configs(ours: PretrainedConfig, theirs: PretrainedConfig) -> Iterator[str]:
    before, after = (json.loads(config.to_json_string(use_diff=False)) for config in (ours, theirs))
    added = {key for key in OLDER_KEYS if key not in before}
    for key in sorted((set(before) | set(after)) - added):
        if key not in _NOT_COMPARED and not key.startswith("_") and before.get(key) != after.get(key):
            yield f"{key} {before.get(key)!r} of its config becomes {after.get(key)!r}"


def _compare(ours: Any, theirs: Any) -> Iterator[str]:
    before, after = _settings(ours), _settings(theirs)
    for part, name in _PARTS.items():
        if before[part] != after[part]:
            yield f"{name} differs" if part != "added_tokens" else f"{name} differ"
    for text in [*PLAIN_TEXTS, *_OTHER_TEXTS, *_around_control(ours)]:
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            yield f"{text!r} gets different ids"
            break
    for special in _SPECIAL:
        if getattr(ours, special) not in (None, getattr(theirs, special)):
            yield f"{special} {getattr(ours, special)} becomes {getattr(theirs, special)}"
    if ours.chat_template != theirs.chat_template:
        yield "the chat template differs"


def _around_control(tokenizer: Any) -> Iterator[str]:
    for token in list(tokenizer.backend_tokenizer.get_added_tokens_decoder().values())[:_NUM_CONTROL]:
        yield f"a{token.content}b {token.content} c\n{token.content}"


def _settings(tokenizer: Any) -> dict[str, Any]:
    """Settings that determine the ids; empty values are dropped, since an empty suffix equals none."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["model"] = {name: value for name, value in settings["model"].items() if value}
    return {part: settings[part] for part in _PARTS}
