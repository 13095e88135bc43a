"""The Modelfile with which Ollama opens a GGUF file.

Ollama does not run the Jinja template in the file: its own templates are in Go's language. One is written here for
templates that put fixed texts around the turns, and compared with the Jinja template; others need llama.cpp's server.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.chat_template.habits import TemplateRefused
from tunesmith.chat_template.template import Renderer
from tunesmith.gguf.chats import probe_chats
from tunesmith.rows.conversation import Message

_SYSTEM, _USER, _REPLY = "tunesmith-probe-system", "tunesmith-probe-question", "tunesmith-probe-reply"
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class TurnTexts:
    """A template that puts fixed texts around the turns.

    Attributes:
        begin: before the first turn, if that is not a system prompt (some templates write their own one there).
        around: role -> texts before and after a turn's content; those of a system prompt hold the begin of the chat.
        ask: where the reply begins.
    """

    begin: str
    around: Mapping[str, Pair]
    ask: str

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama makes of a chat with `to_go`."""
        begin = "" if messages[0].role == "system" else self.begin
        return begin + "".join(message.content.join(self.around[message.role]) for message in messages) + self.ask

    def to_go(self) -> str:
        """As a template in Go's language, over Ollama's `.Messages`."""
        begin = _quote(self.begin)
        if begin and "system" in self.around:
            begin = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{begin}{{{{ end }}}}'
        cases = ""
        for role, (before, after) in self.around.items():
            word = "else if" if cases else "if"
            cases += f'{{{{ {word} eq .Role "{role}" }}}}{_quote(before)}{{{{ .Content }}}}{_quote(after)}'
        return f"{begin}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{_quote(self.ask)}"


def _quote(text: str) -> str:
    """A text in a Go template: quoted, so that nothing in it is read as template or as the end of the Modelfile's
    string."""
    if not text:
        return ""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    # Ollama leaves out what is not printable
    plain = "".join(char if char.isprintable() else _ESCAPES.get(char, f"\\U{ord(char):08x}") for char in plain)
    return f'{{{{ "{plain}" }}}}'


def find_turn_texts(renderer: Renderer, left_out: str = "") -> TurnTexts | None:
    """The fixed texts of a template; None if it does more than put them around turns.

    Args:
        left_out: a text at the begin that Ollama writes itself (BOS).
    """
    user, reply = Message("user", _USER), Message("assistant", _REPLY)
    try:
        alone, asked = renderer.render([user]), renderer.render([user], add_generation_prompt=True)
        answered, chat = renderer.render([user, reply]), renderer.render([user, reply, user])
    except TemplateRefused:
        return None
    head, _, after_user = alone.partition(_USER)
    after_reply = answered.rpartition(_REPLY)[2]
    middle, _, rest = chat.removeprefix(head + _USER).partition(_REPLY)
    between = rest.partition(_USER)[0]
    before_user, before_reply = between.removeprefix(after_reply), middle.removeprefix(after_user)
    around = {"user": (before_user, after_user), "assistant": (before_reply, after_reply)}
    if system := _around_system(renderer, before_user):
        around = {"system": (system[0].removeprefix(left_out), system[1]), **around}
    begin = head[: len(head) - len(before_user)].removeprefix(left_out)
    found = TurnTexts(begin, around, asked.removeprefix(alone))
    return found if _is_same(found, renderer, left_out) else None


def _around_system(renderer: Renderer, before_user: str) -> Pair | None:
    """The texts around a system prompt; None if the template has no turn for it."""
    try:
        before, _, behind = renderer.render([Message("system", _SYSTEM), Message("user", _USER)]).partition(_SYSTEM)
    except TemplateRefused:
        return None
    gap = behind.partition(_USER)[0]
    return (before, gap[: len(gap) - len(before_user)]) if gap.endswith(before_user) else None


def _is_same(found: TurnTexts, renderer: Renderer, left_out: str) -> bool:
    """Whether the texts give what the template writes, for chats with and without a system prompt."""
    for chat in probe_chats(renderer):
        turns = chat.request["messages"]
        if "tools" in chat.request:
            continue
        messages = [Message(turn["role"], turn["content"]) for turn in turns]
        if any(message.role not in found.around for message in messages):
            continue
        if left_out + found.render(messages) != chat.text:
            return False
    return True


def write_modelfile(file: str, renderer: Renderer | None, bos: str, stops: Sequence[str], context: int) -> str:
    """The text of a Modelfile.

    Args:
        file: name of the GGUF file, in the same folder.
        bos: the text of BOS where llama.cpp puts it before every prompt, else "".
        stops: texts of the tokens that end a reply.
        context: largest number of tokens of a chat.
    """
    modelfile = shlex.quote(file.removesuffix(".gguf") + ".Modelfile")
    lines = [f"# ollama create NAME -f {modelfile}", f"FROM ./{file}"]
    if renderer is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif turns := find_turn_texts(renderer, bos):
        lines.append(f'TEMPLATE """{turns.to_go()}"""')
        if "system" not in turns.around:
            lines.append("# The chat template has no turn for a system prompt: Ollama leaves system prompts out")
        if renderer.habits.writes_calls:
            lines.append("# Chats with tools need the Jinja template in the file: llama-server --jinja")
    else:
        lines += [
            "# The chat template in the file does more than put fixed texts around the turns, and has no form in",
            "# Ollama's language here. With llama.cpp it runs as trained: llama-server --jinja -m " + file,
        ]
    lines += [f"PARAMETER stop {_parameter(text)}" for text in stops]
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def _parameter(text: str) -> str:
    """A string of the Modelfile, which has no escapes."""
    return f'''"""{text}"""''' if '"' in text else f'"{text}"'
