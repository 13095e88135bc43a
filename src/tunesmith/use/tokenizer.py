"""`tunesmith tokenizer`: train a byte-level BPE tokenizer on texts, with control tokens and a chat template."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.config.data_keys import DataSection
from tunesmith.data.scripts import script_of
from tunesmith.errors import DataError, ModelError
from tunesmith.files import atomic_directory
from tunesmith.model.bpe import CONTROL_TOKENS, train_tokenizer
from tunesmith.model.source import open_path
from tunesmith.rows.conversation import RawText, RowRefused, Segments, UnknownFormat, find_lone_surrogate
from tunesmith.rows.formats import parse_document
from tunesmith.sources.read import find_sources, read_rows
from tunesmith.sources.rowsize import RowTooLarge
from tunesmith.sources.textfile import LongText

MIN_VOCAB_SIZE = 256 + len(CONTROL_TOKENS)
_SAMPLE_LINES = 20_000  # for the compression table
_PIECE = 2048  # characters


def run_tokenizer(data: DataSection, vocab_size: int, output: Path, sample_mb: int) -> None:
    """Train on the texts of the data, save, and print how well each language is compressed.

    Args:
        sample_mb: train on at most this much UTF-8 text, drawn evenly from all of it.

    Raises:
        ModelError: the vocabulary is too small for all bytes and the control tokens.
        DataError: the data cannot be read.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ModelError(
            f"--vocab-size {vocab_size}: needs {MIN_VOCAB_SIZE} or more, for the 256 bytes and the control tokens "
            f"{', '.join(CONTROL_TOKENS)}.",
            code="vocab-too-small",
        )
    output = open_path(str(output))
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ModelError(f"{output}: already exists; give --output a new folder.", code="output-exists")
    lines = LineSample(_SAMPLE_LINES)
    texts, num_bytes = sample_texts(map(lines.keep, iterate_texts(data)), sample_mb * 10**6)
    tokenizer = train_tokenizer(texts, vocab_size)
    with atomic_directory(output) as partial:
        tokenizer.save_pretrained(partial)
    print(
        f"{len(tokenizer):,} tokens" + ("" if len(tokenizer) == vocab_size else "; the text has no more pairs to merge")
    )
    if num_bytes > sample_mb * 10**6:
        print(
            f"trained on {sample_mb} MB of the {num_bytes / 1e6:,.1f} MB of text, drawn evenly from all of it; "
            "a larger --sample-mb uses more"
        )
    for line in compression_table(tokenizer, lines.lines):
        print(line)
    print(f"tokenizer saved: {output}")
    print(f"use it: tunesmith train recipe:laptop-pretrain --tokenizer {output} --data ... --output runs/base")


def iterate_texts(data: DataSection) -> Iterator[str | LongText]:
    """Every text of every row: raw text unchanged, and each turn of a chat. Rows that training refuses are skipped."""
    seen_files: set[str] = set()
    for number, row in enumerate(read_rows(find_sources(data.train), data.encoding, data.max_row_mb)):
        if data.limit and number >= data.limit:
            return
        is_first = row.file not in seen_files
        seen_files.add(row.file)
        if isinstance(row.value, RowTooLarge):
            continue
        try:
            parsed, long_text = parse_document(row.value, data.format, data.fields, data.ignore_columns)
        except UnknownFormat as refusal:
            if is_first:
                raise DataError(f"{row.where}: {refusal.reason}", code="text-unusable") from None
            continue
        except RowRefused:
            continue
        if long_text:
            if not any(map(find_lone_surrogate, long_text.blocks())):
                yield long_text
        elif isinstance(parsed, RawText):
            yield parsed.text
        elif isinstance(parsed, Segments):
            yield from (text for text, _ in parsed.parts)
        else:
            yield from (m.content for m in parsed.messages if m.content)


def sample_texts(texts: Iterable[str | LongText], max_bytes: int) -> tuple[list[str], int]:
    """The texts and their UTF-8 bytes; of more than max_bytes, an even sample of pieces, in order.

    Memory holds the sample and one text, or one block of a long text.
    """
    texts = iter(texts)
    whole: list[str | LongText] = []
    total = 0
    for text in texts:
        whole.append(text)
        total += sum(len(block.encode()) for block in _blocks_of(text))
        if total > max_bytes:
            break
    else:
        return ["".join(_blocks_of(text)) for text in whole], total
    rng = random.Random(0)
    # the pieces with the smallest random keys, the largest key first
    kept: list[tuple[float, int, str, int]] = []
    total = kept_bytes = 0
    for number, piece in enumerate(_cut_pieces(itertools.chain(whole, texts))):
        size = len(piece.encode())
        total += size
        kept_bytes += size
        heapq.heappush(kept, (-rng.random(), number, piece, size))
        while kept_bytes > max_bytes and len(kept) > 1:
            kept_bytes -= heapq.heappop(kept)[3]
    return [piece for _, _, piece, _ in sorted(kept, key=lambda entry: entry[1])], total


def _blocks_of(text: str | LongText) -> Iterable[str]:
    return [text] if isinstance(text, str) else text.blocks()


def _cut_pieces(texts: Iterable[str | LongText]) -> Iterator[str]:
    """Pieces of one to two thousand characters that end with a line or a word where there is one."""
    for text in texts:
        left = ""
        for block in _blocks_of(text):
            left = yield from _cut_block(left + block)
        if left:
            yield left


def _cut_block(text: str) -> Generator[str, None, str]:
    """The pieces of a text except the last, which is returned: more may follow."""
    start = 0
    while start + _PIECE < len(text):
        limit = start + _PIECE
        middle = start + _PIECE // 2
        end = text.rfind("\n", middle, limit) + 1 or text.rfind(" ", middle, limit)
        end = end if start < end else limit
        yield text[start:end]
        start = end
    return text[start:]


class LineSample:
    """A uniform random sample of lines (reservoir sampling; Vitter 1985)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lines: list[str] = []
        self._seen = 0
        self._rng = random.Random(0)

    def keep(self, text: str | LongText) -> str | LongText:
        for line in _lines_of(text):
            if not line.strip():
                continue
            self._seen += 1
            if len(self.lines) < self.size:
                self.lines.append(line)
            elif (place := self._rng.randrange(self._seen)) < self.size:
                self.lines[place] = line
        return text


def _lines_of(text: str | LongText) -> Iterator[str]:
    """The lines of a text, without their ends."""
    left = ""
    for block in _blocks_of(text):
        lines = (left + block).splitlines(keepends=True)
        # more may follow the last line, and "\n" its "\r"
        left = lines.pop() if lines else ""
        yield from (line.splitlines()[0] for line in lines)
    yield from left.splitlines()


def compression_table(tokenizer: Any, lines: list[str]) -> list[str]:
    """Bytes and characters per token for each language, on the sampled lines."""
    bytes_, chars, tokens = Counter[str](), Counter[str](), Counter[str]()
    encodings = tokenizer.backend_tokenizer.encode_batch(lines, add_special_tokens=False)
    for line, encoding in zip(lines, encodings, strict=True):
        language = script_of(line)
        bytes_[language] += len(line.encode())
        chars[language] += len(line)
        tokens[language] += len(encoding.ids)
    total = sum(bytes_.values()) or 1
    table = [f"{'language':<14}{'share':>8}{'bytes/token':>13}{'characters/token':>18}"]
    for language, count in bytes_.most_common():
        per_token = f"{count / tokens[language]:>13.2f}{chars[language] / tokens[language]:>18.2f}"
        table.append(f"{language:<14}{count / total:>8.1%}{per_token}")
    return table
