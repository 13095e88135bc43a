"""No text becomes a control token through normalization (promise 8), whatever the tokenizer's flags."""

from __future__ import annotations

import contextlib
import copy
import datetime
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import chat_row, save_folder, tiny_config
from tunesmith.config.data_keys import DataSection
from tunesmith.config.schema import ModelSection
from tunesmith.data.labelling import label_rows
from tunesmith.encode.encoder import Encoder
from tunesmith.encode.shield import MARK, without_added_tokens
from tunesmith.errors import ModelError
from tunesmith.model.tokenizer import build_encoder, load_tokenizer
from tunesmith.rows.conversation import Message, RowRefused
from tunesmith.sources.read import RawRow

DATE = datetime.datetime(2026, 1, 2)
TOKEN = "<TASK>"
NORMALIZERS: dict[str, Any] = {
    "nfc": normalizers.NFC(),
    "nfkc": normalizers.NFKC(),
    "lowercase": normalizers.Lowercase(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "bert": normalizers.BertNormalizer(),
    "nmt": normalizers.Nmt(),
    "replace": normalizers.Sequence([normalizers.Replace("\u00ad", ""), normalizers.Replace(Regex("[«⟨]"), "<")]),
    "prepend": normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
    "many": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex("_+"), "_")]),
    "deletes our mark": normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(MARK, "")]),
    "one becomes all": normalizers.Replace("☃", TOKEN),
}  # fmt: skip
FLAGS: dict[str, dict[str, bool]] = {
    "plain": {},
    "special": {"special": True},
    "lstrip": {"lstrip": True},
    "rstrip": {"rstrip": True},
    "word": {"single_word": True},
    "literal": {"normalized": False},
}


@cache
def disguised_letters(name: str) -> dict[str, list[str]]:
    """For each letter of the token, the characters of the BMP that are normalized to it; for "", the deleted ones."""
    normalizer = NORMALIZERS[name]
    rest = normalizer.normalize_str("x")[:-1]  # prepended text
    found: dict[str, list[str]] = {letter: [] for letter in ["", *TOKEN]}
    targets = {normalizer.normalize_str(letter).removeprefix(rest): letter for letter in TOKEN}
    for point in range(sys.maxunicode + 1 if name == "nfkc" else 0x10000):
        if 0xD800 <= point < 0xE000:
            continue
        seen = normalizer.normalize_str(f"a{chr(point)}a").removeprefix(rest)[1:-1]
        if seen in targets:
            found[targets[seen]].append(chr(point))
        elif not seen:
            found[""].append(chr(point))
    return found


def spellings(name: str) -> list[str]:
    """The token with each letter disguised in each way, with deleted characters inside it, and both at random."""
    letters, rng = disguised_letters(name), random.Random(5)
    found = [TOKEN, TOKEN.lower(), "☃"]
    found += [TOKEN.replace(letter, other) for letter in TOKEN for other in letters[letter]]
    found += [f"{TOKEN[:3]}{gone}{TOKEN[3:]}" for gone in letters[""]]
    for _ in range(100):
        text = "".join(rng.choice([*letters[letter], letter]) + rng.choice(["", "", *letters[""]]) for letter in TOKEN)
        found.append(text.replace(MARK, ""))
    return [text for text in found if MARK not in text]


def with_token(tokenizer: Any, normalizer: Any, **flags: bool) -> Any:
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.normalizer = normalizer
    own.add_tokens([AddedToken(TOKEN, **flags)])
    return own


def attack(encoder: Encoder, text: str) -> str:
    """Outcome for a message; no added tokens except the template's, and the same text as without added tokens."""
    clean = sum(i in encoder.added_ids for i in encoder.encode_prompt([Message("user", "q")]))
    blind = without_added_tokens(encoder.tokenizer.backend_tokenizer)
    try:
        ids = encoder.encode_prompt([Message("user", text)])
    except ModelError:
        return "refused"
    assert sum(i in encoder.added_ids for i in ids) == clean, ascii(text)
    plain = blind.encode(f"user\n{text}", add_special_tokens=False).ids
    if encoder.tokenizer.backend_tokenizer.normalizer != NORMALIZERS["prepend"]:
        assert ",".join(map(str, plain)) in ",".join(map(str, ids)), ascii(text)
    return "used"


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", NORMALIZERS)
def test_no_disguise_becomes_a_token(tokenizer: Any, name: str, flags: str) -> None:
    encoder = build_encoder(with_token(tokenizer, NORMALIZERS[name], **FLAGS[flags]), None, {}, DATE)
    everything = spellings(name)
    sample = everything if len(everything) < 150 else random.Random(1).sample(everything, 150)
    texts = [before + text + behind for text in sample for before, behind in [("", ""), ("so ", " it is")]]
    outcomes = [attack(encoder, text) for text in texts[:2] + texts]
    assert "used" in outcomes
    rows = [RawRow("x.jsonl", n, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]})
            for n, text in enumerate(texts, 1)]  # fmt: skip
    labelled = list(label_rows(rows, encoder, DataSection(train=["x.jsonl"]), max_seq_len=2048))
    clean = sum(i in encoder.added_ids for i in encoder.encode_prompt([Message("user", "q")])) + 1  # the stop token
    for row, text in zip(labelled, texts, strict=True):
        for sample_of_row in row.samples:
            ids = sample_of_row.input_ids.tolist()
            assert sum(i in encoder.added_ids for i in ids) == clean, ascii(text)


def test_the_attack_is_one(tokenizer: Any) -> None:
    """Without the shield, these texts do become the token."""
    for name, text in {"nfkc": "<TAS\u212a>", "lowercase": "<task>", "bert": "<ta\u00adsk>", "accents": "<T\u00c1SK>",
                       "replace": "«TA\u00adSK>", "one becomes all": "☃"}.items():  # fmt: skip
        own = with_token(tokenizer, NORMALIZERS[name])
        token = own.convert_tokens_to_ids(TOKEN)
        assert token in own(text)["input_ids"], name
        assert token in build_encoder(own, None, {}, DATE, "allow").encode_prompt([Message("user", text)])
        allowing = build_encoder(own, None, {}, DATE, "allow")
        [row] = label_rows([RawRow("x", 1, chat_row(text, "A"))], allowing, DataSection(train=["x"]), 512)
        assert "control token" not in row.reason, (name, row.reason)  # as for a prompt
        assert row.status == "refused" or token in row.samples[0].input_ids, name
        assert attack(build_encoder(own, None, {}, DATE), text) == ("refused" if text == "☃" else "used")


@pytest.mark.parametrize("kind", ["words", "unigram"])
def test_no_disguise_becomes_a_token_of_the_models_own_vocabulary(kind: str) -> None:
    """Tokens that are matched literally, but whose text is also in the model's vocabulary."""
    pieces = ["<unk>", TOKEN, "<end>", "\n", "user", "\u2581", *"<TASK>askt qouier"]
    model = (
        models.WordLevel({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="<unk>")
        if kind == "words"
        else models.Unigram([(piece, -float(i > 2)) for i, piece in enumerate(dict.fromkeys(pieces))], unk_id=0)
    )
    core = Tokenizer(model)
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if kind == "words" else pre_tokenizers.Metaspace()
    own = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")
    own.add_tokens([AddedToken(TOKEN, normalized=False)])
    encoder = build_encoder(own, "none", {}, DATE)
    text = "so <TAS\u212a> it"
    assert own.convert_tokens_to_ids(TOKEN) in own(text)["input_ids"]
    with contextlib.suppress(ModelError):
        assert own.convert_tokens_to_ids(TOKEN) not in encoder.encode_prompt([Message("user", text)])


def test_a_usual_tokenizer_pays_nothing(tokenizer: Any) -> None:
    assert build_encoder(copy.deepcopy(tokenizer), None, {}, DATE).shield._disguises is None
    nfc = with_token(tokenizer, normalizers.NFC(), normalized=False)
    assert build_encoder(nfc, None, {}, DATE).shield._disguises is None


@pytest.mark.parametrize("name", ["nfkc", "lowercase", "bert"])
def test_added_tokens_of_the_run_are_matched_as_spelled(tokenizer: Any, tmp_path: Path, name: str) -> None:
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.normalizer = NORMALIZERS[name]
    folder = save_folder(tmp_path / "model", tiny_config("qwen3"), own)
    loaded = load_tokenizer(ModelSection(path=str(folder), add_tokens=[TOKEN]))
    token = loaded.convert_tokens_to_ids(TOKEN)
    assert loaded(f"a {TOKEN}")["input_ids"].count(token) == 1
    for text in spellings(name)[1:]:
        assert text == TOKEN or token not in loaded(f"a {text}")["input_ids"], ascii(text)


def test_a_refusal_names_the_token(tokenizer: Any) -> None:
    encoder = build_encoder(with_token(tokenizer, NORMALIZERS["one becomes all"]), None, {}, DATE)
    with pytest.raises(RowRefused) as refused:
        encoder.shield.mark("a ☃")
    assert "control token '<TASK>'" in refused.value.reason
