"""Decode tokens to text, piece by piece or whole, up to a stop string."""

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
        self._pieces: list[str] = []

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
        if piece:
            self._pieces.append(piece)
        return piece

    @property
    def has_failed(self) -> bool:
        """Whether text comes only at the end."""
        return self._stream is None

    def finish(self) -> str:
        """The remaining text: bytes of an unfinished character become U+FFFD."""
        whole, shown = self.whole(), "".join(self._pieces)
        return whole[len(shown) :] if whole.startswith(shown) else ""

    def whole(self) -> str:
        """The text of all tokens so far."""
        return str(self._backend.decode(self._ids, skip_special_tokens=False))


class ReplyText:
    """The text of a reply as it may be shown: text that may become a stop string is held back.

    Attributes:
        is_stopped: whether a stop string has come.
    """

    def __init__(self, encoder: Encoder, stops: Sequence[str]) -> None:
        self._decoder = PieceDecoder(encoder)
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that a token lets be shown."""
        piece = self._decoder.push(token_id)
        if not self._stops:
            return piece
        if self._decoder.has_failed and any(stop in self._decoder.whole() for stop in self._stops):
            return self.finish()
        self._held += piece
        return self._release(is_last=False)

    def finish(self) -> str:
        """The remaining text up to a stop string."""
        if self.is_stopped:
            return ""
        rest = self._decoder.finish()
        if not self._stops:
            return rest
        self._held += rest
        return self._release(is_last=True)

    def _release(self, is_last: bool) -> str:
        """Text before the first stop string, or before what may be the beginning of one."""
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return self._held[: min(places)]
        kept = 0 if is_last else max(map(self._beginning_at_end, self._stops))
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown

    def _beginning_at_end(self, stop: str) -> int:
        """Length of the longest beginning of a stop string that the held text ends with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


def decode_reply(encoder: Encoder, ids: Sequence[int]) -> str:
    """Text of a reply without its stop token."""
    kept = [i for i in ids if i not in encoder.stop_ids and i != encoder.eos_id]
    return str(encoder.tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=False))
