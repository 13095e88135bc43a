"""The command line: instant help, every problem at once, the right exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tunesmith
from tunesmith.config import RunConfig, dump_yaml, json_schema, leaf_fields, resolve_config

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


def test_version(run) -> None:
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, f"tunesmith {tunesmith.__version__}")


def test_help_names_every_config_key(run) -> None:
    _, out, _ = run("train", "--help")
    for key in leaf_fields(RunConfig):
        assert f"--{key}" in out, key


def test_all_problems_are_reported_together(run, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {grad_accum_step: 2, precision: fp8}\noptm: {lr: 1}\ndata: {train: x, max_seq_len: 4}\n")
    code, _, err = run("train", path, "--optim.schedule", "cosin", "--modle", "x")
    assert code == 2
    assert "8 problems" in err
    assert "train.grad_accum_step: unknown key; did you mean train.grad_accum_steps?" in err
    assert "optm: unknown section; did you mean optim?" in err
    assert "--modle: unknown flag; did you mean --model" in err
    assert "'fp8' is not one of auto, fp32, bf16, bf16_pure or fp16" in err
    assert "'cosin' is not one of cosine, linear or constant; did you mean cosine?" in err
    assert "data.max_seq_len: input should be greater than or equal to 8" in err
    assert "train.output_dir: missing; give --output" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("key", [k for k in leaf_fields(RunConfig) if k.count(".") == 1 and len(k.split(".")[1]) > 2])
def test_a_typo_in_any_flag_is_answered_with_the_key(run, key: str) -> None:
    section, name = key.split(".")
    typo = f"{section}.{name[:-2]}{name[-1]}{name[-2]}" if name[-1] != name[-2] else f"{section}.{name}x"
    code, _, err = run("train", f"--{typo}", "1", "--model", "m", "--data", "d", "--output", "o")
    assert code == 2
    assert f"--{typo}: unknown flag; did you mean --{key}?" in err


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
    ("text", "message"),
    [
        ("model: [", "line 1"),
        ("- a\n- b\n", "must hold sections"),
        ("train: {seed: 1, seed: 2}", "stands twice"),
        ("train: 5", "is a section and needs keys below it"),
    ],
)
def test_broken_yaml_is_explained(run, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    code, _, err = run("train", path)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_rules_between_keys(run) -> None:
    code, _, err = run(
        "train", "--model", "m", "--data", "d", "--output", "o", "--data.max_seq_len", 4096,
        "--train.micro_batch_tokens", 2048, "--train.eval_steps", 5, "--model.config.hidden_size", 8,
    )  # fmt: skip
    assert code == 1
    assert "cannot hold one sample of data.max_seq_len 4096" in err
    assert "train.eval_steps: nothing to evaluate on" in err
    assert "model.config: overrides are for new:PRESET" in err


def test_schema_is_current_and_accepts_a_run_file(run) -> None:
    _, out, _ = run("train", "--json-schema")
    assert json.loads(out) == json_schema()
    kept = Path(__file__).parents[1] / "docs" / "run.schema.json"
    assert json.loads(kept.read_text(encoding="utf-8")) == json_schema(), "run `make docs`"
    schema = json_schema()
    assert set(schema["properties"]) == {"model", "data", "optim", "train"}
    assert yaml.safe_load(json.dumps(schema))["$defs"]["DataSection"]["properties"]["train"]["anyOf"]


def test_generated_docs_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root / "docs"))
    import generate

    readme = (root / "README.md").read_text(encoding="utf-8")
    assert generate.readme_with_table(readme) == readme, "run `make docs`"


def test_readme_names_every_file_once() -> None:
    root = Path(__file__).parents[1]
    tree = (root / "README.md").read_text(encoding="utf-8").split("src/tunesmith/\n")[1].split("```")[0]
    named = [line.split()[0] for line in tree.splitlines() if line.split()[0].endswith(".py")]
    files = [p.name for p in (root / "src").rglob("*.py") if not p.name.startswith("__")]
    assert sorted(named) == sorted(files)
