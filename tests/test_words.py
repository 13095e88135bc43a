"""The encoder of words gives the tokenizer's own ids, or is not used."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import tokenizers_of_others
from tunesmith.tokens import words
from tunesmith.tokens.words import WordEncoder

LONG = pytest.mark.skipif(not os.environ.get("TUNESMITH_LONG"), reason="a larger vocabulary; TUNESMITH_LONG=1")
SHARED = Path(__file__).resolve().parents[2] / "shared"
LINES = [
    "The quick brown fox's 12 jumps, they're over 3,456 lazy dogs!",
    "def f(x):\n    return x['a']  # it's",
    "你好，世界。12",
]
QWEN = tokenizers_of_others._QWEN
PATTERNS = {
    "qwen": [QWEN],
    "llama3": [QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")],
    "o200k": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "possessive": [r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"],
    "digits first": [r" ?\p{N}", "gpt2"],
    "three": [r"\p{N}{1,3}", r"[\r\n]", "gpt2"],
    "gpt2": ["gpt2"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_agreed", {})


def make(patterns: list[str], normalizer: Any = None, **model: Any) -> Tokenizer:
    """A small byte-level BPE that cuts by these patterns."""
    core = Tokenizer(models.BPE(**model))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns if pattern != "gpt2"]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=patterns[-1] == "gpt2")
    core.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level]) if splits else byte_level
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(LINES * 20, trainer)
    return core


def odd_texts(count: int, seed: int = 1) -> list[str]:
    """Texts of every kind of character, the usual ones most often."""
    rng = random.Random(seed)
    usual = [
        "'s",
        "'LL",
        "'",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "the",
        "Dog",
        "x",
        "12",
        "3456",
        "...",
        "_",
        "é",
        "’",
        "“",
        "ñ",
        "—",
    ]
    odd = [
        "\u00a0",
        "\u2028",
        "\u200b",
        "\u0301",
        "²",
        "ª",
        "ſ",
        "İ",
        "\u1680",
        "你好",
        "。",
        "😀",
        "ß",
        "Ж",
        "\x00",
        "\x1c",
        "\x7f",
        "\x85",
    ]
    return ["".join(rng.choices([*usual * 3, *odd], k=rng.randint(0, 30))) for _ in range(count)]  # fmt: skip


def compare(backend: Tokenizer, texts: list[str]) -> int:
    """Number of texts that the encoder takes; their ids must be the tokenizer's."""
    encoder = WordEncoder.of(backend)
    assert encoder is not None
    taken = [text for text in texts if encoder.takes(text)]
    expected = [backend.encode(text, add_special_tokens=False).ids for text in taken]
    for _ in range(2):  # with and without its words known
        assert [ids.tolist() for ids in encoder.encode(taken)] == expected
    return len(taken)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.NFKC()], ids=["plain", "NFC", "NFKC"])
def test_ids_are_the_tokenizers(name: str, normalizer: Any) -> None:
    assert compare(make(PATTERNS[name], normalizer), odd_texts(600)) > (20 if normalizer else 80)


@pytest.mark.parametrize("name", ["minimind", "gpt2", pytest.param("qwen", marks=LONG)])
def test_ids_of_real_tokenizers(name: str) -> None:
    if not (SHARED / "tokenizers").exists():
        pytest.skip("needs ../shared/tokenizers")
    rows = json.loads((SHARED / "data" / "llamafactory" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = [row["output"] for row in rows[:400]]
    backend = tokenizers_of_others.build(name).backend_tokenizer
    assert compare(backend, texts) > 380
    assert compare(backend, odd_texts(1000, 2)) > 100


def test_added_tokens_are_not_cut() -> None:
    backend = make(["gpt2"])
    backend.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("[x]", lstrip=True, rstrip=True)])
    backend.add_tokens(["   ", "é—", AddedToken("fox", single_word=True)])
    texts = ["a<|end|>b", "a  [x] b", "a   b", "né—", "a fox runs"]
    encoder = WordEncoder.of(backend)
    assert encoder is not None
    assert not any(map(encoder.takes, texts))
    assert compare(backend, [*texts, "a<|en d|>b", "a  b", "é", "[x", "\n\n"]) == 5


@pytest.mark.parametrize(
    "pattern", [r"(a)|\p{N}+", r"\bthe|.+", r"\p{Han}+", r"a{2}+|\s", r"a{2}?", r"[a[b]]+", r"[^\S]+", "é"]
)
def test_patterns_that_could_mean_something_else(pattern: str) -> None:
    assert WordEncoder.of(make([pattern, "gpt2"])) is None


def test_tokenizers_of_another_kind() -> None:
    assert WordEncoder.of(make(["gpt2"], dropout=0.1)) is None
    assert WordEncoder.of(make(["gpt2"], normalizers.Lowercase())) is None
    assert WordEncoder.of(make(["gpt2"], normalizers.Sequence([normalizers.NFC()]))) is None
    for cutter in (
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ):
        backend = make(["gpt2"])
        if cutter is None:
            backend = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        else:
            backend.pre_tokenizer = cutter
        assert WordEncoder.of(backend) is None


@pytest.mark.parametrize(
    "other", [r"\s+|\S+", r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+", words._GPT2.replace(r"\s+(?!\S)|", "")]
)
def test_an_encoder_that_cuts_otherwise_is_not_used(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make(["gpt2"])
    monkeypatch.setattr(words, "_GPT2", other)
    assert WordEncoder.of(backend) is None


def test_characters_of_which_the_engines_disagree_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then only ASCII texts are taken."""
    known = words.unicodedata.category
    monkeypatch.setattr(words.unicodedata, "category", lambda char: "Po" if char == "é" else known(char))
    encoder = WordEncoder.of(make(["gpt2"]))
    assert encoder is not None
    assert encoder.takes("cafe")
    assert not encoder.takes("ñandu")


def test_a_full_cache_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MAX_WORDS", 50)
    backend = make(["gpt2"])
    encoder = WordEncoder.of(backend)
    assert encoder is not None
    for text in odd_texts(300):
        if encoder.takes(text):
            assert encoder.encode([text, "", text])[2].tolist() == backend.encode(text).ids
            assert len(encoder._words) < 130


@pytest.mark.parametrize(
    ("normalizer", "added", "text"),
    [
        (normalizers.NFC(), "cafe\u0301", "a caf\u00e9 b"),
        (normalizers.NFKC(), "\ufb01x", "a fix b"),
        (normalizers.NFKC(), "\uff1cx\uff1e", "a <x> b"),
    ],
)
def test_added_tokens_are_searched_for_as_normalized(normalizer: Any, added: str, text: str) -> None:
    backend = make(["gpt2"], normalizer)
    backend.add_tokens([AddedToken(added, normalized=True)])
    assert backend.token_to_id(added) in backend.encode(text).ids
    encoder = WordEncoder.of(backend)
    assert encoder is not None
    assert not encoder.takes(text)
    assert compare(backend, [text, "a b"]) == 1


@pytest.mark.parametrize("pattern", ["(?i:ss|the)", "(?i:cla(?:s)s)", "(?i:s{2})", "(?i:as+)"])
def test_sharp_s_is_two_letters_to_one_engine_alone(pattern: str) -> None:
    encoder = WordEncoder.of(make([pattern, "gpt2"]))
    assert encoder is None or not encoder.takes("\u00df")
    assert WordEncoder.of(make(PATTERNS["o200k"])).takes("\u00df")  # type: ignore[union-attr]


class _OfPython:
    """A part of a tokenizer that is written in Python."""

    def pre_tokenize(self, text: Any) -> None:
        pass

    def normalize(self, text: Any) -> None:
        text.lowercase()


def test_tokenizers_that_cannot_be_read_or_probed() -> None:
    backend = make(["gpt2"])
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    assert WordEncoder.of(backend) is None
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(_OfPython())
    assert WordEncoder.of(backend) is None
    backend = make(["gpt2"])
    backend.normalizer = normalizers.Normalizer.custom(_OfPython())
    assert WordEncoder.of(backend) is None
    few = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], unk_token="?"))  # fails at any other letter
    few.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert WordEncoder.of(few) is None
