"""A tokenizer as GGUF metadata: tokens, types, merges or scores, special ids, and whether BOS is put in front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.encode.encoder import Encoder
from tunesmith.errors import ModelError
from tunesmith.gguf.fuzz import draw_texts
from tunesmith.gguf.pretokenizer import NUM_FUZZ, Twin, find_twin
from tunesmith.gguf.spm import SpmVocabulary, read_spm
from tunesmith.rows.conversation import Message

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer in GGUF.

    Attributes:
        metadata: full keys.
        twin: how near llama.cpp's ids are to the tokenizer's.
    """

    metadata: Mapping[str, Any]
    twin: Twin


def describe_vocabulary(
    name: str, encoder: Encoder, rows: int, texts: Sequence[str], stops: Sequence[int]
) -> Vocabulary:
    """A tokenizer's GGUF form.

    Args:
        name: of the model, for messages.
        rows: of the embedding; those without a token get a placeholder.
        texts: without control tokens, on which ids are compared.
        stops: ids that end a reply.

    Raises:
        ModelError: llama.cpp has no tokenizer of this kind.
    """
    settings = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    tokens, types = _list_tokens(settings, rows)
    spm = read_spm(settings)
    try:
        twin = find_twin(encoder.tokenizer, texts) if spm is None else _measure_spm(encoder.tokenizer, spm, texts)
    except ModelError as error:
        raise ModelError(f"{name}: {error}", code=error.code) from None
    metadata: dict[str, Any] = {"tokenizer.ggml.model": twin.model, "tokenizer.ggml.pre": twin.name}
    if spm is not None:
        scores = [*spm.scores, *[0.0] * rows][:rows]
        metadata["tokenizer.ggml.scores"] = [float(score) for score in scores]
        metadata["tokenizer.ggml.add_space_prefix"] = spm.has_prefix
    else:
        merges = settings["model"]["merges"]
        metadata["tokenizer.ggml.merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return Vocabulary(metadata | _special_ids(encoder, stops), twin)


def _list_tokens(settings: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Texts and types of all rows of the embedding."""
    model = settings["model"]
    known = {*model["vocab"], *(token["content"] for token in settings["added_tokens"])}
    mark = "UNUSED"
    while any(text.startswith(f"[{mark}") for text in known):
        mark += "_"
    tokens = [f"[{mark}{number}]" for number in range(rows)]
    types = [_UNUSED] * rows
    for text, number in model["vocab"].items():
        tokens[number], types[number] = text, _NORMAL
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = _BYTE
    for token in settings["added_tokens"]:
        number = token["id"]
        tokens[number], types[number] = token["content"], _CONTROL if token["special"] else _USER_DEFINED
    if (unknown := model.get("unk_token")) and unknown in model["vocab"]:
        types[model["vocab"][unknown]] = _UNKNOWN
    return tokens, types


def _special_ids(encoder: Encoder, stops: Sequence[int]) -> dict[str, Any]:
    """Metadata of special tokens.

    The tokenizer's EOS keeps its key, since templates may print it; the stop tokens are end of turn and end of message
    where they differ from it. There are no keys for more; llama.cpp knows some others by their text.
    """
    tokenizer = encoder.tokenizer
    ends = dict.fromkeys([*([encoder.eos_id] if encoder.eos_id is not None else []), *stops])
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found: dict[str, Any] = {f"tokenizer.ggml.{key}": number for key, number in zip(keys, ends, strict=False)}
    others = {
        "bos_token_id": encoder.bos_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    found |= {f"tokenizer.ggml.{key}": number for key, number in others.items() if number is not None}
    found |= {"tokenizer.ggml.add_bos_token": adds_bos(encoder), "tokenizer.ggml.add_eos_token": False}
    return found


def adds_bos(encoder: Encoder) -> bool:
    """Whether llama.cpp must put BOS before a text.

    It does so before every prompt, and takes away the BOS that a chat template has written. So it must not where the
    trained chats have none, even if the tokenizer puts it before plain texts.
    """
    renderer = encoder.renderer()
    if not encoder.bos_ids or renderer is None:
        return bool(encoder.bos_ids)
    try:
        text = renderer.render([Message("user", "Hi")], add_generation_prompt=True)
    except Exception:  # a template for chats of another form; the proof shows whether BOS is right
        return False
    return text.startswith(encoder.tokenizer.bos_token)


def _measure_spm(tokenizer: Any, spm: SpmVocabulary, texts: Sequence[str]) -> Twin:
    """How often llama.cpp's ids differ from a byte-fallback tokenizer's."""
    backend = tokenizer.backend_tokenizer

    def find_differing(given: Sequence[str]) -> list[str]:
        found = backend.encode_batch_fast(list(given), add_special_tokens=False)
        return [text for text, encoding in zip(given, found, strict=True) if encoding.ids != spm.encode(text)]

    fuzz = draw_texts(NUM_FUZZ)
    own, others = find_differing(texts), find_differing(fuzz)
    examples = own or others
    return Twin(
        "llama",
        "default",
        spm.has_prefix,
        exact=not examples,
        is_meant=True,
        differs=len(own) / max(1, len(texts)),
        fuzz_differs=len(others) / len(fuzz),
        example=min(examples, key=len) if examples else None,
        reasons=("llama.cpp joins tokens by their scores, the tokenizer by its merges",) if examples else (),
    )
