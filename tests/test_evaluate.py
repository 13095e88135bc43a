"""tunesmith evaluate: likelihoods as in training, replies scored and kept, several models on the same rows."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import chat_row, raises, save_folder, tiny_config, write_jsonl

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

import tunesmith
from tunesmith.errors import ConfigError, DataError, ModelError, TunesmithError, UsageError
from tunesmith.evaluation.records import EvaluationFolder, read_evaluation, read_replies
from tunesmith.evaluation.table import format_evaluation
from tunesmith.runfolder import RunFolder, read_metrics

SHORT = ("--max-new-tokens", 8)
CHATS = [chat_row(f"What is the answer {i}?", f"The answer is {i} and you.") for i in range(40)]
TURNS = [
    {
        "messages": [
            *chat_row("Who are you?", "I am a small model.")["messages"],
            *chat_row(f"And {i}?", f"The fox says {i}.")["messages"],
        ]
    }
    for i in range(6)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A finished run that held rows out, with its base and data beside it."""
    from tunesmith.cli import main

    folder = tmp_path_factory.mktemp("trained")
    base = save_folder(folder / "base", tiny_config("qwen3", initializer_range=0.02), tokenizer)
    data = write_jsonl(folder / "chats.jsonl", CHATS)
    words = ("train", "--model", base, "--data", data, "--output", folder / "run", "--data.eval_split", "0.25",
             "--optim.lr", "3e-3", "--train.epochs", "6", "--data.max_seq_len", "128")  # fmt: skip
    assert main([str(word) for word in words]) == 0
    return folder / "run"


def evaluated(run: Any, output: Path, *words: object) -> Any:
    code, out, err = run("evaluate", *words, "--output", output)
    assert code == 0, out + err
    return read_evaluation(EvaluationFolder(output))


def records_of(output: Path) -> list[Any]:
    return list(read_replies(EvaluationFolder(output)))


def test_a_run_is_scored_on_its_held_out_rows_as_in_training(run, trained: Path, tmp_path: Path) -> None:
    evaluation = evaluated(run, tmp_path / "out", trained, *SHORT)
    last = [record for record in read_metrics(RunFolder(trained).metrics) if "eval_loss" in record][-1]
    scores = evaluation.models[0].scores
    assert scores["loss"].value == pytest.approx(last["eval_loss"], rel=1e-6)
    assert scores["perplexity"].value == pytest.approx(last["eval_perplexity"], rel=1e-6)
    assert scores["token_accuracy"].value == last["eval_token_accuracy"]
    assert (evaluation.data.rows, evaluation.data.scored, evaluation.data.replies) == (10, 10, 10)
    assert all(score.low <= score.value <= score.high for score in scores.values() if score.low is not None)
    records = records_of(tmp_path / "out")
    wanted = {row["messages"][1]["content"] for row in CHATS}
    assert len({record.row for record in records}) == 10
    assert {record.reference for record in records} <= wanted
    assert scores["exact_match"].value == sum(record.scores["exact_match"] for record in records) / 10
    size = sum(len(record.reference.encode()) for record in records)
    assert scores["bits_per_byte"].value == pytest.approx(
        scores["loss"].value / math.log(2) * sum(record.reference_tokens + 1 for record in records) / size
    )


@pytest.mark.parametrize("kind", ["eval-data", "adapter", "gpt2-none", "text", "all"])
def test_loss_equals_that_of_training_for_every_kind_of_run(run, tmp_path: Path, tokenizer: Any, kind: str) -> None:
    config = tiny_config("gpt2" if kind == "gpt2-none" else "llama", initializer_range=0.02)
    base = save_folder(tmp_path / "base", config, tokenizer)
    held_out = write_jsonl(tmp_path / "eval.jsonl", TURNS)
    train = write_jsonl(tmp_path / "train.jsonl", CHATS)
    words: list[Any] = []
    if kind == "adapter":
        words = ["--lora.kind", "lora", "--lora.rank", 2]
    elif kind == "gpt2-none":
        rows = [{"prompt": f"Say {i}:\n", "completion": f"{i}"} for i in range(9)]
        words = ["--data.chat_template", "none"]
        write_jsonl(held_out, rows[:4])
        write_jsonl(train, rows[4:])
    elif kind == "text":
        write_jsonl(held_out, [{"text": "the quick brown fox " * 30}, {"text": "春眠不觉晓"}])
        write_jsonl(train, [{"text": "lazy dog " * 20}])
    elif kind == "all":
        words = ["--data.train_on", "all", "--data.overlong", "split"]
    code, _, err = run("train", "--model", base, "--data", train, "--eval-data", held_out, "--output", tmp_path / "run",
                       "--data.max_seq_len", 64, "--train.max_steps", 1, *words)  # fmt: skip
    assert code == 0, err
    evaluation = evaluated(run, tmp_path / "out", tmp_path / "run", *SHORT)
    last = read_metrics(RunFolder(tmp_path / "run").metrics)[-1]
    scores = evaluation.models[0].scores
    assert scores["loss"].value == pytest.approx(last["eval_loss"], rel=1e-6)
    assert scores["token_accuracy"].value == pytest.approx(last["eval_token_accuracy"])
    replies = {"eval-data": 12, "adapter": 12, "gpt2-none": 4, "text": 0, "all": 12}[kind]
    assert evaluation.data.replies == replies == len(records_of(tmp_path / "out"))
    assert ("bleu" in scores) is bool(replies)


def test_the_base_and_other_models_are_scored_on_the_same_rows(run, trained: Path, tmp_path: Path) -> None:
    words = (trained, trained.parent / "base", *SHORT, "--limit", 6)
    evaluation = evaluated(run, tmp_path / "out", *words)
    assert [model.name for model in evaluation.models] == ["run", "base"]
    difference = evaluation.differences[0]
    assert (difference.model, difference.reference) == ("base", "run")
    for name, score in difference.scores.items():
        if score.value is not None:
            values = [evaluation.model(model).scores[name].value for model in ("base", "run")]
            assert score.value == pytest.approx(values[0] - values[1])
    assert difference.scores["loss"].low > 0
    beside = evaluated(run, tmp_path / "beside", trained, "--base", *SHORT, "--limit", 6)
    assert [(model.name, model.base_of) for model in beside.models] == [("base", "run"), ("run", None)]
    assert beside.differences[0].scores["loss"].value == pytest.approx(-difference.scores["loss"].value)
    for name in ("out", "beside"):
        by_model = {
            model: {r.row for r in records_of(tmp_path / name) if r.model == model} for model in ("run", "base")
        }
        assert by_model["run"] == by_model["base"]
        assert len(by_model["run"]) == 6


def test_the_table_fits_and_json_is_the_file(run, trained: Path, tmp_path: Path) -> None:
    words = ("evaluate", trained, "--base", *SHORT, "--output", tmp_path / "out")
    code, out, err = run(*words)
    assert code == 0
    assert (
        max(len(line) for line in out.splitlines() if str(tmp_path.parent) not in line and "chats.jsonl" not in line)
        <= 80
    )
    for text in ("loss", "exact match, strict", "ROUGE-L", "difference", "base"):
        assert text in out
    assert "base: replies  10/10" in err
    evaluation = read_evaluation(EvaluationFolder(tmp_path / "out"))
    narrow = format_evaluation(evaluation, 44)
    assert max(len(line) for line in narrow if "chats.jsonl" not in line) <= 44
    assert "run minus base" in narrow
    code, out, err = run(*words, "--json")  # everything is done already
    content = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert json.loads(out) == {name: value for name, value in content.items() if name != "sha256"}
    assert "replies" not in err


def test_turns_of_a_row_are_asked_with_the_turns_before_them(run, trained: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "turns.jsonl", TURNS)
    evaluation = evaluated(run, tmp_path / "all", trained, "--data", data, *SHORT)
    assert (evaluation.data.scored, evaluation.data.replies) == (6, 12)
    second = next(record for record in records_of(tmp_path / "all") if record.turn == 1)
    assert "I am a small model." in second.prompt
    last = evaluated(run, tmp_path / "last", trained, "--data", data, *SHORT, "--replies", "last")
    assert last.data.replies == 6
    assert {record.turn for record in records_of(tmp_path / "last")} == {1}
    none = evaluated(run, tmp_path / "none", trained, "--data", data, "--replies", "none")
    assert set(none.models[0].scores) == {"loss", "perplexity", "token_accuracy", "bits_per_byte"}
    assert none.models[0].scores["loss"] == evaluation.models[0].scores["loss"]


def test_sampled_replies_follow_the_seed_and_not_the_batch(run, trained: Path, tmp_path: Path) -> None:
    words = (trained, *SHORT, "--temperature", 1.5)
    for name, more in (("one", ()), ("two", ("--seed", 0)), ("three", ("--seed", 1))):
        evaluated(run, tmp_path / name, *words, *more)
    one, two, three = ({r.key: r.reply for r in records_of(tmp_path / name)} for name in ("one", "two", "three"))
    assert one == two != three


def test_a_smaller_limit_is_part_of_a_larger_one(run, trained: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    found = {}
    for limit in (4, 9):
        evaluated(run, tmp_path / str(limit), trained, "--data", data, *SHORT, "--limit", limit)
        found[limit] = {record.row for record in records_of(tmp_path / str(limit))}
    assert len(found[4]) == 4
    assert found[4] < found[9]


def test_the_rows_drawn_do_not_depend_on_the_order_of_files(run, trained: Path, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", CHATS[place::2]) for place, name in enumerate("ab")]
    drawn = []
    for place, names in enumerate((files, files[::-1])):
        evaluated(run, tmp_path / str(place), trained, "--data", *names, *SHORT, "--limit", 5)
        drawn.append({record.row for record in records_of(tmp_path / str(place))})
    assert drawn[0] == drawn[1]


def test_replies_are_kept_in_the_order_of_the_data(trained: Path, run, tmp_path: Path) -> None:
    from tunesmith.evaluation.replies import ReplyLog

    words = (trained, "--base", "--max-new-tokens", 24)
    evaluated(run, tmp_path / "out", *words)
    path = tmp_path / "out" / "replies.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(reversed(lines)))  # as replies of other lengths would have ended
    evaluated(run, tmp_path / "out", *words)
    assert path.read_bytes() == b"".join(lines)
    found = [(record.model, int(record.row.rpartition(":")[2])) for record in records_of(tmp_path / "out")]
    assert found == sorted(found)
    with ReplyLog(EvaluationFolder(tmp_path / "out")) as log:
        assert [record.key for record in log.done.values()] == [record.key for record in records_of(tmp_path / "out")]


def test_a_hub_id_in_the_folder_of_a_run_is_not_of_that_run(trained: Path, monkeypatch: Any) -> None:
    from tunesmith.evaluation.candidates import find_run

    monkeypatch.chdir(trained)
    assert find_run("Qwen/Qwen2.5-0.5B") is None
    assert find_run("gpt2") is None
    assert find_run(".") is not None
    assert find_run("model") is not None


def test_names_of_models_differ_from_each_other_and_from_the_reference(tmp_path: Path, tokenizer: Any) -> None:
    from datetime import datetime

    from tunesmith.evaluation.candidates import find_candidates
    from tunesmith.evaluation.settings import EvaluateSettings

    places = [tmp_path / name for name in ("x/a", "y/a", "a-1", "reference", "é")]
    for place in places:
        save_folder(place, tiny_config("qwen3"), tokenizer)
    found = find_candidates(EvaluateSettings([str(place) for place in places]), datetime.now())
    assert [one.name for one in found] == ["a-2", "a-3", "a-1", "reference-1", "é"]


def test_a_killed_evaluation_continues_and_ends_the_same(run, trained: Path, tmp_path: Path) -> None:
    words = (trained, "--base", "--max-new-tokens", 24)
    whole = evaluated(run, tmp_path / "whole", *words)
    command = [sys.executable, "-m", "tunesmith", "evaluate", *map(str, words), "--output", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    replies = tmp_path / "killed" / "replies.jsonl"
    while process.poll() is None and not (replies.exists() and replies.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "evaluate.json").exists()
    lines = replies.read_bytes().splitlines(keepends=True)
    replies.write_bytes(b"".join(lines[:-3]) + lines[-1][:40])  # and the kill cut a line
    continued = evaluated(run, tmp_path / "killed", *words)
    assert continued == whole
    ended = {name: (tmp_path / "killed" / name).read_bytes() for name in ("replies.jsonl", "evaluate.html")}
    assert ended == {name: (tmp_path / "whole" / name).read_bytes() for name in ended}


def test_ctrl_c_says_how_to_continue(run, trained: Path, tmp_path: Path) -> None:
    def press() -> None:
        while not (tmp_path / "out" / "evaluation-state.json").exists():
            time.sleep(0.002)
        signal.raise_signal(signal.SIGINT)

    words = ("evaluate", trained, "--base", "--max-new-tokens", 100, "--output", tmp_path / "out")
    thread = threading.Thread(target=press)
    thread.start()
    code, _, err = run(*words)
    thread.join()
    assert code == 3, err
    assert "continues" in err
    assert str(tmp_path / "out") in err
    assert not (tmp_path / "out" / "evaluate.json").exists()


def test_another_evaluation_is_not_mixed_in(run, fails, trained: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained.parent / "base", tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", CHATS[:6])
    words = ["evaluate", model, "--data", data, "--replies", "none", "--output", tmp_path / "out"]
    assert run(*words)[0] == 0
    assert run(*words)[0] == 0
    for more, told in (
        (["--temperature", 0.5], "temperature: 0.0 -> 0.5"),
        (["--data.chat_template", "alpaca"], "its labels"),
        (["--limit", 3], "limit: None -> 3"),
    ):
        error = fails(*words, *more)
        assert error.code == "evaluation-differs"
        assert told in str(error)
    assert "base is a new model" in str(fails("evaluate", trained.parent / "base", *words[1:]))
    save_folder(tmp_path / "other", tiny_config("qwen3", initializer_range=0.01), tunesmith_tokenizer(model))
    shutil.copy(tmp_path / "other" / "model.safetensors", model / "model.safetensors")
    write_jsonl(data, CHATS[:5])
    text = str(fails(*words))
    assert "weights" in text
    assert "rows" in text
    (tmp_path / "out" / "evaluation-state.json").write_text("{}")
    assert fails(*words).code == "evaluation-damaged"
    code, _, err = run(*words, "--overwrite")
    assert code == 0, err
    assert read_evaluation(EvaluationFolder(tmp_path / "out")).data.scored == 5


def tunesmith_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_refused_rows_are_named_and_too_many_end_it(run, fails, trained: Path, tmp_path: Path) -> None:
    rows = [*CHATS[:6], {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]}]
    data = write_jsonl(tmp_path / "bad.jsonl", rows)
    words = ("evaluate", trained, "--data", data, *SHORT, "--output", tmp_path / "out")
    assert fails(*words).code == "too-many-refused"
    code, out, _ = run(*words, "--data.max_refused", 0.5)
    assert code == 0
    assert "bad.jsonl:7" in out
    assert "1 left out" in out
    evaluation = read_evaluation(EvaluationFolder(tmp_path / "out"))
    assert [(refusal.count, refusal.rows) for refusal in evaluation.data.refused] == [(1, [f"{data}:7"])]


def test_what_makes_scores_doubtful_is_said(run, fails, trained: Path, tmp_path: Path) -> None:
    data = trained.parent / "chats.jsonl"
    words = ("evaluate", trained, "--data", data, "--replies", "none", "--output", tmp_path / "o")
    code, out, _ = run(*words)
    assert code == 0
    assert "was trained on" in out
    assert fails(*words[:4], data, *words[4:]).code == "file-named-twice"
    broken = shutil.copytree(trained.parent / "base", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    words = ("evaluate", broken, "--data", data, *SHORT, "--output", tmp_path / "b")
    assert fails(*words).code == "loss-not-finite"


def test_checkpoints_are_evaluated_as_models_of_their_run(run, trained: Path, tmp_path: Path) -> None:
    checkpoint = max((trained / "checkpoints").glob("step-*"))
    evaluation = evaluated(run, tmp_path / "o", checkpoint, trained, "--replies", "none")
    assert [model.name for model in evaluation.models] == [f"run/{checkpoint.name}", "run"]
    assert evaluation.models[0].scores["loss"] == evaluation.models[1].scores["loss"]


def test_rows_that_one_model_cannot_use_are_left_out_for_all(run, trained: Path, tmp_path: Path) -> None:
    long = chat_row("the quick brown fox " * 40, "The answer.")
    data = write_jsonl(tmp_path / "long.jsonl", [*CHATS[:6], long])
    words = (trained, trained.parent / "base", "--data", data, *SHORT, "--data.max_refused", 1)
    whole = evaluated(run, tmp_path / "whole", trained.parent / "base", "--data", data, *SHORT)
    assert whole.data.scored == 7
    both = evaluated(run, tmp_path / "both", *words)
    assert (both.data.rows, both.data.usable, both.data.scored) == (7, 6, 6)


def test_odd_rows_and_replies_are_scored(run, trained: Path, tmp_path: Path) -> None:
    answers = [
        "   ",
        "\x1b]0;x\x07\u202e",
        "a" * 90,
        "😀" * 9,
        "\n\n",
        "<|im_end|>",
        "</think>",
        '{"a": [1]}',
        "你好。",
        "0",
    ]
    data = write_jsonl(tmp_path / "odd.jsonl", [chat_row(f"Q {i}", answer) for i, answer in enumerate(answers)])
    code, out, err = run(
        "evaluate", trained, "--data", data, *SHORT, "--data.max_refused", 1, "--output", tmp_path / "o"
    )
    assert code == 0, err
    assert "\x1b" not in out
    scored = read_evaluation(EvaluationFolder(tmp_path / "o"))
    kinds = {record.reference: record.kind for record in records_of(tmp_path / "o")}
    assert kinds['{"a": [1]}'] == "json"
    assert scored.models[0].scores["json_valid"].rows == 1
    assert all(math.isfinite(score.value) for score in scored.models[0].scores.values() if score.value is not None)
    assert "tok:zh" in scored.methods["bleu"]


def test_a_prompt_without_room_counts_as_an_empty_reply(run, tmp_path: Path, tokenizer: Any) -> None:
    model = save_folder(tmp_path / "m", tiny_config("llama", max_position_embeddings=64), tokenizer)
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row("the quick brown " * 30, "no"), chat_row("Who?", "me")])
    evaluation = evaluated(run, tmp_path / "o", model, "--data", data, *SHORT, "--data.max_seq_len", 400)
    full, other = sorted(records_of(tmp_path / "o"), key=lambda record: -len(record.prompt))
    assert (full.error, full.reply, full.has_stopped, full.scores["exact_match"]) == ("context-full", "", False, 0)
    assert not other.error
    assert any("got no reply" in remark for remark in evaluation.models[0].remarks)


def test_cut_replies_are_not_generated(run, tmp_path: Path, tokenizer: Any) -> None:
    model = save_folder(tmp_path / "m", tiny_config("gpt2", n_positions=64), tokenizer)
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row("Who?", "the answer and " * 40)])
    evaluation = evaluated(run, tmp_path / "p", model, "--data", data, *SHORT)
    assert evaluation.data.replies == 0
    assert any("cut at 64 tokens" in remark for remark in evaluation.models[0].remarks)


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        (["{base}"], UsageError, "no-data"),
        (["new:minimind-26m", "--data", "{data}"], ModelError, "random-weights"),
        (["{base}", "{base}", "--data", "{data}"], UsageError, "model-twice"),
        (["{base}", "--base", "--data", "{data}"], ModelError, "no-base"),
        (["{base}", "--data", "{data}x"], DataError, "file-not-found"),
        (["{base}x", "--data", "{data}"], ModelError, "model-not-found"),
        (["{base}", "--data", "{data}", "--output", "{data}"], TunesmithError, "output-not-folder"),
        (["{base}", "--data", "{data}", "--output", "{base}"], TunesmithError, "output-taken"),
        (["{base}", "--data", "{data}", "--data.max_seq_len", "-1"], ConfigError, "config"),
        (["{base}", "{run}", "--tokenizer", "{base}", "--data", "{data}"], UsageError, "tokenizer-for-several"),
        (["{base}", "--data", "{data}", "--data.formt", "x"], UsageError, "unknown-flag"),
        (["{base}", "--data", "{data}", "--model.config.hidden_size", "9"], ModelError, ""),
    ],
)
def test_wrong_commands_have_their_errors(
    fails, trained: Path, tmp_path: Path, words: list[str], kind, code: str
) -> None:
    names = {"base": trained.parent / "base", "data": trained.parent / "chats.jsonl", "run": trained}
    output = [] if "--output" in words else ["--output", tmp_path / "out"]
    error = fails("evaluate", *[word.format(**names) for word in words], *output)
    assert isinstance(error, kind)
    assert not code or error.code == code


def test_flags_out_of_range_are_usage_errors(run, trained: Path) -> None:
    for flag, value in (
        ("--limit", 0),
        ("--temperature", -1),
        ("--replies", "some"),
        ("--seed", "x"),
        ("--bleu-tokenizer", "ja"),
    ):
        code, _, err = run("evaluate", trained, flag, value)
        assert code == 2
        assert flag in err


def test_held_out_rows_that_cannot_be_told_are_an_error(fails, trained: Path, tmp_path: Path) -> None:
    for name in ("run", "base"):
        shutil.copytree(trained.parent / name, tmp_path / name)
    shutil.copy(trained.parent / "chats.jsonl", tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record.pop("sha256")
    record["cwd"] = str(tmp_path)
    for entry in record["guard"]["data"]["train"]:
        entry["path"] = str(tmp_path / "chats.jsonl")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    config = (tmp_path / "run" / "config.yaml").read_text().replace(str(trained.parent), str(tmp_path))
    (tmp_path / "run" / "config.yaml").write_text(config)
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write(json.dumps(CHATS[0]) + "\n")
    error = fails("evaluate", tmp_path / "run")
    assert error.code == "held-out-rows-changed"
    (tmp_path / "run" / "config.yaml").write_text(config.replace("eval_split: 0.25", "eval_split: 0.0"))
    assert fails("evaluate", tmp_path / "run").code == "no-held-out-rows"


def test_python_takes_rows_and_writes_the_same_files(trained: Path, tmp_path: Path) -> None:
    evaluation = tunesmith.evaluate(trained, data=CHATS[:5], max_new_tokens=8, output=tmp_path / "out")
    assert isinstance(evaluation, tunesmith.Evaluation)
    assert callable(tunesmith.evaluate)
    assert [record.row for record in records_of(tmp_path / "out")] == [f"data[{i}]" for i in range(5)]
    again = tunesmith.evaluate(trained, data=CHATS[:5], max_new_tokens=8, output=tmp_path / "out")
    assert again == evaluation == read_evaluation(EvaluationFolder(tmp_path / "out"))
    with raises(UsageError, "no-model"):
        tunesmith.evaluate(data=CHATS)
    with raises(UsageError, "bad-number", "limit"):
        tunesmith.evaluate(trained, limit=0)
    with raises(UsageError, "unknown-choice", "replies"):
        tunesmith.evaluate(trained, replies="some")
    with raises(UsageError, "sampling-value", "temperature"):
        tunesmith.evaluate(trained, temperature=-1, output=tmp_path / "bad")
    with raises(ConfigError, "config", "data.fromat"):
        tunesmith.evaluate(trained, data={"train": [str(tmp_path)], "fromat": "messages"})
