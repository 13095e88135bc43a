"""Text scores equal what the tools' own commands print for the same texts, Chinese included."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import raises

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

from tunesmith.errors import UsageError
from tunesmith.evaluation.texts import (
    TextScorer,
    bleu_of,
    choose_tokenizer,
    chrf_of,
    one_segment,
    require_tokenizer,
    sentence_bleu,
)
from tunesmith.generation.matching import split_words

ENGLISH = [
    ("The cat sat on the mat.", "The cat is on the mat."),
    ("It isn't 1,000.5 km - or is it?", "It is 1,000.5 km, isn't it?"),
    ("", "An answer that is missing"),
    ("same words here again", "same words here again"),
    ("two\nlines\r\nof text", "two lines of text"),
    ("naïve café &quot;x&quot;", "naive café \"x\""),
    ("no match", "other words entirely"),
]  # fmt: skip
CHINESE = [
    ("今天天气很好，我们去公园吧。", "今天天气不错，我们去公园玩吧。"),
    ("他在2024年买了iPhone 15。", "他于2024年购买了 iPhone 15。"),
    ("好的", "好的。"),
    ("", "没有回答"),
    ("完全不同", "另外一句话"),
]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f"{one_segment(text)}\n" for text in texts), encoding="utf-8")
    return path


def sacrebleu_command(folder: Path, pairs: list[tuple[str, str]], *flags: str) -> list[str]:
    """What the command prints as scores, with ten decimals."""
    replies = write_lines(folder / "replies.txt", [reply for reply, _ in pairs])
    references = write_lines(folder / "references.txt", [reference for _, reference in pairs])
    command = [sys.executable, "-m", "sacrebleu", str(references), "-i", str(replies), "-b", "-w", "10", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(("pairs", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh"), (CHINESE, "char")])
def test_corpus_scores_equal_the_command_of_sacrebleu(tmp_path: Path, pairs, tokenizer: str) -> None:
    scorer = TextScorer(tokenizer)
    bleu = bleu_of(np.sum([scorer.bleu_counts(*pair) for pair in pairs], axis=0))
    chrf = chrf_of(np.sum([scorer.chrf_counts(*pair) for pair in pairs], axis=0))
    found = sacrebleu_command(tmp_path, pairs, "-m", "bleu", "chrf", "-tok", tokenizer, "-f", "text")
    assert found == [f"{bleu:.10f}", f"{chrf:.10f}"]
    assert bleu > 1
    assert f"tok:{tokenizer}" in scorer.signatures()["bleu"]


@pytest.mark.parametrize("is_chinese", [False, True])
def test_rouge_equals_the_command_of_rouge_score(tmp_path: Path, is_chinese: bool) -> None:
    """rouge-score drops Chinese, so its command gets each word of ours as a word that it keeps."""
    pairs = CHINESE if is_chinese else ENGLISH
    words = {
        word: f"w{number}"
        for number, word in enumerate(dict.fromkeys(w for p in pairs for t in p for w in split_words(t)))
    }
    files = []
    for side, name in enumerate(("replies", "references")):
        texts = [pair[side] for pair in pairs]
        if is_chinese:
            texts = [" ".join(words[word] for word in split_words(text)) for text in texts]
        files.append(write_lines(tmp_path / f"{name}.txt", texts))
    output = tmp_path / "scores.csv"
    command = [sys.executable, "-m", "rouge_score.rouge", f"--target_filepattern={files[1]}", f"--prediction_filepattern={files[0]}",
               f"--output_filename={output}", "--noaggregate"]  # fmt: skip
    subprocess.run(command, capture_output=True, check=True)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    scorer = TextScorer("13a")
    for row, pair in zip(rows, pairs, strict=True):
        found = scorer.rouge(*pair)
        assert {name: row[f"{name}-F"] for name in found} == {name: f"{value:.6f}" for name, value in found.items()}
    assert any(float(row["rouge2-F"]) > 0 for row in rows)


def test_scores_of_summed_counts_equal_sacrebleu_on_random_texts() -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    rng = random.Random(3)
    scorer = TextScorer("13a")
    for _ in range(60):
        pairs = [
            tuple(" ".join(rng.choices("a b c d e.", k=rng.randrange(9))) for _ in range(2))
            for _ in range(rng.randrange(1, 4))
        ]
        bleu, chrf = ([count(*pair) for pair in pairs] for count in (scorer.bleu_counts, scorer.chrf_counts))
        replies, references = zip(*pairs, strict=True)
        assert bleu_of(np.sum(bleu, axis=0)) == pytest.approx(
            BLEU().corpus_score(replies, [references]).score, abs=1e-9
        )
        assert chrf_of(np.sum(chrf, axis=0)) == pytest.approx(
            CHRF().corpus_score(replies, [references]).score, abs=1e-9
        )
        one = BLEU(effective_order=True).sentence_score(replies[0], [references[0]]).score
        assert sentence_bleu(bleu[0]) == pytest.approx(one, abs=1e-9)
    assert bleu_of(np.zeros((2, 10))).tolist() == chrf_of(np.zeros((2, 18))).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("references", "tokenizer"),
    [
        (["Hello there."], "13a"),
        (["你好，世界。"], "zh"),
        (["Hello."] * 9 + ["你好"], "zh"),
        (["Hello."] * 99 + ["你好"], "13a"),
        (["これはペンです。", "漢字かな"], "char"),
        (["안녕하세요"], "char"),
        (["สวัสดี"], "char"),
        (["Привет"], "13a"),
        (["42", "{}", ""], "13a"),
        ([], "13a"),
    ],
)
def test_the_tokenizer_follows_the_scripts(references: list[str], tokenizer: str) -> None:
    name, reason = choose_tokenizer(references)
    assert name in (tokenizer, "ja-mecab", "ko-mecab")
    assert reason
    TextScorer(name).bleu_counts("a", "b")


def test_a_tokenizer_that_is_not_installed_is_named() -> None:
    pytest.importorskip("sacrebleu")
    for name, module in (("ja-mecab", "MeCab"), ("ko-mecab", "mecab_ko")):
        try:
            __import__(module)
        except ImportError:
            with raises(UsageError, "extra-missing", name):
                require_tokenizer(name)
    require_tokenizer("zh")


@pytest.mark.parametrize(
    "text", ["", "   ", "\x00\x1b[31m\x9b", "a" * 20_000, "\u202e\u2028\x85", "🙂" * 300, "{" * 3000]
)
def test_odd_texts_have_scores(text: str) -> None:
    scorer = TextScorer("zh")
    for pair in ((text, "a reference"), ("a reply", text), (text, text)):
        found = [*scorer.bleu_counts(*pair), *scorer.chrf_counts(*pair), *scorer.rouge(*pair).values()]
        assert np.isfinite(found).all()
