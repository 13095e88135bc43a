"""Data prepared in several processes: the same stores and ledgers, and no process, error or hang is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import chat_row, raises, write_jsonl
from tunesmith.config.data_keys import DataSection
from tunesmith.data import store
from tunesmith.data.dataset import Dataset, find_data
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.portable import PortableEncoder
from tunesmith.errors import DataError, RunError
from tunesmith.files import spell_sealed
from tunesmith.preparation import chunks, labelled
from tunesmith.preparation.chunks import chunk_rows
from tunesmith.preparation.helper import start_helper
from tunesmith.preparation.labelled import LabelRules, label_chunks
from tunesmith.preparation.pool import Pool
from tunesmith.preparation.write import write_dataset
from tunesmith.runfolder import RunFolder
from tunesmith.sources import textfile
from tunesmith.sources.read import find_sources, read_rows


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few rows are many chunks and shards."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 7)
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 2000)
    monkeypatch.setattr(store, "SHARD_TOKENS", 300)
    monkeypatch.setattr(textfile, "HEAD", 1000)


def every_kind(folder: Path) -> list[str]:
    """Rows of every outcome in files of several kinds; bad rows and long ones among them."""
    rows: list[Any] = [chat_row(f"What is {n}?", f"{n} " * (n % 40)) for n in range(60)]
    rows[10] = {"messages": [{"role": "user", "content": "alone"}]}
    rows[11] = {"text": "raw text"}
    rows[12] = {"zebra": 1}
    rows[13] = chat_row("big", "word " * 3000)
    rows[20] = {**rows[20], "zebra": 1}
    write_jsonl(folder / "a.jsonl", rows)
    with (folder / "a.jsonl").open("a") as file:
        file.write("\n   \n" + json.dumps(chat_row("last", "row 1.50")) + "\n")
    (folder / "b.json").write_text(json.dumps([{"instruction": "Q", "output": f"A{n} 1.50"} for n in range(30)]))
    (folder / "c.txt").write_text("the quick brown fox\n" * 200)
    write_jsonl(folder / "d.jsonl", [{"text": f"raw {n}"} for n in range(20)])
    return [str(folder / name) for name in ("a.jsonl", "b.json", "c.txt", "d.jsonl")]


def prepare(folder: Path, encoder: Encoder, names: list[str], **keys: Any) -> tuple[Dataset, dict[str, bytes], str]:
    """The data set, its files, and its ledger."""
    data = DataSection(train=names, **{"max_refused": 1.0, "max_cut_replies": 1.0, "max_row_mb": 0.01, **keys})
    folder.mkdir()
    dataset = write_dataset(data, find_data(data), encoder, 64, 0, RunFolder(folder))
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return dataset, files, "".join(spell_sealed(dataset.ledger_json(encoder, encoder.defaults.date)))


DRAWN = {"system_prompts": ["Be brief.", "Be kind."], "system_prompt_share": 0.5, "eval_split": 0.2}


@pytest.mark.parametrize("keys", [{}, {"overlong": "split"}, DRAWN, {"limit": 75}, {"chat_template": "none"}])
def test_any_number_of_workers_gives_the_same_files(
    tmp_path: Path, encoder: Encoder, small: None, keys: dict[str, Any]
) -> None:
    names = every_kind(tmp_path)
    alone = prepare(tmp_path / "alone", encoder, names, workers=0, **keys)
    several = prepare(tmp_path / "several", encoder, names, workers=3, **keys)
    assert alone[1] == several[1]
    assert alone[2] == several[2]
    assert len([name for name in alone[1] if "tokens-" in name]) > 2
    if not keys:
        ledger = json.loads(alone[2])["train"]
        assert (ledger["rows"], ledger["refused"]) == (112, 5)


def test_a_worker_labels_with_an_equal_encoder(encoder: Encoder) -> None:
    portable = PortableEncoder.of(encoder)
    assert portable is not None
    built = portable.build()
    assert built.tokenizer.backend_tokenizer.to_str() == encoder.tokenizer.backend_tokenizer.to_str()
    for name in ("bos_ids", "eos_id", "bos_id", "stop_ids", "added_ids", "control_text"):
        assert getattr(built, name) == getattr(encoder, name)
    assert np.array_equal(built.is_control, encoder.is_control)


def test_the_first_error_in_the_data_is_the_one_that_is_raised(tmp_path: Path, encoder: Encoder, small: None) -> None:
    rows = [json.dumps(chat_row("Q", f"A{n}")) for n in range(100)]
    rows[80], rows[95] = '{"messages": [', '{"a": 1, "a": 2}'
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    for workers in (0, 2):
        with raises(DataError, "broken-json", f"{tmp_path / 'a.jsonl'}:81"):
            prepare(tmp_path / f"out{workers}", encoder, [str(tmp_path / "a.jsonl")], workers=workers)
    (tmp_path / "b.jsonl").write_text('{"nothing": "known"}\n' * 30)
    for workers in (0, 2):
        with raises(DataError, "format-unknown", f"{tmp_path / 'b.jsonl'}:1"):
            prepare(tmp_path / f"new{workers}", encoder, [str(tmp_path / "b.jsonl")], workers=workers)


def test_small_data_start_no_worker(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "available_cores", lambda: 2)
    started = []
    monkeypatch.setattr(Pool, "_start", lambda pool: started.append(pool))
    prepare(tmp_path / "small", encoder, [str(write_jsonl(tmp_path / "a.jsonl", [chat_row("Q", "A")] * 50))])
    assert not started


def workers_of(pid: int) -> list[int]:
    """Processes that a process has started and that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_killed_worker_is_one_error(tmp_path: Path, encoder: Encoder, small: None) -> None:
    write_jsonl(tmp_path / "a.jsonl", [chat_row("Q", f"A{n}") for n in range(500)])
    data = DataSection(train=["x"], workers=2)
    rows = read_rows(find_sources([str(tmp_path / "a.jsonl")]), parses=False)
    results = label_chunks(chunk_rows(rows), LabelRules(encoder, data, 64))
    next(results)
    first, other = workers_of(os.getpid())
    os.kill(first, signal.SIGKILL)
    with raises(RunError, "worker-died", "SIGKILL", "data.workers"):
        list(results)
    assert not any(map(is_alive, (first, other)))


SLOW = """
import datetime, sys, time
from pathlib import Path
from tokenizers import Tokenizer
from tunesmith.preparation.pool import Pool

class Sleep:
    def open(self):
        return time.sleep

with Pool(Sleep(), 2, time.sleep) as pool:
    print("ready", flush=True)
    for _ in pool.map([0.0, 0.0, 600.0, 600.0]):
        print("done", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent_in_the_middle_of_an_item(tmp_path: Path, number: signal.Signals) -> None:
    """Sleep in a module, so that the workers can import it."""
    (tmp_path / "slow.py").write_text(SLOW.split("with Pool")[0])
    (tmp_path / "run.py").write_text("import time\nfrom slow import *\nwith Pool" + SLOW.split("with Pool")[1])
    words = [sys.executable, str(tmp_path / "run.py")]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(3)] == ["ready\n", "done\n", "done\n"]
    children = workers_of(parent.pid)
    assert len(children) == 2
    parent.send_signal(number)
    parent.wait(10)
    deadline = time.monotonic() + 10
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, children))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_for_the_command_do_not_end_its_helpers(number: signal.Signals) -> None:
    """A scheduler sends them to all processes, at any moment: also to one that has just started."""
    helper = start_helper("import sys; print('up', flush=True); print(sys.stdin.read())",
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    helper.send_signal(number)
    assert helper.stdout is not None
    assert helper.stdout.readline() == b"up\n"
    helper.send_signal(number)
    assert helper.communicate(b"done")[0] == b"done\n"
    assert helper.returncode == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
