"""tunesmith evaluate: likelihoods as in training, replies scored and kept, several models on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, save_folder, tiny_config, write_jsonl

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

from tunesmith.evaluation.records import EvaluationFolder, read_evaluation, read_replies
from tunesmith.runfolder import RunFolder, read_metrics

SHORT = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A finished run that held rows out, with its base and data beside it."""
    from tunesmith.cli import main

    folder = tmp_path_factory.mktemp("trained")
    base = save_folder(folder / "base", tiny_config("qwen3", initializer_range=0.02), tokenizer)
    rows = [chat_row(f"What is the answer {i}?", f"The answer is {i} and you.") for i in range(40)]
    data = write_jsonl(folder / "chats.jsonl", rows)
    words = ("train", "--model", base, "--data", data, "--output", folder / "run", "--data.eval_split", "0.25",
             "--optim.lr", "3e-3", "--train.epochs", "6", "--train.micro_batch_tokens", "256", "--data.max_seq_len", "128")  # fmt: skip
    assert main([str(word) for word in words]) == 0
    return folder / "run"


def evaluated(run, output: Path, *words: object) -> Any:
    code, _out, err = run("evaluate", *words, "--output", output)
    assert code == 0, err
    return read_evaluation(EvaluationFolder(output))


def test_a_run_is_scored_on_its_held_out_rows_as_in_training(run, trained: Path, tmp_path: Path) -> None:
    evaluation = evaluated(run, tmp_path / "out", trained, *SHORT)
    last = [record for record in read_metrics(RunFolder(trained).metrics) if "eval_loss" in record][-1]
    scores = evaluation.models[0].scores
    assert scores["loss"].value == pytest.approx(last["eval_loss"], rel=1e-6)
    assert scores["perplexity"].value == pytest.approx(last["eval_perplexity"], rel=1e-6)
    assert scores["token_accuracy"].value == last["eval_token_accuracy"]
    assert (evaluation.data.rows, evaluation.data.scored, evaluation.data.replies) == (10, 10, 10)
    assert all(score.low <= score.value <= score.high for score in scores.values() if score.low is not None)
    records = list(read_replies(EvaluationFolder(tmp_path / "out")))
    assert len(records) == 10
    assert {record.reference for record in records} <= {f"The answer is {i} and you." for i in range(40)}
    assert scores["exact_match"].value == sum(record.scores["exact_match"] for record in records) / 10
