"""The page at `/`: what it may load, what it shows of runs, and that outside text is only ever text."""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tunesmith
from conftest import SHARED, WORDS, chat_row, needs_shared, raises, save_folder, tiny_config, write_jsonl
from tunesmith.config.data_keys import DataSection
from tunesmith.data.labelling import label_rows
from tunesmith.errors import TunesmithError
from tunesmith.model.bpe import train_tokenizer
from tunesmith.model.tokenizer import build_encoder
from tunesmith.serve.turns import learn_openings, split_turns
from tunesmith.sources.read import RawRow
from tunesmith.use.turns import find_turns

fastapi = pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402

from tunesmith.serve.errors import add_error_handlers  # noqa: E402
from tunesmith.serve.page import add_page  # noqa: E402
from tunesmith.serve.runs import ServedRun, find_runs, open_runs  # noqa: E402
from tunesmith.serve.settings import ServeSettings  # noqa: E402

STATIC = Path(str(files("tunesmith.serve"))) / "static"
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in STATIC.glob("*.js")}
EVIL = "<img src=x onerror=alert(1)> **bold** `code` [link](javascript:alert(3)) <script>alert(2)</script>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model has learnt to reply with markup, on rows with markup; two rows are refused."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = train_tokenizer([WORDS, EVIL] * 20, vocab_size=500)
    base = save_folder(
        folder / "base", tiny_config("qwen3", vocab_size=500, hidden_size=64, initializer_range=0.02), tokenizer
    )
    turns = [
        ("system", "be small"),
        ("user", "hi"),
        ("assistant", "hello to you"),
        ("user", EVIL),
        ("assistant", "the fox"),
    ]
    long = {"messages": [{"role": role, "content": text} for role, text in turns]}
    rows = [chat_row("hello", EVIL)] * 24 + [chat_row("Who are you?", "I am a small model.")] * 24 + [long] * 8
    data = write_jsonl(folder / "rows <b>x.jsonl", [*rows, chat_row("What?", ""), chat_row("And?", "")])
    tunesmith.train(
        model={"path": str(base)},
        data={"train": [str(data)], "eval_split": 0.1, "max_refused": 0.5},
        train={
            "output_dir": str(folder / "run <i>y"),
            "max_steps": 110,
            "log_steps": 1,
            "eval_steps": 55,
            "micro_batch_tokens": 512,
        },
        optim={"lr": 3e-3},
    )
    return folder / "run <i>y"


def client_of(runs: list[ServedRun], api_key: str | None = None) -> TestClient:
    app = fastapi.FastAPI()
    app.state.serving = SimpleNamespace(settings=ServeSettings(api_key=api_key))
    add_error_handlers(app)
    add_page(app, runs)
    return TestClient(app)


@pytest.fixture(scope="module")
def client(trained: Path) -> TestClient:
    return client_of(find_runs([str(trained)]))


# ---- files ----


def test_page_and_its_files_come_with_strict_headers() -> None:
    client = client_of([])
    for name in ("", "favicon.ico", *(f"static/{path.name}" for path in STATIC.iterdir())):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200, name
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in answer.headers
        again = client.get(f"/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "name",
    ["../page.py", "..%2fpage.py", "%2e%2e/run.py", "page.py", "", "static/page.js", "/etc/passwd", "page.js%00"],
)
def test_no_other_file_is_served(name: str) -> None:
    answer = client_of([]).get(f"/static/{name}")
    assert answer.status_code == 404
    assert set(answer.json()) == {"error"}


def test_page_names_no_other_host_and_has_no_inline_script_or_style() -> None:
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(?:https?:)?//[\w-]+\.\w", text), path.name
    html = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    assert re.findall(r"<script(?![^>]*\ssrc=)", html) == []


def test_scripts_never_parse_text_as_html_or_code() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setTimeout\(\s*['\"`]|srcdoc|DOMParser|createContextualFragment"
    for name, text in SCRIPTS.items():
        assert not re.search(forbidden, text), name


def texts_of(language: str) -> dict[str, str]:
    part = SCRIPTS["texts.js"].partition(f"  {language}: {{\n")[2].partition("\n  },")[0]
    return dict(re.findall(r'^    (\w+): "(.*)",$', part, re.MULTILINE))


def test_texts_are_complete_in_both_languages() -> None:
    english, chinese = texts_of("en"), texts_of("zh")
    assert len(english) > 100
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", chinese[key])), key
    used = set(re.findall(r'\bt\("(\w+)"[,)]', "".join(SCRIPTS.values())))
    used |= set(re.findall(r'data-text="(\w+)"', (STATIC / "index.html").read_text(encoding="utf-8")))
    assert used <= set(english)


def test_wheel_has_the_page() -> None:
    builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    root = Path(tunesmith.__file__).parents[2]
    found = {file.distribution_path for file in builder.WheelBuilder(str(root)).recurse_included_files()}
    assert {f"tunesmith/serve/static/{path.name}" for path in STATIC.iterdir()} <= found


# ---- runs ----


def test_what_is_shown_of_runs_needs_the_key(trained: Path) -> None:
    client = client_of(find_runs([str(trained)]), api_key="sesame")
    paths = ["runs", "runs/run <i>y", "runs/run <i>y/metrics", "runs/run <i>y/rows"]
    for path in paths:
        assert client.get(f"/ui/{path}").status_code == 401, path
        assert client.get(f"/ui/{path}", headers={"Authorization": "Bearer wrong"}).status_code == 401, path
        assert client.get(f"/ui/{path}", headers={"Authorization": "Bearer sesame"}).status_code == 200, path
    assert client.get("/").status_code == 200


def test_no_answer_names_a_path(client: TestClient, trained: Path) -> None:
    paths = [
        "runs",
        "runs/run <i>y",
        "runs/run <i>y/metrics",
        "runs/run <i>y/rows",
        "runs/run <i>y/rows?kind=refused",
        "runs/no-such",
    ]
    for path in paths:
        answer = client.get(f"/ui/{path}")
        assert str(trained.parent) not in answer.text, path
        assert answer.headers.get("cache-control") in ("no-store", None)


def test_other_runs_and_folders_cannot_be_asked_for(client: TestClient) -> None:
    for name in ("..", "%2e%2e", "..%2fbase", "base", ".", "run <i>y%2f..", "%2fetc"):
        assert client.get(f"/ui/runs/{name}/rows").status_code == 404, name


@pytest.mark.parametrize("query", ["start=-1", "start=x", "start=1e9", "part=other", "kind=all", f"start={2**63}"])
def test_wrong_queries_are_refused_in_the_apis_shape(client: TestClient, query: str) -> None:
    answer = client.get(f"/ui/runs/run <i>y/rows?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_value"


def test_served_folders_of_a_run_lead_to_it_once(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / trained.name
    shutil.copytree(trained, other)
    checkpoint = next((trained / "checkpoints").iterdir())
    found = find_runs(
        [
            str(trained),
            str(trained / "model"),
            str(checkpoint),
            str(trained.parent / "base"),
            str(other),
            "owner/hub-id",
        ]
    )
    assert [run.name for run in found] == ["run <i>y", "run <i>y-2"]
    assert [run.folder.path for run in found] == [trained, other]
    with raises(TunesmithError, "not-a-run"):
        open_runs([str(trained.parent / "base")])


@pytest.mark.parametrize(
    ("host", "given", "count"), [("127.0.0.1", False, 1), ("0.0.0.0", False, 0), ("0.0.0.0", True, 1)]
)
def test_training_data_is_shown_to_other_machines_only_if_asked(
    trained: Path, host: str, given: bool, count: int
) -> None:
    from tunesmith.serve.run import _runs

    options = argparse.Namespace(model=str(trained), more=[], host=host, runs=[str(trained)] if given else None)
    assert len(_runs(options)) == count


def test_run_is_described_as_in_its_report(client: TestClient, trained: Path) -> None:
    about = client.get("/ui/runs/run <i>y").json()
    assert about["is_finished"]
    assert not about["is_live"]
    assert about["summary"] == tunesmith.Run(trained).verdict.summary
    assert [(one["rows"], one["used"], one["refused"]) for one in about["files"]] == [(58, 56, 2)]
    assert about["problems"][0]["count"] == 2


def test_rows_are_those_of_the_token_store(client: TestClient, trained: Path) -> None:
    run = find_runs([str(trained)])[0]
    first, rows = client.get("/ui/runs/run <i>y/rows").json(), []
    for part in ("train", "eval"):
        for start in range(0, first["total"], first["size"]):
            rows += client.get(f"/ui/runs/run <i>y/rows?part={part}&start={start}").json()["rows"]
    data = run._open_data()
    store = data._stores["train"]
    assert sorted(int(row["name"].rpartition(":")[2]) for row in rows) == sorted(store.row_numbers.tolist())
    for row in rows:
        index = int(np.flatnonzero(store.row_numbers == int(row["name"].rpartition(":")[2]))[0])
        sample = store[index]
        whole = data.encoder.tokenizer.decode(sample.input_ids.tolist())
        assert "".join(text for turn in row["turns"] for text, _ in turn["runs"]) == whole
        marked = "".join(text for turn in row["turns"] for text, is_trained in turn["runs"] if is_trained)
        assert marked == data.encoder.tokenizer.decode(sample.input_ids[sample.loss_mask == 1].tolist())
    long = next(row for row in rows if len(row["turns"]) > 2)
    assert [turn["role"] for turn in long["turns"]] == ["system", "user", "assistant", "user", "assistant"]
    refused = client.get("/ui/runs/run <i>y/rows?kind=refused").json()["rows"]
    assert [row["name"] for row in refused] == ["rows <b>x.jsonl:57", "rows <b>x.jsonl:58"]
    assert all("empty" in row["reason"] for row in refused)


def test_curves_grow_and_start_again_where_the_file_was_written_anew(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    run = open_runs([str(tmp_path / "run")])[0]
    metrics = run.folder.metrics
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:50]) + lines[50][:9])
    first = run.metrics(0, "")
    assert [record["step"] for record in first["records"]] == [json.loads(line)["step"] for line in lines[:50]]
    assert run.metrics(first["offset"], first["mark"])["records"] == []
    metrics.write_bytes(b"".join(lines[:60]))
    second = run.metrics(first["offset"], first["mark"])
    assert len(second["records"]) == 10
    assert not second["is_new"]
    for changed in (lines[:40], [b'{"step": 1, "loss": 1e999}\n', *lines[1:]]):  # shorter; longer, but another
        metrics.write_bytes(b"".join(changed))
        third = run.metrics(second["offset"], second["mark"])
        assert third["is_new"]
        assert len(third["records"]) == len(changed)
    metrics.unlink()
    assert run.metrics(9, "x") == {"records": [], "offset": 0, "mark": "", "is_new": True, "has_more": False}
    about = run.about()
    assert about["summary"]


def test_long_metrics_come_in_parts(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    run = open_runs([str(tmp_path / "run")])[0]
    run.folder.metrics.write_text(
        "".join(f'{{"step": {step}, "loss": 1.5, "more": "{"x" * 99}"}}\n' for step in range(20_000))
    )
    records, offset, mark, parts = [], 0, "", 0
    while True:
        part = run.metrics(offset, mark)
        records += part["records"]
        offset, mark, parts = part["offset"], part["mark"], parts + 1
        if not part["has_more"]:
            break
    assert [record["step"] for record in records] == list(range(20_000))
    assert parts > 1


@pytest.mark.parametrize("name", ["data_ledger.json", "tokens/offsets.npy", "tokens/store.json", "config.yaml"])
def test_damaged_files_of_a_run_give_an_error_without_paths(trained: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(trained, tmp_path / "run")
    runs = open_runs([str(tmp_path / "run")])
    (tmp_path / "run" / name).write_bytes(b"\x00{")
    client = client_of(runs)
    answer = client.get("/ui/runs/run/rows")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "run_unreadable"
    assert str(tmp_path) not in answer.text
    assert client.get("/ui/runs").json() == {"runs": [{"name": "run", "parts": ["train"]}]}


# ---- turns ----

CHATS: list[dict[str, Any]] = [
    chat_row("What is the answer?", "The answer is forty two."),
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}] * 3},
    {
        "messages": [
            {"role": "system", "content": "be small"},
            {"role": "user", "content": "user\nassistant"},
            {"role": "assistant", "content": "user"},
        ]
    },
]


def check_turns(tokenizer: Any, template: str | None) -> set[str]:
    """Compare turns found in the tokens alone with those found with the row; returns the roles with openings."""
    tokenizer = copy.deepcopy(tokenizer)
    if template and Path(template).is_file():
        marks = re.findall(r"<\|?[\w/]+\|?>|\[/?[A-Z_]+\]", Path(template).read_text(encoding="utf-8"))
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    encoder = build_encoder(tokenizer, template, {}, datetime.datetime(2026, 1, 2))
    data = DataSection(train=["x"])
    openings = learn_openings(encoder, data)
    for row in label_rows([RawRow("x", 1, chat) for chat in CHATS], encoder, data, 4096):
        for sample, turns in zip(row.samples, find_turns(row, encoder, data), strict=True):
            found = split_turns(sample, openings)
            assert [turn.start for turn in found] == [0, *(turn.end for turn in found[:-1])]
            assert found[-1].end == len(sample.input_ids)
            if not {"user", "assistant"} <= set(openings.values()) or not all(turn.role for turn in turns):
                continue
            # before the first reply the template may write more than the row has, or a system prompt inside the question
            border = next(turn.start for turn in turns if turn.role == "assistant")
            assert [turn for turn in found if turn.end > border] == [turn for turn in turns if turn.end > border]
            assert "assistant" not in {turn.role for turn in found if turn.end <= border}
    return set(openings.values())


def test_turns_are_found_in_tokens_as_with_the_row(tokenizer: Any) -> None:
    folder = Path(__file__).parent / "templates"
    for name in (
        "bos_and_headers",
        "generation_marks",
        "strips_thinking",
        "no_system",
        "dated_system",
        "default_system",
        "channels",
    ):
        assert {"user", "assistant"} <= check_turns(tokenizer, str(folder / f"{name}.jinja")), name
    assert check_turns(tokenizer, "chatml") >= {"system", "user", "assistant"}
    check_turns(tokenizer, "alpaca")
    check_turns(tokenizer, "none")


@needs_shared
@pytest.mark.parametrize(
    "name",
    ["llamacpp/Qwen-Qwen3-0.6B", "trl/llama3_1", "trl/gemma3", "axolotl/mistral_v1", "trl/qwen2_5", "axolotl/phi_4"],
)
def test_turns_are_found_in_tokens_of_real_templates(tokenizer: Any, name: str) -> None:
    assert "user" in check_turns(tokenizer, str(SHARED / "templates" / f"{name}.jinja"))
