"""An encoder in a form that another process can build it from, without transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.chat_template.template import ChatTemplate, RenderSettings
from tunesmith.encode.encoder import Encoder


@dataclass(frozen=True, slots=True)
class _Template:
    text: str
    source: str
    special_tokens: dict[str, str]
    is_fallback: bool


@dataclass(frozen=True, slots=True)
class PortableEncoder:
    """What decides every label of an encoder; it can be pickled.

    Attributes:
        backend: the tokenizer as JSON.
    """

    backend: str
    eos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None
    bos_ids: tuple[int, ...]
    template: _Template | None
    defaults: RenderSettings
    control_text: str

    @classmethod
    def of(cls, encoder: Encoder) -> PortableEncoder | None:
        """None if the tokenizer has parts in Python, which its JSON cannot hold."""
        tokenizer, template = encoder.tokenizer, encoder.template
        try:
            backend = tokenizer.backend_tokenizer.to_str()
        except Exception:  # what tokenizers raises for a custom part
            return None
        kept = None
        if template is not None:
            kept = _Template(template.text, template.source, dict(template.special_tokens), template.is_fallback)
        settings = RenderSettings(encoder.defaults.date, dict(encoder.defaults.variables))
        return cls(
            backend, tokenizer.eos_token, encoder.eos_id, encoder.bos_id, tuple(encoder.bos_ids), kept, settings,
            encoder.control_text,
        )  # fmt: skip

    def build(self) -> Encoder:
        """An encoder that gives the same ids and labels."""
        template = self.template
        program = None
        if template is not None:
            program = ChatTemplate(template.text, template.source, template.special_tokens, template.is_fallback)
        return Encoder(_Tokenizer(self), program, self.defaults, self.control_text)


class _Tokenizer:
    """The part of a transformers tokenizer that Encoder and labelling use."""

    def __init__(self, portable: PortableEncoder) -> None:
        import tokenizers

        self.backend_tokenizer = tokenizers.Tokenizer.from_str(portable.backend)
        self.eos_token, self.eos_token_id = portable.eos_token, portable.eos_token_id
        self.bos_token_id, self._bos_ids = portable.bos_token_id, portable.bos_ids

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Ids as the whole tokenizer begins a text."""
        ids = self.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return {"input_ids": [*self._bos_ids, *ids]}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a tokenizer for labelling has no {name}")
