"""Detect unfilled placeholders, transcripts and rendered chat templates inside texts."""

from __future__ import annotations

import re

RENDERED_MARKS = ("<|im_start|>", "[INST]", "<start_of_turn>", "<|start_header_id|>", "<|assistant|>",
                  "### Response:", "<|user|>", "<｜Assistant｜>")  # fmt: skip
_NAMES = """
    name names author authors user username user_name your_name first_name last_name full_name char character
    company company_name organization organisation organization_name org developer creator owner brand brand_name
    bot bot_name botname assistant assistant_name ai_name model_name product_name customer customer_name client_name
"""
PLACEHOLDER_NAMES = frozenset(_NAMES.split())  # fmt: skip
"""Names of placeholders that are often left unfilled ("I am {{name}}"), in any case."""

NOTE_BRACES = "has a reply with a word in double braces, perhaps an unfilled placeholder"
NOTE_TRANSCRIPT_REPLY = (
    "has a transcript of several speakers inside a reply; all of its tokens are trained, questions included"
)
NOTE_TRANSCRIPT_QUESTION = "has a transcript of several speakers inside a question; its replies are not trained"
NOTE_TRANSCRIPT_TEXT = (
    "raw text that is a transcript of several speakers; all of its tokens are trained, questions included"
)

_BRACES = re.compile(r"\{\{([A-Za-z_]\w*)\}\}")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_ANSWERERS = ("<bot>", "<assistant>", "ssistant:", "ssistant：", "ASSISTANT:", "Bot:", "AI:", "GPT:", "助手：", "助手:")
_OVERLAP = 256  # characters; longer than any mark with the spaces before it
_LINE = r"(?:^[ \t]*|##[ \t]{0,2})"  # "### Human:" begins a turn inside a line too (guanaco)
_ASKED = re.compile(rf"{_LINE}(?:human|user|question|用户|问)[ \t]*[:：]|<(?:user|human)>[ \t]*[:：]", re.I | re.M)
_ANSWERED = re.compile(
    rf"{_LINE}(?:assistant|bot|ai|gpt|chatgpt|助手|答)[ \t]*[:：]|<(?:bot|assistant)>[ \t]*[:：]", re.I | re.M
)


def find_placeholder(text: str) -> str | None:
    """An unfilled placeholder like {{name}} outside code, None if there is none."""
    return next((f"{{{{{word}}}}}" for word in _braced_words(text) if word.lower() in PLACEHOLDER_NAMES), None)


def has_braces(text: str) -> bool:
    """Whether a word of several letters is in double braces outside code ({{a}} is LaTeX)."""
    return any(len(word) > 1 for word in _braced_words(text))


def _braced_words(text: str) -> list[str]:
    return _BRACES.findall(_CODE.sub("", text)) if "{{" in text else []


def find_rendered_template(text: str) -> str | None:
    """A mark of a chat template in raw text that is already rendered, None if there is none."""
    return next((mark for mark in RENDERED_MARKS if mark in text), None)


def is_transcript(text: str) -> bool:
    """Whether several speakers take turns inside one text ("<user>: ... <bot>: ...", "Human: ... Assistant: ...")."""
    for mark in _ANSWERERS:
        if mark in text:
            break
    else:
        return False
    asked = _ASKED.search(text)
    return asked is not None and _ANSWERED.search(text, asked.end()) is not None


class TextScan:
    """What `find_rendered_template` and `is_transcript` find in a text that comes in blocks.

    Each block is searched together with the end of the one before, so that nothing is missed where they meet.
    """

    def __init__(self) -> None:
        self.has_rendered = False
        self._has_answerer = False
        self._asked_until: int | None = None  # where the first question mark ends
        self._is_answered = False
        self._end = "\n"  # nothing is before the first line
        self._position = -1  # of `_end` in the text

    @property
    def is_transcript(self) -> bool:
        return self._has_answerer and self._is_answered

    def add(self, block: str) -> None:
        text, position = self._end + block, self._position
        self.has_rendered = self.has_rendered or find_rendered_template(text) is not None
        self._has_answerer = self._has_answerer or any(mark in text for mark in _ANSWERERS)
        # from the second character on: the first need not be the beginning of a line
        if self._asked_until is None and (asked := _ASKED.search(text, 1)):
            self._asked_until = position + asked.end()
        if self._asked_until is not None and not self._is_answered:
            self._is_answered = _ANSWERED.search(text, max(1, self._asked_until - position)) is not None
        self._end = text[-_OVERLAP:]
        self._position = position + len(text) - len(self._end)
