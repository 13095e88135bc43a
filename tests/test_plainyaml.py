"""Run files are bounded plain data, every problem is told in a few lines, and a saved config is what was run."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.plainyaml import dump, load, require_plain
from tunesmith.config.runfile import dump_yaml, resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.errors import ConfigError, TunesmithError

Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., TunesmithError]
BASE = "model: {path: 'new:x', tokenizer: t}\ndata: {train: d, template_kwargs: %s}\ntrain: {output_dir: o}\n"
BOMB = "a: &a [lol, lol]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
MERGES = "a: &a {k1: 1, k2: 2}\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join(['*' + chr(97 + n)] * 9)}]}}\n" for n in range(9))  # fmt: skip
HOSTILE = {
    "aliases": BOMB,
    "merges": MERGES,
    "cycle": "data: &a {template_kwargs: *a}\n",
    "cycle in a list": "data: {template_kwargs: {a: &b [1, *b]}}\n",
    "merge cycle": "a: &a {<<: *a}\n",
    "long text": "a: &a " + "x" * 100_000 + "\nb: [" + "*a, " * 1000 + "]\n",
    "deep list": "a: " + "[" * 5000 + "]" * 5000,
    "deep keys": "a: " + "{a: " * 5000 + "}" * 5000,
    "deep blocks": "".join(" " * n + "a:\n" for n in range(400)),
    "not closed": "[" * 50_000,
    "many keys": "\n".join(f"key{n}: {n}" for n in range(100_000)),
    "long": "a: " + "x" * 10**6,
    "long key": "x" * 10_000 + ": 1",
    "python": "a: !!python/object/apply:os.system ['true']",
    "set": "data: !!set {a, b}",
    "binary": "data: !!binary aGVsbG8=",
    "omap": "data: !!omap [a: 1]",
    "pairs": "data: !!pairs [a: 1]",
    "timestamp": "data: !!timestamp 2020-01-01",
    "no bool": "data: !!bool maybe",
    "no int": "data: !!int ''",
    "no float": "data: !!float ''",
    "own tag": "data: !thing 1",
    "twice": "data: 1\ndata: 2\n",
    "tab": "data:\n\ttrain: x\n",
    "nul": "data: a\0b\n",
    "control": "data: \x1b[2J\n",
    "two documents": "--- 1\n--- 2\n",
    "list key": "? [a, b]\n: 1\n",
    "alias of nothing": "a: *b\n",
    "digits": "data: " + "9" * 10_000,
    "hex": "data: 0x_\n",
    "directive": "%YAML 9.9\n---\na: 1\n",
    "list": "- 1\n",
    "text": "hello",
    "many typos": "\n".join(f"modle{n}: {n}" for n in range(1000)),
    "large value": "optim: {lr: [" + "1, " * 10_000 + "]}\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_run_files_are_refused_in_a_few_lines(run: Run, tmp_path: Path, name: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(HOSTILE[name], encoding="utf-8")
    started = time.monotonic()
    for command in ("train", "preview", "convert-config"):
        code, _, err = run(command, file)
        assert code == 1 or command == "convert-config"
        assert len(err) < 5000
        assert "Traceback" not in err
        assert "report it as a bug" not in err
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("content", [b"\xff\xfem\0o\0", b"\x80\x81", b"\xfe\xff\0m"])
def test_other_encodings_are_refused(fails: Fails, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    error = fails("train", tmp_path / "run.yaml")
    assert (type(error), error.code) == (ConfigError, "wrong-encoding")


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    assert load("\ufeffmodel: 1\n") == {"model": 1}


def test_aliases_and_merges_that_people_write_are_read() -> None:
    text = "base: &b {lr: 1.0e-3, steps: [1, 2]}\none: {<<: *b, lr: 2.0}\ntwo: {a: *b, b: *b}\nnon: !!str 12\n"
    base = {"lr": 1e-3, "steps": [1, 2]}
    assert load(text) == {"base": base, "one": {**base, "lr": 2.0}, "two": {"a": base, "b": base}, "non": "12"}


ODD_TEXTS = [
    "", " ", "a ", " a", "on", "yes", "null", "~", "1", "1.5", "1e5", "0x1f", "0b1", "1:30", ".inf", ".nan", "=", "<<", "2020-01-01",
    "- a", "a: b", "# a", "a #b", "'", '"', "\\", "\n", "a\nb", "a\n\nb ", "\ta", "a\t", "\r", "a\r\nb", "\x85", "a\u2028b", "\u2029",
    "\ufeff", "\0", "\x1b[2J", "\x7f", "\x9b", "\u202e", "é", "你好", "🙂", "%a", "@a", "`a", "!a", "!!str a", "&a", "*a", "|", ">", "---",
    "...", "{", "[a", "a, b", "?", "? a", ":", "a:", "word " * 60, "x" * 300, " \n ", "\n a", "a\n ", "\ud7ff\ue000", "\uffff", "\U0010ffff",
]  # fmt: skip


def draw(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return rng.choice(ODD_TEXTS)
    if kind == 1:
        return "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000), rng.choice((9, 10, 13, 32, 133))))) for _ in range(rng.randrange(12)))  # fmt: skip
    if kind == 2:
        return rng.choice((0, -1, 2**63 - 1, -(2**63), rng.randrange(-(10**6), 10**6)))
    if kind == 3:
        return rng.choice((0.0, -0.0, 1e-320, 1.7e308, 1e16, 1e-5, 123456789.123, rng.uniform(-1e9, 1e9), 10.0 ** rng.randrange(-300, 300)))  # fmt: skip
    if kind in (4, 5):
        return rng.choice((True, False, None))
    if kind == 6:
        return [draw(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(draw(rng, 9)): draw(rng, depth + 1) for _ in range(rng.randrange(4))}


def is_identical(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return [*one] == [*other] and all(is_identical(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_identical, one, other))
    if isinstance(one, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


@pytest.mark.parametrize("seed", range(4))
def test_what_a_config_accepts_reads_back_identical(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    for number in range(60):
        values = {f"k{number}": draw(rng), rng.choice(ODD_TEXTS): draw(rng)}
        tree = {"model": {"path": "new:x", "tokenizer": "t", "config": values}, "data": {"train": ["d"], "template_kwargs": values}, "train": {"output_dir": "o"}}  # fmt: skip
        config = RunConfig.model_validate(tree)
        text = dump_yaml(config)
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        again = resolve_config(RunConfig, tmp_path / "config.yaml", {})
        assert is_identical(again.data.template_kwargs, values)
        assert is_identical(again.model.config, values)
        assert dump_yaml(again) == text


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_read_back(text: str) -> None:
    assert load(dump({"a": text, text: 1, "l": [text]})) == {"a": text, text: 1, "l": [text]}


@pytest.mark.parametrize(
    "value",
    [
        "{a: .inf}", "{a: -.inf}", "{a: [.nan]}", "{1: a}", "{a: {true: 1}}", "{a: {null: 1}}", "{a: 99999999999999999999}",
        '{a: "\\uD800"}', "{a: " + "[" * 42 + "]" * 42 + "}", "{messages: 1}", "{add_generation_prompt: true}", "[1]",
    ],
)  # fmt: skip
def test_values_that_would_change_are_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "run.yaml").write_text(BASE % value, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        resolve_config(RunConfig, tmp_path / "run.yaml", {})
    assert refused.value.code == "config"
    assert all(problem.startswith("data.template_kwargs") for problem in refused.value.problems)
    assert len(str(refused.value)) < 1000


def test_python_values_are_refused_too() -> None:
    cycle: dict[str, Any] = {}
    cycle["a"] = cycle
    for value in (cycle, {"a": {1, 2}}, {"a": (1,)}, {"a": b"x"}, {"a": object()}, {"a": 10**5000}):
        with pytest.raises(ValueError):
            require_plain(value)
