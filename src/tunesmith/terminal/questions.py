"""What a person types into a chat: lines from a pipe, or a line editor on a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tunesmith.display import hidden_replaced, one_line, raw_stream

PROMPT = "you> "
KEYS = (
    "Alt-Enter, or a \\ at the end of a line, begins a new line; Tab completes commands; Ctrl-C stops a reply; "
    "Ctrl-D leaves"
)
Read = Callable[[str], str]  # the text that stands there already -> the text that was entered


class Cleared(Exception):
    """Ctrl-C with text on the line: that text is given up."""


def has_editor() -> bool:
    """Whether both ends are a terminal that can move its cursor."""
    is_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    return is_terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def open_lines() -> Read:
    """Each line of standard input, without the spaces around it; raises EOFError at its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing where standard output alone is no terminal
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text must not end the chat; the encoder says so
        sys.stdin.reconfigure(errors="surrogateescape")
    return lambda _: input(PROMPT).strip()


def open_editor(complete: Callable[[str], Sequence[str]]) -> Read:
    """A line editor with history, pasted texts of several lines, and completion by Tab.

    Reading raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C where nothing is typed, Cleared where something is.

    Args:
        complete: a text that begins with / -> what it may become.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.data_structures import Size
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.layout.processors import Processor, Transformation
    from prompt_toolkit.output.vt100 import Vt100_Output
    from prompt_toolkit.shortcuts import CompleteStyle

    class Commands(Completer):
        def get_completions(self, document: Any, event: Any) -> Iterable[Completion]:
            text = document.text_before_cursor
            for whole in complete(text) if text.startswith("/") else ():
                yield Completion(whole, start_position=-len(text), display=one_line(whole.strip()))

    class Visible(Processor):
        """Pasted control characters are sent as they are, and shown as U+FFFD."""

        def apply_transformation(self, transformation_input: Any) -> Transformation:
            return Transformation([(part[0], hidden_replaced(part[1])) for part in transformation_input.fragments])

    def size() -> Size:
        columns, rows = shutil.get_terminal_size()
        return Size(rows, columns)

    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation=lambda width, number, is_soft_wrapped: "" if is_soft_wrapped else "...> ".rjust(width),
        completer=Commands(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        history=InMemoryHistory(),
        key_bindings=_keys(),
        input_processors=[Visible()],
        # it asks for no cursor position, which some terminals do not answer
        output=Vt100_Output(raw_stream(sys.stdout), size, term=os.environ.get("TERM"), enable_cpr=False),
    )

    def read(default: str) -> str:
        # a lone half of a character cannot be encoded; it comes from bytes that are no text
        text = session.prompt(default=default)
        return re.sub("[\ud800-\udfff]", "\ufffd", text).strip()

    return read


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: Any) -> None:
        """Sends the text, unless its line ends with a backslash."""
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor(1)
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def give_up(event: Any) -> None:
        event.app.exit(exception=Cleared if event.current_buffer.text else KeyboardInterrupt)

    return keys
