"""tunesmith generate: a model answers prompts as it is trained on them, and what is kept is data for train."""

from __future__ import annotations

import fcntl
import gc
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tunesmith
from conftest import SHARED, chat_row, needs_shared, save_folder, tiny_config, write_jsonl
from tunesmith.config.data_keys import DataSection
from tunesmith.distillation.checks import Scored, find_fault
from tunesmith.distillation.questions import Question, read_questions, spell_message
from tunesmith.distillation.samples import Sample
from tunesmith.distillation.settings import Selection, read_check
from tunesmith.errors import DataError, RunError, TunesmithError, UsageError
from tunesmith.generation.matching import final_number
from tunesmith.generation.reply_parts import ReplyParts
from tunesmith.rows.conversation import Conversation, RowRefused
from tunesmith.rows.formats import parse_row
from tunesmith.sources.folders import matches_pattern

SHORT = ("--max-new-tokens", 8)
CHATS = [chat_row(f"What is the answer {i}?", f"The answer is {i} and you.") for i in range(12)]
DATA = DataSection(train=["?"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A small model of which every eighth token ends a reply, so that replies are short and most of them end."""
    return save_writer(tmp_path_factory.mktemp("teacher") / "model", "qwen3", tokenizer)


def save_writer(folder: Path, architecture: str, tokenizer: Any, **overrides: Any) -> Path:
    """A small model that writes whole characters only, two tokens and more, and ends at every eighth token."""
    save_folder(folder, tiny_config(architecture, **overrides), tokenizer)
    settings = json.loads((folder / "generation_config.json").read_text())
    parts = [number for number in range(400) if "\ufffd" in tokenizer.decode([number])]
    stops = [2, *range(9, 400, 8)]
    settings |= {"eos_token_id": stops, "min_new_tokens": 2, "suppress_tokens": parts}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", CHATS)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers_of(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def ledger_of(output: Path) -> dict[str, Any]:
    ledger: dict[str, Any] = json.loads(output.with_name(f"{output.stem}.ledger.json").read_text())
    return ledger


def generated(run: Any, output: Path, *words: object) -> list[dict[str, Any]]:
    code, out, err = run("generate", *words, "--output", output)
    assert code == 0, out + err
    return lines_of(output)


# rows


@pytest.mark.parametrize(
    ("row", "fields", "asked", "reference"),
    [
        ({"prompt": "Who?"}, {}, "Who?", None),
        ({"prompt": "Who?", "completion": None}, {}, "Who?", None),
        ({"prompt": "Who?", "completion": "Me."}, {}, "Who?", "Me."),
        ({"prompt": [{"role": "user", "content": "Who?"}]}, {}, "Who?", None),
        ({"instruction": "Who?", "input": ""}, {}, "Who?", None),
        ({"instruction": "Who?", "input": "", "output": ""}, {}, "Who?", None),
        ({"instruction": "Say", "input": "it", "output": "it"}, {}, "Say\nit", "it"),
        ({"query": "Who?", "system": "Be kind."}, {}, "Who?", None),
        ({"input": "Who?"}, {}, "Who?", None),
        ({"question": "Who?", "answer": "Me."}, {"prompt": "question", "completion": "answer"}, "Who?", "Me."),
        ({"question": "Who?"}, {"prompt": "question", "completion": "answer"}, "Who?", None),
        ({"question": "Who?"}, {"prompt": "question"}, "Who?", None),
        ({"a": "Who?"}, {"instruction": "a"}, "Who?", None),
        ({"messages": [{"role": "user", "content": "Who?"}]}, {}, "Who?", None),
        ([{"role": "user", "content": "Who?"}], {}, "Who?", None),
        ({"conversations": [{"from": "human", "value": "Who?"}]}, {}, "Who?", None),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": " "}]}, {}, "Who?", None),
        (chat_row("Who?", "Me."), {}, "Who?", "Me."),
    ],
)
def test_rows_with_and_without_replies_are_questions(row, fields, asked, reference) -> None:
    data = DataSection(train=["?"], fields=fields)
    (question,) = read_questions("x:1", row, data, "last")
    assert question.row["messages"][-1] == {"role": "user", "content": asked}
    assert (question.reference or {}).get("content") == reference
    assert Question.from_line(question.to_line()) == question


def test_a_question_keeps_all_that_a_template_reads() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    row = {
        "system": "Be kind.",
        "tools": json.dumps([tool]),
        "chat_template_kwargs": {"enable_thinking": True},
        "messages": [
            {"role": "user", "content": "Look!"},
            {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call | {"id": "c1"}]},
            {"role": "tool", "content": "blue", "tool_call_id": "c1", "name": "look"},
        ],
    }
    (question,) = read_questions("x:1", row, DATA, "last")
    assert question.row["tools"] == [tool]
    assert question.row["chat_template_kwargs"] == {"enable_thinking": True}
    assert [turn["role"] for turn in question.row["messages"]] == ["system", "user", "assistant", "tool"]
    read = parse_row(question.answered({"role": "assistant", "content": "Blue."}), "auto", DATA.fields)
    assert isinstance(read, Conversation)
    own = parse_row({**row, "messages": [*row["messages"], {"role": "assistant", "content": "Blue."}]}, "auto", DATA.fields)  # fmt: skip
    assert isinstance(own, Conversation)
    assert [m.to_template() for m in read.messages] == [m.to_template() for m in own.messages]
    assert [m.is_trained for m in read.messages if m.role == "assistant"] == [False, True]
    assert (read.tools, read.template_kwargs) == (own.tools, own.template_kwargs)


def test_all_replies_are_asked_for_and_a_prefill_stays() -> None:
    row = {"messages": [*chat_row("One?", "1.")["messages"], *chat_row("Two?", "2.")["messages"]]}
    first, second = read_questions("x:1", row, DATA, "all")
    assert [len(one.row["messages"]) for one in (first, second)] == [1, 3]
    assert second.row["messages"][1]["loss_weight"] == 0
    prompt = [{"role": "user", "content": "Name?"}, {"role": "assistant", "content": "My name is"}]
    (question,) = read_questions("x:1", {"prompt": prompt}, DATA, "last")
    assert (question.prefill, question.reference) == ("My name is", None)
    (message,) = question.prompt_row()["messages"][1:]
    assert message["train_detail"] == [{"begin_offset": 0, "end_offset": 9, "train": False}]


@pytest.mark.parametrize("row", [{"text": "once upon a time"}, {"segments": [{"text": "a", "label": True}]}])
def test_text_has_no_question(row) -> None:
    with pytest.raises(RowRefused) as refused:
        read_questions("x:1", row, DATA, "last")
    assert refused.value.code == "no-question"


@needs_shared
def test_rows_of_every_real_file_are_spelled_so_that_they_read_the_same() -> None:
    from tunesmith.sources.read import find_sources, read_rows

    seen = 0
    for path in sorted((SHARED / "data").rglob("*.json*")):
        try:
            rows = [row for row, _ in zip(read_rows(find_sources([str(path)])), range(5), strict=False)]
        except TunesmithError:
            continue
        for row in rows:
            try:
                own = parse_row(row.parsed().value, "auto", DATA.fields)
                questions = read_questions(row.where, row.value, DATA, "last")
            except RowRefused:
                continue
            if not isinstance(own, Conversation) or questions[0].reference is None:
                continue
            seen += 1
            place = max(i for i, m in enumerate(own.messages) if m.role == "assistant" and m.is_trained)
            read = parse_row(questions[0].answered(spell_message(own.messages[place])), "auto", DATA.fields)
            assert isinstance(read, Conversation), row.where
            assert [m.to_template() for m in read.messages] == [m.to_template() for m in own.messages[: place + 1]]
            assert (read.tools, dict(read.template_kwargs), read.documents) == (
                own.tools, dict(own.template_kwargs), own.documents)  # fmt: skip
            assert not [note for note in read.notes if "not read" in note]
    assert seen > 30


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.\n#### 7", 7), ("#### 1,234", 1234), ("The answer is $18.50.", Fraction("18.5")),
        (r"thus \boxed{\frac{3}{4}}, not 9", Fraction(3, 4)), (r"\boxed{-12}", -12), ("-5", -5), ("5 - 3 is 2", 2),
        ("10%", 10), ("答案是18元", 18), ("it is ７", 7), ("−3", -3), ("9/0", None), ("v1.2.3", None), ("none", None),
        ("#### no", None), (r"\$1{,}000", 1000), ("18.0", 18), ("3/4", Fraction(3, 4)),
    ],
)  # fmt: skip
def test_the_number_that_an_answer_ends_in(text: str, number: Any) -> None:
    assert final_number(text) == number


# answers


def test_answers_are_rows_that_train_uses(run, teacher: Path, tmp_path: Path) -> None:
    rows = [*CHATS[:4], {"prompt": "What is the answer 3?", "id": 7}, {"instruction": "Who are you?", "input": ""}]
    data = write_jsonl(tmp_path / "mixed.jsonl", rows)
    answers = generated(run, tmp_path / "a.jsonl", teacher, "--data", data, "--samples", 3, "--max-new-tokens", 24)
    ledger = ledger_of(tmp_path / "a.jsonl")
    assert (ledger["data"]["rows"], ledger["data"]["used"], ledger["samples"]["samples"]) == (6, 6, 18)
    left_out = sum(one["count"] for one in ledger["samples"]["left_out"].values())
    assert ledger["samples"]["kept"] + left_out == 18
    assert ledger["samples"]["kept"] == len(answers) > 6
    assert {row["metadata"]["finish_reason"] for row in answers} == {"stop"}
    assert run("check", "--model", teacher, "--data", tmp_path / "a.jsonl")[0] == 0
    code, _, err = run("train", "--model", teacher, "--data", tmp_path / "a.jsonl", "--output", tmp_path / "student",
                         "--train.max_steps", 1)  # fmt: skip
    assert code == 0, err
    used = json.loads((tmp_path / "student" / "data_ledger.json").read_text())["train"]
    assert (used["used"], used["refused"]) == (len(answers), 0)
    assert not any(entry["notes"] for entry in used["files"].values())


def test_prompts_and_answers_are_those_of_evaluate(run, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    words = (teacher, "--data", prompts, "--max-new-tokens", 24)
    answers = generated(run, tmp_path / "a.jsonl", *words, "--keep-cut")
    assert run("evaluate", *words, "--output", tmp_path / "e")[0] == 0
    replies = {one["row"]: one for one in lines_of(tmp_path / "e" / "replies.jsonl")}
    assert len(answers) == len(replies) == 12
    for row in answers:
        reply = replies[row["metadata"]["row"]]
        assert row["messages"][-1]["content"].strip() == reply["reply"].strip()
        assert row["metadata"]["tokens"] == reply["tokens"]
        for name in ("exact_match", "rougeL", "loops"):
            assert row["metadata"]["scores"][name] == pytest.approx(reply["scores"][name], abs=1e-4)


def test_a_sample_does_not_depend_on_other_rows(run, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    words = (teacher, "--samples", 4, "--keep-cut", "--max-new-tokens", 12)
    whole = generated(run, tmp_path / "a.jsonl", *words, "--data", prompts)
    turned = write_jsonl(tmp_path / "turned.jsonl", reversed(CHATS))
    other = generated(run, tmp_path / "b.jsonl", *words, "--data", turned, "--max-rows", 3)
    said = [(row["messages"][0]["content"], row["metadata"]["sample"], row["messages"][-1]) for row in whole]
    assert sorted(said, key=str) == sorted(
        [(row["messages"][0]["content"], row["metadata"]["sample"], row["messages"][-1]) for row in other], key=str
    )
    assert len({row["messages"][-1]["content"] for row in whole}) > 12
    part = generated(run, tmp_path / "c.jsonl", *words, "--data", prompts, "--limit", 5)
    assert len({row["metadata"]["row"] for row in part}) == 5
    assert all(row in whole for row in part)
    assert ledger_of(tmp_path / "c.jsonl")["drawn"] == 5


def test_a_killed_run_continues_and_ends_the_same(run, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    words = (teacher, "--data", prompts, "--samples", 6, "--max-new-tokens", 24)
    generated(run, tmp_path / "whole.jsonl", *words)
    output = tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "tunesmith", "generate", *map(str, words), "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    samples = tmp_path / ".killed.samples" / "samples.jsonl"
    while process.poll() is None and not (samples.exists() and samples.stat().st_size):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not output.exists()
    lines = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])  # and the kill cut a line
    generated(run, output, *words)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    whole, killed = ledger_of(tmp_path / "whole.jsonl"), ledger_of(output)
    assert whole == killed


def test_a_kill_between_the_output_and_its_ledger_is_no_obstacle(run, teacher, prompts, tmp_path: Path) -> None:
    words = (teacher, "--data", prompts, "--keep-cut", *SHORT)
    generated(run, tmp_path / "a.jsonl", *words)
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.ledger.json").unlink()
    generated(run, tmp_path / "a.jsonl", *words)
    assert (tmp_path / "a.jsonl").read_bytes() == content
    assert ledger_of(tmp_path / "a.jsonl")["output"]["rows"] == 12


def test_ctrl_c_says_how_to_continue(run, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    def press() -> None:
        while not (tmp_path / ".a.samples" / "state.json").exists():
            time.sleep(0.002)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    words = (teacher, "--data", prompts, "--samples", 40, "--max-new-tokens", 100, "--keep-cut")
    code, _, err = run("generate", *words, "--output", tmp_path / "a.jsonl")
    thread.join()
    assert code == 3, err
    assert "continues" in err
    assert not (tmp_path / "a.jsonl").exists()


def test_samples_of_other_settings_are_not_mixed_in(run, fails, teacher: Path, tmp_path: Path) -> None:
    model = shutil.copytree(teacher, tmp_path / "model")
    data = write_jsonl(tmp_path / "p.jsonl", CHATS[:4])
    words = ["generate", model, "--data", data, "--output", tmp_path / "a.jsonl", "--keep-cut", *SHORT]
    assert run(*words)[0] == 0
    for more, told in (
        (["--temperature", 0.5], "temperature: 0.0 -> 0.5"),
        (["--seed", 4], "seed: 0 -> 4"),
        (["--data.chat_template", "alpaca"], "template"),
        (["--stop", "fox"], "stop: [] -> ['fox']"),
    ):
        error = fails(*words, *more)
        assert error.code == "generation-differs"
        assert told in str(error)
    write_jsonl(data, CHATS[:5])
    assert "rows of" in str(fails(*words))
    write_jsonl(data, CHATS[:4])
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "weights" in str(fails(*words))
    assert run(*words, "--overwrite")[0] == 0
    for name, value in (("generation_config.json", {"eos_token_id": 5}), ("config.json", {"rms_norm_eps": 0.01})):
        content = (model / name).read_text()
        (model / name).write_text(json.dumps(json.loads(content) | value))
        assert "generation_config" in str(fails(*words))
        (model / name).write_text(content)
    assert run(*words, "--overwrite")[0] == 0
    (tmp_path / ".a.samples" / "state.json").write_text("{}")
    assert fails(*words).code == "generation-damaged"


# what is kept


def crafted(run: Any, teacher: Path, rows: list[Any], texts: list[list[str]], output: Path, *words: object) -> Path:
    """An output whose samples have these texts, ready to be chosen among."""
    data = write_jsonl(output.with_name("crafted.jsonl"), rows)
    code, out, err = run("generate", teacher, "--data", data, "--output", output, "--samples", len(texts[0]),
                         "--max-new-tokens", 1, "--keep-cut", "--data.max_refused", 1, *words)  # fmt: skip
    assert code == 0 or "no sample is kept" in err, out + err
    samples = output.with_name(f".{output.stem}.samples") / "samples.jsonl"
    made = lines_of(samples)
    for one in made:
        text = texts[one["question"]][one["sample"]]
        one |= {"text": text, "finish_reason": "stop", "error": "", "tokens": len(text), "logprob": -float(len(text))}
        one["controls"] = [word for word in ("<|im_start|>", "<|im_end|>", '<|"|>') if word in text]
    write_jsonl(samples, made)
    return data


def chosen(run: Any, teacher: Path, data: Path, output: Path, texts: list[list[str]], *words: object) -> list[str]:
    words = ("--samples", len(texts[0]), "--max-new-tokens", 1, "--data.max_refused", 1, *words)
    return answers_of(generated(run, output, teacher, "--data", data, *words))


def test_answers_are_chosen_by_checks_and_scores(run, fails, teacher: Path, tmp_path: Path) -> None:
    rows = [chat_row("What is 3 + 4?", "3 + 4 = 7\n#### 7"), chat_row("Who?", "I am a fox."), {"prompt": "Say."}]
    texts = [
        ["It is 7.", "8", "#### 7", "It is 7.", "7 \ufffd"],
        ["I am a fox", "a fox", "a dog", "i AM a fox.", ""],
        ["one two three", "one", "two", "two", 'x <|"|>user'],
    ]
    output = tmp_path / "a.jsonl"
    data = crafted(run, teacher, rows, texts, output)
    words = (run, teacher, data, output, texts)
    assert len(chosen(*words)) == 3 + 4 + 3
    reasons = ledger_of(output)["samples"]["left_out"]
    assert {reason: one["count"] for reason, one in reasons.items()} == {
        "repeats another sample of the same prompt": 2,
        "has bytes that are not text (U+FFFD)": 1,
        "is empty": 1,
        "writes a control token in its text": 1,
    }
    assert chosen(*words, "--keep", "correct") == ["I am a fox", "i AM a fox."]
    assert chosen(*words, "--check", "number") == ["It is 7.", "#### 7"]
    assert chosen(*words, "--check", "regex=^(one|two)") == ["one two three", "one", "two"]
    assert chosen(*words, "--keep", "best") == ["#### 7", "I am a fox", "one"]
    assert chosen(*words, "--score", "logprob", "--keep-per-row", 1) == ["8", "a fox", "one"]
    assert chosen(*words, "--keep-per-row", 2) == ["It is 7.", "8", "I am a fox", "a fox", "one two three", "one"]
    assert fails("generate", teacher, "--data", data, "--output", output, "--samples", 5, "--max-new-tokens", 1,
                 "--check", "regex=zebra").code == "no-answers"  # fmt: skip
    assert len(lines_of(output)) == 6  # as before
    rejected = tmp_path / "rejected.jsonl"
    kept = chosen(*words, "--keep", "correct", "--rejected", rejected)
    others = lines_of(rejected)
    assert len(kept) + len(others) == 15
    assert sum(row["metadata"]["left_out"] == "fails the check reference" for row in others) == 6


def test_json_answers_are_checked_by_a_schema(run, teacher: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 1}))
    rows = [chat_row("List.", "[1, 2]")]
    texts = [["[1, 2.0]", "[3]", "[]", "```json\n[1]\n```", "no"]]
    output = tmp_path / "a.jsonl"
    data = crafted(run, teacher, rows, texts, output)
    words = (run, teacher, data, output, texts)
    assert chosen(*words, "--check", f"json_schema={schema}") == ["[1, 2.0]", "[3]"]
    assert chosen(*words, "--keep", "correct") == ["[1, 2.0]"]
    assert chosen(*words, "--check", "json_valid") == ["[1, 2.0]", "[3]", "[]"]
    assert chosen(*words, "--check", f"json_schema={schema}", "reference") == ["[1, 2.0]"]


def test_repeated_prompts_get_other_samples_and_no_repeated_answers(run, teacher: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", [CHATS[0], CHATS[1], CHATS[0]])
    answers = generated(run, tmp_path / "a.jsonl", teacher, "--data", data, "--samples", 12, "--max-new-tokens", 6,
                        "--keep-cut", "--temperature", 2)  # fmt: skip
    asked = [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in answers]
    assert len(asked) == len(set(asked))
    assert {row["metadata"]["row"][-1] for row in answers} == {"1", "2", "3"}


@needs_shared
def test_reasoning_and_tool_calls_are_fields_of_the_answer(run, teacher: Path, tmp_path: Path) -> None:
    template = SHARED / "templates" / "llamacpp" / "Qwen-Qwen3-0.6B.jinja"
    if not template.exists():
        pytest.skip("the template is not there")
    tool = {"type": "function", "function": {"name": "look", "parameters": {
        "type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}}}  # fmt: skip
    call = {"function": {"name": "look", "arguments": {"at": "sky"}}}
    messages = [{"role": "user", "content": "Look!"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = [{"messages": messages, "tools": [tool]}]
    written = '<tool_call>\n{"name": "look", "arguments": {"at": "%s"}}\n</tool_call>'
    texts = [
        [f"<think>\nHm.\n</think>\n\n{written % 'sky'}", written % "sea", "<tool_call>\n{", "Nothing.",
         '<tool_call>\n{"name": "jump", "arguments": {}}\n</tool_call>'],
    ]  # fmt: skip
    output, template_words = tmp_path / "a.jsonl", ("--data.chat_template", template)
    data = crafted(run, teacher, rows, texts, output, *template_words)
    words = (run, teacher, data, output, texts, *template_words)
    chosen(*words, "--keep", "correct")
    (row,) = lines_of(output)
    assert row["messages"][-1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm.",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}],
    }
    assert row["tools"] == [tool]
    chosen(*words, "--check", "tool_arguments")
    assert len(lines_of(output)) == 2


# what goes wrong


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        (["--data", "{data}", "--samples", "0", "--output", "{out}"], SystemExit, ""),
        (["--data", "{data}"], SystemExit, ""),
        (["--output", "{out}"], UsageError, "no-data"),
        (["--data", "{data}", "--output", "{out}.txt"], UsageError, "output-not-jsonl"),
        (["--data", "{data}", "--output", "{data}"], UsageError, "output-taken"),
        (["--data", "{data}", "--output", "{data}", "--overwrite"], UsageError, "output-is-input"),
        (["--data", "{folder}", "--output", "{folder}/new.jsonl"], UsageError, "output-is-input"),
        (["--data", "{data}", "--output", "{out}", "--rejected", "{out}"], UsageError, "output-twice"),
        (["--data", "{data}", "--output", "{folder}/a.jsonl", "--rejected", "{folder}/../{name}/a.jsonl"], UsageError,
         "output-twice"),
        (["--data", "{data}", "--output", "{folder}/a.jsonl", "--rejected", "{folder}/a.ledger.json"], UsageError,
         "output-twice"),
        (["--data", "{data}", "--output", "{out}", "--rejected", "{text}"], TunesmithError, "output-taken"),
        (["--data", "{folder}/p*.jsonl", "--output", "{folder}/panswers.jsonl"], UsageError, "output-is-input"),
        (["--data", "{folder}/**/*.jsonl", "--output", "{out}"], UsageError, "output-is-input"),
        (["--data", "{folder}/p*.json*", "--output", "{out}", "--rejected", "{folder}/pr.jsonl"], UsageError,
         "output-is-input"),
        (["--data", "{data}", "--output", "{out}", "--samples", "3", "--temperature", "0"], UsageError, "samples-greedy"),
        (["--data", "{data}", "--output", "{out}", "--check", "exact"], UsageError, "unknown-check"),
        (["--data", "{data}", "--output", "{out}", "--check", "regex=("], UsageError, "check-pattern"),
        (["--data", "{data}", "--output", "{out}", "--check", "json_schema={data}"], UsageError, "check-schema"),
        (["--data", "{data}", "--output", "{out}", "--score", "beauty"], UsageError, "unknown-score"),
        (["--data", "{data}", "--output", "{folder}/a\0.jsonl"], TunesmithError, "output-not-usable"),
        (["--data", "{data}x", "--output", "{out}"], DataError, "file-not-found"),
        (["--data", "{text}", "--output", "{out}"], DataError, "no-usable-rows"),
        (["--data", "{data}", "--output", "{out}", "--sampels", "2"], UsageError, "unknown-flag"),
    ],
)  # fmt: skip
def test_wrong_commands_leave_nothing_behind(fails, teacher, prompts, tmp_path: Path, words, kind, code: str) -> None:
    text = write_jsonl(tmp_path / "texts.jsonl", [{"text": "once"}])
    names = {
        "data": prompts,
        "out": tmp_path / "out" / "a.jsonl",
        "folder": tmp_path,
        "text": text,
        "name": tmp_path.name,
    }
    before = sorted(tmp_path.rglob("*"))
    filled = [word.format(**names) for word in words]
    if kind is SystemExit:
        with pytest.raises(SystemExit):
            fails("generate", teacher, *filled)
    else:
        error = fails("generate", teacher, *filled)
        assert error.code == code
        assert isinstance(error, kind if code != "output-taken" else TunesmithError)
    assert sorted(path for path in tmp_path.rglob("*") if path != tmp_path / "out") == before


@pytest.mark.parametrize("flag", ["--output", "--rejected"])
def test_a_file_that_cannot_be_written_is_known_before_anything_is_generated(
    run, teacher: Path, prompts: Path, tmp_path: Path, flag: str
) -> None:
    (tmp_path / "file").touch()
    for name in (tmp_path / "file" / "a.jsonl", tmp_path / f"{240 * 'x'}.jsonl"):
        words = {"--output": tmp_path / "good.jsonl", flag: name}
        code, _, err = run("generate", teacher, "--data", prompts, *(word for pair in words.items() for word in pair))
        assert code == 1
        assert "generating" not in err
        assert ".partial" not in err
        assert not (tmp_path / "good.jsonl").exists()
        assert not [path for path in tmp_path.rglob("*") if path.name == "samples.jsonl"]


def test_rejected_samples_are_written_anew_where_the_file_is_another(run, teacher, prompts, tmp_path: Path) -> None:
    words = ["generate", teacher, "--data", prompts, "--output", tmp_path / "a.jsonl", "--keep-cut", *SHORT,
             "--samples", 2, "--keep-per-row", 1]  # fmt: skip
    rejected = tmp_path / "new" / "rejected.jsonl"
    assert run(*words, "--rejected", rejected)[0] == 0
    whole = rejected.read_bytes()
    assert b"left_out" in whole
    for other in (b"", whole[: whole.index(b"\n") + 1]):
        rejected.write_bytes(other)
        assert run(*words, "--rejected", rejected)[0] == 0
        assert rejected.read_bytes() == whole


def test_a_pattern_that_does_not_end_is_named() -> None:
    check, text = "regex=^(a|a)+$", 60 * "a" + "!"
    sample = Sample(0, 0, text, "stop", "", 1, None)
    reason = find_fault(Scored(sample, ReplyParts("", text, ()), text, "text", None, {}), [read_check(check)])
    assert reason == f"the check {check} does not end"


def test_a_schema_that_cannot_be_decided_is_named(tmp_path: Path) -> None:
    for number, schema in enumerate(({"$ref": "https://example.com/schema.json"}, {"$ref": "#"})):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(schema))
        check = read_check(f"json_schema={file}")
        sample = Sample(0, 0, "[1]", "stop", "", 1, None)
        reason = find_fault(Scored(sample, ReplyParts("", "[1]", ()), "[1]", "json", None, {}), [check])
        assert reason == f"the check {check.text} does not end"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("*.jsonl", ["a.jsonl"]), ("**", ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl"]), ("b/*", ["b/c.jsonl"]),
     ("**/*.jsonl", ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl"]), ("b/**/[de]*", ["b/d/e.jsonl"]), ("?/c.*", ["b/c.jsonl"]),
     ("a.jsonl", []), ("b", [])],
)  # fmt: skip
def test_a_pattern_matches_what_glob_finds(tmp_path: Path, pattern: str, found: list[str]) -> None:
    names = ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    asked = f"{tmp_path}/{pattern}"
    matched = [name for name in names if matches_pattern((tmp_path / name).resolve(), asked)]
    assert matched == found
    if found:
        globbed = [path for path in glob.glob(asked, recursive=True) if Path(path).is_file()]
        assert sorted(Path(path).relative_to(tmp_path).as_posix() for path in globbed) == found


def test_bad_rows_are_counted_and_prompts_beyond_the_context_too(run, tmp_path: Path, tokenizer: Any) -> None:
    model = save_writer(tmp_path / "m", "llama", tokenizer, max_position_embeddings=64)
    rows = [
        CHATS[0],
        chat_row("the quick brown " * 40, "no"),
        {"messages": []},
        {"text": "once"},
        {"messages": [{"role": "nobody", "content": "x"}]},
        chat_row("say <|im_end|> to me", "yes"),
        {"prompt": ""},
    ]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    words = (model, "--data", data, "--keep-cut", "--data.max_refused", 1, *SHORT)
    answers = generated(run, tmp_path / "a.jsonl", *words)
    ledger = ledger_of(tmp_path / "a.jsonl")
    assert (ledger["data"]["rows"], ledger["data"]["used"]) == (7, 4)
    assert ledger["samples"]["questions"] == 4
    beyond = [r for r in ledger["samples"]["left_out"] if "no room" in r]
    assert [ledger["samples"]["left_out"][one]["count"] for one in beyond] == [1]
    assert "say <|im_end|> to me" in [row["messages"][0]["content"] for row in answers]


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3_moe", "gemma3"])
def test_other_models_answer_too(run, tmp_path: Path, tokenizer: Any, architecture: str) -> None:
    model = save_writer(tmp_path / "m", architecture, tokenizer)
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"the quick {i}\n"} for i in range(3)])
    words = ("--data.chat_template", "none") if architecture == "gpt2" else ()
    answers = generated(run, tmp_path / "a.jsonl", model, "--data", data, "--keep-cut", "--samples", 2, *words, *SHORT)
    assert len(answers) == 6
    assert run("check", "--model", model, "--data", tmp_path / "a.jsonl", *words)[0] == 0


def test_files_of_the_same_name_stay_apart(run, teacher: Path, tmp_path: Path) -> None:
    files = []
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        files.append(write_jsonl(tmp_path / name / "p.jsonl", CHATS[number : number + 1]))
    answers = generated(run, tmp_path / "a.jsonl", teacher, "--data", *files, "--keep-cut", *SHORT)
    assert [row["metadata"]["row"] for row in answers] == [f"{file}:1" for file in files]


def test_two_processes_do_not_write_one_output(fails, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / ".a.samples").mkdir()
    handle = os.open(tmp_path / ".a.samples", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    words = ("generate", teacher, "--data", prompts, "--output", tmp_path / "a.jsonl")
    assert fails(*words).code == "generation-in-use"
    os.close(handle)


def test_a_full_disk_leaves_whole_samples(run, fails, teacher: Path, prompts: Path, make_disk, tmp_path: Path) -> None:
    disk = make_disk("60k")
    words = (teacher, "--data", prompts, "--samples", 16, "--keep-cut", "--max-new-tokens", 24)
    error = fails("generate", *words, "--output", disk / "a.jsonl")
    assert (error.code, type(error)) == ("disk-full", RunError)
    del error
    gc.collect()  # its frames hold files of the disk
    assert not (disk / "a.jsonl").exists()
    samples = (disk / ".a.samples" / "samples.jsonl").read_bytes()
    assert samples.endswith(b"\n")
    assert all(json.loads(line) for line in samples.splitlines())
    shutil.copytree(disk / ".a.samples", tmp_path / ".a.samples")
    generated(run, tmp_path / "a.jsonl", *words)
    generated(run, tmp_path / "b.jsonl", *words)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_python_gives_the_same_answers(run, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    command = generated(run, tmp_path / "a.jsonl", teacher, "--data", prompts, "--samples", 2, "--keep-cut", *SHORT)
    answers = tunesmith.generate(teacher, data=CHATS, output=tmp_path / "b.jsonl", samples=2, keep_cut=True,
                                 max_new_tokens=8)  # fmt: skip
    rows = list(answers.rows())
    assert [row["messages"] for row in rows] == [row["messages"] for row in command]
    assert rows[0]["metadata"]["row"] == "data[0]"
    assert answers.ledger["samples"]["kept"] == len(rows)
    preview = tunesmith.preview(model=teacher, data=answers, rows=1)
    assert preview.to_json()[0]["status"] == "used"
    for wrong in ({"samples": 0}, {"keep": "good"}, {"top_p": 3}, {"seed": "x"}, {"check": "nothing"}):
        with pytest.raises(UsageError):
            tunesmith.generate(teacher, data=CHATS, output=tmp_path / "c.jsonl", **wrong)


def test_selections_are_described() -> None:
    assert Selection(keep="best").to_json()["keep_per_row"] == 1
    assert [check.name for check in Selection(keep="correct").all_checks] == ["reference"]
    assert read_check("regex=a=b").pattern.search("a=b")
