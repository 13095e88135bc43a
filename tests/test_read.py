"""Containers: told from name and first bytes; whatever is broken ends with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.data.read import find_sources, read_rows
from tunesmith.errors import DataError

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


def test_hub_card_with_configs_is_obeyed(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(lines(ROWS), encoding="utf-8")
    (tmp_path / "other.jsonl").write_text(lines(ROWS), encoding="utf-8")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: mine.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert values(tmp_path) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b"", "the file is empty"),
        ("x.jsonl", b"\n \n", "holds no rows"),
        ("x.json", b"[]", "holds no rows"),
        ("x.json", b'[{"a": 1},\n{"b" 2}]', "x.json:2: broken JSON"),
        ("x.json", b'{"data": [\n{"a": 1}]}', "rows below the key 'data'"),
        ("x.jsonl", b'{"a": "\xff"}\n', "not UTF-8 text (byte 0xff in line 1)"),
        ("x.parquet", b"PAR1 nothing", "not a readable Parquet file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000)[:40], "cannot be read"),
        ("x.csv", b"a,b\n1,2,3\n", "x.csv:2: the row does not have the 2 fields"),
        ("x.csv", b"a,b\n1\n", "x.csv:2: the row does not have the 2 fields"),
        ("x.csv", b'a,b\n"1,2\n', "broken CSV"),
        ("x.xlsx", b"PK", "unknown kind of file"),
    ],
)
def test_broken_files_say_where_and_why(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        values(tmp_path / name)
    assert words in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_broken_json_at_line_17(tmp_path: Path) -> None:
    text = lines(ROWS * 6).split("\n")
    text[16] = '{"prompt": "q", "completion" "a"}'
    (tmp_path / "x.jsonl").write_text("\n".join(text))
    with pytest.raises(DataError, match=r"x\.jsonl:17: broken JSON .* at column 30"):
        values(tmp_path / "x.jsonl")


def test_a_missing_file_offers_the_similar_name(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder\. Did you mean .*b\.jsonl\?"):
        find_sources([str(folder / "bb.jsonl")])
    with pytest.raises(DataError, match="no file matches"):
        find_sources([str(folder / "*.xml")])
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        find_sources([str(folder / "empty")])


def test_a_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with pytest.raises(DataError) as error:
        values("nobody-here/no-such-data")
    assert "nobody-here/no-such-data: not a local file or folder, and the hub could not give it" in str(error.value)
