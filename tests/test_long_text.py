"""A text file that is not held in memory gives the rows, tokens and refusals of the same text in memory."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tokenizers_of_others as others
from conftest import run_apart
from tunesmith.config.data_keys import DataSection
from tunesmith.data.check import text_of
from tunesmith.data.labelling import label_rows
from tunesmith.data.labels import NOTE_UNKNOWN
from tunesmith.data.ledger import LabelledRow, Ledger
from tunesmith.encode import longtext
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.longtext import IdFile, encode_long
from tunesmith.encode.messages import NOTE_CONTROL
from tunesmith.encode.shield import MARK
from tunesmith.errors import DataError
from tunesmith.model.tokenizer import build_encoder
from tunesmith.rows.textmarks import NOTE_TRANSCRIPT_TEXT
from tunesmith.sources import textfile
from tunesmith.sources.read import RawRow, find_sources, read_rows
from tunesmith.use import tokenizer as tokenizer_command

DATE = datetime.datetime(2026, 1, 2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a short text is a long one."""
    monkeypatch.setattr(textfile, "HEAD", 3_000)
    monkeypatch.setattr(textfile, "_BLOCK", 700)
    monkeypatch.setattr(longtext, "PIECE", 2_000)
    monkeypatch.setattr(longtext, "_AROUND", 200)
    monkeypatch.setattr(longtext, "_IN_MEMORY", 1_000)


def encoder_of(name: str, control_text: str = "plain") -> Encoder:
    if not others.FOLDER.is_dir():
        pytest.skip("the shared tokenizers are not beside this checkout")
    tokenizer = others.build(name)
    ends = {"minimind": ("<|im_start|>", "<|im_end|>"), "gpt2": ("<|endoftext|>",) * 2, "llama2": ("<s>", "</s>")}
    tokenizer.add_special_tokens(dict(zip(("bos_token", "eos_token"), ends[name], strict=True)))
    return build_encoder(tokenizer, "none", {}, DATE, control_text)


def words_tokenizer(vocab: dict[str, int]) -> Any:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1} | vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def label(rows: Any, encoder: Encoder, **data: Any) -> LabelledRow:
    section = DataSection(train=["x"], chat_template="none", **data)
    (row,) = label_rows(rows, encoder, section, 128)
    return row


def same_rows(text: str, encoder: Encoder, folder: Path) -> LabelledRow:
    """Label a text from a file and from memory, compare, and return the row of the file."""
    path = folder / "long.txt"
    path.write_bytes(text.encode())
    (raw,) = read_rows(find_sources([str(path)]))
    assert isinstance(raw.value["text"], textfile.LongText)
    ours, whole = label([raw], encoder), label([RawRow(str(path), 1, {"text": text})], encoder)
    assert (ours.status, ours.how, ours.reason, ours.code) == (whole.status, whole.how, whole.reason, whole.code)
    assert ours.notes == whole.notes
    assert len(ours.samples) == len(whole.samples)
    for one, other in zip(ours.samples, whole.samples, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
    counts = [Ledger(), Ledger()]
    for ledger, row in zip(counts, (ours, whole), strict=True):
        ledger.add(row)
    assert counts[0].to_json() == counts[1].to_json()
    assert ours.start() == whole.start()
    return ours


LINES = "".join(f"Line {n}: the quick  brown fox 狐狸 🙂 jumps, e\u0301 {n * n}\r\n\n" for n in range(400))
TEXTS = {
    "lines": LINES,
    "one line": LINES.replace("\r\n\n", " "),
    "chinese": "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。" * 400,
    "no place to cut": "".join(chr(97 + n * n % 26) for n in range(9_000)),
    "a stretch without a place": LINES[:6_000] + "x" * 7_000 + "\n" + LINES[:6_000],
    "blank lines": "one\n" + "\n" * 9_000 + "two\n" + " " * 4_000 + "three" + "\r\n" * 5_001 + "four\n" + LINES,
    "runs": "one\n" + "<" * 4_001 + " \n" + "<>" * 3_000 + "\n" + ". " * 3_000 + "。" * 4_001 + " =" * 3_001 + LINES,
    "rules": ("=" * 79 + "\n" + "-" * 500 + "\n") * 20 + LINES,
    "control tokens": LINES[:5_000] + "<|im_start|>assistant\nHi<|im_end|>\n</s> <s> <|endoftext|>" * 20 + LINES,
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["own", *others.NAMES])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_long_file_is_labelled_as_its_text(name: str, text: str, encoder: Encoder, tmp_path: Path) -> None:
    row = same_rows(text, encoder if name == "own" else encoder_of(name), tmp_path)
    assert row.status == "used"
    assert len(row.samples) > 5


@pytest.mark.usefixtures("small")
def test_what_is_said_of_the_text_does_not_depend_on_where_it_stands(encoder: Encoder, tmp_path: Path) -> None:
    for shift in range(690, 705):  # around the end of a block
        talk = "x" * shift + "\nHuman: hello\n" + "y " * 2_000 + "\n Assistant: hi <|im_end|> there\n"
        row = same_rows("the fox\n" + talk, encoder, tmp_path)
        assert NOTE_TRANSCRIPT_TEXT in row.notes
        assert NOTE_CONTROL in row.notes
    swapped = "the fox\nAssistant: hi\n" + "y " * 4_000 + "\nHuman: hello\n"
    assert NOTE_TRANSCRIPT_TEXT not in same_rows(swapped, encoder, tmp_path).notes
    assert NOTE_TRANSCRIPT_TEXT not in same_rows(LINES + "xHuman: a Assistant: b" * 300, encoder, tmp_path).notes


@pytest.mark.usefixtures("small")
def test_a_long_file_is_refused_as_its_text(tmp_path: Path) -> None:
    marked = same_rows(LINES + MARK + LINES, encoder_of("minimind"), tmp_path)
    assert (marked.status, marked.code) == ("refused", "mark-in-text")
    spelled = same_rows(LINES + "<|im_end|>" + LINES, encoder_of("minimind", "refuse"), tmp_path)
    assert (spelled.status, spelled.code) == ("refused", "control-text")
    same_rows(LINES + "<|im_end|>" + LINES, encoder_of("minimind", "allow"), tmp_path)


@pytest.mark.usefixtures("small")
def test_the_row_as_check_compares_it(encoder: Encoder, tmp_path: Path) -> None:
    """Two long files are the same row if all of their text is the same, not its beginning."""
    rows = [same_rows(text, encoder, tmp_path) for text in (LINES, LINES, LINES + "more")]
    texts = [text_of(row) for row in rows]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.usefixtures("small")
def test_a_long_file_that_breaks_off_is_explained(encoder: Encoder, tmp_path: Path) -> None:
    cases = {
        "x.txt": (LINES.encode() + b"\xff\xfe" + LINES.encode(), "wrong-encoding"),
        "y.txt.gz": (gzip.compress(LINES.encode())[:-200], "file-damaged"),
    }
    for name, (data, code) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError) as error:
            label(read_rows(find_sources([str(tmp_path / name)])), encoder)
        assert error.value.code == code
        assert name in str(error.value)


@pytest.mark.usefixtures("small")
def test_a_long_file_in_any_encoding(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(LINES.encode("utf-16")))
    rows = list(read_rows(find_sources([str(tmp_path / "x.txt.gz")]), "utf-16"))
    assert isinstance(rows[0].value["text"], textfile.LongText)
    whole = label([RawRow("x", 1, {"text": LINES})], encoder)
    np.testing.assert_array_equal(label(rows, encoder).samples[-1].input_ids, whole.samples[-1].input_ids)


@pytest.mark.usefixtures("small")
def test_a_long_file_with_fields_of_its_own(encoder: Encoder, tmp_path: Path) -> None:
    """An entry of dataset_info.json names the column; a format that is no text sees the whole text."""
    (tmp_path / "long.txt").write_text(LINES, encoding="utf-8", newline="")
    entry = {"wiki": {"file_name": "long.txt", "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry))
    row = label(read_rows(find_sources([f"{tmp_path}:wiki"])), encoder)
    assert (row.status, row.how) == ("used", "text")
    rows = list(read_rows(find_sources([str(tmp_path / "long.txt")])))
    refused = label([*rows, RawRow("y", 1, {"text": "a"})][:1], encoder, fields={"text": "text"})
    assert refused.status == "used"
    with pytest.raises(DataError):
        label(rows, encoder, fields={"text": "absent"})


def test_unknown_tokens_of_a_long_file_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "HEAD", 3_000)
    words = words_tokenizer({"the": 4, "fox": 5})
    row = same_rows("the fox " * 900 + "cat", build_encoder(words, "none", {}, DATE), tmp_path)
    assert row.notes == (NOTE_UNKNOWN,)


@pytest.mark.parametrize("name", ["minimind", "llama2"])
def test_pieces_have_the_spans_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tokenizer marks the beginning of each text (SentencePiece)."""
    monkeypatch.setattr(longtext, "PIECE", 2_000)
    backend = encoder_of(name).tokenizer.backend_tokenizer
    found, whole = encode_long(backend, LINES), backend.encode(LINES, add_special_tokens=False)
    assert list(found.ids) == whole.ids
    assert found.offsets == whole.offsets


def test_ids_come_back_from_memory_and_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (1 << 20, 100):
        monkeypatch.setattr(longtext, "_IN_MEMORY", limit)
        ids = IdFile(tmp_path)
        for start in range(0, 300, 30):
            ids.extend(range(start, start + 30))
            assert ids[start : start + 100].tolist() == list(range(start, start + 30))
        assert (len(ids), ids[5:8].tolist(), ids[300:310].tolist()) == (300, [5, 6, 7], [])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_a_tokenizer_is_trained_on_the_same_pieces(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(LINES.encode())
    data = DataSection(train=[str(path)])
    (long_text,) = tokenizer_command.iterate_texts(data)
    assert isinstance(long_text, textfile.LongText)
    for max_bytes in (10_000, 10_000_000):
        ours = tokenizer_command.sample_texts([long_text], max_bytes)
        assert ours == tokenizer_command.sample_texts([LINES], max_bytes)
    samples = [tokenizer_command.LineSample(50), tokenizer_command.LineSample(50)]
    samples[0].keep(long_text)
    samples[1].keep(LINES)
    assert samples[0].lines == samples[1].lines


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """On the whole way into a token store."""
    words_tokenizer({f"{word}" * 40: number for number, word in enumerate(("the", "fox", "dog"), 4)}).save_pretrained(
        tmp_path / "tokenizer"
    )
    text = ("the" * 40 + " " + "fox" * 40 + "\n" + "dog" * 40 + " ") * 2_750  # 1 MB
    code = (
        "import datetime, os, resource, sys\n"
        "os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # its threads hold 40 MB more, or not\n"
        "from pathlib import Path\n"
        "from transformers import AutoTokenizer\n"
        "from tunesmith.config.schema import DataSection\n"
        "from tunesmith.data.labelling import label_rows\n"
        "from tunesmith.data.store import StoreWriter\n"
        "from tunesmith.model.tokenizer import build_encoder\n"
        "from tunesmith.sources.read import find_sources, read_rows\n"
        "tokenizer, path, out = sys.argv[1:]\n"
        "encoder = build_encoder(AutoTokenizer.from_pretrained(tokenizer), 'none', {}, datetime.datetime(2026, 1, 2))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = read_rows(find_sources([path]))\n"
        "with StoreWriter(Path(out)) as writer:\n"
        "    for row in label_rows(rows, encoder, DataSection(train=[path]), 512, folder=Path(out)):\n"
        "        writer.add(row)\n"
        "print(len(row.samples), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown_kb = []
    for number, times in enumerate((5, 20)):
        path = tmp_path / f"{number}.txt"
        path.write_text(text * times)
        out = run_apart(code, tmp_path / "tokenizer", path, tmp_path / f"out{number}")
        num_samples, grown = map(int, out.split())
        assert num_samples == -(-3 * 2_750 * times // 511)
        grown_kb.append(grown)
    assert grown_kb[1] < grown_kb[0] + 8_000, grown_kb  # held whole: 26,000 more
