"""Find spellings of added tokens that only the tokenizer itself recognizes (after normalization).

A normalizer rewrites a text before added tokens with `normalized=True` are matched and before the model's vocabulary,
which may contain the same token, is applied: under NFKC or a lowercasing normalizer, `<TAS\\u212a>` (KELVIN SIGN) and
`<ta\\xadsk>` can become `<TASK>`. Such texts cannot be enumerated, so the tokenizer is run on each text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tunesmith.rows.conversation import RowRefused

CODE = "control-token-disguised"  # refusal code for texts that marks cannot keep as text
_ROUNDS = 4  # one round finds disguises, one confirms that none is left; overlapping tokens need a few more


class Disguises:
    """Find and break up disguised spellings of a tokenizer's added tokens.

    Args:
        backend: a `tokenizers.Tokenizer` that neither truncates nor pads.
        tokens: added tokens to look for, by id, from `find_at_risk`.
        neighbour: text of an added token that templates write next to messages; "" if there is none.
    """

    def __init__(self, backend: Any, tokens: dict[int, Any], neighbour: str = "") -> None:
        self._backend, self._ids = backend, frozenset(tokens)
        self._normalize = backend.normalizer.normalize_str if backend.normalizer else str
        self._cores = {self._core(token.content) for token in tokens.values()}
        # some normalizers and pre-tokenizers treat the beginning of a text differently
        self._contexts = list(dict.fromkeys(["", "\n", neighbour]))

    def _core(self, content: str) -> str:
        """A text that anything normalized to this token must contain; "" if unknown."""
        core = self._normalize(content).strip(" \u2581")
        return core if core.isascii() and " " not in core else ""  # a pre-tokenizer may rewrite other characters

    def _may_hold(self, text: str) -> bool:
        """Cheap test whether the tokenizer must be run; the normalizer alone is several times faster."""
        normal = self._normalize(f"\n{text}\n") + self._normalize(text)
        return any(core in normal for core in self._cores)

    def mark(self, text: str, mark: str) -> str:
        """The text with marks between the characters of each disguised token.

        Raises:
            RowRefused: marks do not break it up, as when one character is normalized to a whole token.
        """
        if not self._may_hold(text):
            return text
        for _ in range(_ROUNDS):
            spans = self._find(text)
            if not spans:
                return text
            inside = {place for start, end, _ in spans for place in range(start + 1, end)}
            text = "".join(f"{mark}{char}" if place in inside else char for place, char in enumerate(text))
        _, _, token = spans[0]
        raise RowRefused(
            f"contains characters that this tokenizer turns into the control token "
            f"{self._backend.id_to_token(token)!r}, whatever is done to keep them as text. Remove these characters",
            code="control-token-disguised",
        )

    def _find(self, text: str) -> list[tuple[int, int, int]]:
        """[start, end) of each disguised token in the text, with its id."""
        found = []
        for context in self._contexts:
            encoding = self._backend.encode(f"{context}{text}{context}", add_special_tokens=False)
            if self._ids.isdisjoint(encoding.ids):
                continue
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                start, end = start - len(context), min(end - len(context), len(text))
                if token in self._ids and 0 <= start < end:
                    found.append((start, end, token))
        return found


def find_at_risk(backend: Any, tokens: dict[int, Any]) -> dict[int, Any]:
    """Added tokens that texts other than their own spelling may become; none for most tokenizers.

    Args:
        tokens: id -> `tokenizers.AddedToken`, without the unknown token, which any text may become.
    """
    is_rewritten = backend.normalizer is not None
    return {
        token_id: token
        for token_id, token in tokens.items()
        if (is_rewritten and token.normalized) or token_id in _spelled_by_model(backend, token.content)
    }


def _spelled_by_model(backend: Any, content: str) -> set[int]:
    """Ids with which the model's own vocabulary writes the text of a token."""
    if backend.model.token_to_id(content) is None:
        return set()
    normalize = backend.normalizer.normalize_str if backend.normalizer else str
    texts = {content, f" {content}", f"a {content} a"}
    return {
        token.id
        for text in texts | {normalize(text) for text in texts}
        for piece in _split(backend, text)
        for token in backend.model.tokenize(piece)
    }


def _split(backend: Any, text: str) -> Iterable[str]:
    if backend.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
