"""Find out how a tokenizer treats text that its vocabulary cannot write.

Either a token represents such text, or it is dropped without a token. A tokenizer's `unk_token` does not tell: GPT-2
and Qwen name <|endoftext|> there and write every text in bytes.
"""

from __future__ import annotations

from typing import Any

# every byte that UTF-8 has: 1 byte, continuation bytes, and the first bytes of 2, 3 and 4
_EVERY_BYTE = "".join(
    map(chr, [*range(0x80), *range(0x80, 0xC0), *range(0xC0, 0x800, 0x40), *range(0x800, 0xD800, 0x1000),
              0xE0A0, 0xFFFC, 0x1F600, *range(0x40000, 0x110000, 0x40000), 0x10FFFD]),
)  # fmt: skip
_PRIVATE = "\U0010fffd"
_SELDOM_WRITTEN = "\u13a0\ua4f8\U00010330\U0001f9ff"  # Cherokee, Lisu, Gothic, an emoji


def unknown_id(backend: Any) -> int | None:
    """Id of the token for text that the vocabulary cannot write; None where every text can be written.

    Args:
        backend: a `tokenizers.Tokenizer` that does not truncate.
    """
    token = _declared(backend.model)
    if token is None or token not in backend.encode(_EVERY_BYTE, add_special_tokens=False).ids:
        return None
    return token


def drops_text(backend: Any) -> bool:
    """Whether text that the vocabulary cannot write is left out, with no token in its place."""
    normalise = backend.normalizer.normalize_str if backend.normalizer else str
    return any(
        normalise(char).strip() and not backend.encode(char, add_special_tokens=False).ids for char in _SELDOM_WRITTEN
    )


def _declared(model: Any) -> int | None:
    """The unknown token of a tokenizer's model, whether the model ever writes it or not."""
    if hasattr(model, "unk_token"):
        return model.token_to_id(model.unk_token) if model.unk_token is not None else None
    written = model.tokenize(_PRIVATE)  # Unigram names its unknown token by number only, and not to Python
    return written[0].id if len(written) == 1 else None
