"""Decode tokens to text, piece by piece or whole."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from tunesmith.encode.encoder import Encoder


class PieceDecoder:
    """Decode tokens to printable pieces; holds back the bytes of an unfinished character."""

    def __init__(self, encoder: Encoder) -> None:
        self._backend = encoder.tokenizer.backend_tokenizer
        self._stream: DecodeStream | None = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> str:
        """The text completed by a token."""
        self._ids.append(token_id)
        if self._stream is None:
            return ""
        try:
            piece = self._stream.step(self._backend, token_id) or ""
        except Exception:  # some decoders rewrite earlier text later; `finish` returns the rest
            self._stream = None
            return ""
        self._shown += piece
        return piece

    def finish(self) -> str:
        """The remaining text: bytes of an unfinished character become U+FFFD."""
        whole = self._backend.decode(self._ids, skip_special_tokens=False)
        return whole[len(self._shown) :] if whole.startswith(self._shown) else ""


def decode_reply(encoder: Encoder, ids: Sequence[int]) -> str:
    """Text of a reply without its stop token."""
    kept = [i for i in ids if i not in encoder.stop_ids and i != encoder.eos_id]
    return str(encoder.tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=False))
