"""Preview shows what is trained: ids and masks of `preview --json` equal those in RUN/tokens, file by file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import chat_row, save_folder, tiny_config, write_jsonl
from test_matrix import OWN_TEMPLATES, tokenizer_for
from tunesmith.data.store import open_store

TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "AbCdEfG12", "type": "function", "function": {"name": "look", "arguments": {"at": "fox"}}}


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chats() -> list[Any]:
    long = [turn("user" if i % 2 == 0 else "assistant", f"{i} the quick brown fox " * (1 + i % 5)) for i in range(12)]
    return [
        *[chat_row(f"What is the answer {i}?", "The answer is forty two. " * (1 + i % 7)) for i in range(20)],
        {"messages": [turn("system", "Be brief."), *chat_row("你好，世界。", "处处闻啼鸟。")["messages"]]},
        {"messages": long},
        chat_row("a typed <|im_end|> token", "and <think> another"),
        chat_row("refused", ""),
    ]


def thoughts() -> list[Any]:
    return [
        {
            "messages": [
                turn("user", f"Why {i}?"), turn("assistant", "So.", reasoning_content="hello to you"),
                turn("user", "And?"), turn("assistant", f"It is {i}.", reasoning_content="the lazy dog " * (1 + i % 9)),
            ]
        }
        for i in range(15)
    ]  # fmt: skip


def tools() -> list[Any]:
    return [
        {
            "messages": [
                turn("user", f"Look {i}"), turn("assistant", "", tool_calls=[CALL]),
                turn("tool", "a dog" * (1 + 20 * (i % 3)), name="look", tool_call_id="AbCdEfG12"), turn("assistant", "It is a dog."),
            ],
            "tools": [TOOL],
        }
        for i in range(12)
    ]  # fmt: skip


def instructions() -> list[Any]:
    return [
        {"instruction": f"Say hello {i}", "input": "to me" * (i % 2), "output": "hello " * (1 + i)} for i in range(25)
    ]


def texts() -> list[Any]:
    return [{"text": "the quick brown fox jumps over the lazy dog and says hello\n" * (1 + 5 * i)} for i in range(6)]


# some rows of each are longer
MAX_SEQ_LEN = {"chats": 96, "thoughts": 96, "tools": 450, "instructions": 40, "texts": 96}
ROWS = {"chats": chats, "thoughts": thoughts, "tools": tools, "instructions": instructions, "texts": texts}
TEMPLATES = ("default_system", "strips_thinking", "generation_marks", "documents_and_names", "arguments_as_text")
CASES = [
    *[("chats", template, ()) for template in TEMPLATES],
    *[("thoughts", template, ()) for template in ("strips_thinking", "channels")],
    *[("tools", template, ()) for template in ("default_system", "arguments_as_text", "merges_results")],
    ("instructions", "alpaca", ()),
    ("instructions", "none", ()),
    ("texts", "default_system", ()),
    ("chats", "default_system", ("--data.overlong", "drop")),
    ("chats", "default_system", ("--data.history", "unroll")),
    ("chats", "default_system", ("--data.train_on", "last_assistant")),
    ("chats", "default_system", ("--data.control_text", "allow")),
    ("chats", "default_system", ("--data.train_on", "all")),
]


def samples_of(preview: list[dict[str, Any]]) -> list[tuple[int, list[int], list[int]]]:
    return [(row["row"], s["input_ids"], s["loss_mask"]) for row in preview for s in row["samples"]]


@pytest.mark.parametrize(
    ("rows", "template", "flags"), CASES, ids=lambda value: "-".join(value) if isinstance(value, tuple) else value
)
def test_preview_shows_the_tokens_of_a_run(
    run: Any, tokenizer: Any, tmp_path: Path, rows: str, template: str, flags: tuple[str, ...]
) -> None:
    built_in = template in ("alpaca", "none")
    text = None if built_in else (OWN_TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    own = copy.deepcopy(tokenizer) if text is None else tokenizer_for(tokenizer, text)
    model = save_folder(tmp_path / "model", tiny_config("qwen3", vocab_size=len(own)), own)
    data = write_jsonl(tmp_path / "data.jsonl", ROWS[rows]())
    given = ["--model", model, "--data", data, "--data.max_seq_len", MAX_SEQ_LEN[rows], "--data.max_refused", 0.5,
             "--data.max_cut_replies", 1, *flags,
             *(["--data.chat_template", template] if built_in else [])]  # fmt: skip
    code, out, err = run("preview", *given, "--rows", 1000, "--json")
    assert code == 0, err
    shown = [json.loads(line) for line in out.splitlines()]
    assert len(shown) == len(ROWS[rows]())
    code, _, err = run(
        "train", *given, "--output", tmp_path / "run", "--train.max_steps", 1, "--train.micro_batch_tokens", 512
    )
    assert code == 0, err
    store = open_store(tmp_path / "run" / "tokens")
    stored = [
        (int(store.row_numbers[i]), store[i].input_ids.tolist(), store[i].loss_mask.tolist()) for i in range(len(store))
    ]
    assert stored == samples_of(shown)
    assert sum(np.sum(mask) for _, _, mask in stored) > 0
    ledger = json.loads((tmp_path / "run" / "data_ledger.json").read_text(encoding="utf-8"))["train"]
    assert ledger["refused"] == sum(row["status"] == "refused" for row in shown)
