"""data.stream: rows are labelled just ahead of training, and a run continues at its place in them, bit for bit."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, killed_after, raises, write_jsonl
from tunesmith.config.data_keys import DataSection
from tunesmith.config.train_keys import TrainSection
from tunesmith.data.dataset import find_data
from tunesmith.data.ledger import LabelledRow, Ledger
from tunesmith.encode.encoder import Encoder
from tunesmith.errors import DataError, RunError
from tunesmith.files import read_sealed, spell_sealed
from tunesmith.runfolder import RunFolder
from tunesmith.sources.read import find_sources, read_rows
from tunesmith.streaming import data as stream_data
from tunesmith.streaming.cursor import Cursor
from tunesmith.streaming.data import StreamedDataset, StreamSettings, build_stream_feed, open_stream, write_stream
from tunesmith.streaming.feed import StreamingFeed, call_here
from tunesmith.streaming.ledger import load_ledger, save_ledger
from tunesmith.streaming.rows import read_from
from tunesmith.streaming.windows import window_folder

Run = Callable[..., tuple[int, str, str]]
SMALL = "import sys; from tunesmith.streaming import data; data.MIN_SAMPLES, data.MIN_TOKENS = 40, 1000; "
TRAIN = SMALL + "from tunesmith.cli import main; sys.exit(main(sys.argv[1:]))"
FLAGS = ("--data.stream", "--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--train.grad_accum_steps", 2,
         "--optim.lr", 3e-3, "--train.max_steps", 24, "--train.save_steps", 7, "--train.log_steps", 3)  # fmt: skip


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_data, "MIN_SAMPLES", 40)
    monkeypatch.setattr(stream_data, "MIN_TOKENS", 1000)


def many_chats(path: Path, count: int = 600, first: int = 0) -> Path:
    rows = [
        chat_row(f"What is the answer {i}?", f"The answer is {i}." * (1 + i % 3)) for i in range(first, first + count)
    ]
    return write_jsonl(path, rows)


def places(names: list[str], cursor: Cursor, **keys: Any) -> list[tuple[Any, dict[str, Any]]]:
    found = read_from(find_sources(names), cursor, DataSection(train=names, stream=True, **keys))
    return [(row, json.loads(json.dumps(place.to_json()))) for row, place in found]


class Stream:
    """A stream over files without a model, begun or continued."""

    def __init__(self, folder: Path, encoder: Encoder, names: list[str], packs_per_step: int = 3, **keys: Any) -> None:
        self.folder = RunFolder(folder)
        self.folder.path.mkdir(exist_ok=True)
        data = DataSection(train=names, stream=True, max_seq_len=64, **keys)
        train = TrainSection(output_dir="x", max_steps=10, grad_accum_steps=packs_per_step)
        self.settings = StreamSettings(data, train, encoder, 64, 128)
        self.sources = find_data(data)

    def begin(self) -> StreamedDataset:
        return write_stream(self.settings, self.sources, self.folder)

    def feed(self, dataset: StreamedDataset) -> StreamingFeed:
        return build_stream_feed(dataset, self.settings, True, self.folder, call_here)

    def steps(self, place: Any = None, count: int = 40) -> list[tuple[Any, ...]]:
        """What is trained in each step, and the place behind it, as a checkpoint keeps it."""
        if place is None:
            dataset = self.begin()
        else:
            dataset = open_stream(self.settings, self.sources, self.folder, {}, place)
        found: list[tuple[Any, ...]] = []
        for step in self.feed(dataset).steps(place or (0, 0)):
            if step is not None:
                batches = [(batch.input_ids.tolist(), batch.targets.tolist()) for batch in step.batches]
                found.append((batches, step.rows(), step.epoch, json.loads(json.dumps(step.place))))
            if len(found) == count:
                break
        return found


@pytest.mark.parametrize("kind", ["lines", "crlf", "bom", "utf-16", "gzip", "parquet", "csv", "array"])
def test_reading_continues_at_every_place(tmp_path: Path, kind: str) -> None:
    """The rows behind a place are those of a reading from the start, with the same numbers."""
    rows = [{"prompt": f"问题 {i}\u2028x", "completion": f"答 {i} 🙂"} for i in range(1500)]
    lines = "".join(
        json.dumps(row, ensure_ascii=False) + ("\n\n" if i % 7 == 0 else "\n") for i, row in enumerate(rows)
    )
    path, keys = tmp_path / "rows.jsonl", {}
    if kind == "gzip":
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=400)
    elif kind == "csv":
        path = tmp_path / "rows.csv"
        path.write_text("prompt,completion\n" + "".join(f'"{r["prompt"]}\n",{r["completion"]}\n' for r in rows))
    elif kind == "array":
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows))
    else:
        keys = {"encoding": "utf-16"} if kind == "utf-16" else {}
        text = lines.replace("\n", "\r\n") if kind == "crlf" else ("\ufeff" + lines if kind == "bom" else lines)
        path.write_bytes(text.encode("utf-16" if kind == "utf-16" else "utf-8"))
    other = tmp_path / "z.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]), encoding=keys.get("encoding", "utf-8"))
    names = [str(path), str(other)]
    whole = places(names, Cursor(), **keys)
    assert [row for row, _ in whole] == list(read_rows(find_sources(names), keys.get("encoding", "utf-8")))
    for at in (0, 1, 255, 256, 399, 400, 1023, 1400, 1499, 1501):
        assert places(names, Cursor.from_json(whole[at][1]), **keys) == whole[at + 1 :]


def test_a_hub_data_set_continues_at_every_place_also_twice(tmp_path: Path) -> None:
    """A local folder laid out as a hub data set is streamed by `datasets` in the same way."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "hub" / "data").mkdir(parents=True)
    for shard in range(3):
        rows = [chat_row(f"q{shard} {i}", f"a{i}") for i in range(500 + shard * 37)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"hub/data/train-{shard}.parquet", row_group_size=300)
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n---\n"
    )
    (tmp_path / "hub" / "README.md").write_text(card)
    names = [str(tmp_path / "hub")]
    whole = places(names, Cursor())
    assert len(whole) == 1611
    assert [row for row, _ in whole] == list(read_rows(find_sources(names)))
    for at in (0, 255, 256, 700, 1200):
        rest = places(names, Cursor.from_json(whole[at][1]))
        assert [row for row, _ in rest] == [row for row, _ in whole[at + 1 :]]
        again = places(names, Cursor.from_json(rest[300][1]))
        assert [row for row, _ in again] == [row for row, _ in whole[at + 302 :]]


def test_limit_and_several_files(tmp_path: Path) -> None:
    names = [str(many_chats(tmp_path / f"{part}.jsonl", 30)) for part in "abc"]
    whole = places(names, Cursor(), limit=70)
    assert len(whole) == 70
    assert places(names, Cursor.from_json(whole[44][1]), limit=70) == whole[45:]


def test_steps_repeat_from_every_place_over_windows_and_epochs(tmp_path: Path, encoder: Encoder) -> None:
    names = [str(many_chats(tmp_path / "a.jsonl", 130)), str(many_chats(tmp_path / "b.jsonl", 150, 1000))]
    stream = Stream(tmp_path / "run", encoder, names, packs_per_step=7)
    whole = stream.steps(count=50)
    assert whole[-1][2] > 2  # epochs
    assert all(len(step[0]) == 7 for step in whole)  # never short: a step takes packs of two windows
    assert not list(stream.folder.tokens.glob("window-*"))
    for at in (1, 20):
        assert stream.steps(whole[at][3], count=20) == whole[at + 1 : at + 21]


def test_every_row_once_an_epoch_in_another_order_and_the_ledger_counts_it_once(
    tmp_path: Path, encoder: Encoder
) -> None:
    names = [str(many_chats(tmp_path / "a.jsonl", 280))]
    stream = Stream(tmp_path / "run", encoder, names, packs_per_step=1)
    steps = stream.steps(count=300)
    ends = [next(i for i, step in enumerate(steps) if step[2] >= epoch) for epoch in (1, 2)]
    first = [row for step in steps[: ends[0] + 1] for row in step[1]]
    second = [row for step in steps[ends[0] + 1 : ends[1] + 1] for row in step[1]]
    assert len(first) == len(set(first)) == 280
    assert sorted(first) == sorted(second)
    assert first != second
    assert json.loads(stream.folder.ledger.read_text())["train"]["rows"] == 280
    assert [step[2] for step in steps] == sorted(step[2] for step in steps)


def test_processes_share_one_stream(tmp_path: Path, encoder: Encoder) -> None:
    """Other processes open the main one's windows and take their share of the same packs."""
    stream = Stream(tmp_path / "run", encoder, [str(many_chats(tmp_path / "a.jsonl"))], packs_per_step=3)
    dataset = stream.begin()
    feed = stream.feed(dataset)
    follower = open_stream(stream.settings, None, stream.folder, {})
    other = build_stream_feed(follower, stream.settings, True, stream.folder, lambda look: True)
    mine, theirs = feed.steps((0, 0), 0, 2), other.steps((0, 0), 1, 2)
    together = []
    for _ in range(60):
        while (one := next(mine)) is None:
            pass
        while (two := next(theirs)) is None:
            pass
        assert one.place == two.place
        together.append(sorted(one.batches.rows() + two.batches.rows()))
    mine.close()  # type: ignore[attr-defined]
    alone = Stream(tmp_path / "alone", encoder, [str(tmp_path / "a.jsonl")], packs_per_step=3).steps(count=60)
    assert together == [sorted(step[1]) for step in alone]


def bad_after(path: Path, good: int) -> Path:
    rows: list[Any] = [chat_row(f"Who {i}?", "You.") for i in range(good)]
    return write_jsonl(path, rows + [{"messages": [{"role": "user", "content": "x"}]} for _ in range(100)])


def test_bad_rows_end_the_run_when_they_are_reached(tmp_path: Path, encoder: Encoder) -> None:
    with raises(DataError, "too-many-refused"):
        Stream(tmp_path / "one", encoder, [str(bad_after(tmp_path / "a.jsonl", 10))]).begin()
    stream = Stream(tmp_path / "two", encoder, [str(bad_after(tmp_path / "b.jsonl", 500))])
    with raises(RunError, "too-many-refused", "b.jsonl:501"):
        stream.steps(count=1000)


def test_wrong_files_end_the_command_before_step_1(tmp_path: Path, encoder: Encoder) -> None:
    good = str(many_chats(tmp_path / "a.jsonl"))
    unknown = str(write_jsonl(tmp_path / "b.jsonl", [{"foo": 1}]))
    with raises(DataError, "format-unknown", "b.jsonl:1"):
        Stream(tmp_path / "one", encoder, [good, unknown]).begin()
    broken = tmp_path / "c.jsonl"
    broken.write_text('{"messages": [}\n')
    with raises(DataError, "broken-json", "c.jsonl:1"):
        Stream(tmp_path / "two", encoder, [good, str(broken)]).begin()
    late = tmp_path / "d.jsonl"
    late.write_text(Path(good).read_text() + "{\n")
    with raises(RunError, "broken-json", "d.jsonl:601"):
        Stream(tmp_path / "three", encoder, [str(late)]).steps(count=1000)


def test_a_file_that_changes_while_it_is_streamed_is_an_error(tmp_path: Path, encoder: Encoder) -> None:
    path = many_chats(tmp_path / "a.jsonl", 2000)
    stream = Stream(tmp_path / "run", encoder, [str(path)])
    steps = stream.feed(stream.begin()).steps()
    next(steps)
    with path.open("a") as file:
        file.write(json.dumps(chat_row("New?", "Yes.")) + "\n")
    with raises(RunError, "file-changed", "a.jsonl"):
        for _ in range(1000):
            next(steps)


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_labelling_process_ends_with_the_feed_and_a_killed_one_is_an_error(
    tmp_path: Path, encoder: Encoder
) -> None:
    stream = Stream(tmp_path / "run", encoder, [str(many_chats(tmp_path / "a.jsonl", 3000))])
    before = children()
    steps = stream.feed(stream.begin()).steps()
    next(steps)
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    with raises(RunError, "labelling-ended", "signal 9"):
        for _ in range(2000):
            next(steps)
    other = Stream(tmp_path / "other", encoder, [str(tmp_path / "a.jsonl")])
    dataset = other.begin()
    assert len(children() - before) == 1
    dataset.close()
    assert not children() - before


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("time", "tokens_per_s", "eval_s", "memory_gb")}
        for line in lines
    ]


def test_resumed_anywhere_the_weights_are_the_same(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    """With a step over two windows, several epochs, evaluation data, and windows left by a kill."""
    names = ("--data", many_chats(tmp_path / "a.jsonl", 60), "--eval-data", chats, *FLAGS)
    whole = tmp_path / "whole"
    code, out, err = run("train", "--model", model_folder, *names, "--output", whole, "--train.keep_checkpoints", 20)
    assert code == 0, err
    assert "streamed from 1 file" in out
    assert (whole / "report.html").is_file()
    for step in (14,):
        part = killed_after(whole, step, tmp_path / f"from-{step}")
        left = window_folder(part / "tokens", step)
        left.mkdir()
        (left / "tokens.bin").write_bytes(b"half")
        (part / "data_ledger.json").write_bytes((whole / "data_ledger.json").read_bytes())
        code, out, err = run("resume", part)
        assert code == 0, err
        assert (weights(part), records(part)) == (weights(whole), records(whole))
        assert read_sealed(part / "data_ledger.json") == read_sealed(whole / "data_ledger.json")
        assert not list((part / "tokens").glob("window-*"))


def test_a_run_that_met_bad_rows_continues_with_a_higher_limit(
    fails: Any, run: Run, model_folder: Path, tmp_path: Path
) -> None:
    path, out = bad_after(tmp_path / "a.jsonl", 300), tmp_path / "run"
    words = ("--model", model_folder, "--data", path, "--output", out, *FLAGS, "--train.max_steps", 40)
    assert fails("train", *words).code == "too-many-refused"
    assert (out / "checkpoints" / "step-000014").is_dir()
    assert fails("resume", out).code == "too-many-refused"
    code, _, err = run("resume", out, "--data.max_refused", 0.5)
    assert code == 0, err


def test_what_a_stream_cannot_do_is_refused(
    fails: Any, run: Run, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    words = ("train", "--model", model_folder, "--data", chats, "--output", tmp_path / "run", "--data.stream")
    assert "train.max_steps" in str(fails(*words))
    assert "data.eval_split" in str(fails(*words, "--train.max_steps", 5, "--data.eval_split", 0.1))
    assert not (tmp_path / "run").exists()


def test_changed_data_are_no_longer_the_run_s(fails: Any, run: Run, model_folder: Path, tmp_path: Path) -> None:
    path, moved = many_chats(tmp_path / "a.jsonl", 150), tmp_path / "b.jsonl"
    out = tmp_path / "run"
    assert (
        run("train", "--model", model_folder, "--data", path, "--output", out, *FLAGS, "--train.max_steps", 8)[0] == 0
    )
    longer = ("--train.max_steps", 10, "--allow", "schedule")
    path.rename(moved)
    assert fails("resume", out, *longer).code == "run-changed"
    assert fails("resume", out, *longer, "data").code in ("file-not-found", "stream-changed")
    moved.rename(path)
    os.utime(path, (0, 0))  # as a copy has it
    assert run("resume", out, *longer)[0] == 0
    path.write_text(path.read_text().replace("The answer is 149", "The answer is 941"))
    assert fails("resume", out, "--train.max_steps", 12, "--allow", "schedule").code == "run-changed"
    assert fails("resume", out, "--train.max_steps", 12, "--allow", "schedule", "data").code == "stream-changed"


@pytest.mark.skipif(
    "TUNESMITH_LONG" not in os.environ, reason="kills training processes for a minute: TUNESMITH_LONG=1"
)
def test_killed_at_any_moment_the_weights_are_the_same(tmp_path: Path, model_folder: Path) -> None:
    names = ("--model", model_folder, "--data", many_chats(tmp_path / "a.jsonl", 400), *FLAGS, "--train.max_steps", 400)

    def start(*words: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", TRAIN, *map(str, words)], stdout=subprocess.DEVNULL)

    whole, part = tmp_path / "whole", tmp_path / "part"
    assert start("train", *names, "--output", whole).wait() == 0
    rng, kills = random.Random(0), 0
    process = start("train", *names, "--output", part)
    while not (part / "checkpoints").is_dir():
        time.sleep(0.05)
    while True:
        time.sleep(rng.uniform(0.2, 6.0))
        labelling = _children_of(process.pid)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        ends_by = time.monotonic() + 10  # one that was just started imports first
        while any(map(is_alive, labelling)):
            assert time.monotonic() < ends_by
            time.sleep(0.05)
        process = start("resume", part)
    assert process.returncode == 0
    assert kills >= 3
    assert weights(part) == weights(whole)
    assert records(part) == records(whole)


def _children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_the_ledger_of_a_stream_names_some_rows_and_counts_all() -> None:
    ledger = Ledger()
    for number in range(1, 1000):
        ledger.add(LabelledRow("a", number, "refused", reason="bad", code="bad", is_by_choice=number % 2 == 0))
        ledger.add(LabelledRow("a", number, "used", "text", "truncated", tokens_lost=3, notes=(f"n{number % 2}",)))
        if number % 100 == 0:
            ledger = load_ledger(json.loads(json.dumps(save_ledger(ledger, max_rows=10))))
    saved = json.loads(json.dumps(save_ledger(ledger, max_rows=10)))
    again = load_ledger(saved)
    assert again.count_reasons() == {"bad": 999}
    assert (again.truncated, again.refused, again.num_bad, again.tokens_lost) == (999, 999, 500, 2997)
    assert sum(again.count_notes().values()) == 999
    assert len(saved["files"]["a"]["truncated"]) == 10
    assert len(saved["files"]["a"]["notes"]["n1"]) == 10
    assert json.loads("".join(spell_sealed(saved))) is not None
