"""The pre-tokenizer of llama.cpp that a tokenizer gets in GGUF, and how often ids differ."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tokenizers_of_others
from conftest import WORDS, needs_shared, raises
from tunesmith.errors import ModelError
from tunesmith.gguf.fuzz import draw_texts
from tunesmith.gguf.pretokenizer import find_twin
from tunesmith.model.bpe import train_tokenizer

TEXTS = [line for line in WORDS.split("\n") if line] + ["In 2026, 12345 x 67.89", "don't I'LL", "a\n\nb\n\n1. c"]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUMBERS = [f"in {year} there were {year % 97} of {year % 13}\n\n{year}" for year in range(1900, 2030)]


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer([WORDS * 20, *NUMBERS], vocab_size=500)


def changed(tokenizer: Any, **parts: Any) -> Any:
    """The tokenizer with other parts of its tokenizer.json."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model = settings["model"] | parts.pop("model", {})
    core = Tokenizer.from_str(json.dumps(settings | {"model": model}))
    for name, part in parts.items():
        setattr(core, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def cut(*patterns: str, **byte_level: bool) -> Any:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    last = {"add_prefix_space": False, "use_regex": not patterns} | byte_level
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(**last)])


def test_our_own_tokenizers_have_an_exact_twin(trained: Any) -> None:
    twin = find_twin(trained, TEXTS)
    assert (twin.model, twin.name, twin.exact, twin.is_meant) == ("gpt2", "gpt-2", True, True)
    assert (twin.differs, twin.fuzz_differs, twin.example, twin.reasons) == (0, 0, None, ())


def test_each_digit_of_our_own_tokenizers_is_a_token(trained: Any) -> None:
    """Also where the training texts are full of the same numbers, and the pre-tokenizer does not cut between digits."""
    tokens = trained.get_vocab()
    assert not [token for token in tokens if sum(char.isdigit() for char in token) > 1]
    assert "\u01201" in tokens  # with a space before it
    for number in ("2026", "1999", " 12345"):
        pieces = trained.backend_tokenizer.encode(number, add_special_tokens=False).tokens
        assert [piece.removeprefix("\u0120") for piece in pieces] == list(number.strip())


@pytest.mark.parametrize(
    ("patterns", "model", "name"),
    [
        ((QWEN,), {}, "qwen2"),
        ((QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),), {"ignore_merges": True}, "llama-bpe"),
        ((QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),), {}, "smaug-bpe"),
    ],
)
def test_patterns_as_on_the_hub(trained: Any, patterns: Any, model: Any, name: str) -> None:
    twin = find_twin(changed(trained, model=model, pre_tokenizer=cut(*patterns)), TEXTS)
    assert (twin.name, twin.is_meant, twin.differs) == (name, True, 0)
    assert twin.fuzz_differs <= 0.002  # the long s after an apostrophe
    assert not twin.exact
    assert twin.reasons


def test_individual_digits(trained: Any) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    twin = find_twin(changed(trained, pre_tokenizer=pre_tokenizers.Sequence([digits, last])), TEXTS)
    assert (twin.name, twin.exact) == ("smollm", True)


def test_normalization_is_measured_and_named(trained: Any) -> None:
    nfc = changed(trained, pre_tokenizer=cut(QWEN), normalizer=normalizers.NFC())
    twin = find_twin(nfc, TEXTS)
    assert (twin.name, twin.is_meant, twin.exact, twin.differs) == ("qwen2", True, False, 0)
    assert any("NFC" in reason for reason in twin.reasons)
    assert find_twin(nfc, ["cafe\u0301", "caf\xe9"]).differs == 0.5


def test_without_a_twin_the_nearest_is_named_with_what_differs(trained: Any) -> None:
    """As the tokenizers of earlier versions of `tunesmith tokenizer`."""
    digits = pre_tokenizers.Split(Regex(r" ?\p{N}"), "isolated")
    old = changed(
        trained, pre_tokenizer=pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    )
    twin = find_twin(old, TEXTS)
    assert (twin.name, twin.exact, twin.is_meant) == ("gpt-2", False, False)
    assert twin.differs == 1 / len(TEXTS)  # blank lines before a digit
    assert 0 < twin.fuzz_differs < 0.1
    assert twin.example is not None
    with_gpt2 = changed(trained, pre_tokenizer=cut())
    assert old(twin.example)["input_ids"] != with_gpt2(twin.example)["input_ids"]


def test_a_space_in_front_is_named(trained: Any) -> None:
    twin = find_twin(changed(trained, pre_tokenizer=cut(add_prefix_space=True)), TEXTS)
    assert (twin.name, twin.exact) == ("gpt-2", False)
    assert twin.differs > 0.5


@needs_shared
@pytest.mark.parametrize("name", ["minimind", "gpt2"])
def test_others_tokenizers_with_byte_level(name: str) -> None:
    twin = find_twin(tokenizers_of_others.build(name), TEXTS)
    assert (twin.model, twin.name, twin.exact) == ("gpt2", "gpt-2", True)


@pytest.mark.parametrize(
    "core",
    [
        Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
        Tokenizer(models.BPE({"a": 0, "b": 1}, [])),
        Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0)),
        Tokenizer(models.BPE({"a": 0, "b": 1}, [], dropout=0.5)),
    ],
    ids=["words", "characters", "unigram", "dropout"],
)
def test_a_kind_that_llama_cpp_does_not_have_is_refused(core: Any) -> None:
    with raises(ModelError, "tokenizer-has-no-twin"):
        find_twin(PreTrainedTokenizerFast(tokenizer_object=core), ["a"])


def test_random_texts_hold_what_tokenizers_disagree_on() -> None:
    texts = draw_texts(3000)
    assert texts == draw_texts(3000) != draw_texts(3000, seed=1)
    whole = "".join(texts)
    assert all(part in whole for part in ("'LL", "\r\n", "12", "\u200d", "e\u0301", "你", " \n", "\x00", "\u3000"))
    whole.encode()  # no lone surrogates
