"""The command line: instant help, every problem at once, the right exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tunesmith
from tunesmith.cli import _parse_config_command, build_parser
from tunesmith.config.choices import FIXED_KEYS, RESUME_PARTS
from tunesmith.config.ranges import bounds_of, example_of
from tunesmith.config.runfile import dump_yaml, json_schema, leaf_fields, read_yaml, resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.config.train_keys import interval_steps
from tunesmith.errors import ConfigError, ModelError, UsageError

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "rich", "tokenizers")


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["chat", "--help"], ["--version"], ["preview", "--help"], []]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom tunesmith.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("HEAVY []"), result.stdout[-300:]


def test_config_errors_come_before_torch() -> None:
    code = (
        "import sys\nfrom tunesmith.cli import main\n"
        "print(main(['train', '--optim.lr', 'fast', '--data', 'x']), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1 False"


_TRAIN_UNTIL_TORCH = """
import sys
from tunesmith.cli import main

class EndAtTorch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            sys.stderr.write("<end>")
            sys.stderr.flush()
            raise KeyboardInterrupt

sys.meta_path.insert(0, EndAtTorch())
main(["train", "--model", "new:minimind-26m", "--data", "x.jsonl", "--output", "run"])
"""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_train_says_something_before_torch(is_terminal: bool, tmp_path: Path) -> None:
    """Importing torch takes seconds."""
    ours, theirs = pty.openpty() if is_terminal else os.pipe()
    child = subprocess.Popen([sys.executable, "-c", _TRAIN_UNTIL_TORCH], stdout=theirs, stderr=theirs, cwd=tmp_path)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while b"<end>" not in shown and (piece := os.read(ours, 1000)):
            shown += piece
    child.kill()
    child.wait()
    os.close(ours)
    before, found, _ = shown.decode().partition("<end>")
    assert found
    assert before.strip().startswith("loading" if is_terminal else "start")


def test_version(run) -> None:
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, f"tunesmith {tunesmith.__version__}")


def test_help_names_every_config_key(run) -> None:
    _, out, _ = run("train", "--help")
    for key in leaf_fields(RunConfig):
        assert f"--{key}" in out, key


@pytest.mark.parametrize("command", ["", *build_parser().commands])
def test_help_begins_with_an_example(run, command: str) -> None:
    code, out, _ = run(*filter(None, [command]), "--help")
    assert code == 0
    assert out.startswith("example")
    assert out.splitlines()[1].startswith(f"  tunesmith {command}")
    assert "usage: tunesmith" in out


TOO_MANY = ("a", "b", "c")


@pytest.mark.parametrize("command", build_parser().commands)
def test_a_command_shows_its_own_usage(run, command: str) -> None:
    takes_many = command in ("chat", "evaluate", "merge", "serve")  # of others, a flag is missing too
    code, out, err = run(command, *(() if takes_many else TOO_MANY))
    assert (code, out) == (2, "")
    assert err.splitlines()[0].startswith(f"usage: tunesmith {command}")
    assert f"tunesmith {command}: error: " in err
    assert takes_many or command in ("tokenizer", "export", "generate") or re.search(r"error: .*\bc\b", err)


def test_help_of_resume_shows_what_it_takes(run) -> None:
    _, out, _ = run("resume", "--help")
    shown = {key for key in leaf_fields(RunConfig) if re.search(rf"--{re.escape(key)}[ .]", out)}
    assert set(leaf_fields(RunConfig)) - shown == {*FIXED_KEYS, "train.output_dir"}
    for part in RESUME_PARTS:
        assert part in out


def test_all_problems_are_reported_together(run, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {grad_accum_step: 2, precision: fp8}\noptm: {lr: 1}\ndata: {train: x, max_seq_len: 4}\n")
    code, _, err = run("train", path, "--optim.schedule", "cosin", "--modle", "x")
    assert code == 2
    problems = [line.strip() for line in err.splitlines()[1:]]
    assert [problem.split(":")[0] for problem in problems] == [
        "train.grad_accum_step", "optm", "--modle", "model.path", "data.max_seq_len", "optim.schedule",
        "train.output_dir", "train.precision",
    ]  # fmt: skip
    for word in ("train.grad_accum_steps", "optim", "--model", "cosine"):
        assert any(f"did you mean {word}?" in problem for problem in problems)
    assert "Traceback" not in err


NUMERIC = [key for key, field in leaf_fields(RunConfig).items() if bounds_of(field)]


@pytest.mark.parametrize("key", NUMERIC)
def test_a_wrong_number_is_told_with_its_range_and_an_example_that_holds(fails, key: str) -> None:
    def problem_of(value: object) -> str:
        values = [value, 0.9] if key == "optim.betas" else [value]
        given = [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *values]
        words = ["train", "--model", "m", "--data", "d", "--output", "o", *given]
        (problem,) = fails(*words).problems
        return problem

    field = leaf_fields(RunConfig)[key]
    bounds = bounds_of(field)
    wrong = ["many", "nan", *(bounds[name] for name in ("gt", "lt") if name in bounds)]
    wrong += [bounds["ge"] - 1] if "ge" in bounds else []
    wrong += [bounds["le"] * 2] if "le" in bounds else []
    wrong += [1.5] if "int" in str(field.annotation) else []
    for value in wrong:
        problem = problem_of(value)
        assert problem.startswith(f"{key}: must be a "), problem
        assert "input should" not in problem
        assert "\n" not in problem
        assert re.search(rf"not '?{re.escape(str(value))}'?", problem)
    example = example_of(key, field)
    section, name = key.split(".")
    tree = {"model": {"path": "m"}, "data": {"train": ["d"]}, "train": {"output_dir": "o"}, "lora": {"kind": "lora"}}
    tree[section] = tree.get(section, {}) | {name: [example, example] if key == "optim.betas" else example}
    tree["data"] |= {"system_prompts": ["s"]} if name == "system_prompt_share" else {}
    tree["data"] |= {"eval": ["e"]} if name in ("eval_steps", "eval_generate", "early_stop_patience") else {}
    tree["train"] |= {"eval_steps": 0.1} if name == "early_stop_patience" else {}
    RunConfig.model_validate(tree)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", True), ("optim.lr", ""), ("optim.lr", [1]), ("train.compile", "maybe"), ("train.output_dir", 3),
        ("data.train", 3), ("data.train", [3]), ("model.config", 3), ("train.eval_steps", 2.5), ("data.eval_split", 2),
        ("data.encoding", "utf9"), ("data.template_kwargs", {"messages": 1}), ("train.precision", "fp8"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_the_key_the_value_and_what_to_give(key: str, value: object) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError) as caught:
        resolve_config(RunConfig, None, {}, arguments={section: {name: value}})
    (problem,) = [line for line in caught.value.problems if line.startswith(key)]
    assert not re.search(r"input should|, not .*, not ", problem), problem
    assert re.search(r"must be|give|did you mean|leave it out|is not one of|needs keys", problem), problem


def test_flags_win_over_yaml_and_the_resolved_config_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m}\ndata: {train: d, template_kwargs: {a: 1}}\ntrain: {output_dir: o}\noptim: {lr: 1e-3}\n"
    )
    config = resolve_config(RunConfig, path, {"optim.lr": "2e-4", "data.template_kwargs.b": False})
    assert config.optim.lr == 2e-4
    assert config.data.train == ["d"]
    assert config.data.template_kwargs == {"a": 1, "b": False}
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config))
    assert resolve_config(RunConfig, again, {}) == config


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("model: [", "broken-yaml"),
        ("- a\n- b\n", "no-sections"),
        ("train: {seed: 1, seed: 2}", "broken-yaml"),
        ("train: 5", "config"),
        ("data: {? [a, b] : 1}", "broken-yaml"),
        ("a: &a {x: 1}\nb: {c: &c {<<: *a, x: 2, x: 3}}", "broken-yaml"),
        ("train: {seed: !!int abc}", "broken-yaml"),
    ],
)
def test_broken_yaml_is_explained(fails, tmp_path: Path, text: str, code: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    error = fails("train", path)
    assert (type(error), error.code, error.exit_code) == (ConfigError, code, 1)
    assert str(path) in str(error)


NEEDED = ("--model", "m", "--data", "d", "--output", "o")


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--optim.betas", "0.9", "1.5"], "optim.betas"),
        (["--optim.betas", "0.9", "-0.1"], "optim.betas"),
        (["--optim.betas", "0.9"], "optim.betas"),
        (["--optim.betas", "0.9", "0.9", "0.9"], "optim.betas"),
        (["--optim.lr", "nan"], "optim.lr"),
        (["--optim.eps", "inf"], "optim.eps"),
        (["--train.epochs", "1e9"], "train.epochs"),
        (["--train.seed", str(2**63)], "train.seed"),
        (["--optim.warmup_steps", "-1"], "optim.warmup_steps"),
        (["--optim.warmup_steps", "5", "--optim.warmup_ratio", "0.1"], "optim.warmup_steps"),
    ],
)
def test_values_that_would_fail_later_are_refused(fails, flags: list[str], key: str) -> None:
    error = fails("train", *NEEDED, *flags)
    assert (type(error), error.code, error.exit_code) == (ConfigError, "config", 1)
    assert [problem.split(":")[0] for problem in error.problems] == [key]


def test_yes_is_no_number(fails, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: yes, betas: [no, 0.9]}\ntrain: {seed: on, compile: yes}\n")
    error = fails("train", path, *NEEDED)
    assert (error.code, error.exit_code) == ("config", 1)
    assert [problem.split(":")[0] for problem in error.problems] == ["optim.lr", "optim.betas", "train.seed"]


def test_warmup_steps_survive_a_resolved_config(tmp_path: Path) -> None:
    flags = {"model.path": "m", "data.train": "d", "train.output_dir": "o", "optim.warmup_steps": "7"}
    config = resolve_config(RunConfig, None, flags)
    assert config.optim.warmup_steps == 7
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert resolve_config(RunConfig, tmp_path / "config.yaml", {}) == config


def test_merge_keys_and_dates_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "a: {b: &b {<<: &c {epochs: 3, seed: 1}, seed: 2}}\ntrain: {<<: *b, output_dir: 2024-07-26}\n"
        "model: {path: m}\ndata: {train: d, template_kwargs: {date_string: 2024-07-26}}\n"
    )
    with pytest.raises(ConfigError) as error:
        resolve_config(RunConfig, path, {})
    assert [problem.split(":")[0] for problem in error.value.problems] == ["a"]
    config = resolve_config(RunConfig, None, {key: value for key, value in read_yaml(path).items() if key != "a"})
    assert (config.train.epochs, config.train.seed, config.train.output_dir) == (3, 2, "2024-07-26")
    assert config.data.template_kwargs == {"date_string": "2024-07-26"}


def parse(*words: str) -> Any:
    return _parse_config_command(build_parser(), list(words))[1]


def test_list_flags_add_up() -> None:
    config = parse("train", "--model", "m", "--output", "o", "--data", "a", "b", "--data", "c", "--eval-data", "d",
                   "--eval-data", "e", "--train.trackers", "wandb", "--train.trackers", "trackio",
                   "--optim.betas", "0.1", "0.2", "--optim.betas", "0.3", "0.4")  # fmt: skip
    assert config.data.train == ["a", "b", "c"]
    assert config.data.eval == ["d", "e"]
    assert config.train.trackers == ["wandb", "trackio"]
    assert config.optim.betas == (0.3, 0.4)


def test_values_of_open_maps() -> None:
    config = parse("train", *NEEDED, "--data.template_kwargs.date_string", "2024-07-26",
                   "--data.template_kwargs.n", "-1", "--data.template_kwargs.dashes=--")  # fmt: skip
    assert config.data.template_kwargs == {"date_string": "2024-07-26", "n": -1, "dashes": "--"}


@pytest.mark.parametrize("rest", [["--rows", "2"], []])
def test_an_open_map_without_a_value(fails, rest: list[str]) -> None:
    error = fails("preview", "--model", "m", "--data", "d", "--data.template_kwargs.x", *rest)
    assert (type(error), error.code) == (UsageError, "flag-without-value")
    assert "--data.template_kwargs.x" in str(error)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["preview", "--optim.lr", "1"], "--optim.lr"),
        (["preview", "--output", "x"], "--output"),
        (["tokenizer", "--output", "x", "--model.config.hidden_size", "1"], "--model.config.hidden_size"),
    ],
)
def test_a_flag_of_another_command(fails, words: list[str], flag: str) -> None:
    error = fails(*words, "--data", "d")
    assert error.exit_code == 2
    own = [problem for problem in error.problems if problem.startswith(f"{flag}: ")]
    assert len(own) == 1
    assert "did you mean" not in own[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preview", "--rows", "abc"], "whole number of 1 or more, such as 5, not 'abc'"),
        (["preview", "--rows", "0"], "not '0'"),
        (["chat", "m", "--temperature", "nan"], "a number of 0 or more, such as 0.7, not 'nan'"),
        (["chat", "m", "--temperature", "warm"], "not 'warm'"),
        (["chat", "m", "--top-p", "0"], "a share above 0 and at most 1, such as 0.5, not '0'"),
        (["chat", "m", "--top-k", "-1"], "a whole number of 0 or more, such as 50, not '-1'"),
        (["chat", "m", "--min-p", "1.5"], "a number from 0 to 1, such as 0.05, not '1.5'"),
        (["chat", "m", "--repetition-penalty", "0"], "a number above 0, such as 1.1, not '0'"),
        (["chat", "m", "--seed", str(2**63)], "a whole number from 0 to "),
        (["chat", "m", "--seed", "-1"], "not '-1'"),
    ],
)
def test_numbers_in_flags(run, words: list[str], message: str) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert message in err


def test_names_that_are_too_long(run, fails, tmp_path: Path) -> None:
    for flags in (["--model", "x" * 400], ["--model", "m", "--tokenizer", "x" * 400], ["--model", "~nobody-here/m"]):
        error = fails("preview", "--data", Path(__file__), *flags)
        assert (type(error), error.exit_code) == (ModelError, 1)
        assert len(str(error)) < 200
    code, _, err = run("preview", "--model", "m", "--data", __file__, "--html", tmp_path / ("x" * 400))
    assert code == 1
    assert err.startswith("error: ")
    assert "File name too long" in err


def test_output_that_has_no_unicode(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunesmith", "train", *NEEDED, "--optim.schedule", "余弦"]
    env = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert r"'\u4f59\u5f26' is not one of" in result.stderr


def test_rules_between_keys(fails) -> None:
    error = fails(
        "train", "--model", "m", "--data", "d", "--output", "o", "--data.max_seq_len", 4096,
        "--train.micro_batch_tokens", 2048, "--train.eval_steps", 5, "--model.config.hidden_size", 8,
    )  # fmt: skip
    assert (error.code, error.exit_code) == ("config", 1)
    found = {problem.split(":")[0] for problem in error.problems}
    assert found == {"train.micro_batch_tokens", "train.eval_steps", "model.config.hidden_size"}


def test_schema_is_current_and_accepts_a_run_file(run) -> None:
    _, out, _ = run("train", "--json-schema")
    assert json.loads(out) == json_schema()
    kept = Path(__file__).parents[1] / "docs" / "run.schema.json"
    assert json.loads(kept.read_text(encoding="utf-8")) == json_schema(), "run `make docs`"
    schema = json_schema()
    assert set(schema["properties"]) == {"model", "data", "optim", "lora", "train", "stages"}
    for section, key in (("Data", "train"), ("Data", "eval"), ("Train", "trackers")):
        own = yaml.safe_load(json.dumps(schema))["$defs"][f"{section}Section"]["properties"][key]
        kinds = [option.get("type") for option in own["anyOf"]]
        assert kinds[:2] == ["string", "array"], own
        assert own["description"]
    assert "wandb" in own["anyOf"][0]["enum"]


@pytest.mark.parametrize("page", ["docs/config.md", "docs/data.md", "docs/architecture.md", "docs/errors.md"])
def test_generated_docs_are_current(monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate

    assert page in generate.PAGES
    assert generate.fill_page(page) == (ROOT / page).read_text(encoding="utf-8"), "run `make docs`"


def test_commands_of_the_data_page_run(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    lines = "\n".join(block.partition("```")[0] for block in page.split("```sh\n")[1:]).splitlines()
    codes = []
    for line in filter(None, lines):
        if line.startswith("echo "):
            subprocess.run(line, shell=True, check=True)
            continue
        words = shlex.split(line.replace("src/tunesmith", str(ROOT / "src" / "tunesmith")), comments=True)
        code, _, err = run(*words[1:])
        assert code == (1 if "# refused" in line else 0), f"{line}\n{err}"
        codes.append(code)
    assert codes == [0, 0, 0, 0, 1, 0, 0]


def test_what_is_fixed_when_a_run_begins(run, fails, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    lora = ("--lora.kind", "lora", "--lora.rank", 2)
    code, _, err = run(
        "train", "--model", model_folder, "--data", chats, "--output", output, "--train.max_steps", 1, *lora
    )
    assert code == 0, err
    error = fails("resume", output, "--lora.rank", 4, "--lora.kind", "lora", "--optim.name", "adamw_8bit")
    assert (type(error), error.code) == (ConfigError, "fixed-on-resume")
    assert {problem.split(":")[0] for problem in error.problems} == {"lora.rank", "optim.name"}


@pytest.mark.parametrize(("every", "steps"), [(5, 5), ("5", 5), (0.25, 3), ("0.01", 1), (1, 1)])
def test_intervals_are_steps_or_a_share_of_all_steps(tmp_path: Path, every: Any, steps: int) -> None:
    flags = {"model.path": "m", "data.train": "d", "data.eval": "e", "train.output_dir": "o"}
    config = resolve_config(RunConfig, None, flags | {"train.eval_steps": every, "train.save_steps": every})
    assert config.train.eval_steps is not None
    assert interval_steps(config.train.eval_steps, 12) == steps
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert resolve_config(RunConfig, tmp_path / "config.yaml", {}) == config
    assert "steps: 5.0" not in dump_yaml(config)


def test_an_interval_is_not_a_step_and_a_half(fails) -> None:
    error = fails("train", *NEEDED, "--data.eval_split", 0.1, "--train.eval_steps", 1.5, "--train.save_steps", 0)
    assert [problem.split(":")[0] for problem in error.problems] == ["train.eval_steps", "train.save_steps"]
