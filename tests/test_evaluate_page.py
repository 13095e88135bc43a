"""evaluate.html: safe, self-contained, worst first, and usable with some thousand rows."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tunesmith.evaluation.records import (
    DataSummary,
    Difference,
    Evaluation,
    EvaluationFolder,
    ModelResult,
    Refusal,
    ReplyRecord,
    Score,
)
from tunesmith.judging import page as evaluation_page
from tunesmith.judging.page import KINDS, kinds_of, show_evaluation, sort_rows, write_page
from tunesmith.judging.run import Judgement
from tunesmith.judging.tally import Judged, tally

ATTACK = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\" ' \x1b[31m \u202e {{ 7*7 }}"


def record(model: str, row: int, reply: str, **more: Any) -> ReplyRecord:
    values: dict[str, Any] = {
        "turn": 0, "kind": "text", "prompt": f"question {row}", "reference": f"answer {row}", "has_stopped": True,
        "tokens": 3, "reference_tokens": 3,
    }  # fmt: skip
    scores = {"exact_match": float(reply == f"answer {row}"), "rougeL": 0.5} | more.pop("scores", {})
    return ReplyRecord(model=model, row=f"/data/chats.jsonl:{row}", reply=reply, scores=scores, **(values | more))


def evaluation(*names: str, judge: Any = None) -> Evaluation:
    scores = {"exact_match": Score(0.5, 0.4, 0.6, 10), "loss": Score(1.25), "tool_equal": Score(None)}
    models = [ModelResult(name, f"/models/{name}", None, "chatml", scores, ["a remark"]) for name in names]
    change = {"exact_match": Score(0.1, 0.02, 0.2, 10), "loss": Score(0.5, 0.4, 0.6, 10)}
    pairs = [Difference(name, names[0], change) for name in names[1:]]
    data = DataSummary(["/data/chats.jsonl"], 12, 12, 10, 10, 10, [Refusal(ATTACK, 2, ["chats.jsonl:3"])])
    return Evaluation(models, pairs, data, {"seed": 0, "temperature": 0.0, "max_new_tokens": 512}, {"rouge": "how"},
                      {}, judge, "1.0")  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_nothing_of_a_row_becomes_markup_and_nothing_is_fetched() -> None:
    records = [record(name, 1, ATTACK, prompt=ATTACK, reference=ATTACK) for name in ("base", ATTACK)]
    answers = [Judgement("h", "/data/chats.jsonl:1", 0, "base", ATTACK, "j", "first", ATTACK)]
    judge = {"model": "j", "url": "http://u", "method": "m", "comparisons": [tally(ATTACK, "base", [], 0).to_json()]}
    page = show_evaluation(evaluation("base", ATTACK, judge=judge), records, answers)
    tags = Tags(page).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not {"img", "link", "iframe", "a"} & {tag for tag, _ in tags}
    assert not [
        name for _, attributes in tags for name in attributes if name.startswith("on") or name in ("src", "href")
    ]
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "\\x1b[31m" in page
    assert "{{ 7*7 }}" in page
    assert "url(" not in page
    assert "http" not in re.sub("http://u", "", page)


def test_rows_are_worst_first_and_bounded(tmp_path: Path, monkeypatch: Any) -> None:
    replies = {1: ("answer 1", 1.0), 2: ("x", 0.2), 3: ("y", 0.0), 4: ("z", 0.9)}
    records = [record("m", row, text, scores={"rougeL": rouge}) for row, (text, rouge) in replies.items()]
    records.append(record("m", 5, "", error="context-full"))
    found = evaluation("m")
    assert [key[0].rpartition(":")[2] for _, key, _ in sort_rows(found, records)] == ["5", "3", "2", "4", "1"]
    monkeypatch.setattr(evaluation_page, "MAX_ROWS", 2)
    page = show_evaluation(found, records)
    assert page.count("<article") == 2
    assert "3 more are in replies.jsonl" in page
    folder = EvaluationFolder(tmp_path)
    folder.replies.write_text("".join(one.to_line() + "\n" for one in records))
    write_page(folder, found)
    assert folder.page.read_text() == page


def test_two_thousand_rows_of_two_models_stay_small() -> None:
    records = [record(name, row, "reply " * 2000, prompt="q " * 5000) for row in range(2500) for name in ("a", "b")]
    page = show_evaluation(evaluation("a", "b"), records)
    assert page.count("<article") == evaluation_page.MAX_ROWS == 2000
    assert len(page) < 20e6
    assert page.count("more characters]") == 4000


def test_kinds() -> None:
    def kinds(reply: str = "x", **more: Any) -> set[str]:
        return set(kinds_of(record("m", 1, reply, **more)))

    assert kinds("answer 1") == {"right"}
    assert kinds() == {"wrong"}
    assert kinds(" ") == {"wrong", "empty"}
    assert kinds(has_stopped=False, scores={"loops": 1.0}) == {"wrong", "endless", "loops"}
    assert kinds(kind="json", scores={"json_valid": 0.0, "json_equal": 0.0}) == {"wrong", "broken-json"}
    assert kinds(kind="json", scores={"json_valid": 1.0, "json_equal": 1.0}) == {"right"}
    assert kinds(kind="tool_call", has_tools=True, scores={"tool_equal": 0.0}) == {"wrong", "tool-calls", "wrong-call"}
    assert kinds(kind="tool_call", has_tools=True, scores={"tool_equal": 1.0}) == {"right", "tool-calls"}
    assert kinds(error="context-full") == {"wrong", "no-reply"}


def test_filters_offer_what_there_is() -> None:
    records = [record("a", 1, "same"), record("b", 1, "other"), record("a", 2, "你好世界", reference="你好世界好")]
    records.append(record("b", 2, "你好世界", reference="你好世界好"))
    answers = [
        Judgement("1", "/data/chats.jsonl:1", 0, "a", "b", "j", "first", "VERDICT: 1"),
        Judgement("2", "/data/chats.jsonl:1", 0, "b", "a", "j", "first", "VERDICT: 1"),
        Judgement("3", "/data/chats.jsonl:1", 0, "b", "a", "another judge", None, "never shown"),
    ]
    found = tally("b", "a", [Judged("1", "first", "first")], 0)
    judge = {"model": "j", "url": "u", "method": "m", "comparisons": [found.to_json()]}
    page = show_evaluation(evaluation("a", "b", judge=judge), records, answers)
    options = [attributes.get("value") for tag, attributes in Tags(page).tags if tag == "option"]
    assert [kind for kind in KINDS if kind in options] == ["wrong", "differs", "judge-split"]
    assert "<option>Chinese</option>" in page
    assert "never shown" not in page
    assert 'class="good">+10.0%' in page  # a higher exact match is better, a higher loss is not
    assert 'class="bad">+0.5000' in page
    assert "b against a" in page


def test_an_evaluation_without_replies_has_a_page() -> None:
    page = show_evaluation(evaluation("m"), [])
    assert "<script" not in page
    assert "1.2500" in page
