"""Read a command line of MiniMind: launcher, script, flags, and the generation that has them."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config.plainyaml import show
from tunesmith.config.suggest import did_you_mean, suggest_words
from tunesmith.display import one_line
from tunesmith.errors import ConfigError, UsageError
from tunesmith.foreign.minimind_flags import (
    BITS,
    DATA_FILES,
    ELSEWHERE,
    FOLDERS,
    GENERATIONS,
    OTHERS,
    SCRIPTS,
    SWITCHES,
    Flags,
    Generation,
    Kind,
    Script,
)

_EXAMPLE = "tunesmith convert-config --from minimind -- python train_full_sft.py --batch_size 64"
_LINE_CONTINUES = re.compile(r"[\\^`][ \t]*\r?\n")
_BACKSLASH_OF_A_PATH = re.compile(r"\\(?=[\w.])")
_REDIRECTION = re.compile(r"\d?>|&>|<|\||&$")
_RENAMED = {  # flags of the same meaning in other generations
    "dim": ("hidden_size",), "n_layers": ("num_hidden_layers",), "hidden_size": ("dim",),
    "num_hidden_layers": ("n_layers",),
    "out_dir": ("save_dir",), "save_dir": ("out_dir",), "lora_name": ("lora_weight",), "lora_weight": ("lora_name",),
    "history_cnt": ("historys",), "historys": ("history_cnt",), "use_moe": ("student_use_moe",),
    "student_use_moe": ("use_moe",),
    "model_mode": ("weight",), "weight": ("model_mode",), "load": ("load_from",), "load_from": ("load",),
    "max_seq_len": ("max_new_tokens",), "max_new_tokens": ("max_seq_len",),
}  # fmt: skip
_LARGEST = 2**63
_PROCESSES = ("nproc_per_node", "num_gpus", "num_processes", "nnodes", "num_nodes")  # of launchers


@dataclass(frozen=True, slots=True)
class Launch:
    """What is in front of a script.

    Attributes:
    words: the launcher, without the script.
    folder: where the script is run, as named by `cd` before it; "" is here.
    script: path of the script as given, with forward slashes.
    flags: words after it.
    """

    words: list[str]
    folder: str
    script: str
    flags: list[str]

    @property
    def name(self) -> str:
        return self.script.rpartition("/")[2]

    @property
    def processes(self) -> int | None:
        """Number of processes; None where the launcher decides."""
        count = 1
        for at, word in enumerate(self.words):
            name, _, value = word.lstrip("-").partition("=")
            if word.startswith("-") and name.replace("-", "_") in _PROCESSES:
                value = value or next(iter(self.words[at + 1 :]), "")
                if not (value.isascii() and value.isdigit() and int(value)):
                    return None
                count *= int(value)
        return count


@dataclass(frozen=True, slots=True)
class Command:
    """Attributes:
    script: file name of the script.
    given: flags of the command line, by their full names.
    older: other generations with all of these flags, the newest first.
    why: how the generation was chosen.
    folder: of the repository, where the script is and is run; "" is the repository's own.
    is_above: it is given in the repository's folder although its script is in a folder below.
    """

    launch: Launch
    script: str
    generation: Generation
    given: Flags
    older: list[str] = field(default_factory=list)
    why: str = ""
    folder: str = ""
    is_above: bool = False

    @property
    def kind(self) -> Kind:
        return SCRIPTS[self.script].kind

    @property
    def values(self) -> Flags:
        """All flags of the script, with its defaults."""
        return SCRIPTS[self.script].flags[self.generation.name] | self.given

    @property
    def sizes(self) -> tuple[int, int]:
        """Hidden size and layers; of a distillation, the student's."""
        values, one = self.values, self.generation
        if self.kind == "distillation":
            return values.get("student_hidden_size", 512), values.get("student_num_layers", 8)
        return values.get(one.hidden, 512), values.get(one.layers, 8)

    @property
    def is_moe(self) -> bool:
        return bool(self.values.get("student_use_moe", self.values.get("use_moe", False)))

    def weights_name(self, name: str) -> str:
        """full_sft -> full_sft_512_moe, their name of weights without .pth."""
        return f"{name}_{self.sizes[0]}{'_moe' if self.is_moe else ''}"

    @property
    def text(self) -> str:
        """The command in one line."""
        moved = ["cd", self.launch.folder, "&&"] if self.launch.folder else []
        words = [*self.launch.words, self.launch.script, *self.launch.flags]
        return one_line(" ".join([*moved, *(shlex.quote(word) for word in words)]))


class Paths:
    """Paths of a command as they are named in the folder in which it is given.

    Attributes:
    moved: paths that were changed.
    """

    def __init__(self, command: Command, here: Path) -> None:
        self._command, self._here = command, here
        self.moved: dict[str, str] = {}

    def local(self, path: str) -> str:
        """../out of a script in trainer/ is out, where the command is given in the folder above trainer/."""
        given = path.replace("\\", "/")
        if posixpath.isabs(given) or given.startswith("~") or given[1:2] == ":":
            return given
        folder = self._command.launch.folder
        found = posixpath.normpath(posixpath.join(folder, given))
        if self._command.is_above and given.startswith("../") and not (self._here / found).exists():
            found = posixpath.normpath(posixpath.join(folder, self._command.folder, given))
        if found != posixpath.normpath(given):
            self.moved[given] = found
        return found


def read_command(words: Sequence[str], generation: str | None = None, here: Path = Path()) -> Command:
    """Args:
        words: the command, as words or as one text.
        generation: of MINIMIND_GENERATIONS; otherwise the newest that has all flags.
        here: folder in which the command would be given.

    Raises:
        UsageError: there is no command.
        ConfigError: no script of MiniMind that tunesmith has a counterpart for, or its flags are wrong.
    """
    launch = find_script(words)
    name = launch.name
    if name in OTHERS:
        does = "tunesmith does supervised fine-tuning and pre-training"
        raise ConfigError(name, [f"is {OTHERS[name]}; {does}"], code="other-method")
    if name in ELSEWHERE:
        raise ConfigError(name, [f"has no run file: {ELSEWHERE[name]}"], code="other-script")
    if name not in SCRIPTS:
        found = did_you_mean(suggest_words(name, [*SCRIPTS, *OTHERS, *ELSEWHERE]))
        known = f"; converted are {', '.join(SCRIPTS)}"
        raise ConfigError(one_line(name), [f"is not a script of MiniMind that is known here{found or known}"],
                          code="unknown-script")  # fmt: skip
    script = SCRIPTS[name]
    texts = _read_flags(name, script, launch.flags)
    chosen, older, why = _choose_generation(name, script, texts, generation)
    given = _read_values(name, texts, script.flags[chosen.name])
    folder = FOLDERS.get(name, "") if script.kind == "chat" else chosen.folder
    return Command(launch, name, chosen, given, older, why, folder, bool(folder) and _is_above(launch, folder, here))


def find_script(words: Sequence[str]) -> Launch:
    """Raises:
    UsageError: there is no script in it.
    """
    parts = _split(words)
    folder = ""
    for part in parts:
        if part[:1] == ["cd"] and len(part) == 2:
            folder = f"{folder}/{part[1]}".strip("/") if folder and not part[1].startswith("/") else part[1]
            continue
        for at, word in enumerate(part):
            if word.lower().endswith(".py"):
                return Launch(part[:at], folder, _slashes(word), part[at + 1 :])
            module = part[at + 1] if word == "-m" and at + 1 < len(part) else ""
            if f"{module.rpartition('.')[2]}.py" in (*SCRIPTS, *OTHERS, *ELSEWHERE):
                return Launch(part[:at], folder, module.replace(".", "/") + ".py", part[at + 2 :])
    if not any(parts):
        raise UsageError(f"convert-config: no command after --; give it as in\n  {_EXAMPLE}", code="no-command")
    shown = one_line(shlex.join(word for part in parts for word in part))
    raise UsageError(f"convert-config: {shown[:200]}: names no script (train_full_sft.py); give the command as in\n  "
                     f"{_EXAMPLE}", code="no-script")  # fmt: skip


def _split(words: Sequence[str]) -> list[list[str]]:
    """The commands in the words, without redirections."""
    listed = list(words)
    if len(listed) == 1 and any(mark.isspace() for mark in listed[0].strip()):
        text = _BACKSLASH_OF_A_PATH.sub("/", _LINE_CONTINUES.sub(" ", listed[0]))
        try:
            listed = shlex.split(text.replace(";", " ; "), comments=True)
        except ValueError as error:
            raise UsageError(f"convert-config: {one_line(text)[:200]}: {error}; check its quotes",
                             code="no-script") from None  # fmt: skip
    parts: list[list[str]] = [[]]
    for word in listed:
        if word in ("&&", ";", "||"):
            parts.append([])
        elif word not in ("$", "!"):  # a prompt; a notebook's mark
            parts[-1].append(word.removeprefix("!") if not parts[-1] else word)
    return [_before_redirection(part) for part in parts]


def _before_redirection(part: list[str]) -> list[str]:
    end = next((at for at, word in enumerate(part) if _REDIRECTION.match(word)), len(part))
    return part[:end]


def _slashes(path: str) -> str:
    return path.replace("\\", "/").removeprefix("./")


def _is_above(launch: Launch, folder: str, here: Path) -> bool:
    """Whether a script of trainer/ is named from the folder above it."""
    start = here / launch.folder
    if "/" in launch.script:
        return launch.script == f"{folder}/{launch.name}"
    is_inside = Path(launch.folder).name == folder or start.resolve().name == folder or (start / launch.name).is_file()
    return not is_inside and (start / folder / launch.name).is_file()


def _read_flags(name: str, script: Script, words: Sequence[str]) -> dict[str, str | None]:
    """Full name of each flag -> its text; None for a switch."""
    known = sorted({flag for flags in script.flags.values() for flag in flags})
    texts: dict[str, str | None] = {}
    problems: list[str] = []
    at = 0
    while at < len(words):
        word, at = words[at], at + 1
        typed, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            problems.append(f"{show(word, 80)}: is neither a flag nor the value of one")
            continue
        begun = [flag for flag in known if flag.startswith(typed)] if typed else []
        flag = typed if typed in known else begun[0] if len(begun) == 1 else ""
        next_is_value = at < len(words) and not words[at].startswith("--")
        if not flag:
            problems.append(f"--{one_line(typed)}: {name} has no such flag{_explain_flag(typed, begun, known)}")
            at += not equals and next_is_value
        elif flag in SWITCHES:
            if equals:
                problems.append(f"--{flag}: takes no value")
            texts[flag] = None
        elif equals or next_is_value:
            texts[flag] = given = value if equals else words[at]
            at += not equals
            if not given.strip():  # of an unset shell variable
                problems.append(f"--{flag}: is empty; give a value or leave it out")
        else:
            problems.append(f"--{flag}: needs a value")
    if problems:
        raise ConfigError(name, problems, code="script-flags")
    return texts


def _explain_flag(typed: str, begun: list[str], known: Sequence[str]) -> str:
    if typed in ("output", "generation", "from", "dataset-info"):
        return "; it is one of convert-config: write it before --"
    near = begun if len(begun) == 2 else suggest_words(typed, known)
    all_flags = f" in any generation; it has --{', --'.join(known)}" if known else "; it has no flags"
    return did_you_mean(near, "--") or all_flags


def _choose_generation(
    name: str, script: Script, texts: dict[str, str | None], wanted: str | None
) -> tuple[Generation, list[str], str]:
    """The newest generation with all flags; the others that have them; why."""
    allowed = [one for one in script.flags if wanted is None or one == wanted or one.startswith(f"{wanted}-")]
    if not allowed:
        raise ConfigError(name, [f"is of {', '.join(script.flags)}, not of generation {wanted}; change --generation"],
                          code="script-flags")  # fmt: skip
    fitting = [one for one in allowed if set(texts) <= set(script.flags[one])]
    if not fitting:
        raise ConfigError(name, _explain_mixture(script, texts, allowed), code="script-flags")
    chosen, why = fitting[0], "the newest with these flags"
    data = (texts.get("data_path") or "").replace("\\", "/").rpartition("/")[2]
    newest = next((one for one, files in DATA_FILES.items() if data in files), None)
    if newest and list(GENERATIONS).index(newest) > list(GENERATIONS).index(chosen):
        dated = [one for one in fitting if list(GENERATIONS).index(one) >= list(GENERATIONS).index(newest)]
        if dated:
            chosen, why = dated[0], f"the newest with these flags and {data}"
    if wanted == chosen:
        why = "as given"
    elif len(fitting) == 1 and wanted is None:
        why = "the only one with these flags"
    return GENERATIONS[chosen], [one for one in fitting if one != chosen], why


def _explain_mixture(script: Script, texts: dict[str, str | None], allowed: list[str]) -> list[str]:
    """A line for each flag that the nearest generation lacks."""
    best = max(allowed, key=lambda one: len(set(texts) & set(script.flags[one])))
    lines = []
    for flag in texts:
        if flag not in script.flags[best]:
            having = [one for one, flags in script.flags.items() if flag in flags]
            rest = [one for one in script.flags[best] if one not in texts]
            renamed = [one for one in _RENAMED.get(flag, ()) if one in rest]
            found = f"; it is --{renamed[0]} there" if renamed else did_you_mean(suggest_words(flag, rest), "--")
            lines.append(f"--{flag}: is of {', '.join(having)}; no generation has all of these flags, and {best}, "
                         f"which has most, lacks it{found}")  # fmt: skip
    return lines


def _read_values(name: str, texts: dict[str, str | None], defaults: Flags) -> Flags:
    problems: list[str] = []
    values: Flags = {}
    for flag, text in texts.items():
        try:
            values[flag] = _read_value(flag, text, defaults[flag])
        except ValueError as error:
            problems.append(f"--{flag}: {show(text, 80)} is not {error}")
    if problems:
        raise ConfigError(name, problems, code="script-flags")
    return values


def _read_value(flag: str, text: str | None, default: Any) -> Any:
    """The value as their parser reads it.

    Raises:
        ValueError: it cannot; says what is wanted.
    """
    if text is None:
        return True
    if isinstance(default, bool):
        return bool(text)  # type=bool: any text is true, also "False" and "0"
    if isinstance(default, str):
        return text
    kind = "a whole number" if isinstance(default, int) else "a number"
    try:
        value = int(text) if isinstance(default, int) else float(text)
    except ValueError:
        raise ValueError(kind) from None
    if flag in BITS and value not in (0, 1):
        raise ValueError("0 or 1")
    if not -_LARGEST < value < _LARGEST:  # nan neither
        raise ValueError(f"{kind} of usual size")
    return value
