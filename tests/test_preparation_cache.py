"""Prepared data are kept and found again, continued after a kill, shared by processes, and never wrong."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, write_jsonl
from test_preparation import DRAWN, every_kind, small
from tunesmith.chat_template.template import ChatTemplate
from tunesmith.config.data_keys import DataSection
from tunesmith.data.dataset import Dataset, find_data
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.portable import PortableEncoder
from tunesmith.errors import DataError, TunesmithError
from tunesmith.files import spell_sealed
from tunesmith.model.tokenizer import build_encoder
from tunesmith.preparation import cache, fingerprint, journal
from tunesmith.preparation.cache import cache_limit, hash_data_file, open_entry, trim_cache
from tunesmith.preparation.labelled import LabelRules
from tunesmith.preparation.write import Unwatched, write_dataset
from tunesmith.runfolder import RunFolder

__all__ = ["small"]
Prepared = tuple[dict[str, bytes], str, list[str]]  # files of the stores, ledger, notes


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Notes(Unwatched):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def prepare(folder: Path, encoder: Encoder, names: list[str], **keys: Any) -> Prepared:
    given = {"max_refused": 1.0, "max_cut_replies": 1.0, "max_row_mb": 0.01, "cache": True, "workers": 0, **keys}
    data = DataSection(train=names, **given)
    folder.mkdir()
    notes = Notes()
    dataset = write_dataset(data, find_data(data), encoder, 64, 0, RunFolder(folder), notes)
    return files_of(folder), ledger_of(dataset, encoder), notes.notes


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ledger_of(dataset: Dataset, encoder: Encoder) -> str:
    return "".join(spell_sealed(dataset.ledger_json(encoder, encoder.defaults.date)))


def stores(root: Path) -> list[Path]:
    return sorted((root / "prepared").glob("*/tokens"))


@pytest.mark.parametrize("keys", [{}, DRAWN])
def test_a_second_start_finds_what_was_prepared(
    tmp_path: Path, root: Path, encoder: Encoder, small: None, keys: dict[str, Any]
) -> None:
    names = every_kind(tmp_path)
    plain = prepare(tmp_path / "plain", encoder, names, cache=False, **keys)
    assert not root.exists()
    first = prepare(tmp_path / "first", encoder, names, **keys)
    second = prepare(tmp_path / "second", encoder, names, **keys)
    third = prepare(tmp_path / "third", encoder, names, **keys, max_refused=0.9, workers=2)
    assert plain[:2] == first[:2] == second[:2] == third[:2]
    num_stores = 2 if keys else 1
    assert [len(one[2]) for one in (plain, first, second, third)] == [0, 0, num_stores, num_stores]
    assert all("prepared earlier" in note for note in second[2])
    one, two = (tmp_path / name / "tokens" / "tokens-00000.bin" for name in ("first", "second"))
    assert one.stat().st_ino == two.stat().st_ino  # no second copy on the disk
    shutil.rmtree(root)
    assert files_of(tmp_path / "second") == plain[0]


def test_what_is_kept_still_has_to_be_good_enough(tmp_path: Path, encoder: Encoder) -> None:
    names = [str(write_jsonl(tmp_path / "a.jsonl", [chat_row("Q", "A"), {"messages": []}]))]
    for number in range(2):
        with pytest.raises(DataError, match="max_refused"):
            prepare(tmp_path / f"out{number}", encoder, names, max_refused=0.1)
    assert len(prepare(tmp_path / "done", encoder, names)[2]) == 1


@pytest.mark.parametrize("name", ["tokens-00001.bin", "loss_mask-00000.bin", "offsets.npy", "store.json", "entry"])
@pytest.mark.parametrize("keeps_time", [False, True])
def test_damage_is_found_and_the_data_are_prepared_again(
    tmp_path: Path, root: Path, encoder: Encoder, small: None, name: str, keeps_time: bool
) -> None:
    names = every_kind(tmp_path)[:1]
    first = prepare(tmp_path / "first", encoder, names)
    kept = {**first[0]}
    [store] = stores(root)
    damaged = store.parent / "entry.json" if name == "entry" else store / name
    content, stat = bytearray(damaged.read_bytes()), damaged.stat()
    content[len(content) // 2] ^= 1
    damaged.unlink()  # not the file of the run, which is the same
    damaged.write_bytes(content)
    if keeps_time:
        os.utime(damaged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = prepare(tmp_path / "second", encoder, names)
    assert second[:2] == first[:2]
    assert any("preparing the data again" in note for note in second[2])
    assert files_of(tmp_path / "first") == kept


def test_everything_that_decides_a_label_is_in_the_key(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat_row("Q", "A")])
    date = datetime.datetime(2026, 1, 2)

    def key(template: str | None = None, when: datetime.datetime = date, length: int = 64, **keys: Any) -> str:
        data = DataSection(train=[str(path)], **keys)
        kwargs = keys.get("template_kwargs", {})
        encoder = build_encoder(tokenizer, template, kwargs, when, data.control_text)
        found = fingerprint.fingerprint(find_data(data).train, LabelRules(encoder, data, length))
        assert found is not None
        return found

    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    keys = [key(), key(length=65), key(template="chatml"), key(template=str(tmp_path / "t.jinja")),
            key(template_kwargs={"a": 1}), key(overlong="drop"), key(train_on="all"), key(history="unroll"),
            key(limit=1), key(fields={"prompt": "q"}), key(ignore_columns=["x"]), key(encoding="cp1252"),
            key(control_text="refuse"), key(max_row_mb=1.0), key(train_reasoning=False), key(format="messages")]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key() == key(when=date.replace(year=2027)) == key(max_refused=0.5, workers=3, cache=True)
    write_jsonl(path, [chat_row("Q", "B")])
    assert key() != keys[0]


@pytest.mark.parametrize(
    ("text", "daily"),
    [("{{ strftime_now('%d %b %Y') }}", True), ('{% if strftime_now is defined %}{{ strftime_now("%Y") }}{% endif %}',
     True), ("{{ strftime_now('%H:%M') }}", False), ("{% set f = '%H' %}{{ strftime_now(f) }}", False),
     ("{{ strftime_now('%c') }}", False), ("{{ (strftime_now)('%H') }}", False), ("{{ '%%H' }}", None)],
)  # fmt: skip
def test_the_date_counts_as_far_as_the_template_prints_it(encoder: Encoder, text: str, daily: bool | None) -> None:
    encoder.template = ChatTemplate(text, "x", {})
    printed = fingerprint._date_of(encoder)
    assert printed == (None if daily is None else "2026-01-02" if daily else "2026-01-02T00:00:00")


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from tunesmith.config.data_keys import DataSection
from tunesmith.data import store
from tunesmith.data.dataset import find_data
from tunesmith.preparation import chunks, journal, write
from tunesmith.runfolder import RunFolder
from tunesmith.sources import textfile

portable, folder, rows, workers, *names = sys.argv[1:]
chunks.CHUNK_ROWS, chunks.CHUNK_CHARACTERS, store.SHARD_TOKENS, textfile.HEAD = 7, 2000, 300, 1000
journal.COMMIT_S = 0.0

class Kill(write.Unwatched):
    def preparing(self, done, share):
        print(done, flush=True)
        if done >= int(rows):
            os.kill(os.getpid(), signal.SIGKILL)

data = DataSection(train=names, max_refused=1.0, max_cut_replies=1.0, max_row_mb=0.01, cache=True, workers=int(workers))
encoder = pickle.loads(Path(portable).read_bytes()).build()
write.write_dataset(data, find_data(data), encoder, 64, 0, RunFolder(Path(folder)), Kill())
"""


def killed_at(folder: Path, encoder: Encoder, rows: int, workers: int, names: list[str]) -> list[int]:
    """Rows that were done at each step of a preparation that killed itself."""
    (folder.parent / "encoder").write_bytes(pickle.dumps(PortableEncoder.of(encoder)))
    folder.mkdir()
    words = [sys.executable, "-c", KILLED, folder.parent / "encoder", folder, rows, workers, *names]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_a_killed_preparation_continues_with_the_same_result(
    tmp_path: Path, root: Path, encoder: Encoder, small: None
) -> None:
    names = every_kind(tmp_path)
    plain = prepare(tmp_path / "plain", encoder, names, cache=False)
    for number, (rows, workers) in enumerate([(20, 0), (60, 2), (100, 0)]):
        done = killed_at(tmp_path / f"killed{number}", encoder, rows, workers, names)
        assert len(done) < 12  # it did not begin again
    shutil.rmtree(root / "files", ignore_errors=True)
    last = prepare(tmp_path / "last", encoder, names)
    assert any("continuing" in note for note in last[2])
    assert last[:2] == plain[:2]
    [store] = stores(root)
    assert not list(store.parent.glob("ledger-*"))


def test_a_damaged_part_is_not_continued(
    tmp_path: Path, root: Path, encoder: Encoder, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = every_kind(tmp_path)
    plain = prepare(tmp_path / "plain", encoder, names, cache=False)
    killed_at(tmp_path / "killed", encoder, 60, 0, names)
    for number, name in enumerate(
        ("tokens-00000.bin", "loss_mask-00001.bin", "offsets.npy", "../journal.json", "../ledger-000000.json")
    ):
        copy = tmp_path / f"cache{number}"
        shutil.copytree(root, copy)
        monkeypatch.setenv("TUNESMITH_CACHE", str(copy))
        [store] = stores(copy)
        content = bytearray((store / name).read_bytes())
        content[len(content) // 3] ^= 1
        (store / name).write_bytes(content)
        last = prepare(tmp_path / f"last{number}", encoder, names)
        assert any("starting over" in note for note in last[2]), (name, last[2])
        assert last[:2] == plain[:2]


def test_a_second_process_waits_and_takes_over_from_a_killed_one(
    tmp_path: Path, root: Path, encoder: Encoder, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = every_kind(tmp_path)
    data = DataSection(train=names, max_refused=1.0, max_cut_replies=1.0, max_row_mb=0.01, cache=True)
    key = fingerprint.fingerprint(find_data(data).train, LabelRules(encoder, data, 64))
    code = (
        "import sys, time\nfrom tunesmith.preparation.cache import open_entry\n"
        "with open_entry(sys.argv[1], print):\n    print('locked', flush=True)\n    time.sleep(600)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(key)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "locked\n"
    told: list[str] = []

    def kill_first(seconds: float) -> None:
        told.append("waited")
        first.kill()
        first.wait()

    monkeypatch.setattr(cache.time, "sleep", kill_first)
    notes = prepare(tmp_path / "second", encoder, names)[2]
    assert told
    assert any(f"process {first.pid} is preparing" in note for note in notes)


def test_the_cache_is_bounded_and_entries_in_use_stay(
    tmp_path: Path, root: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        path = write_jsonl(tmp_path / f"{number}.jsonl", [chat_row("Q", f"A{n}") for n in range(50)])
        prepare(tmp_path / f"out{number}", encoder, [str(path)])
        time.sleep(0.02)
    entries = sorted((root / "prepared").glob("*/"), key=lambda entry: entry.stat().st_mtime_ns)
    oldest, _, third, _ = (entry.name for entry in entries if entry.is_dir())
    with open_entry(oldest, print):
        os.utime(root / "prepared" / oldest, (0, 0))
        trim_cache(0, kept=third)
    left = {path.name for path in (root / "prepared").iterdir()}
    assert left == {oldest, f"{oldest}.lock", third, f"{third}.lock"}
    monkeypatch.setenv("TUNESMITH_CACHE_GB", "0.5")
    assert cache_limit() == 500_000_000
    monkeypatch.setenv("TUNESMITH_CACHE_GB", "much")
    with pytest.raises(TunesmithError, match="TUNESMITH_CACHE_GB"):
        cache_limit()


def test_a_cache_that_cannot_be_written_to_is_a_note(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    names = [str(write_jsonl(tmp_path / "a.jsonl", [chat_row("Q", "A")]))]
    files, _, notes = prepare(tmp_path / "out", encoder, names)
    assert "tokens/store.json" in files
    assert ["not kept" in note for note in notes] == [True]


def test_a_data_file_is_hashed_once_and_again_when_it_changes(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SMALL_BYTES", 1)
    monkeypatch.setattr(cache, "_FRESH_NS", 0)
    path = tmp_path / "a.jsonl"
    path.write_text("one")
    time.sleep(0.02)
    hashed = []
    real = cache.sha256_file
    monkeypatch.setattr(cache, "sha256_file", lambda path: hashed.append(path) or real(path))
    assert hash_data_file(path) == hash_data_file(path) == real(path)
    assert len(hashed) == 1
    before = path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.02)
    assert hash_data_file(path) == real(path)
    assert len(hashed) == 2
    for record in (root / "files").glob("*.json"):
        record.write_text("[]")
    assert hash_data_file(path) == real(path)


def test_commits_do_not_change_the_files(
    tmp_path: Path, encoder: Encoder, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = every_kind(tmp_path)
    plain = prepare(tmp_path / "plain", encoder, names, cache=False)
    monkeypatch.setattr(journal, "COMMIT_S", 0.0)
    assert prepare(tmp_path / "often", encoder, names)[:2] == plain[:2]
    assert json.loads(plain[1])["train"]["rows"] == 112
