"""Exact match and ROUGE-L without libraries: words as rouge-score finds them, and those of scripts that it drops."""

from __future__ import annotations

import random

import pytest

from tunesmith.generation.matching import lcs_length, matches_exactly, normalize, rouge_l, split_words


@pytest.mark.parametrize(
    ("reply", "reference", "is_same"),
    [
        ("Paris.", "paris", True),
        ("  42\n", "42", True),
        ("Ｐａｒｉｓ！", "Paris", True),
        ("好的。", "好的", True),
        ("straße", "STRASSE", True),
        ("-5", "5", False),
        ("1.5", "15", False),
        ("(a)", "a", False),
        ("", "...", False),
        ("?!", "", False),
        ("?", "？", True),
        ("cafe\u0301", "café", True),
        ("cafe", "café", False),
        ("a  b", "a\tb", True),
        ("ab", "a b", False),
    ],
)
def test_exact_match_is_of_normalised_texts(reply: str, reference: str, is_same: bool) -> None:
    assert matches_exactly(reply, reference) is is_same
    assert normalize(normalize(reply)) == normalize(reply)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World_2x!", ["hello", "world", "2x"]),
        ("naïve café", ["na", "ve", "caf"]),  # as rouge-score
        ("你好,world世界", ["你", "好", "world", "世", "界"]),
        ("カード です", ["カ", "ー", "ド", "で", "す"]),
        ("안녕 하세요", ["안녕", "하세요"]),
        ("Привет, мир", ["привет", "мир"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("١٢٣ عدد", ["١٢٣", "عدد"]),
        ("\u0301 😀 \x1b[0m -- ½²", ["0m"]),
        ("", []),
    ],
)
def test_words_of_every_script(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_words_and_rouge_l_equal_those_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    from rouge_score import tokenize

    rng = random.Random(0)
    for _ in range(200):
        one, two = ("".join(rng.choices("aB b_cé 1-.\n", k=rng.randrange(60))) for _ in range(2))
        assert split_words(one) == tokenize.tokenize(one, None)
        assert rouge_l(two, one) == scorer.score(one, two)["rougeL"].fmeasure


def test_long_texts_take_no_time() -> None:
    one = [str(number % 977) for number in range(20_000)]
    assert lcs_length(one, one[::2]) == 10_000
    assert lcs_length([], one) == lcs_length(one, []) == 0
