"""Find out how a tokenizer treats text that its vocabulary cannot encode.

Such text is either replaced by a token or dropped. A tokenizer's `unk_token` does not tell which: GPT-2 and Qwen name
<|endoftext|> there although they can encode every text as bytes.
"""

from __future__ import annotations

from typing import Any

# every byte that occurs in UTF-8: 1 byte, continuation bytes, and the first bytes of 2, 3 and 4
_EVERY_BYTE = "".join(
    map(chr, [*range(0x80), *range(0x80, 0xC0), *range(0xC0, 0x800, 0x40), *range(0x800, 0xD800, 0x1000),
              0xE0A0, 0xFFFC, 0x1F600, *range(0x40000, 0x110000, 0x40000), 0x10FFFD]),
)  # fmt: skip
_PRIVATE = "\U0010fffd"
_SELDOM_WRITTEN = "\u13a0\ua4f8\U00010330\U0001f9ff"  # Cherokee, Lisu, Gothic, an emoji


def unknown_id(backend: Any) -> int | None:
    """Id of the token for text that the vocabulary cannot encode; None if every text can be encoded.

    Args:
        backend: a `tokenizers.Tokenizer` that does not truncate.
    """
    token = _declared(backend.model)
    if token is None or token not in backend.encode(_EVERY_BYTE, add_special_tokens=False).ids:
        return None
    return token


def drops_text(backend: Any) -> bool:
    """Whether text that the vocabulary cannot encode is dropped without a token in its place."""
    normalize = backend.normalizer.normalize_str if backend.normalizer else str
    return any(
        normalize(char).strip() and not backend.encode(char, add_special_tokens=False).ids for char in _SELDOM_WRITTEN
    )


def _declared(model: Any) -> int | None:
    """The unknown token declared by a tokenizer's model, whether the model ever writes it or not."""
    if hasattr(model, "unk_token"):
        return model.token_to_id(model.unk_token) if model.unk_token is not None else None
    written = model.tokenize(_PRIVATE)  # Unigram knows its unknown token by id only, which Python cannot read
    return written[0].id if len(written) == 1 else None
