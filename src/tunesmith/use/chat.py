"""`tunesmith chat`: a conversation in the terminal, or one answer with --prompt."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import sys

from tunesmith.config.schema import ModelSection
from tunesmith.errors import ModelError
from tunesmith.rows.conversation import Message
from tunesmith.use.batch import Sampling
from tunesmith.use.generate import Speaker, load_speaker, stream_reply

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt (and resets), /exit leaves"


def run_chat(options: argparse.Namespace) -> None:
    section = ModelSection(path=options.model, trust_remote_code=options.trust_remote_code)
    speaker = load_speaker(section, options.chat_template, options.more, options.allow_changed_base)
    template = speaker.encoder.template
    if template is not None and template.is_fallback:
        print(
            f"note: {options.model} brings no chat template, so the built-in {template.source} one is used; if it was "
            "trained with another, or none, give that as --chat-template",
            file=sys.stderr,
        )
    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
    chat = Chat(speaker, sampling, options.system)
    if options.prompt is not None:
        chat.answer(options.prompt)
        return
    print(f"{options.model}: {HELP}")
    if names := speaker.adapter_names:
        print(f"adapters: {', '.join(names)}; /adapter NAME switches, /adapter base answers without")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text must not end the chat; the encoder says so
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/exit":
            return
        if line:
            _handle_line(chat, line)


def _handle_line(chat: Chat, line: str) -> None:
    if line == "/reset":
        chat.reset()
        print("(forgotten)")
    elif line == "/system" or line.startswith("/system "):
        chat.reset(system=line.removeprefix("/system").strip() or None)
        print("(system prompt set)" if chat.system else "(system prompt removed)")
    elif line.split()[0] == "/adapter" and chat.speaker.adapter_names:
        name, names = line.removeprefix("/adapter").strip(), [*chat.speaker.adapter_names, "base"]
        if name in names:
            chat.speaker.switch(name)
        print(f"(now {name})" if name in names else f"no adapter {name!r}; there are: {', '.join(names)}")
    elif line.startswith("/"):
        print(f"unknown command {line.split()[0]}; {HELP}")
    else:
        try:
            chat.answer(line)
        except KeyboardInterrupt:  # stops the reply, not the chat
            print(" (interrupted)")
        except ModelError as error:
            advice = " Type /reset to forget this one." if error.code == "context-full" and chat.messages else ""
            print(f"error: {error}{advice}", file=sys.stderr)


class Chat:
    """The turns so far, and the model that answers the next."""

    def __init__(self, speaker: Speaker, sampling: Sampling, system: str | None) -> None:
        self.speaker = speaker
        self.sampling = sampling
        self.system = system or None
        self.reset()

    def reset(self, system: str | None = "") -> None:
        """Forget all turns; the system prompt stays unless a new one (or None) is given."""
        self.system = self.system if system == "" else system
        self.messages = [Message("system", self.system)] if self.system else []

    def answer(self, text: str) -> str:
        """Print the reply as it comes, and keep both turns once it is whole."""
        asked = [*self.messages, Message("user", text)]
        prompt = self.speaker.encoder.encode_prompt(asked, date=datetime.datetime.now())
        reply = ""
        for piece in stream_reply(self.speaker, prompt, self.sampling):
            sys.stdout.write(piece)
            sys.stdout.flush()
            reply += piece
        print()
        self.messages = [*asked, Message("assistant", reply)]
        return reply
