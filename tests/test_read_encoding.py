"""data.encoding: any codec for text files; undecodable text ends with the line and the likely encodings."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import raises
from tunesmith.config.data_keys import DataSection
from tunesmith.errors import DataError
from tunesmith.sources.read import find_sources, read_rows

ROW = {"prompt": "你好，世界", "completion": "春眠不觉晓"}
FRENCH = {"prompt": "Où est-ce ?", "completion": "déjà vu, ça coûte 5 €"}


def values(path: Path, encoding: str = "utf-8") -> list[Any]:
    return [row.value for row in read_rows(find_sources([str(path)]), encoding)]


def written(row: dict[str, str]) -> dict[str, str]:
    line = json.dumps(row, ensure_ascii=False)
    cells = ["prompt,completion", ",".join(f'"{value}"' for value in row.values())]
    return {
        "x.json": json.dumps([row], ensure_ascii=False, indent=1), "x.jsonl": line + "\n" + line, "x.txt": "".join(row.values()),
        "x.md": "".join(row.values()), "x.csv": "\r\n".join(cells), "x.tsv": "\n".join(cells).replace(",\"", "\t\"").replace(",", "\t", 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    "encoding", ["gbk", "GB18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "UTF8"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_text_containers_in_any_encoding(tmp_path: Path, encoding: str, packed: bool) -> None:
    for name, text in written(ROW).items():
        path = tmp_path / (name + ".gz" if packed else name)
        content = text.encode(encoding)
        path.write_bytes(gzip.compress(content) if packed else content)
        expected = {"text": text} if name in ("x.txt", "x.md") else ROW
        assert values(path, encoding)[0] == expected, name


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-16-le", "utf-16-be", "gb18030", "utf-32-be"):
        (tmp_path / "x.jsonl").write_bytes(("\ufeff" + json.dumps(ROW)).encode(encoding))
        assert values(tmp_path / "x.jsonl", encoding) == [ROW]


@pytest.mark.parametrize(
    ("row", "encoding", "advice"),
    [
        (ROW, "gbk", "not UTF-8 text (byte 0xc4 in line 3). Try --data.encoding gb18030"),
        (FRENCH, "cp1252", "not UTF-8 text (byte 0xf9 in line 3). Try --data.encoding cp1252"),
        (FRENCH, "utf-16", "not UTF-8 text (its first bytes are those of utf-16). Try --data.encoding utf-16, or save"),
        ({"prompt": "plain", "completion": "ASCII"}, "utf-16-le", "Try --data.encoding utf-16-le, or save"),
        (
            {"prompt": "水" * 999, "completion": "水" * 999},
            "utf-16",
            "(its first bytes are those of utf-16). Try --data.encoding utf-16, or save",
        ),
        (FRENCH, "utf-16-le", "Try --data.encoding utf-16-le, or save"),
        (FRENCH, "utf-16-be", "Try --data.encoding utf-16-be, or save"),
        (ROW, "utf-32", "Try --data.encoding utf-32, or save"),
    ],
)
def test_what_is_not_utf_8_gets_the_likely_encodings(
    tmp_path: Path, row: dict[str, str], encoding: str, advice: str
) -> None:
    text = ("" if row["prompt"] > "水水" else '{"a": 1}\n{"a": 2}\n') + json.dumps(row, ensure_ascii=False) + "\n"
    (tmp_path / "x.jsonl").write_bytes(text.encode(encoding))
    with raises(DataError, "wrong-encoding", advice) as error:
        values(tmp_path / "x.jsonl")
    assert len(values(tmp_path / "x.jsonl", str(error.value).split("--data.encoding ")[1].split()[0].rstrip(",."))) in (
        1,
        3,
    )


def test_a_wrong_encoding_names_the_line_and_the_right_one(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a" * 5000})] * 400 + [json.dumps({"text": "春眠不觉晓，café"}, ensure_ascii=False)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with raises(DataError, "wrong-encoding", "x.jsonl", "ASCII", "byte 0xe6 in line 401", "--data.encoding utf-8"):
        values(tmp_path / "x.jsonl", "ascii")
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\r\n{"a": "\x81"}\n')
    with raises(DataError, "wrong-encoding", "CP1252", "byte 0x81 in line 2"):
        values(tmp_path / "x.jsonl", "cp1252")


def test_an_unknown_encoding_is_an_error_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'gb1803' is not the name of a text encoding; did you mean gb18030"):
        DataSection(train=["x"], encoding="gb1803")
    for name in ("hex", "rot13", "undefined", "a\0b", "Chinese (simplified) please"):
        with pytest.raises(ValueError, match="is not the name of a text encoding"):
            DataSection(train=["x"], encoding=name)
        (tmp_path / "x.jsonl").write_text("{}")
        with raises(DataError, "unknown-encoding", "data.encoding"):
            values(tmp_path / "x.jsonl", name)
    assert DataSection(train=["x"]).encoding == "utf-8"


def test_every_codec_reads_or_refuses(tmp_path: Path) -> None:
    import encodings.aliases

    for content in (b'{"a": "\xff\xfe\x00"}\n' * 3, "\ufeff{}\n".encode("utf-16"), b"\n\n[\x80", b"\x1b$B"):
        (tmp_path / "x.jsonl").write_bytes(content)
        for name in set(encodings.aliases.aliases.values()) | {"idna", "punycode", "unicode_escape", "utf-7"}:
            with contextlib.suppress(DataError):
                values(tmp_path / "x.jsonl", name)
