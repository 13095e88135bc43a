"""The key of prepared data changes with every key, file and setting that can change a token, a label or the ledger.

All keys of the sections are walked, so that a new one has to be put into one of the lists here.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import locale
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from conftest import chat_row, write_jsonl
from tunesmith.chat_template.program import dated
from tunesmith.config.data_keys import DataSection, FieldsSection
from tunesmith.config.schema import ModelSection
from tunesmith.config.sources import SourceSection
from tunesmith.data.dataset import find_data
from tunesmith.encode.draws import RowDraws
from tunesmith.encode.portable import PortableEncoder
from tunesmith.model.tokenizer import build_encoder
from tunesmith.preparation import cache, fingerprint
from tunesmith.preparation.labelled import LabelRules

DATE = datetime.datetime(2026, 1, 2, 3, 4, 5)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
CHANGES: dict[str, Any] = {
    "format": "messages", "fields": {"prompt": "q"}, "ignore_columns": ["x"], "chat_template": "chatml",
    "template_kwargs": {"a": 1}, "max_seq_len": 63, "overlong": "drop", "train_on": "all", "train_reasoning": False,
    "system_prompts": ["Be brief."], "history": "unroll", "control_text": "refuse", "limit": 1, "encoding": "cp1252",
    "max_row_mb": 1.0, "stream": True,
}  # fmt: skip
ALONE = {"system_prompts": ["Be kind."]}  # with which the keys below decide something
CHANGES_OF_DRAWS: dict[str, Any] = {"system_prompt_share": 0.5, "empty_think_share": 0.5}
CHANGES_NOTHING: dict[str, Any] = {"eval": ["b.jsonl"], "eval_split": 0.5, "max_refused": 0.5, "max_cut_replies": 0.5,
                                   "workers": 3, "cache": True, "share_prefix": True}  # fmt: skip
BY_FILES = {"train"}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "b.jsonl", [chat_row("Q", "B")])
    monkeypatch.chdir(tmp_path)
    return write_jsonl(tmp_path / "a.jsonl", [chat_row("Q", "A")])


def key_of(
    tokenizer: Any, train: Any, when: datetime.datetime = DATE, seed: int = 0, more: Any = None, **keys: Any
) -> str:
    data = DataSection(train=train if isinstance(train, list) else [str(train)], **keys)
    encoder = build_encoder(copy.deepcopy(tokenizer), data.chat_template, data.template_kwargs, when, data.control_text)
    rules = LabelRules(encoder, data, data.max_seq_len or 64, RowDraws.of(data, seed))
    found = fingerprint.fingerprint(find_data(data).train, rules, more)
    assert found is not None
    return found


def test_every_key_of_data(rows: Path, tokenizer: Any) -> None:
    lists = (CHANGES, CHANGES_OF_DRAWS, CHANGES_NOTHING)
    assert sorted(DataSection.model_fields) == sorted([*BY_FILES, *(key for one in lists for key in one)])
    plain, drawn = key_of(tokenizer, rows), key_of(tokenizer, rows, **ALONE)
    found = {key: key_of(tokenizer, rows, **{key: value}) for key, value in CHANGES.items()}
    found |= {key: key_of(tokenizer, rows, **ALONE, **{key: value}) for key, value in CHANGES_OF_DRAWS.items()}
    found |= {"none": plain, "alone": drawn, "seed": key_of(tokenizer, rows, seed=1, **ALONE)}
    found["more"] = key_of(tokenizer, rows, more=[0.5, 1])
    assert len(set(found.values())) == len(found), found
    for key, value in CHANGES_NOTHING.items():
        assert key_of(tokenizer, rows, **{key: value}) == plain, key
    assert key_of(tokenizer, rows, seed=1) == plain  # nothing is drawn


def test_every_column(rows: Path, tokenizer: Any) -> None:
    keys = {key_of(tokenizer, rows, fields={name: "x"}) for name in FieldsSection.model_fields}
    assert len(keys) == len(FieldsSection.model_fields)
    assert key_of(tokenizer, rows) not in keys


def test_every_key_of_a_source(rows: Path, tokenizer: Any) -> None:
    """How much of each source a pass takes is decided after the rows are labelled."""
    given = {"name": "n", "weight": 2.0, "epochs": 2.0, "limit": 1}
    assert sorted(SourceSection.model_fields) == sorted(["path", *given])
    plain = key_of(tokenizer, rows)
    for name, value in given.items():
        is_same = key_of(tokenizer, [{"path": str(rows), name: value}]) == plain
        assert is_same == (name != "limit"), name
    other = str(rows.with_name("b.jsonl"))
    orders = [[str(rows), other], [other, str(rows)], [{"path": str(rows), "limit": 1}, other],
              [str(rows), {"path": other, "limit": 1}]]  # fmt: skip
    assert len({plain, *(key_of(tokenizer, one) for one in orders)}) == 5


def test_every_key_of_the_model(rows: Path, tokenizer: Any) -> None:
    """They decide the tokenizer and the template, which are compared by content."""
    assert sorted(ModelSection.model_fields) == ["add_tokens", "config", "path", "revision", "tokenizer",
                                                 "trust_remote_code"]  # fmt: skip
    plain = key_of(tokenizer, rows)
    others = {
        name: copy.deepcopy(tokenizer) for name in ("added", "special", "template", "unused special", "bos", "norm")
    }
    others["added"].add_tokens(["<extra>"])
    others["special"].add_special_tokens({"additional_special_tokens": ["<extra>"]})
    others["template"].chat_template = TEMPLATE
    others["unused special"].pad_token = "fox"
    others["bos"].bos_token = others["bos"].eos_token
    import tokenizers

    others["norm"].backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    keys = {name: key_of(other, rows) for name, other in others.items()}
    assert len({plain, *keys.values()}) == len(keys) + 1, keys
    assert key_of(copy.deepcopy(tokenizer), rows) == plain


def test_everything_a_worker_has_of_an_encoder(rows: Path, tokenizer: Any) -> None:
    """A worker labels with this alone, so nothing else of the encoder can decide a label."""
    assert set(PortableEncoder.__dataclass_fields__) == {
        "backend", "eos_token", "eos_token_id", "bos_token_id", "bos_ids", "template", "defaults", "control_text",
    }  # fmt: skip


def test_files_and_what_is_around_them(
    rows: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    plain = key_of(tokenizer, rows, chat_template=str(template))
    template.write_text(TEMPLATE + "\n{#- a comment #}")
    assert key_of(tokenizer, rows, chat_template=str(template)) != plain
    template.write_text("{{ strftime_now('%d %b %Y') }}" + TEMPLATE)
    days = [key_of(tokenizer, rows, DATE.replace(day=day, hour=hour), chat_template=str(template))
            for day, hour in ((1, 1), (1, 2), (2, 1))]  # fmt: skip
    assert days[0] == days[1] != days[2]
    plain = key_of(tokenizer, rows)
    for name, value in (("TZ", "Asia/Tokyo"), ("LANG", "de_DE.UTF-8"), ("PYTHONHASHSEED", "1"), ("HOME", "/nowhere")):
        monkeypatch.setenv(name, value)
        assert key_of(tokenizer, rows) == plain, name
    os.utime(rows, (0, 0))
    assert key_of(tokenizer, rows) == plain
    for changed in (rows.read_bytes() + b"\n", rows.read_bytes()[:-1]):
        rows.write_bytes(changed)
        assert key_of(tokenizer, rows) != plain
    moved = rows.rename(rows.with_name("c.jsonl"))  # the ledger names the file
    assert key_of(tokenizer, moved) != plain


@pytest.mark.parametrize("what", ["version", "python", "package", "code"])
def test_other_versions(what: str, rows: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = key_of(tokenizer, rows)
    fingerprint._hash_code.cache_clear()
    if what == "version":
        monkeypatch.setattr(tunesmith, "__version__", "99")
    elif what == "python":  # its tables of Unicode, its codecs and its json
        monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    elif what == "package":
        monkeypatch.setattr(fingerprint, "_version", lambda name: "99" if name == "tokenizers" else None)
    else:
        monkeypatch.setattr(tunesmith, "__file__", str(tmp_path / "__init__.py"))
    try:
        assert key_of(tokenizer, rows) != plain
    finally:
        fingerprint._hash_code.cache_clear()


_WITHOUT_LABELS = {"", "display", "errors", "files", "reading", "runfolder", "plans"}


def test_all_code_that_labels_is_part_of_the_key() -> None:
    code = "import sys; import tunesmith.preparation.write, tunesmith.preparation.worker, tunesmith.encode.portable; "
    code += "print(*{name.partition('.')[2].partition('.')[0] for name in sys.modules if name.startswith('tunesmith')})"
    used = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(used) - _WITHOUT_LABELS == set(fingerprint._LABELLING)


def test_dates_are_in_english_in_any_locale(tmp_path: Path) -> None:
    """Workers are new processes without the caller's locale; the key has the date as it is, not as it is spelled."""
    dates = [DATE, DATE.replace(month=5, day=31, hour=23), datetime.datetime(2026, 10, 4)]
    flags = ["", "-", "_", "0", "^", "#", "^0", "0^", "^#", "-_", "_0"]
    letters = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ%"
    formats = ["", "%", "%%B", "% %B %-d%"]
    formats += [
        "<%" + "".join(parts) + ">" for parts in itertools.product(flags, ("", "3", "12"), ("", "E", "O"), letters)
    ]
    for date in dates:
        write = dated(date)
        for text in formats:
            assert write(text) == date.strftime(text), text  # pytest runs in the C locale
    if shutil.which("localedef") is None:
        pytest.skip("no localedef to make a locale with")
    made = subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE"], capture_output=True)
    if made.returncode > 1 or not (tmp_path / "de_DE").is_dir():
        pytest.skip("localedef has no German")
    code = (
        "import datetime, locale, sys; from tunesmith.chat_template.program import dated\n"
        "locale.setlocale(locale.LC_ALL, 'de_DE'); date = datetime.datetime(2026, 5, 31, 23)\n"
        "print(date.strftime('%B'), dated(date)('%A %B %^b %OB %Ex %r'))"
    )
    environment = {**os.environ, "LOCPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "Mai Sunday May MAY May 05/31/26 11:00:00 PM\n", done.stderr
    assert locale.setlocale(locale.LC_TIME) == "C"


def test_hashes_of_files_are_not_taken_from_a_record_of_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced by a rename, or by a link that points elsewhere; with the same size and time."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_SMALL_BYTES", 1)
    monkeypatch.setattr(cache, "_FRESH_NS", 0)
    one, two, link = tmp_path / "one", tmp_path / "two", tmp_path / "link"
    for path, text in ((one, "1"), (two, "2")):
        path.write_text(text)
        os.utime(path, (1, 1))
    link.symlink_to(one)
    first = cache.hash_data_file(link)
    link.unlink()
    link.symlink_to(two)
    assert cache.hash_data_file(link) == cache.hash_data_file(two) != first
    two.rename(one)
    assert cache.hash_data_file(one) != first
