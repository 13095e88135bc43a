"""Apply one random damage to a file or to the words of a command, drawn from a given generator."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 1e308, -0.0, 0.5, float("nan"), float("inf"), "", " ", "x", "0", "1e5",
    "null", "\ud800", "\x00", "a\nb", "‮", "<|im_end|>", "{{ x }}", "../../x", "/dev/zero", "~nosuchuser/x", "x" * 10_000,
    [], {}, [[]], [None], [0, "x", {}], {"": 0}, {"x": {"x": {}}}, ["x"] * 1000,
]  # fmt: skip
NEST = 100_000
ODD_WORDS = [
    "", " ", "x", "-1", "0", "1", "nan", "inf", "1e400", "99999999999999999999", "null", "true", "[]", "{}", "a=b", "--", "-", "=",
    "~nosuchuser/x", "/dev/zero", "/dev/null", "/dev/full", "/dev/stdin", "/proc/self/mem", "fifo", "loop", "folder", "x" * 300,
    "x/" * 2000, "a\udcffb", "你好", "\x1b[31m", "new:tiny", "owner/name", "recipe:x", "recipe:../x", "*", "**/*", "[", "model",
    "data", "half", "full", "adapter", "run.yaml", "&a [*a]", "!!python/object:os.system", "{a: &x 1, b: *x}",
]  # fmt: skip
FLAGS = ["--data.fields.prompt", "--data.template_kwargs.x", "--model.config.hidden_size", "--optim.betas", "--data.eval_split",
         "--data.max_refused", "--data.encoding", "--data.format", "--data.max_seq_len", "--lora.target_modules", "--lora.rank",
         "--train.precision", "--data.chat_template", "--model.add_tokens", "--nonsense", "--model", "--data", "--tokenizer",
         "--data.limit", "--data.history", "--optim.lr", "--train.seed", "--train.grad_accum_steps", "--train.keep_checkpoints",
         "--model.revision", "--eval-data", "--data.max_row_mb", "--lora.kind", "--optim.name", "--train.log_steps"]  # fmt: skip


@dataclass(frozen=True)
class Damage:
    file: str
    what: str


def damage_file(path: Path, rng: random.Random) -> Damage:
    """Damage a file in a way suited to its format."""
    kinds: list[Callable[[Path, random.Random], str]] = [replace_file, damage_bytes]
    if path.suffix in (".json", ".jsonl", ".yaml"):
        kinds += [damage_tree] * 5
    elif path.suffix == ".safetensors":
        kinds += [damage_header] * 3
    elif path.suffix in (".csv", ".jinja", ".txt", ".md"):
        kinds += [damage_lines] * 2
    what = rng.choice(kinds)(path, rng)
    return Damage(str(path), what)


def replace_file(path: Path, rng: random.Random) -> str:
    """Replace the file by something else."""
    kind = rng.choice(
        ["missing", "empty", "folder", "fifo", "loop", "null", "zero", "full", "broken link", "text", "huge hole"]
    )
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind in ("null", "zero", "full"):
        path.symlink_to(f"/dev/{kind}")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "text":
        path.write_text("not what the name says\n" * rng.randint(1, 50))
    elif kind == "huge hole":
        with path.open("wb") as file:
            file.truncate(2**26)
    return kind


def damage_bytes(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "cut", "zeros", "insert", "append", "twice", "random"])
    at = rng.randrange(len(data)) if data else 0
    if kind == "flip" and data:
        for _ in range(rng.choice([1, 1, 3, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeros":
        size = min(rng.choice([1, 8, 4096]), len(data) - at)
        data[at : at + size] = bytes(size)
    elif kind == "insert":
        data[at:at] = rng.choice(
            [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\r\n", b"{", b'"', b"[" * 2000, rng.randbytes(20)]
        )
    elif kind == "append":
        data += rng.choice([b"\n", b"}", b"x" * 100, rng.randbytes(1000)])
    elif kind == "twice":
        data += bytes(data)
    elif kind == "random":
        data = bytearray(rng.randbytes(rng.choice([1, 100, 10_000])))
    path.write_bytes(data)
    return f"bytes, {kind} at {at}"


def damage_lines(path: Path, rng: random.Random) -> str:
    lines = path.read_text().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.choice(["drop", "twice", "shuffle", "odd"])
    if kind == "drop":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "shuffle":
        rng.shuffle(lines)
    else:
        odd = [
            '"',
            "{{",
            "{%",
            "{% for x in range(99999999) %}",
            ",,,,,",
            "\t",
            "{{ messages[99] }}",
            "{% raw %}",
            "---\n",
        ]
        place = rng.randrange(len(lines[at]))
        lines[at] = lines[at][:place] + rng.choice(odd) + lines[at][place:]
    path.write_text("".join(lines))
    return f"lines, {kind} at {at}"


def damage_tree(path: Path, rng: random.Random) -> str:
    """Change a value somewhere in JSON or YAML."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        at = rng.randrange(len(lines))
        lines[at], what = _damaged_json(lines[at], rng)
        path.write_text("\n".join(lines) + "\n")
        return f"line {at + 1}: {what}"
    if path.suffix == ".yaml":
        tree, what = _damaged(yaml.safe_load(text), rng)
        path.write_text(json.dumps(tree) if rng.random() < 0.5 else yaml.dump(tree))
        return what
    text, what = _damaged_json(text, rng)
    path.write_text(text)
    return what


def damage_header(path: Path, rng: random.Random) -> str:
    """Change the JSON header of a safetensors file, or its length."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.2:
        number = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**62, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", number) + data[8:])
        return f"header of {number} bytes"
    text, what = _damaged_json(data[8 : 8 + size].decode(), rng)
    header = text.encode(errors="replace")
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    return f"header: {what}"


def _damaged_json(text: str, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.04:
        return "[" * NEST + "]" * NEST, "nested deep"
    tree, what = _damaged(json.loads(text), rng)
    if rng.random() < 0.04:
        marked = json.dumps(tree)
        return marked[:-1] + ', "a": 1, "a": 2' + marked[-1], f"{what}; a key twice"
    return json.dumps(tree), what


def _damaged(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """The tree with one place damaged."""
    places = list(_places(tree))
    if not places or rng.random() < 0.04:
        value = rng.choice(ODD_VALUES)
        return value, f"all of it -> {value!r}"[:100]
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for place in places:
        by_depth.setdefault(len(place), []).append(place)
    place = rng.choice(by_depth[rng.choice(sorted(by_depth))])  # the few top-level keys as often as the thousands below
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    key, name = place[-1], "/".join(map(str, place))
    kind = rng.choice(["value", "value", "value", "drop", "neighbour", "rename", "number"])
    if kind == "drop":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[rng.choice(["", "x", f"{key}s", "\x00", "__class__"])] = parent.pop(key)
    elif kind == "neighbour" and isinstance(parent, dict):
        parent[key] = parent[rng.choice(list(parent))]
    elif kind == "number" and isinstance(parent[key], int | float):
        parent[key] = rng.choice([parent[key] + 1, parent[key] - 1, parent[key] * 2, -parent[key], parent[key] * 10**9])
    else:
        kind, parent[key] = "value", rng.choice(ODD_VALUES)
    shown = repr(parent.get(key) if isinstance(parent, dict) else parent)[:80]
    return tree, f"{name[:80]}: {kind} -> {shown}"


def _places(tree: Any, above: tuple[Any, ...] = ()) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from _places(value, (*above, key))


def damage_words(words: list[str], rng: random.Random, work: Path) -> tuple[list[str], Damage]:
    """Change, drop or add one or two words; paths with odd names for them are created in the folder."""
    os.mkfifo(work / "fifo")
    (work / "loop").symlink_to("loop")
    (work / "folder").mkdir()
    words = list(words)
    said = []
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.choice(["value", "value", "drop", "twice", "flag", "flag", "swap"])
        at = rng.randrange(1, len(words)) if len(words) > 1 else 0
        if kind == "value" and len(words) > 1:
            # outputs are never outside of the folder
            is_output = words[at - 1] in ("--output", "--html") and words[at] != "--output"
            odd = [word for word in ODD_WORDS if not (is_output and word.startswith("/dev"))]
            if words[at - 1] in ("--train.max_steps", "--max-new-tokens", "--vocab-size", "--rows"):
                odd = [word for word in odd if not word.startswith("9")]  # would take years
            words[at] = rng.choice(odd)
        elif kind == "drop" and len(words) > 1:
            del words[at]
        elif kind == "twice":
            words.insert(at, words[at])
        elif kind == "swap" and len(words) > 2:
            other = rng.randrange(1, len(words))
            words[at], words[other] = words[other], words[at]
        elif words[0] not in ("recipes", "convert-config", "merge", "chat"):
            words += [rng.choice(FLAGS), rng.choice([word for word in ODD_WORDS if not word.startswith("9")])]
        said.append(f"{kind} at {at}")
    for at, word in enumerate(words[:-1]):  # after all changes: outputs stay inside, work stays short
        if word in ("--output", "--html") and words[at + 1].startswith(("/dev", "/proc/self")):
            words[at + 1] = "out"
    if words[0] == "train" and "--train.max_steps" not in words:
        words += ["--train.max_steps", "4"]
    return words, Damage("", ", ".join(said))
