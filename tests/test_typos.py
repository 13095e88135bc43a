"""A mistyped command, flag or key is answered with the one that was meant."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.config.runfile import SHORTHANDS, dump_yaml, explain_flag, leaf_fields, resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.config.suggest import edit_distance, suggest_words
from tunesmith.errors import ConfigError, UsageError
from tunesmith.parser.build import build_parser
from tunesmith.parser.words import find_command, refuse_unknown_flags

PARSER = build_parser()
KEYS = list(leaf_fields(RunConfig))
CONFIG_COMMANDS = ("train", "resume", "preview", "check", "tokenizer")


def typos(word: str, rng: random.Random) -> Iterator[str]:
    """A letter dropped, doubled, swapped with the next one or replaced; dashes for underscores."""
    letters = [at for at, letter in enumerate(word) if letter.isalpha()]
    for _ in range(3):
        at = rng.choice(letters)
        yield word[:at] + word[at + 1 :]
        yield word[:at] + word[at] + word[at:]
        yield word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
        yield word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1 :]
    yield word.replace("_", "-")
    yield word.replace("-", "_")


def suggested(message: str) -> list[str]:
    """The words after "did you mean"."""
    return message.partition("did you mean ")[2].split("?")[0].split(" or ")


def test_a_mistyped_command_is_answered_with_the_command() -> None:
    rng = random.Random(0)
    for command in PARSER.commands:
        for typo in set(typos(command, rng)) - set(PARSER.commands) - {""}:
            with pytest.raises(UsageError) as refused:
                find_command(PARSER, typo)
            assert refused.value.code == "unknown-command"
            assert command in suggested(str(refused.value).splitlines()[0]), typo
    for word, command in (("finetune", "train"), ("sft", "train"), ("fuse", "merge"), ("infer", "chat")):
        with pytest.raises(UsageError, match=command):
            find_command(PARSER, word)
    with pytest.raises(UsageError) as refused:
        find_command(PARSER, "--modle")
    assert refused.value.code == "flag-before-command"


@pytest.mark.parametrize("name", PARSER.commands)
def test_a_mistyped_flag_of_a_command_is_answered_with_the_flag(name: str) -> None:
    rng, command = random.Random(1), PARSER.commands[name]
    own = [flag for flag in command.flags if flag.startswith("--") and not flag.endswith(".KEY")]
    keys = {f"--{key}" for key in KEYS} | set(SHORTHANDS)
    wrong: list[str] = []
    for flag in own:
        for typo in sorted({f"--{word}" for word in typos(flag[2:], rng)} - set(own) - keys):
            if name in CONFIG_COMMANDS:
                message = explain_flag(typo, [known[2:] for known in own])
            else:
                with pytest.raises(UsageError) as refused:
                    refuse_unknown_flags(command, [typo, "value"])
                assert refused.value.code == "unknown-flag"
                message = str(refused.value)
            meant = {flag, f"--{SHORTHANDS.get(flag, flag[2:])}"} | {
                f for f, key in SHORTHANDS.items() if key == flag[2:]
            }
            if not meant & set(suggested(message)):
                wrong.append(f"{typo}: {message}")
    assert not wrong, wrong


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("model.config", "data.template_kwargs")])
def test_a_mistyped_key_of_a_run_file_is_answered_with_the_key(key: str) -> None:
    rng = random.Random(2)
    section, _, name = key.partition(".")
    others = [other for other in ("model", "data", "optim", "lora", "train") if other != section]
    wrong = []
    for typo in sorted({*typos(key, rng), name, f"{rng.choice(others)}.{name}", key.rpartition(".")[2]} - set(KEYS)):
        tree: dict[str, object] = {}
        *parents, last = typo.split(".")
        below = tree
        for parent in parents:
            below = below.setdefault(parent, {})  # type: ignore[assignment]
        below[last] = "value"
        with pytest.raises(ConfigError) as refused:
            resolve_config(RunConfig, None, {}, arguments=tree)
        found = [word for problem in refused.value.problems for word in suggested(problem)]
        is_section = any(
            typo.startswith(f"{word}.") or typo == word
            for word in ("model", "data", "optim", "lora", "train", "data.fields")
        )
        if not {key, section, key.rpartition(".")[0]} & set(found) and not (is_section and typo.count(".") == 0):
            wrong.append(f"{typo}: {refused.value.problems}")
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("flag", "has", "has_not"),
    [
        ("lora", "--lora.kind lora", "did you mean"),
        ("load", "", "did you mean"),
        ("optim", "--optim.name", "did you mean"),
        ("prompt", "--data.fields.prompt", ""),
        ("xyzzy", "", "did you mean"),
    ],
)  # fmt: skip
def test_short_words_do_not_mislead(flag: str, has: str, has_not: str) -> None:
    own = [known[2:] for known in PARSER.commands["train"].flags]
    message = explain_flag(f"--{flag}", own)
    assert has in message
    assert not has_not or has_not not in message


def test_edit_distance_counts_typos() -> None:
    assert [edit_distance("lora", word, 2) for word in ("lora", "lroa", "lor", "loraa", "lira", "data")] == [
        0,
        1,
        1,
        1,
        1,
        99,
    ]
    assert suggest_words("", ["a", "b"]) == []
    assert suggest_words("x" * 10_000, ["chat"]) == []


def test_a_flag_with_one_dash_and_help_without_any(run) -> None:
    assert "did you mean --model?" in explain_flag("-model", ["model"])
    code, out, _ = run("help", "chat")
    assert (code, out.splitlines()[1].split()[:2]) == (0, ["tunesmith", "chat"])


@pytest.mark.parametrize(
    "words", [("merge", "a", "--output", "x", "--method", "tie"), ("resume", "r", "--allow", "ties")]
)
def test_a_mistyped_choice_is_answered(run, words: tuple[str, ...]) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert ("did you mean ties?" in err) == (words[0] == "merge")


@pytest.mark.parametrize("word", ["quantize", "-v", "-x", "--"])
def test_a_word_that_is_no_typo_gets_no_misleading_command(word: str) -> None:
    with pytest.raises(UsageError) as refused:
        find_command(PARSER, word)
    assert suggested(str(refused.value).splitlines()[0]) == (["--version"] if word == "-v" else [""])


def test_only_the_adapter_keys_that_differ_are_named_without_an_adapter(tmp_path: Path) -> None:
    """As in a resolved config, which has all keys: resume reads it."""
    config = resolve_config(RunConfig, None, {"model.path": "m", "data.train": ["d"], "train.output_dir": "o"})
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    with pytest.raises(ConfigError) as refused:
        resolve_config(RunConfig, tmp_path / "config.yaml", {"lora.rank": 9})
    assert [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]] == ["lora.rank"]


def test_the_beginning_of_a_flag_gets_the_flag_and_its_value_is_not_shown(run) -> None:
    code, _, err = run("serve", "runs/mine", "--api-key", "sk-secret")
    assert code == 2
    assert "did you mean --api-key-file?" in err
    assert "sk-secret" not in err


@pytest.mark.parametrize(
    "key", [key for key, field in leaf_fields(RunConfig).items() if "Literal" in str(field.annotation)]
)
def test_a_wrong_word_gives_one_error_for_its_key(key: str) -> None:
    """Also where a key takes a word or something else, which pydantic reports as one error for each."""
    flags = {"model.path": "m", "data.train": ["d"], "train.output_dir": "o", key: "qqqqqq"}
    with pytest.raises(ConfigError) as caught:
        resolve_config(RunConfig, None, flags)
    lines = [line for line in str(caught.value).splitlines() if "qqqqqq" in line]
    assert len(lines) == 1, lines
    assert lines[0].strip().startswith(f"{key}:")
