"""lm-eval on our model folder, our adapter and our server: the replies and the exact match of `tunesmith evaluate`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import write_jsonl
from tunesmith.cli import main
from tunesmith.demo.chats import draw_chats, draw_held_out
from tunesmith.demo.run import SHARES, base_folder
from tunesmith.evaluation.records import EvaluationFolder, read_evaluation, read_replies

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("TUNESMITH_LONG"), reason="takes minutes; TUNESMITH_LONG=1 runs it"),
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'lm_eval[api]'"
    ),
]
TASK = Path(__file__).resolve().parents[1] / "docs" / "lm_eval"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small chat model, an adapter on it, and held-out chats of one question each."""
    folder = tmp_path_factory.mktemp("made")
    held_out, kept_out = draw_held_out(8, list(SHARES))

    def rows(chats: object) -> Iterator[dict[str, object]]:
        for chat in chats:  # type: ignore[attr-defined]
            for task in chat:
                turns = [("user", task.question), ("assistant", task.answer)]
                yield {"messages": [{"role": role, "content": text} for role, text in turns]}

    train = write_jsonl(folder / "train.jsonl", rows(draw_chats(4000, 0, kept_out, SHARES)))
    test = {row["messages"][0]["content"]: row for row in rows(held_out)}  # type: ignore[index]
    write_jsonl(folder / "test.jsonl", test.values())
    words = ("--data.max_seq_len", "128", "--train.micro_batch_tokens", "384", "--train.log_steps", "50")
    full = ("--data.chat_template", "chatml", "--optim.lr", "2e-3", "--output", folder / "full")
    lora = ("--lora.kind", "lora", "--optim.lr", "2e-3", "--data.limit", "600", "--output", folder / "lora")
    for model, more in ((base_folder(), full), (folder / "full" / "model", lora)):
        assert main([str(word) for word in ("train", "--model", model, "--data", train, *more, *words)]) == 0
    task = shutil.copytree(TASK, folder / "task")
    text = (task / "chats.yaml").read_text()
    (task / "chats.yaml").write_text(text.replace("test: chats.jsonl", f"test: {folder / 'test.jsonl'}"))
    return folder


def lm_eval(made: Path, output: Path, model: str, arguments: str) -> tuple[dict[str, float], dict[str, str]]:
    """The scores, and question -> reply."""
    words = ["--model", model, "--model_args", arguments, "--tasks", "chats", "--include_path", made / "task",
             "--apply_chat_template", "--output_path", output, "--log_samples", "--batch_size",
             "8" if model == "hf" else "1", *(["--device", "cpu"] if model == "hf" else [])]  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "lm_eval", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (results,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_chats_*.jsonl")
    scores = json.loads(results.read_text())["results"]["chats"]
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    replies = {line["doc"]["messages"][0]["content"]: line["resps"][0][0] for line in lines}
    return {name.split(",")[0]: value for name, value in scores.items() if name.endswith(",none")}, replies


@contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of `tunesmith serve MODEL`."""
    words = [sys.executable, "-m", "tunesmith", "serve", str(model), "--port", "0", "--name", "m"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = next(filter(None, (re.search(r"http://\S+/v1", line) for line in process.stdout)))
            yield found.group()
        finally:
            process.terminate()


@pytest.mark.parametrize("kind", ["model folder", "adapter", "server"])
def test_lm_eval_gives_the_same_replies_and_exact_match(kind: str, made: Path, tmp_path: Path) -> None:
    run = made / ("lora" if kind == "adapter" else "full")
    assert main(["evaluate", str(run), "--data", str(made / "test.jsonl"), "--output", str(tmp_path / "ours")]) == 0
    folder = EvaluationFolder(tmp_path / "ours")
    ours = read_evaluation(folder).models[0].scores
    rows = [json.loads(line)["messages"][0]["content"] for line in (made / "test.jsonl").read_text().splitlines()]
    replies = {rows[int(one.row.rpartition(":")[2]) - 1]: one.reply for one in read_replies(folder)}
    base = f"pretrained={made / 'full' / 'model'},dtype=float32"
    if kind == "server":
        with served(run) as url:
            arguments = f"model=m,base_url={url}/chat/completions,num_concurrent=8"
            theirs, their_replies = lm_eval(made, tmp_path / "theirs", "local-chat-completions", arguments)
    else:
        arguments = f"{base},peft={run / 'adapter'}" if kind == "adapter" else base
        theirs, their_replies = lm_eval(made, tmp_path / "theirs", "hf", arguments)
    assert their_replies == replies
    for name in ("exact_match", "exact_match_strict"):
        assert theirs[name] == pytest.approx(ours[name].value, abs=1e-12)
        assert 0.2 < theirs[name] < 1
