"""One cause is listed once, whatever its texts quote; a data set with many distinct texts stays fast."""

from __future__ import annotations

import time

from tunesmith.data.causes import group_causes

DROPS = "the template drops the tool schema of {}"


def texts(*found: tuple[str, str, int]) -> list[tuple[int, str]]:
    return [(cause.count, cause.text) for cause in group_causes({(code, text): n for code, text, n in found})]


def test_names_numbers_and_quotes_do_not_part_a_cause() -> None:
    assert texts(*(("lost", DROPS.format(name), n) for name, n in (("get-weather", 4), ("a.b", 2), ("news", 1)))) == [
        (7, "the template drops the tool schema of … (…: get-weather 4, a.b 2, news 1)")
    ]
    assert texts(("long", "is 1591 tokens long; the limit is 512", 1), ("long", "is 741 tokens long; the limit is 512", 2)) == [
        (3, "is … tokens long; the limit is 512 (…: 741 to 1591)")
    ]  # fmt: skip
    assert texts(("r", "unknown role 'a b'; known: x, y", 2), ("r", "unknown role 'c'; known: x, y", 1)) == [
        (3, "unknown role '…'; known: x, y (…: a b 2, c 1)")
    ]
    assert texts(("k", "key tone is lost; ignore tone", 1), ("k", "key mood is lost; ignore mood", 1)) == [
        (2, "key … is lost; ignore … (…: mood 1, tone 1)")
    ]


def test_other_codes_other_sentences_and_texts_without_a_code_stay_apart() -> None:
    assert len(texts(("a", "the list is empty", 1), ("b", "the text is empty", 1))) == 2
    assert len(texts(("", "has an empty question", 1), ("", "has an empty answer", 1))) == 2
    assert len(texts(("c", DROPS.format("x"), 1), ("c", "turns do not alternate between user and assistant", 1))) == 2
    assert texts(("a", "only one", 3)) == [(3, "only one")]


def test_what_texts_hold_cannot_mislead() -> None:
    hostile = ["…", "", "drops the tool schema of x", "a" * 5000, "the template", "\n", "{}"]
    found = group_causes({("c", DROPS.format(name)): 1 for name in hostile})
    assert sum(cause.count for cause in found) == len(hostile)
    assert all(len(cause.text) < 6000 for cause in found)


def test_many_texts_are_grouped_fast() -> None:
    start = time.perf_counter()
    assert len(group_causes({("c", DROPS.format(f"tool_{i}")): 1 for i in range(20_000)})) == 1
    apart = {("c", f"a{i} b{i} c{i} d{i}"): 1 for i in range(20_000)}
    assert len(group_causes(apart)) == len(apart)
    assert time.perf_counter() - start < 10
