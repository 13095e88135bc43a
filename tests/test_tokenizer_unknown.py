"""Which token replaces text that a vocabulary cannot encode, for every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tunesmith.tokens.unknown import drops_text, unknown_id

SHARED = Path(__file__).resolve().parents[2] / "shared" / "tokenizers"
LETTERS = dict.fromkeys("abcdefgh ")
BYTES = [f"<0x{value:02X}>" for value in range(256)]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def numbered(*pieces: str) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def byte_level(vocab: dict[str, int], **more: Any) -> Tokenizer:
    core = Tokenizer(models.BPE(vocab, [], **more))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return core


def unigram(*pieces: str, fallback: bool = False) -> Tokenizer:
    return Tokenizer(models.Unigram([(p, -1.0) for p in dict.fromkeys(pieces)], unk_id=1, byte_fallback=fallback))


def word_piece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(numbered("[PAD]", "[UNK]", "a", "##b"), unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return core


WRITES_IT = {
    "BPE": lambda: Tokenizer(models.BPE(numbered("x", "<unk>", *LETTERS), [], unk_token="<unk>")),
    "BPE, fused": lambda: Tokenizer(models.BPE(numbered("x", "<unk>", *LETTERS), [], unk_token="<unk>", fuse_unk=True)),
    "BPE, 255 bytes": lambda: Tokenizer(
        models.BPE(numbered("x", "<unk>", *BYTES[:-13]), [], unk_token="<unk>", byte_fallback=True)
    ),
    "WordLevel": lambda: Tokenizer(models.WordLevel(numbered("x", "<unk>", "hello"), unk_token="<unk>")),
    "WordPiece": word_piece,
    "Unigram": lambda: unigram("x", "<unk>", *LETTERS),
    "Unigram, few bytes": lambda: unigram("x", "<unk>", *LETTERS, *BYTES[:100], fallback=True),
    "byte level, not all bytes": lambda: byte_level(numbered("x", "<unk>", *ALPHABET[:60]), unk_token="<unk>"),
}
NEVER = {
    "byte level": lambda: byte_level(numbered(*ALPHABET)),
    "byte level that names one": lambda: byte_level(numbered("x", "<unk>", *ALPHABET), unk_token="<unk>"),
    "BPE in bytes": lambda: Tokenizer(models.BPE(numbered("<unk>", *BYTES), [], unk_token="<unk>", byte_fallback=True)),
    "Unigram in bytes": lambda: unigram("x", "<unk>", *LETTERS, *BYTES, fallback=True),
}


@pytest.mark.parametrize("name", WRITES_IT)
def test_the_token_for_unknown_text(name: str) -> None:
    core = WRITES_IT[name]()
    assert unknown_id(core) == 1
    assert not drops_text(core)


@pytest.mark.parametrize("name", NEVER)
def test_none_where_every_text_can_be_written(name: str) -> None:
    core = NEVER[name]()
    assert unknown_id(core) is None
    assert not drops_text(core)


def test_text_that_is_dropped() -> None:
    core = Tokenizer(models.BPE(numbered(*LETTERS), []))
    assert unknown_id(core) is None
    assert drops_text(core)


def test_our_own_and_real_ones(tokenizer: Any) -> None:
    assert unknown_id(tokenizer.backend_tokenizer) is None
    for name in ("minimind", "llama2"):
        if (SHARED / name).is_dir():
            assert unknown_id(Tokenizer.from_file(str(SHARED / name / "tokenizer.json"))) is None, name
