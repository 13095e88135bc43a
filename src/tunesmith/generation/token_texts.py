"""Texts and bytes of single tokens, for log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tunesmith.encode.encoder import Encoder

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")  # SentencePiece's byte tokens


class TokenTexts:
    """What each token of a model stands for."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._backend = encoder.tokenizer.backend_tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; a part of a character may be all of it."""
        piece = self._backend.id_to_token(token)
        if piece is None:  # beyond the tokenizer's vocabulary
            return b""
        if token in self._encoder.added_ids:
            return str(piece).encode()
        if self._is_byte_level:
            return b"".join(self._byte_chars.get(char, char.encode()) for char in piece)
        found = _BYTE.match(piece)
        return bytes([int(found[1], 16)]) if found else piece.replace("\u2581", " ").encode()

    def shown(self, token: int) -> str:
        """A token's text; U+FFFD stands for a part of a character."""
        return self.bytes_of(token).decode(errors="replace")

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token as OpenAI's chat API shows it."""
        data = self.bytes_of(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self._backend.decoder)

    @cached_property
    def _byte_chars(self) -> dict[str, bytes]:
        """Characters that stand for bytes in byte-level tokenizers: printable Latin-1 itself, others from U+0100 on."""
        kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in kept]
        return {chr(byte): bytes([byte]) for byte in kept} | {
            chr(256 + place): bytes([byte]) for place, byte in enumerate(others)
        }
