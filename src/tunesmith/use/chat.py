"""`tunesmith chat`: a conversation in the terminal, or one answer with --prompt."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import shutil
import sys
import textwrap
from collections.abc import Callable

from tunesmith.config.schema import ModelSection
from tunesmith.errors import ModelError, Terminated
from tunesmith.generation.replies import stream_reply
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker, load_speaker
from tunesmith.rows.conversation import Message
from tunesmith.terminal.questions import KEYS, Cleared, Read, has_editor, open_editor, open_lines
from tunesmith.terminal.status import show_status
from tunesmith.terminal.tty import held_keys, typed_ahead

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt (and resets), /exit leaves"


def run_chat(options: argparse.Namespace) -> None:
    show_status("loading the model")
    section = ModelSection(
        path=options.model,
        tokenizer=options.tokenizer,
        config=options.model_config,
        trust_remote_code=options.trust_remote_code,
    )
    speaker = load_speaker(section, options.chat_template, options.more, options.allow_changed_base)
    template = speaker.encoder.template
    if template is not None and template.is_fallback:
        print(
            f"note: {options.model} brings no chat template, so the built-in {template.source} one is used; if it was "
            "trained with another, or none, give that as --chat-template",
            file=sys.stderr,
        )
    sampling = Sampling(
        options.max_new_tokens,
        options.temperature,
        options.seed,
        options.top_p,
        options.top_k,
        options.min_p,
        options.repetition_penalty,
    )
    chat = Chat(speaker, sampling, options.system)
    if options.prompt is not None:
        chat.answer(options.prompt)
        return
    is_edited = has_editor()
    lines = [f"{options.model}: {HELP}"]
    if names := speaker.adapter_names:
        lines.append(f"adapters: {', '.join(names)}; /adapter NAME switches, /adapter base answers without")
    for line in [*lines, KEYS] if is_edited else lines:
        print(textwrap.fill(line, shutil.get_terminal_size().columns) if is_edited else line)
    talk(chat, open_editor(chat.complete) if is_edited else open_lines(), is_edited)


def talk(chat: Chat, read: Read, is_edited: bool) -> None:
    """Read and answer turns until the person leaves.

    Args:
        is_edited: `read` is a line editor: it takes what was typed during a reply as the beginning of the next turn,
            and Ctrl-C where nothing is typed ends the chat only when it is pressed twice.
    """
    was_asked, typed = False, ""
    with held_keys() if is_edited else contextlib.nullcontext():
        while True:
            try:
                line = read(typed)
                was_asked, typed = False, ""
                if line == "/exit":
                    return
                if line:
                    _handle_line(chat, line)
                    typed = typed_ahead() if is_edited else ""  # stands at the next prompt; Enter sends it
            except Cleared:
                was_asked, typed = False, ""
            except (EOFError, Terminated):
                print()
                return
            except KeyboardInterrupt:
                if was_asked or not is_edited:
                    print()
                    return
                was_asked, typed = True, ""
                print("(press Ctrl-C again, or Ctrl-D, to leave)")


def _handle_line(chat: Chat, line: str) -> None:
    name, _, rest = line.partition(" ")
    if name in COMMANDS and (name != "/adapter" or chat.speaker.adapter_names):
        COMMANDS[name](chat, rest.strip())
    elif "\n" not in line and line.startswith("/"):
        print(f"unknown command {name}; {HELP}")
    else:
        before = len(chat.messages)
        try:
            chat.answer(line)
        except Terminated:
            raise
        except KeyboardInterrupt:
            print(" (stopped)" if len(chat.messages) > before else "(stopped; the question is forgotten)")
        except ModelError as error:
            advice = " Type /reset to forget this one." if error.code == "context-full" and chat.messages else ""
            print(f"error: {error}{advice}", file=sys.stderr)


def _reset(chat: Chat, rest: str) -> None:
    chat.reset()
    print("(forgotten)")


def _set_system(chat: Chat, text: str) -> None:
    chat.reset(system=text or None)
    print("(system prompt set)" if chat.system else "(system prompt removed)")


def _switch(chat: Chat, name: str) -> None:
    names = chat.adapters
    if name in names:
        chat.speaker.switch(name)
    print(f"(now {name})" if name in names else f"no adapter {name!r}; there are: {', '.join(names)}")


COMMANDS: dict[str, Callable[[Chat, str], None]] = {"/reset": _reset, "/system": _set_system, "/adapter": _switch}


class Chat:
    """The turns so far, and the model that answers the next."""

    def __init__(self, speaker: Speaker, sampling: Sampling, system: str | None) -> None:
        self.speaker = speaker
        self.sampling = sampling
        self.system = system or None
        self.reset()

    @property
    def adapters(self) -> list[str]:
        """What /adapter takes."""
        return [*self.speaker.adapter_names, "base"] if self.speaker.adapter_names else []

    def complete(self, text: str) -> list[str]:
        """The commands that begin with a text."""
        commands = ["/reset", "/system ", "/exit", *(f"/adapter {name}" for name in self.adapters)]
        return [command for command in commands if command.startswith(text)]

    def reset(self, system: str | None = "") -> None:
        """Forget all turns; the system prompt stays unless a new one (or None) is given."""
        self.system = self.system if system == "" else system
        self.messages = [Message("system", self.system)] if self.system else []

    def answer(self, text: str) -> str:
        """Print the reply as it comes, and keep both turns; of a reply that Ctrl-C ends, what was printed."""
        asked = [*self.messages, Message("user", text)]
        prompt = self.speaker.encoder.encode_prompt(asked, date=datetime.datetime.now())
        reply = ""
        try:
            for piece in stream_reply(self.speaker, prompt, self.sampling):
                sys.stdout.write(piece)
                sys.stdout.flush()
                reply += piece
            print()
        finally:
            if reply or sys.exc_info()[0] is None:
                self.messages = [*asked, Message("assistant", reply)]
        return reply
