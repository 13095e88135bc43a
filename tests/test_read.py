"""Containers are detected by name and first bytes; errors name file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import raises
from tunesmith.errors import DataError
from tunesmith.sources.read import find_sources, read_rows

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}\u2028b"} for i in range(3)]


def values(*names: object) -> list[object]:
    return [row.value for row in read_rows(find_sources([str(name) for name in names]))]


def lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "b.jsonl").write_text(lines(ROWS).replace("\n", "\n\n"), encoding="utf-8")
    (tmp_path / "c.json").write_text(lines(ROWS), encoding="utf-8")  # JSON Lines named .json
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    (tmp_path / "e.csv").write_text(
        '\ufeffprompt;completion\n"q0";"a0\u2028b"\nq1;a1\u2028b\nq2;a2\u2028b\n', encoding="utf-8"
    )
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "f.parquet")
    (tmp_path / "g.tsv").write_text(
        "prompt\tcompletion\n" + "".join(f"{r['prompt']}\t{r['completion']}\n" for r in ROWS)
    )
    (tmp_path / "h.ndjson").write_text(lines(ROWS), encoding="utf-8-sig")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["a.json", "b.jsonl", "c.json", "d.jsonl.gz", "e.csv", "f.parquet", "g.tsv", "h.ndjson"]
)
def test_every_container_holds_the_same_rows(folder: Path, name: str) -> None:
    assert values(folder / name) == ROWS


def test_folder_glob_and_several_files(folder: Path) -> None:
    (folder / "README.md").write_text("not data")
    (folder / "picture.png").write_bytes(b"x")
    (folder / ".hidden.jsonl").write_text("{")
    sources = find_sources([str(folder)])
    assert len(sources.files) == 8
    assert {p.name for p in sources.passed_over} == {"README.md", "picture.png"}
    assert values(folder) == ROWS * 8
    assert values(folder / "*.jsonl*") == ROWS * 2
    assert values(folder / "a.json", folder / "f.parquet") == ROWS * 2


def test_row_numbers_are_lines(folder: Path) -> None:
    rows = list(read_rows(find_sources([str(folder / "b.jsonl")])))
    assert [row.number for row in rows] == [1, 3, 5]
    assert rows[1].where == f"{folder / 'b.jsonl'}:3"


def test_a_csv_row_has_the_number_of_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b'a,b\n1,2\n"3\n3\n3","4\r\n4"\n\n5,6\n')
    rows = list(read_rows(find_sources([str(tmp_path / "x.csv")])))
    assert [row.number for row in rows] == [2, 3, 8]


def test_endings_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "x.JSONL.GZ").write_bytes(gzip.compress(lines(ROWS).encode()))
    assert values(tmp_path / "x.JSONL.GZ") == ROWS == values(tmp_path)
    with raises(DataError, "file-not-found", "Y.JSONL.GZ"):
        find_sources(["Y.JSONL.GZ"])


def test_text_files_are_one_document_with_every_byte(tmp_path: Path) -> None:
    text = "one\r\ntwo\n\n  three\u2028four"
    (tmp_path / "book.txt").write_bytes(text.encode())
    (tmp_path / "book.md").write_bytes(text.encode())
    assert values(tmp_path / "book.txt") == [{"text": text}] == values(tmp_path / "book.md")


def test_hub_layout_reads_the_train_split_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), data / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), data / "test-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA data set.")
    assert values(tmp_path) == ROWS
    assert values(f"{tmp_path}:test") == ROWS[:1]


def layout(folder: Path, *names: str) -> Path:
    """Files of one row each that names the file, or of text."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one\ntwo\n" if path.suffix in (".txt", ".md") else json.dumps({"text": name}) + "\n")
    return folder


def chosen(folder: Path, name: str = "") -> tuple[list[str], list[str]]:
    """Files read, and files ignored."""
    sources = find_sources([name or str(folder)])
    assert not sources.hub
    return tuple([str(p.relative_to(folder)) for p in ps] for ps in (sources.files, sources.passed_over))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (("train/a.jsonl", "test/b.jsonl"), ["train/a.jsonl"]),
        (("data/train/a.jsonl", "data/validation/b.jsonl"), ["data/train/a.jsonl"]),
        (("train.jsonl", "test.jsonl", "extra.jsonl"), ["train.jsonl"]),
        (("train.txt", "valid.txt"), ["train.txt"]),
        (("train-1.csv", "train_2.csv", "my-dev.csv"), ["train-1.csv", "train_2.csv"]),
        (("chats.jsonl", "test.jsonl"), ["chats.jsonl"]),
        (("train.jsonl", "more.jsonl"), ["more.jsonl", "train.jsonl"]),
        (("eval.jsonl",), ["eval.jsonl"]),
        (("latest.jsonl", "contest.jsonl"), ["contest.jsonl", "latest.jsonl"]),
        (("a.jsonl", "old/train.jsonl", "old/test.jsonl"), ["a.jsonl"]),
        (("a.jsonl", "notes.txt", "requirements.txt", "CHANGELOG.md", "pic.png"), ["a.jsonl"]),
        (("one.txt", "two.md", "README.md", "LICENSE.txt"), ["one.txt", "two.md"]),
    ],
)  # fmt: skip
def test_what_a_folder_trains_and_what_it_passes_over(tmp_path: Path, names: tuple[str, ...], files: list[str]) -> None:
    read, passed_over = chosen(layout(tmp_path, *names))
    assert read == files
    expected = {name for name in names if name not in files}
    assert set(passed_over) == {"old" if name.startswith("old/") else name for name in expected}


def test_text_files_of_a_split_are_whole_documents(tmp_path: Path) -> None:
    assert values(layout(tmp_path, "train.txt", "valid.txt")) == [{"text": "one\ntwo\n"}]


def test_a_split_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = layout(tmp_path / "f5", "train.jsonl", "test.jsonl", "val/a.jsonl", "extra.jsonl")
    monkeypatch.chdir(tmp_path)
    for name in ("f5:test", "./f5:test", f"{folder}:test"):
        assert values(name) == [{"text": "test.jsonl"}]
    assert chosen(folder, f"{folder}:validation") == (["val/a.jsonl"], ["extra.jsonl", "test.jsonl", "train.jsonl"])
    with raises(DataError, "split-not-found", "f5", "dev2", "test, train, validation"):
        find_sources(["f5:dev2"])
    with raises(DataError, "file-not-found", "f6:test"):
        find_sources(["f6:test"])


def test_held_out_splits_alone_must_be_named(tmp_path: Path) -> None:
    layout(tmp_path, "test.jsonl", "dev.jsonl")
    with raises(DataError, "split-not-named", "test, validation", f"{tmp_path}:validation"):
        find_sources([str(tmp_path)])


def test_a_folder_with_data_in_other_subfolders_says_how_to_name_them(tmp_path: Path) -> None:
    layout(tmp_path, "2024/a.jsonl", "2025/b.jsonl")
    with raises(DataError, "folder-without-data", "2024, 2025", "**"):
        find_sources([str(tmp_path)])
    assert len(values(tmp_path / "**/*.jsonl")) == 2


def test_links_are_followed_and_broken_ones_named(tmp_path: Path) -> None:
    real = layout(tmp_path / "real", "a.jsonl")
    folder = layout(tmp_path / "f", "b.jsonl")
    (folder / "train").symlink_to(real)
    (folder / "c.jsonl").symlink_to(real / "a.jsonl")
    (folder / "loop").symlink_to(folder)
    (folder / "data").symlink_to(folder)
    assert values(folder / "c.jsonl") == [{"text": "a.jsonl"}]
    assert values(folder / "train") == [{"text": "a.jsonl"}]
    assert find_sources([str(folder)]).files  # and not without end
    for name in ("loop", "data"):
        (folder / name).unlink()
    assert values(folder) == [{"text": "b.jsonl"}, {"text": "a.jsonl"}, {"text": "a.jsonl"}]
    (folder / "gone.png").symlink_to(real / "nothing")
    assert chosen(folder)[1] == ["gone.png"]
    (folder / "d.jsonl").symlink_to(real / "nothing")
    for name in (folder, folder / "d.jsonl", folder / "*.jsonl"):
        with raises(DataError, "broken-link", "d.jsonl", str(real / "nothing")):
            find_sources([str(name)])


def test_an_empty_name_is_an_error() -> None:
    for name in ("", " "):
        with raises(DataError, "empty-name"):
            find_sources([name])


def test_hub_card_with_configs_is_obeyed(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(lines(ROWS), encoding="utf-8")
    (tmp_path / "other.jsonl").write_text(lines(ROWS), encoding="utf-8")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: mine.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert values(tmp_path) == ROWS
    with raises(DataError, "hub-split-missing", "test"):
        values(f"{tmp_path}:test")
    assert values(f"{tmp_path}:default:train") == ROWS


def damaged_gzip() -> bytes:
    return gzip.compress(b'{"a": 1}\n', mtime=0)[:10] + b"\xff" * 40  # a head, then a block of no known type


@pytest.mark.parametrize(
    ("name", "content", "code", "facts"),
    [
        ("x.jsonl", b"", "file-empty", ()),
        ("x.jsonl", b"\n \n", "file-without-rows", ()),
        ("x.json", b"[]", "file-without-rows", ()),
        ("x.json", b'[{"a": 1},\n{"b" 2}]', "broken-json", ("x.json:2:",)),
        ("x.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}", "broken-json", ("x.jsonl:2:", "4300 digits", "column 7")),
        ("x.json", b'[{"a": 1},\n{"a": ' + b"1" * 5000 + b"}]", "broken-json", ("x.json:2:", "4300 digits")),
        ("x.jsonl", b'{"a": 1}\n' + b"[" * 200_000, "broken-json", ("x.jsonl:2:", "nested")),
        ("x.json", b'[{"a": 1},\n' + b"[" * 200_000 + b"]" * 200_001, "broken-json", ("x.json:2:", "nested")),
        ("x.jsonl.gz", damaged_gzip(), "file-damaged", ("gzip",)),
        ("x.parquet.gz", gzip.compress(b"PAR1", mtime=0), "gzip-unsupported", ("Parquet",)),
        ("x.jsonl", b'{"a": "\xff"}\n', "wrong-encoding", ("UTF-8", "byte 0xff in line 1")),
        ("x.parquet", b"PAR1 nothing", "file-damaged", ()),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:40], "file-damaged", ("gzip",)),
        ("x.csv", b"a,b,a\n1,2,3\n", "duplicate-column", ("x.csv:1:", "1 and 3", "'a'")),
        ("x.csv", b"a,,\n1,2,3\n", "duplicate-column", ("x.csv:1:", "2 and 3")),
        ("x.csv", b"a,b\n1,2,3\n", "wrong-field-count", ("x.csv:2:", "3 fields", "has 2")),
        ("x.csv", b"a,b\n1\n", "wrong-field-count", ("x.csv:2:", "1 fields", "has 2")),
        ("x.csv", b'a,b\n1,2\n"1,2\n\n', "broken-csv", ("x.csv:3:",)),
        ("x.csv", b'a,b\n"1\n\n2"\n', "wrong-field-count", ("x.csv:2:",)),
        ("x.doc", b"PK", "unknown-file-type", (".jsonl",)),
    ],
)
def test_broken_files_say_where_and_why(
    tmp_path: Path, name: str, content: bytes, code: str, facts: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    with raises(DataError, code, str(tmp_path / name), *facts):
        values(tmp_path / name)


def test_broken_json_at_line_17(tmp_path: Path) -> None:
    text = lines(ROWS * 6).split("\n")
    text[16] = '{"prompt": "q", "completion" "a"}'
    (tmp_path / "x.jsonl").write_text("\n".join(text))
    with raises(DataError, "broken-json", "x.jsonl:17:", "column 30"):
        values(tmp_path / "x.jsonl")


def test_a_missing_file_offers_the_similar_name(folder: Path) -> None:
    with raises(DataError, "file-not-found", "bb.jsonl", str(folder / "b.jsonl?")):
        find_sources([str(folder / "bb.jsonl")])
    with raises(DataError, "pattern-without-match", "*.xml"):
        find_sources([str(folder / "*.xml")])
    (folder / "empty").mkdir()
    with raises(DataError, "folder-without-data", "empty"):
        find_sources([str(folder / "empty")])


def test_a_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with raises(DataError, "hub-unreachable", "nobody-here/no-such-data"):
        values("nobody-here/no-such-data")


def test_hub_ids_may_name_a_config_a_split_and_a_slice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        "acme/chats",
        "acme/chats:test",
        "acme/chats:main:test",
        "acme/chats:train[:100]",
        "acme/chats:train[10%:20%]",
    ]
    assert find_sources(names).hub == [
        ("acme/chats", None, "train"), ("acme/chats", None, "test"), ("acme/chats", "main", "test"),
        ("acme/chats", None, "train[:100]"), ("acme/chats", None, "train[10%:20%]"),
    ]  # fmt: skip
