"""A run file with stages: each is trained as a run of its own, and all of them are continued as one."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from conftest import chat_row, killed_after, raises, save_folder, tiny_config, write_jsonl
from tunesmith.config.runfile import json_schema
from tunesmith.config.schema import LrFindConfig, PreviewConfig, TokenizerConfig
from tunesmith.config.stages import StagedConfig, resolve_stages, resolve_training
from tunesmith.errors import ConfigError, InterruptedRun, UsageError
from tunesmith.files import sealed
from tunesmith.run.console import ConsoleReporter
from tunesmith.runfolder import latest_stage, started_stages
from tunesmith.stages.train import resume_stages

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]
COMMON = """
model: {path: MODEL}
data: {max_seq_len: 64}
optim: {lr: 3.0e-3}
train: {output_dir: RUN, micro_batch_tokens: 128, max_steps: 3, save_steps: 1}
"""
STAGES = """
stages:
  - name: pretrain
    data: {train: [text.jsonl]}
  - name: sft
    data: {train: [chats.jsonl], eval_split: 0.1}
    optim: {lr: 1.0e-3}
"""
LORA = """
  - name: lora
    lora: {kind: lora, rank: 4}
    data: {train: [own.jsonl]}
"""


def make_inputs(folder: Path, tokenizer: Any) -> None:
    save_folder(folder / "MODEL", tiny_config("qwen3", initializer_range=0.02), tokenizer)
    write_jsonl(folder / "text.jsonl", [{"text": f"The quick brown fox {i} jumps over you."} for i in range(60)])
    write_jsonl(folder / "chats.jsonl", [chat_row(f"What is {i}?", f"It is {i} and you.") for i in range(40)])
    write_jsonl(folder / "own.jsonl", [chat_row(f"Who are you {i}?", f"I am {i}.") for i in range(40)])
    (folder / "run.yaml").write_text(COMMON + STAGES + LORA, encoding="utf-8")


@pytest.fixture
def inputs(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model, data and run.yaml."""
    make_inputs(tmp_path, tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The folder of a RUN of three stages that nobody interrupted."""
    folder = tmp_path_factory.mktemp("trained")
    make_inputs(folder, tokenizer)
    before = Path.cwd()
    os.chdir(folder)
    try:
        tunesmith.train("run.yaml")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run: Path) -> dict[str, bytes]:
    return {
        path.parent.parent.name: path.read_bytes()
        for kind in ("model/model.safetensors", "adapter/adapter_model.safetensors")
        for path in run.glob(f"*/{kind}")
    }


def resolve(text: str, tmp_path: Path, flags: dict[str, Any] | None = None) -> StagedConfig:
    file = tmp_path / "file.yaml"
    file.write_text(text, encoding="utf-8")
    config = resolve_training(file, flags or {})
    assert isinstance(config, StagedConfig)
    return config


def problems_of(text: str, tmp_path: Path, flags: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(text, tmp_path, flags)
    return caught.value.problems


def test_a_stage_is_the_common_sections_with_its_own(tmp_path: Path) -> None:
    config = resolve(COMMON + STAGES + LORA, tmp_path)
    first, second, third = (stage.config for stage in config.stages)
    assert [stage.folder for stage in config.stages] == ["1-pretrain", "2-sft", "3-lora"]
    assert (first.model.path, second.model.path) == ("MODEL", "RUN/1-pretrain/model")
    assert third.model.path == "RUN/2-sft/model"
    assert second.train.output_dir == "RUN/2-sft"
    assert (first.optim.lr, second.optim.lr, third.optim.lr) == (3e-3, 1e-3, 3e-3)
    assert (second.data.eval_split, third.data.eval_split, third.data.max_seq_len) == (0.1, 0.0, 64)
    assert (first.lora.kind, third.lora.kind) == ("none", "lora")


def test_the_model_section_is_of_the_first_stage(tmp_path: Path) -> None:
    """A later one has its weights, settings and tokenizer from the stage before."""
    common = COMMON.replace(
        "{path: MODEL}", "{path: 'new:tiny', tokenizer: T, trust_remote_code: true, config: {a: 1}}"
    )
    own = STAGES.replace("    optim: {lr: 1.0e-3}", "    model: {add_tokens: [<x>]}")
    first, second = (stage.config.model for stage in resolve(common + own, tmp_path).stages)
    assert (first.path, first.tokenizer, first.config) == ("new:tiny", "T", {"a": 1})
    assert (second.tokenizer, second.config, second.add_tokens) == (None, {}, ["<x>"])
    assert first.trust_remote_code
    assert second.trust_remote_code
    after_adapter = STAGES.replace("    data: {train: [text", "    lora: {kind: lora}\n    data: {train: [text")
    assert resolve(COMMON + after_adapter, tmp_path).stages[1].config.model.path == "RUN/1-pretrain/adapter"


def test_flags_win_for_all_stages_or_for_one(tmp_path: Path) -> None:
    flags = {"optim.lr": "5e-4", "stages.sft.train.max_steps": 9, "train.output_dir": "X", "model.path": "M"}
    first, second = (stage.config for stage in resolve(COMMON + STAGES, tmp_path, flags).stages)
    assert (first.optim.lr, second.optim.lr, first.train.max_steps, second.train.max_steps) == (5e-4, 5e-4, 3, 9)
    assert (first.model.path, second.model.path) == ("M", "X/1-pretrain/model")


def test_epochs_of_a_stage_win_over_common_max_steps(tmp_path: Path) -> None:
    text = COMMON + STAGES + "    train: {epochs: 2}\n"
    assert resolve(text, tmp_path).stages[1].config.train.max_steps is None
    assert resolve(text, tmp_path, {"train.max_steps": 5}).stages[1].config.train.max_steps == 5


@pytest.mark.parametrize(
    ("was", "now", "parts"),
    [
        ("data: {train: [own", "data: {trian: [own", ["stage lora: data.trian", "data.train?"]),
        ("rank: 4", "rank: 0", ["stage lora: lora.rank"]),
        ("name: sft", "name: pretrain", ["item 2", "another stage"]),
        ("name: sft", "name: ../sft", ["item 2", "'../sft'"]),
        ("name: sft", "name: a/b", ["item 2", "'a/b'"]),
        ("name: sft", "name: ''", ["item 2"]),
        ("name: sft", "name: 7", ["item 2", "quotes"]),
        ("name: sft", f"name: {'x' * 101}", ["item 2", "100 bytes"]),
        ("- name: sft", "- nam: sft", ["item 2", "no name"]),
        ("- name: sft", "- sft\n  - name: other", ["item 2"]),
        ("    lora: {kind", "    model: {path: x}\n    lora: {kind", ["stage lora: model.path", "before, sft"]),
        ("    lora: {kind", "    model: {tokenizer: x}\n    lora: {kind", ["stage lora: model.tokenizer"]),
        ("optim: {lr: 1.0e-3}", "train: {output_dir: x}", ["stage sft: train.output_dir"]),
        ("optim: {lr: 1.0e-3}", "lora: {kind: dora}", ["stage lora: lora.kind", "before, sft"]),
        ("optim: {lr: 1.0e-3}", "optm: {lr: 1.0e-3}", ["stage sft: optm", "optim?"]),
        ("micro_batch_tokens: 128", "micro_batch_tokens: 1", ["train.micro_batch_tokens"]),
        ("stages:", "stage:", ["did you mean stages?"]),
    ],
)
def test_problems_name_their_stage(tmp_path: Path, was: str, now: str, parts: list[str]) -> None:
    text = COMMON + STAGES + LORA
    assert was in text
    file = tmp_path / "file.yaml"
    file.write_text(text.replace(was, now, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        resolve_training(file, {})
    found = [problem for problem in caught.value.problems if all(part in problem for part in parts)]
    assert found, caught.value.problems


def test_problems_of_all_stages_are_told_at_once(tmp_path: Path) -> None:
    text = (COMMON + STAGES + LORA).replace("[text.jsonl]}", "[text.jsonl], foo: 1}").replace("rank: 4", "rnk: 4")
    found = problems_of(text.replace("lr: 1.0e-3", "lr: -1").replace("max_steps: 3", "max_steps: 0"), tmp_path)
    assert [problem.split(": ")[:3][-1] if problem.startswith("stage") else problem.split(":")[0] for problem in found]
    assert sum("train.max_steps" in problem for problem in found) == 1  # of the common section: once for all stages
    for part in ("stage pretrain: data.foo", "stage lora: lora.rnk", "stage sft: optim.lr"):
        assert any(problem.startswith(part) for problem in found), found


@pytest.mark.parametrize("given", ["stages: []", "stages: {sft: {}}", "stages: 3", "stages:", "stages: [3]"])
def test_stages_that_are_no_list(tmp_path: Path, given: str) -> None:
    assert any(problem.startswith("stages: ") for problem in problems_of(COMMON + given, tmp_path))


def test_flags_that_fit_no_stage(tmp_path: Path) -> None:
    flags = {"stages.sff.optim.lr": 1, "stages.pretrain": 3, "data.train": "x", "stages.sft.optim.ler": 1}
    found = problems_of(COMMON + STAGES, tmp_path, flags)
    for part in (
        "--stages.sff: no such stage; did you mean --stages.sft?",
        "--stages.pretrain: ",
        "stage sft: optim.ler",
        "--data.train",
    ):
        assert any(problem.startswith(part) for problem in found), found
    with pytest.raises(ConfigError):
        resolve_training(None, {"stages.sft.optim.lr": 1})


def test_commands_that_read_one_stage(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(COMMON + STAGES + LORA, encoding="utf-8")
    preview = resolve_stages(PreviewConfig, file, {})
    assert [stage.config.model.path for stage in preview] == ["MODEL"] * 3
    [tokens] = resolve_stages(TokenizerConfig, file, {}, name="sft")
    assert tokens.config.data.train == ["chats.jsonl"]
    [search] = resolve_stages(LrFindConfig, file, {}, name="sft")
    assert (search.config.model.path, search.config.optim.lr) == ("RUN/1-pretrain/model", 1e-3)
    [search] = resolve_stages(LrFindConfig, file, {"model.path": "other"}, name="sft")
    assert search.config.model.path == "other"
    with pytest.raises(ConfigError, match="did you mean sft"):
        resolve_stages(PreviewConfig, file, {}, name="sfl")
    file.write_text(COMMON + "  ", encoding="utf-8")
    with pytest.raises(ConfigError, match="no stages"):
        resolve_stages(PreviewConfig, file, {"data.train": ["x"]}, name="sft")


def test_the_schema_knows_stages() -> None:
    stage = json_schema()["properties"]["stages"]["items"]
    assert stage["required"] == ["name"]
    assert set(stage["properties"]) == {"name", "model", "data", "optim", "lora", "train"}
    assert stage["additionalProperties"] is False
    assert stage["properties"]["optim"] == {"$ref": "#/$defs/OptimSection"}


def test_the_weights_are_those_of_the_stages_by_hand(run: Run, work: Path) -> None:
    words = [
        "--data.max_seq_len",
        64,
        "--train.micro_batch_tokens",
        128,
        "--train.max_steps",
        3,
        "--train.save_steps",
        1,
    ]
    own = {
        "1-pretrain": ["--model", "MODEL", "--data", "text.jsonl", "--optim.lr", 3e-3],
        "2-sft": ["--model", "hand/1-pretrain", "--data", "chats.jsonl", "--data.eval_split", 0.1, "--optim.lr", 1e-3],
        "3-lora": ["--model", "hand/2-sft", "--data", "own.jsonl", "--lora.kind", "lora", "--lora.rank", 4, "--optim.lr",
                   3e-3],
    }  # fmt: skip
    for name, flags in own.items():
        code, _, err = run("train", *flags, *words, "--output", f"hand/{name}")
        assert code == 0, err
    assert set(weights(work / "RUN")) == set(own)
    assert weights(work / "RUN") == weights(work / "hand")


def cut(work: Path, stages: int, step: int | None = None) -> None:
    """RUN as a kill leaves it: `stages` are finished, and the next is at `step`; None: it has not begun."""
    (work / "RUN" / "report.html").unlink()
    for place, stage in enumerate(started_stages(work / "RUN")):
        if place > stages or (place == stages and step is None):
            shutil.rmtree(stage.path)
        elif place == stages and step is not None:
            whole = work / "whole"
            stage.path.rename(whole)
            killed_after(whole, step, stage.path)


PLACES = [(0, None), (0, 0), (0, 2), (0, 3), (1, None), (1, 1), (2, None), (2, 2)]


@pytest.mark.parametrize(("stages", "step"), PLACES if os.environ.get("TUNESMITH_LONG") else [(1, 1), (2, None)])
def test_resumed_after_any_stage_the_weights_are_the_same(
    run: Run, trained: Path, work: Path, stages: int, step: int | None
) -> None:
    cut(work, stages, step)
    code, out, err = run("resume", "RUN")
    assert code == 0, err
    assert f"stage {stages + 1} of 3" in out
    assert f"stage {stages} of 3" not in out
    assert weights(work / "RUN") == weights(trained / "RUN")
    code, out, err = run("resume", "RUN")
    assert code == 0, err
    assert "RUN is finished (stages pretrain, sft, lora); nothing to do" in out


def test_resumed_elsewhere(
    run: Run, trained: Path, work: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN was moved between two stages and within one, and the command is called from another folder."""
    for stages, step in ((1, 2), (2, None)) if os.environ.get("TUNESMITH_LONG") else ((1, 2),):
        here = tmp_path_factory.mktemp("elsewhere") / "moved"
        cut(work, stages, step)
        shutil.move(work / "RUN", here)
        monkeypatch.chdir(here.parent)
        code, _, err = run("resume", "moved")
        assert code == 0, err
        assert weights(here) == weights(trained / "RUN")
        code, _, err = run("chat", here, "--prompt", "Who are you?", "--max-new-tokens", 2)
        assert code == 0, err
        monkeypatch.chdir(work)
        shutil.rmtree(work / "whole", ignore_errors=True)
        shutil.copytree(trained / "RUN", work / "RUN")


def test_a_moved_run_has_its_adapter_s_base(work: Path) -> None:
    shutil.move(work / "RUN", work / "other")
    model = tunesmith.load(work / "other")
    assert model.reply("Who are you?", max_new_tokens=2) is not None


def test_resumed_from_the_folder_of_a_stage(run: Run, fails: Any, trained: Path, work: Path) -> None:
    cut(work, 1, 1)
    code, _, err = run("resume", "RUN/2-sft")
    assert code == 0, err
    assert weights(work / "RUN") == weights(trained / "RUN")
    assert fails("resume", "RUN/1-pretrain", "--train.max_steps", 9).code == "other-stage"


def test_flags_on_resume_are_for_the_stage_that_is_next(run: Run, fails: Any, work: Path) -> None:
    cut(work, 1)
    error = fails("resume", "RUN", "--model", "MODEL")
    assert error.code == "fixed-on-resume"
    assert "stage sft" in str(error)
    code, _, err = run("resume", "RUN", "--train.max_steps", 5, "--optim.lr", "1e-4", "--optim.schedule", "constant")
    assert code == 0, err
    second, third = tunesmith.Run("RUN").stages[1:]
    assert (second.metrics[-1]["step"], third.metrics[-1]["step"]) == (5, 3)
    assert second.config.optim.lr == 1e-4
    code, out, err = run("resume", "RUN", "--train.max_steps", 4)
    assert code == 0, err
    assert tunesmith.Run("RUN").metrics[-1]["step"] == 4
    assert "stage 3 of 3" in out


def test_a_finished_last_stage_can_be_made_longer(work: Path) -> None:
    assert tunesmith.resume("RUN", max_steps=5).metrics[-1]["step"] == 5


def test_mistakes_in_a_later_stage_end_the_command_at_once(fails: Any, inputs: Path) -> None:
    """Before anything is trained; and no folder is left."""
    write_jsonl(inputs / "odd.jsonl", [{"foo": 1}])
    write_jsonl(inputs / "bad.jsonl", [chat_row("?", "")] * 3)
    (inputs / "broken.jsonl").write_text("{", encoding="utf-8")
    text = (inputs / "run.yaml").read_text()
    wrong = {
        "gone.jsonl": "file-not-found",
        "odd.jsonl": "format-unknown",
        "bad.jsonl": "no-usable-rows",
        "broken.jsonl": "broken-json",
        "own.jsonl], eval: [own.jsonl": "eval-is-trained",
        "own.jsonl], eval: [odd.jsonl": "format-unknown",
        "own.jsonl], chat_template: [gone.jinja": "",
    }
    for name, code in wrong.items():
        (inputs / "wrong.yaml").write_text(text.replace("own.jsonl", name), encoding="utf-8")
        error = fails("train", "wrong.yaml")
        assert "stage lora" in str(error)
        assert code in ("", error.code), error
        assert not (inputs / "RUN").exists()


def test_a_first_stage_that_cannot_begin_leaves_nothing(fails: Any, inputs: Path) -> None:
    write_jsonl(inputs / "text.jsonl", [{"text": "one"}] * 9 + [{"text": 7}] * 50)
    error = fails("train", "run.yaml")
    assert error.code == "too-many-refused"
    assert "tunesmith resume" not in str(error)
    assert not (inputs / "RUN").exists()


def test_a_later_stage_that_cannot_begin_is_begun_after_a_correction(
    run: Run, fails: Any, trained: Path, inputs: Path
) -> None:
    good = (inputs / "chats.jsonl").read_bytes()
    write_jsonl(inputs / "chats.jsonl", [chat_row("?", "!")] * 9 + [{"messages": 7}] * 50)
    error = fails("train", "run.yaml")
    assert error.code == "too-many-refused"
    assert "stage sft" in str(error)
    assert "tunesmith resume RUN" in str(error)
    (inputs / "chats.jsonl").write_bytes(good)
    code, _, err = run("resume", "RUN")
    assert code == 0, err
    assert weights(inputs / "RUN") == weights(trained / "RUN")


def test_a_taken_folder_is_refused(fails: Any, work: Path) -> None:
    assert fails("train", "run.yaml").code == "output-taken"
    cut(work, 1)
    error = fails("train", "run.yaml")
    assert error.code == "output-taken"
    assert "tunesmith resume RUN" in str(error)
    assert fails("train", "--model", "MODEL", "--data", "chats.jsonl", "--output", "RUN").code == "output-taken"


def test_damaged_folders(fails: Any, run: Run, trained: Path, work: Path) -> None:
    cut(work, 1, 2)
    first, second = started_stages(work / "RUN")
    first.model.rename(work / "kept")
    error = fails("resume", "RUN")
    assert str(error).startswith("stage sft: ")
    assert "1-pretrain" in str(error)
    (work / "kept").rename(first.model)
    record = second.record.read_text()
    second.record.write_text(record.replace('"cwd"', '"cwb"'), encoding="utf-8")
    error = fails("resume", "RUN")
    assert error.code == "run-file-damaged"
    assert str(error).startswith("stage sft: ")
    second.record.unlink()
    error = fails("resume", "RUN")
    assert error.code == "stage-damaged"
    assert str(second.path) in str(error)
    shutil.rmtree(second.path)
    shutil.rmtree(first.model)  # saved again from its last checkpoint
    code, _, err = run("resume", "RUN")
    assert code == 0, err
    assert weights(work / "RUN") == weights(trained / "RUN")
    stages = work / "RUN" / "stages.json"
    stages.write_text(stages.read_text().replace("0.003", "0.004"), encoding="utf-8")
    assert fails("resume", "RUN").code == "run-file-damaged"
    content = json.loads(stages.read_text())
    del content["stages"], content["sha256"]
    stages.write_text(sealed(content), encoding="utf-8")
    assert fails("resume", "RUN").code == "run-file-damaged"
    assert fails("report", "RUN").code == "run-file-damaged"


def test_a_base_that_changed_under_a_stage_is_refused(fails: Any, work: Path) -> None:
    cut(work, 1, 2)
    shutil.copy(work / "MODEL" / "model.safetensors", work / "RUN" / "1-pretrain" / "model" / "model.safetensors")
    error = fails("resume", "RUN")
    assert error.code == "run-changed"
    assert "tunesmith resume RUN --allow" in str(error)


def test_two_at_once(fails: Any, work: Path) -> None:
    from tunesmith.staging import locked

    cut(work, 1, 2)
    with locked(work / "RUN"):
        assert fails("resume", "RUN").code == "run-in-use"


def test_a_run_with_stages_is_taken_as_its_last_finished_model(run: Run, fails: Any, work: Path) -> None:
    assert latest_stage(work / "RUN") == work / "RUN" / "3-lora"
    code, _, err = run("chat", "RUN", "--prompt", "Who are you?", "--max-new-tokens", 2)
    assert code == 0, err
    code, _, err = run("merge", "RUN", "--output", "merged")
    assert code == 0, err
    code, _, err = run("evaluate", "RUN/2-sft", "--replies", "none")
    assert code == 0, err
    code, _, err = run("evaluate", "RUN", "--replies", "none", "--data", "chats.jsonl", "--limit", 5)
    assert code == 0, err
    shutil.rmtree(work / "RUN" / "3-lora")
    assert latest_stage(work / "RUN") == work / "RUN" / "2-sft"
    words = ("--data", "own.jsonl", "--output", "more", "--train.max_steps", 1, "--data.max_seq_len", 64)
    code, _, err = run("train", "--model", "RUN", *words)
    assert code == 0, err
    assert fails("check", "--model", "MODEL", "--data", "RUN").code == "run-as-data"


def test_a_run_without_a_finished_stage_has_no_model(fails: Any, work: Path) -> None:
    cut(work, 0, 2)
    error = fails("chat", "RUN", "--prompt", "x")
    assert error.code == "run-not-finished"
    assert str(error).endswith("tunesmith resume RUN")
    shutil.rmtree(work / "RUN" / "1-pretrain")
    assert fails("chat", "RUN", "--prompt", "x").code == "run-not-finished"


def test_the_report_links_to_those_of_the_stages(run: Run, work: Path) -> None:
    cut(work, 1, 2)
    code, out, err = run("report", "RUN")
    assert code == 0, err
    page = (work / "RUN" / "report.html").read_text(encoding="utf-8")
    assert out.strip().endswith("RUN/report.html")
    for name, outcome in (("1-pretrain", "finished"), ("2-sft", "not finished")):
        assert f'href="{name}/report.html"' in page
        assert (work / "RUN" / name / "report.html").is_file()
        assert outcome in page
    assert "not begun" in page
    assert "1 of 3 stages" in page


def test_stages_in_python(work: Path, inputs: Path) -> None:
    shutil.rmtree(work / "RUN")
    seen: list[int] = []
    run = tunesmith.train(
        model="MODEL",
        output="RUN",
        data={"max_seq_len": 64},
        train={"max_steps": 2},
        stages=[
            {"name": "a", "data": {"train": [Path("text.jsonl")]}},
            {"name": "b", "data": {"train": "chats.jsonl"}},
        ],
        on_log=lambda record: seen.append(record["step"]),
    )
    assert seen == [1, 2, 1, 2]
    assert run.is_finished
    assert [stage.path.name for stage in run.stages] == ["1-a", "2-b"]
    assert run.config.data.train == ["chats.jsonl"]
    assert run.model_dir == work / "RUN" / "2-b" / "model"
    assert run.verdict.summary
    assert run.report() == work / "RUN" / "report.html"
    assert not run.stages[0].stages
    with raises(UsageError, "rows-with-stages"):
        tunesmith.train(
            "run.yaml",
            output="OTHER",
            data={"eval": [chat_row("a", "b")]},
            stages=[{"name": "a", "data": {"train": "x"}}],
        )
    with raises(UsageError, "rows-with-stages", "eval of a"):
        tunesmith.train("run.yaml", stages=[{"name": "a", "data": {"eval": [chat_row("a", "b")]}}])


def test_an_interrupt_names_the_run(inputs: Path) -> None:
    """After the last step of a stage, and in the middle of the next."""

    at = {"pretrain": 3, "sft": 2}

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == at[name]:
            os.kill(os.getpid(), 2)

    for name in at:
        with raises(InterruptedRun, "run-interrupted", f"stage {name}") as caught:
            tunesmith.resume("RUN", on_log=stop) if Path("RUN").exists() else tunesmith.train("run.yaml", on_log=stop)
        assert str(caught.value).endswith("RUN"), caught.value  # the command that continues
    run = tunesmith.resume("RUN")
    assert run.is_finished


LONG = pytest.mark.skipif(not os.environ.get("TUNESMITH_LONG"), reason="TUNESMITH_LONG=1 runs it: several minutes")


@LONG
def test_killed_at_any_moment_the_weights_are_the_same(inputs: Path) -> None:
    """kill -9 over the whole course of all stages, also between two of them."""

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tunesmith", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    began = time.monotonic()
    whole = start("train", "run.yaml")
    _, err = whole.communicate()
    took = time.monotonic() - began
    assert whole.returncode == 0, err
    wanted = weights(inputs / "RUN")
    draw, kills = random.Random(0), 0
    for _ in range(3):
        shutil.rmtree(inputs / "RUN")
        while True:
            has_begun = (inputs / "RUN" / "stages.json").exists()
            process = start("resume", "RUN") if has_begun else start("train", "run.yaml")
            try:
                _, err = process.communicate(timeout=took * draw.random())
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0, err
            break
        assert weights(inputs / "RUN") == wanted
    assert kills
    print(f"{kills} kills")


@pytest.mark.parametrize(
    ("at", "said"), [("stage 3 of 3", "Continue with: tunesmith resume"), ("all 3", "are trained")]
)
def test_an_interrupt_between_stages_says_what_there_is(work: Path, at: str, said: str) -> None:
    class Interrupted(ConsoleReporter):
        def note(self, text: str) -> None:
            super().note(text)
            if text.startswith(at):
                raise KeyboardInterrupt

    cut(work, 2)
    with raises(InterruptedRun, "run-interrupted", said) as caught:
        resume_stages("RUN", {}, (), Interrupted())
    assert ("are trained" in str(caught.value)) == at.startswith("all")
