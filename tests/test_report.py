"""report.html: all texts of a run, its data and its model are escaped; charts show its metrics."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, raises, write_jsonl
from tunesmith.errors import TunesmithError
from tunesmith.files import sealed
from tunesmith.report.charts import Series, line_chart, smooth, thin
from tunesmith.report.durations import format_duration, measure_durations
from tunesmith.report.page import changed_keys, list_facts, list_problems, show_run, split_keys
from tunesmith.report.records import read_metrics, read_run
from tunesmith.report.replies import SampleReplies, SampleReply, keep_replies, kept_replies
from tunesmith.report.ticks import format_ticks, format_value, log_ticks, nice_ticks
from tunesmith.report.verdict import judge
from tunesmith.report.write import describe_outcome, read_verdict, write_report

EVIL = "<script>alert('1')</script>&\"quoted\"\x1b[31m\u202e</pre></style>"
SHOWN = "<script>alert('1')</script>&\"quoted\"\\x1b[31m\\u202e</pre></style>"
Run = Callable[..., tuple[int, str, str]]


class Page(HTMLParser):
    """The tags of a page and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.texts += [value for _, value in attrs if value]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def records_of(count: int) -> list[dict[str, Any]]:
    return [
        {"step": i, "epoch": i / 3, "loss": 3 / i, "lr": i / 1e6, "supervised_tokens": 9 * i, "tokens": 10 * i,
         "tokens_per_s": 5.0, "time": 1_700_000_000.0 + 2 * i}
        for i in range(1, count + 1)
    ]  # fmt: skip


def leave_run(folder: Path, records: list[dict[str, Any]], text: str = "plain", **run: Any) -> Path:
    """The files that a run leaves, without its weights."""
    folder.mkdir(exist_ok=True)
    config = {"model": {"path": f"model {text}"}, "data": {"train": ["chats"]}, "train": {"output_dir": "run"}}
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    entry = {"rows": 1234, "used": 1233, "refused": {f"why {text}": [7]}, "notes": {text: [5]},
             "truncated": [{"row": 1, "tokens_lost": 2}]}  # fmt: skip
    ledger = {"train": {"files": {f"file {text}": entry}, "tokens": 5000}, "eval": None}
    (folder / "data_ledger.json").write_text(sealed(ledger), encoding="utf-8")
    (folder / "run.json").write_text(sealed(run), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def show(folder: Path, text: str, records: int = 5) -> Page:
    run = read_run(leave_run(folder, records_of(records), text))
    samples = SampleReplies(f"remark {text}", [SampleReply(f"prompt {text}", f"reply {text}", f"wanted {text}", False)])
    return Page(show_run(run, f"finished {text}", judge(run, samples), samples))


def test_every_text_is_escaped(tmp_path: Path) -> None:
    run = tmp_path / "run <i>&'"
    page, plain = show(run, EVIL), show(run, "plain")
    assert page.tags == plain.tags
    shown = "\n".join(page.texts)
    for words in ("finished", "remark", "why", "file", "prompt", "reply", "wanted"):
        assert f"{words} {SHOWN}" in shown
    assert page.texts.count(run.name) == 2  # title and heading
    assert not set("\x1b\u202e") & set(shown)


def test_a_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    show(tmp_path, "plain")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href|url\(|@import|https?:)", text)
    assert text.count("<script>") == 1


def test_a_page_without_steps_and_replies(tmp_path: Path) -> None:
    page = show(tmp_path, "plain", records=0)
    assert "No step was logged." in page.texts
    assert "svg" not in page.tags
    assert "1,234" in page.texts


def test_charts_are_drawn_where_the_numbers_are() -> None:
    one = Series("loss <b>", [0, 10, 20], [2.0, 1.0, float("nan")])
    two = Series("eval", [0, 20], [2.0, 0.5], is_marked=True)
    page = Page(line_chart("loss & more", [one, two]))
    assert page.tags.count("polyline") == 2
    assert page.tags.count("circle") == 3  # the end of a line, and each evaluation
    assert {"loss & more", "loss <b> 1", "eval 0.5", "eval 2 at 0", "eval 0.5 at 20"} <= set(page.texts)
    paths = [re.findall(r"([\d.]+),([\d.]+)", text) for text in page.texts if re.fullmatch(r"[\d., ]+ [\d., ]+", text)]
    points = [[(float(x), float(y)) for x, y in path] for path in paths if path]
    assert [len(path) for path in points] == [2, 2]  # what is not finite is left out
    (left, top), (middle, lower) = points[0]
    assert points[1][0] == (left, top)
    assert points[1][1][0] - left == pytest.approx(2 * (middle - left), abs=0.2)
    assert points[1][1][1] > lower > top
    assert line_chart("empty", [Series("loss", [1], [float("inf")])]) == ""


def test_a_long_curve_is_faint_with_a_smoothed_one_over_it() -> None:
    xs = list(range(5000))
    ys = [2.0 + (1.0 if x == 3210 else 0.1 * (x % 2)) for x in xs]
    figure = str(line_chart("loss", [Series("loss", xs, ys, is_smoothed=True)]))
    assert re.findall(r'<polyline class="([^"]*)"', figure) == ["s0 faint", "s0 strong"]
    faint, strong = (thin(list(zip(xs, y, strict=True))) for y in (ys, smooth(ys, 101)))
    assert len(faint) <= 600
    assert (3210, 3.0) in faint  # no peak is lost
    assert faint[-1] == (4999, 2.1)
    assert max(abs(y - 2.05) for _, y in strong[10:-10]) < 0.02
    assert len(figure) < 60_000
    [lines] = [json.loads(text) for text in Page(figure).texts if text.startswith("[{")]
    assert [line["name"] for line in lines] == ["loss", "loss (smoothed)"]
    assert lines[0]["x"][-1] == "4999"


def test_smoothing_has_no_lag() -> None:
    line = [float(x) for x in range(30)]
    assert smooth(line, 7) == pytest.approx(line)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1e-5, ["0", "2e-6", "4e-6", "6e-6", "8e-6", "1e-5"]),
        (0.0, 0.001, ["0", "0.0002", "0.0004", "0.0006", "0.0008", "0.001"]),
        (0.0, 0.5, ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]),
        (1.0, 30.0, ["10", "20", "30"]),
        (0.0, 2000.0, ["0", "500", "1k", "1.5k", "2k"]),
        (1.2e6, 3.1e6, ["1.5M", "2M", "2.5M", "3M"]),
        (-1.0, 1.0, ["-1", "-0.5", "0", "0.5", "1"]),
        (100_000.0, 100_004.0, ["100,000", "100,001", "100,002", "100,003", "100,004"]),
        (5.0, 5.0, ["5", "5.1", "5.2", "5.3", "5.4", "5.5"]),
        (0.0, 0.0, ["0", "0.02", "0.04", "0.06", "0.08", "0.1"]),
    ],
)
def test_ticks_are_written_as_people_write_them(low: float, high: float, labels: list[str]) -> None:
    assert format_ticks(nice_ticks(low, high)) == labels


def test_ticks_of_any_axis_are_short() -> None:
    for power in range(-30, 31):
        for factor in (1.0, 1.7, 3.3333, 9.99):
            high = factor * 10.0**power
            for ticks in (nice_ticks(0.0, high), log_ticks(high / 1000, high)):
                assert 2 <= len(ticks) <= 7
                assert all(len(text) <= 8 for text in format_ticks(ticks)), format_ticks(ticks)


def test_values_are_rounded() -> None:
    values = {0.30000000000000004: "0.3", 1.2345678: "1.235", 12345.6: "12,346", 1e-5: "1e-5", 0.0: "0", 5.0: "5"}
    assert {value: format_value(value) for value in values} == values


def test_durations_come_from_the_clocks(tmp_path: Path) -> None:
    records = records_of(5)  # 10 tokens at 5 a second, every 2 seconds
    records[3] |= {"eval_loss": 2.0, "eval_s": 6.0}
    for record in records[3:]:
        record["time"] += 6.0
    records[4]["time"] += 30.0  # a pause
    run = read_run(leave_run(tmp_path, records, date="2023-11-14T00:00:00"))
    took = measure_durations(run)
    assert (took.training, took.evaluation, took.rest, took.tokens_per_s) == pytest.approx((10.0, 6.0, 30.0, 5.0))
    assert "training 10 s, evaluation 6.0 s, the rest (checkpoints, pauses) 30 s" in dict(list_facts(run))["took"]


def test_a_run_of_an_earlier_version_has_no_clocks(tmp_path: Path) -> None:
    records = [{k: v for k, v in record.items() if k != "time"} for record in records_of(5)]
    took = measure_durations(read_run(leave_run(tmp_path, records, date="2023-11-14T00:00:00")))
    assert (took.training, took.evaluation, took.rest, took.preparation) == (10.0, None, None, None)


def test_durations_in_words() -> None:
    seconds = {0.26: "0.3 s", 12.4: "12 s", 75: "1 min 15 s", 120: "2 min", 3720: "1 h 2 min", 201_600: "2 d 8 h"}
    assert {value: format_duration(value) for value in seconds} == seconds


def test_only_what_differs_from_the_defaults_comes_first(tmp_path: Path) -> None:
    run = read_run(leave_run(tmp_path, records_of(1)))
    assert changed_keys(run.config) == {
        "model": {"path": "model plain"}, "data": {"train": ["chats"]}, "train": {"output_dir": "run"},
    }  # fmt: skip
    lora = type(run.config).model_validate(
        {**run.config.model_dump(exclude={"optim", "lora"}), "lora": {"kind": "dora"}}
    )
    assert changed_keys(lora)["lora"] == {"kind": "dora"}
    assert "optim" not in changed_keys(lora)  # 2e-4 is an adapter's default


def test_a_cause_is_listed_once_for_all_files(tmp_path: Path) -> None:
    """With its count, the first rows of any file, and its level, as in check."""
    empty = {"notes": {}, "truncated": [], "rows": 9, "used": 5}
    files = {
        "/long/path/a.jsonl": empty | {"refused": {"turn 1 is 300 words long": [7], "has no reply": [1, 2]}},
        "/long/path/b.jsonl": empty | {"refused": {"turn 3 is 412 words long": [3]}, "notes": {"the key x is not read": [5]}},
        "/long/path/c.jsonl": empty | {"refused": {"has no reply": [4]}, "notes": {"the key y is not read": [5, 6]}},
    }  # fmt: skip
    codes = {"turn 1 is 300 words long": "long", "turn 3 is 412 words long": "long", "has no reply": "no-reply"}
    ledger = {
        "train": {"files": files, "codes": codes},
        "eval": {"files": {"/long/d.jsonl": files["/long/path/a.jsonl"]}},
    }
    found = list(list_problems(ledger, read_run(leave_run(tmp_path, records_of(1))).config.data))
    shown = [
        (one["part"], one["level"], one["what"], one["count"], [name for _, name in one["places"]]) for one in found
    ]
    assert shown[:3] == [
        ("train", "warning", "refused: has no reply", 3, ["a.jsonl:1", "a.jsonl:2", "c.jsonl:4"]),
        ("train", "warning", "refused: a turn is … words long (…: 300 to 412)", 2, ["a.jsonl:7", "b.jsonl:3"]),
        ("train", "note", "the key … is not read (…: y 2, x 1)", 3, ["b.jsonl:5", "c.jsonl:5", "c.jsonl:6"]),
    ]
    assert [one[0] for one in shown[3:]] == ["eval", "eval"]
    run = leave_run(tmp_path, records_of(1))
    (run / "data_ledger.json").write_text(sealed(ledger), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("has no reply") == 2  # of training, and of evaluation
    assert '<code title="/long/path/c.jsonl:4">c.jsonl:4</code>' in page


def test_flags_of_an_advice_stay_whole() -> None:
    pieces = split_keys("Try --optim.lr 2e-5, a longer --data.max_seq_len 832, or lower --train.epochs.")
    assert [text for text, is_flag in pieces if is_flag] == [
        "--optim.lr 2e-5",
        "--data.max_seq_len 832",
        "--train.epochs",
    ]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\x00\n{}\n[1]\n"), "metrics-damaged"),
        (lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()), "metrics-unreadable"),
        (lambda run: (run / "data_ledger.json").write_text("{}"), "ledger-damaged"),
        (
            lambda run: (run / "data_ledger.json").write_text('{"train": {"files": {"a": 3}}, "eval": null}'),
            "ledger-damaged",
        ),
        (lambda run: (run / "data_ledger.json").unlink(), "ledger-unreadable"),
        (lambda run: (run / "config.yaml").write_text("model: ["), "broken-yaml"),
        (lambda run: (run / "config.yaml").write_text("model: 3"), "config"),
    ],
)
def test_what_is_damaged_is_named(change: Callable[[Path], Any], code: str, tmp_path: Path) -> None:
    run = leave_run(tmp_path / "run", records_of(2))
    change(run)
    with raises(TunesmithError, code):
        write_report(run)


def test_what_is_not_a_run_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, code in (("nothing", "run-not-found"), ("file", "run-not-found"), (".", "not-a-run")):
        with raises(TunesmithError, code):
            write_report(tmp_path / name)
        assert run("report", tmp_path / name)[0] == 1
    assert run("report")[0] == run("report", "")[0] == 2


def test_damaged_lines_are_left_out_and_named(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in records_of(6)]
    lines[1] = lines[1][:20]
    lines[2] = lines[2].replace('"loss": 1.0', '"loss": "low"')
    lines[3] = '{"step": true, "loss": 1}'
    lines.append('{"step": 7, "lo')  # cut by a kill, which is no damage
    (leave_run(tmp_path, []) / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = read_run(tmp_path)
    assert [record["step"] for record in run.records] == [1, 5, 6]
    assert run.damaged == [2, 3, 4]
    assert "metrics.jsonl: damaged lines are left out (2, 3, 4)" in Page(write_report(tmp_path).read_text()).texts


@pytest.mark.parametrize("value", ["1e999", "-1e999", "null", "9" * 400, "NaN", "0", "-5", "1e308", "1e-320"])
def test_any_number_can_be_drawn(value: str, tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in records_of(30)]
    for name in ("loss", "lr", "tokens_per_s", "time", "tokens"):
        lines[9] = re.sub(rf'"{name}": [^,}}]*', f'"{name}": {value}', lines[9])
    (leave_run(tmp_path, []) / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert write_report(tmp_path).is_file()


def test_any_records_have_a_report(tmp_path: Path) -> None:
    rng = random.Random(0)
    odd = [0, 1, -1, 1e-300, 1e308, -1e308, None, float("nan"), float("inf"), 10**18, 2**70, -0.0, 5e-324]
    names = ("epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "eval_loss", "eval_s", "time", "skipped")
    for count in [0, 1, 2, 3, 5, 20, 60, 150] * 3:
        records = []
        for step in range(count):
            values = {
                name: rng.choice(odd) if rng.random() < 0.1 else rng.choice([rng.random(), step * 10])
                for name in names
                if rng.random() < 0.7
            }
            records.append({"step": rng.choice([step, step, rng.randrange(10**6)]), **values})
        leave_run(tmp_path, records, date=rng.choice(["2023-11-14T00:00:00", "x", None]))
        if read_metrics(tmp_path / "metrics.jsonl")[0] or not count:
            write_report(tmp_path)
            assert str(read_verdict(tmp_path)).startswith("verdict: ")


def test_a_run_that_has_not_finished_has_a_report_of_what_is_there(tmp_path: Path) -> None:
    assert describe_outcome(read_run(leave_run(tmp_path, []))) == "not finished: no step was logged"
    assert describe_outcome(read_run(leave_run(tmp_path, records_of(3)))) == "not finished: at step 3"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert describe_outcome(read_run(leave_run(tmp_path, records_of(3), finished_at_step=3))) == "finished"
    assert "at step 3" in describe_outcome(read_run(leave_run(tmp_path, records_of(3), finished_at_step=2)))


def test_a_model_that_cannot_be_opened_costs_only_its_replies(tmp_path: Path) -> None:
    leave_run(tmp_path, records_of(3))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    assert '<h2>Sample replies</h2><p class="muted">none: ' in write_report(tmp_path).read_text()


def test_replies_are_kept_for_the_step_that_they_are_of(tmp_path: Path) -> None:
    folder = read_run(leave_run(tmp_path, records_of(3))).folder
    samples = SampleReplies("greedy", [SampleReply("a", "b", "c", False, 0.25)])
    keep_replies(folder, 3, samples)
    assert kept_replies(folder, 3) == samples
    assert not kept_replies(folder, 4).replies
    folder.replies.write_text(folder.replies.read_text().replace("0.25", "0.75"))
    assert not kept_replies(folder, 3).replies


def test_the_command_and_the_api_make_the_same_page(
    run: Run, model_folder: Path, tmp_path: Path, full_replies: None
) -> None:
    import tunesmith

    data = write_jsonl(tmp_path / "d.jsonl", [chat_row(f"What {i}?", "you and me") for i in range(12)])
    output = tmp_path / "run"
    code, out, _ = run("train", "--model", model_folder, "--data", data, "--output", output, "--train.max_steps", 3,
                       "--data.max_seq_len", 64)  # fmt: skip
    assert code == 0
    trained = tunesmith.Run(output)
    assert str(trained.verdict) in out
    assert [finding.code for finding in trained.verdict.findings][:1] == ["few-steps"]
    page = output / "report.html"
    first = page.read_text(encoding="utf-8")
    assert first.count('<tr><td data-label="prompt">') == 5
    page.unlink()
    assert run("report", output)[:2] == (0, f"{page}\n")
    assert page.read_text(encoding="utf-8") == first
    page.unlink()
    assert trained.report() == page
    assert page.read_text(encoding="utf-8") == first
