"""System prompts and empty think blocks in preview, check, train and resume: the same draws, counted, never in evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, raises, save_folder, tiny_config, write_jsonl
from test_draws import PROMPTS, TEMPLATES, write_block
from test_matrix import SYSTEM, a, tokenizer_for, u
from test_preview_equals_train import samples_of
from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import PreviewConfig
from tunesmith.data.store import open_store
from tunesmith.errors import ConfigError
from tunesmith.files import read_sealed
from tunesmith.run.identity import compare_runs
from tunesmith.run.records import RunRecord

TEMPLATE = write_block(TEMPLATES["before every reply, in the prompt too"])
DRAWS = ("--data.system_prompts", *PROMPTS, "--data.system_prompt_share", 0.5, "--data.empty_think_share", 0.3)
SHORT = (
    "--data.max_seq_len",
    128,
    "--train.micro_batch_tokens",
    256,
    "--data.max_refused",
    0.5,
    "--train.max_steps",
    1,
)


def rows_of(first: int = 0) -> list[Any]:
    own = {"messages": [SYSTEM, u("Why?"), a("Ice melts."), u("So?"), a("It is wet.")]}
    return [
        own,
        {"text": "The quick brown fox."},
        *(chat_row(f"Why {i}?", "Ice melts.") for i in range(first, first + 40)),
    ]


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = tokenizer_for(tokenizer, TEMPLATE)
    return save_folder(tmp_path_factory.mktemp("model"), tiny_config("qwen3", vocab_size=len(own)), own)


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    return [write_jsonl(tmp_path / f"{name}.jsonl", rows_of(first)) for name, first in (("a", 0), ("b", 100))]


def preview(run: Any, *words: object) -> list[dict[str, Any]]:
    code, out, err = run("preview", *words, "--json")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def train(run: Any, *words: object) -> str:
    code, out, err = run("train", *words, *SHORT)
    assert code == 0, err
    return str(out)


def stored(folder: Path) -> list[tuple[str, int, list[int], list[int]]]:
    store = open_store(folder)
    names = [Path(file).name for file in store.files]
    return [
        (names[store.file_numbers[i]], int(store.row_numbers[i]), store[i].input_ids.tolist(), store[i].loss_mask.tolist())
        for i in range(len(store))
    ]  # fmt: skip


def shown(rows: list[dict[str, Any]]) -> list[tuple[str, int, list[int], list[int]]]:
    return [(Path(row["file"]).name, *sample) for row in rows for sample in samples_of([row])]


def ledger_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "data_ledger.json").read_text(encoding="utf-8"))
    return found


def test_preview_check_and_training_draw_alike(run: Any, model: Path, data: list[Path], tmp_path: Path) -> None:
    given = ["--model", model, "--data.max_seq_len", 128, *DRAWS]
    rows = preview(run, *given, "--data", *data, "--rows", 1000)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows_of(200))
    out = train(run, *given, "--data", *data, "--eval-data", held_out, "--output", tmp_path / "run")
    assert stored(tmp_path / "run" / "tokens") == shown(rows)
    added, removed = (sum(bool(row[key]) for row in rows) for key in ("system_prompt_added", "empty_think_removed"))
    assert 20 < added < 60 < 10 + removed < 90
    assert not any(row["system_prompt_added"] for row in rows if row["row"] < 3)
    ledger = ledger_of(tmp_path / "run")["train"]
    assert (ledger["system_prompts_added"], ledger["empty_think_removed"]) == (added, removed)
    assert sum(entry["system_prompts_added"] for entry in ledger["files"].values()) == added
    code, checked, err = run("check", *given, "--data", *data)
    assert code == 0, err
    for text in (" ".join(out.split()), " ".join(checked.split())):
        assert f"system prompt added to {added} rows" in text
        assert f"empty think block removed from {removed} rows" in text
    # evaluation rows are as they are in the data
    plain = preview(run, *given[:4], "--data", held_out, "--rows", 1000)
    assert stored(tmp_path / "run" / "eval_tokens") == shown(plain)
    ledger = ledger_of(tmp_path / "run")["eval"]
    assert ledger["empty_think_removed"] == ledger["system_prompts_added"] == 0
    assert preview(run, *given, "--data", data[0], "--eval-data", held_out, "--row", "held_out.jsonl:1-42") == plain
    # one file alone, a few rows, one row; and another seed
    assert preview(run, *given, "--data", data[1], "--rows", 1000) == [
        row for row in rows if row["file"] == str(data[1])
    ]
    some = preview(run, *given, "--data", *data, "--row", "a.jsonl:7", "b.jsonl:5-9")
    assert some == [
        row
        for row in rows
        if (row["file"][-7:], row["row"]) in [("a.jsonl", 7), *(("b.jsonl", i) for i in range(5, 10))]
    ]
    assert preview(run, *given, "--data", *data, "--data.limit", 9, "--rows", 1000) == rows[:9]
    assert preview(run, *given, "--data", *data, "--train.seed", 1, "--rows", 1000) != rows
    page = tmp_path / "rows.html"
    code, text, err = run("preview", *given, "--data", *data, "--rows", 20, "--html", page)
    assert code == 0, err
    assert "empty think block removed" in page.read_text(encoding="utf-8")
    code, text, err = run("preview", *given, "--data", *data, "--rows", 20)
    assert "system prompt added" in text
    assert all(f"{role} │" in text for role in ("system", "user", "assistant"))


def test_resume_keeps_what_was_drawn_and_refuses_other_shares(
    run: Any, model: Path, data: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    given = ["--model", model, "--data.max_seq_len", 128, *DRAWS, "--data", *data, "--data.eval_split", 0.25]
    out = train(run, *given, "--output", folder)
    tokens, held_out = stored(folder / "tokens"), stored(folder / "eval_tokens")
    # rows held out are as they are in the data
    plain = {row[:2]: row[2:] for row in shown(preview(run, *given[:4], "--data", *data, "--rows", 1000))}
    assert len(held_out) == 21
    assert all(plain[row[:2]] == row[2:] for row in held_out)
    names = {tuple(Path(name).name.split(":")) for name in ledger_of(folder)["held_out"]}
    assert names == {(row[0], str(row[1])) for row in held_out}
    assert "nothing is added to them" in " ".join(out.split())
    for changed in (
        ("--data.empty_think_share", 0.9),
        ("--data.system_prompt_share", 0.9),
        ("--data.system_prompts", "Be rude."),
    ):
        code, _, err = run("resume", folder, "--train.max_steps", 2, *changed)
        assert (code, changed[0][2:] in err, "--allow data" in err) == (1, True, True)
    code, _, err = run("resume", folder, "--train.max_steps", 2)
    assert code == 0, err
    assert (stored(folder / "tokens"), stored(folder / "eval_tokens")) == (tokens, held_out)
    code, _, err = run("resume", folder, "--train.max_steps", 3, "--train.seed", 4, "--allow", "seed", "schedule")
    assert code == 0, err
    again = stored(folder / "tokens")
    assert again == shown(preview(run, *given[:-2], "--train.seed", 4, "--rows", 1000)) != tokens
    assert [row[:2] for row in stored(folder / "eval_tokens")] != [row[:2] for row in held_out]
    # a run from before these keys
    now = RunRecord.from_json(read_sealed(folder / "run.json"), folder / "run.json").guard
    now.config["data"] |= {"system_prompts": [], "system_prompt_share": 1.0, "empty_think_share": 1.0}
    keys = ("system_prompts", "system_prompt_share", "empty_think_share")
    older = {key: value for key, value in now.config["data"].items() if key not in keys}
    assert compare_runs(now.model_copy(update={"config": {**now.config, "data": older}}), now) == ([], [])


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"system_prompt_share": 0.2}, "data.system_prompt_share"),
        ({"system_prompts": ["a", " "]}, "data.system_prompts"),
        ({"system_prompts": ["\ud83d"]}, "data.system_prompts"),
        ({"system_prompts": ["a"], "chat_template": "none"}, "data.system_prompts"),
        ({"empty_think_share": 0.2, "chat_template": "none"}, "data.empty_think_share"),
        ({"empty_think_share": 1.2}, "data.empty_think_share"),
        ({"empty_think_share": True}, "data.empty_think_share"),
        ({"empty_think_ratio": 0.2}, "data.empty_think_share"),
        ({"add_system_ratio": 0.2}, "data.system_prompt_share"),
    ],
)
def test_wrong_values_are_named(data: dict[str, Any], named: str) -> None:
    with raises(ConfigError, "config", named):
        resolve_config(PreviewConfig, None, {}, arguments={"model": {"path": "m"}, "data": {"train": ["x"], **data}})


def test_one_prompt_needs_no_list() -> None:
    tree = {"model": {"path": "m"}, "data": {"train": "x", "system_prompts": "Be brief."}}
    config = resolve_config(PreviewConfig, None, {}, arguments=tree)
    assert (config.data.system_prompts, config.data.system_prompt_share) == (["Be brief."], 1.0)


def test_where_nothing_can_be_changed_it_is_said(run: Any, model: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "The quick brown fox. " * 5}] * 3)
    _, out, err = run("check", "--model", model, "--data", text, *DRAWS)
    assert "system prompt added to 0 rows" in " ".join(out.split()), err
    assert "empty think block removed from 0 rows" in " ".join(out.split())
