"""The tokenizer used in training is the one that transformers and other readers of tokenizer.json open."""

from __future__ import annotations

import copy
import datetime
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, ByteLevelBPETokenizer, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import tokenizers_of_others
from conftest import WORDS, build_model, raises, tiny_config
from tunesmith.config.schema import ModelSection
from tunesmith.errors import ModelError
from tunesmith.gguf.fuzz import draw_texts
from tunesmith.model.bpe import train_tokenizer
from tunesmith.model.reopen import PLAIN_TEXTS, find_reopened_differences, require_one_reading, require_reads_as
from tunesmith.model.save import save_model
from tunesmith.model.tokenizer import build_encoder, load_tokenizer

Run = Callable[..., tuple[int, str, str]]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "tokenizers"
DATE = datetime.datetime(2026, 1, 2)
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared tokenizers are not here")
FAMILIES = ["llama", "qwen3", "qwen3_moe", "gpt2", "gemma2", "gemma3"]


def folder_of(folder: Path, family: str, tokenizer_files: Path, tokenizer_config: dict[str, Any] | None = None) -> Path:
    """A model folder as on the hub: config.json, tokenizer.json, tokenizer_config.json."""
    folder.mkdir()
    tiny_config(family).save_pretrained(folder)
    for file in tokenizer_files.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def require(folder: Path, family: str, is_adapter: bool = False, **section: Any) -> None:
    model = ModelSection(path=str(folder), **section)
    encoder = build_encoder(load_tokenizer(model), None, {}, DATE)
    require_one_reading(model, encoder, tiny_config(family), is_adapter)


@pytest.fixture
def ours(tokenizer: Any, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A tokenizer of ours with tokens such as ' 1' from its training text, which Qwen2's pre-tokenizer never produces."""
    texts = [f"in {year} there were {year % 97} of {year % 13}" for year in range(1900, 2030)]
    train_tokenizer(texts, vocab_size=400).save_pretrained(tmp_path / "numbers")
    return tmp_path / "numbers"


@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_tokenizers_are_opened_as_they_are(ours: Path, tmp_path: Path, family: str, is_adapter: bool) -> None:
    require(folder_of(tmp_path / "model", family, ours), family, is_adapter)


def test_a_folder_that_is_read_in_two_ways_is_refused(
    run: Run, fails: Any, numbers: Path, chats: Path, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "model", "qwen2", numbers)
    build_model(tiny_config("qwen2")).save_pretrained(folder)
    for command in ("train", "check", "preview"):
        output = ("--output", tmp_path / "run") if command == "train" else ()
        error = fails(command, "--model", folder, "--data", chats, *output)
        assert (error.code, error.exit_code) == ("tokenizer-ambiguous", 1), command
        assert all(fact in str(error) for fact in (str(folder), "Qwen2Tokenizer", "save_pretrained")), error
    assert not (tmp_path / "run").exists()
    # follow the advice in the message
    fixed = tmp_path / "fixed"
    AutoTokenizer.from_pretrained(folder).save_pretrained(fixed)
    short = ("--data.max_seq_len", 128, "--train.max_steps", 1)
    words = ("--model", folder, "--tokenizer", fixed, "--data", chats, *short)
    code, _, err = run("train", *words, "--output", tmp_path / "run")
    assert code == 0, err
    opened = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    stands = Tokenizer.from_file(str(tmp_path / "run" / "model" / "tokenizer.json"))
    for text in PLAIN_TEXTS:
        assert opened(text)["input_ids"] == stands.encode(text).ids


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_tokenizer_that_would_be_opened_as_another_is_refused(ours: Path, tmp_path: Path, is_adapter: bool) -> None:
    folder = folder_of(tmp_path / "model", "qwen2", ours)
    facts = ("the normalizer differs, the pre-tokenizer differs", "model_type qwen2")
    with raises(ModelError, "tokenizer-reopens-differently", *facts):
        require(folder, "qwen2", is_adapter, tokenizer=str(ours))


@needs_shared
@pytest.mark.parametrize("family", FAMILIES)
def test_minimind(tmp_path: Path, family: str) -> None:
    require(folder_of(tmp_path / "model", family, SHARED / "minimind"), family)


@needs_shared
@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("name", [None, "LlamaTokenizer", "LlamaTokenizerFast"])
def test_llama_2_as_the_hub_has_it(tmp_path: Path, name: str | None, legacy: bool | None) -> None:
    """transformers rebuilds it with differences in leading spaces and at control tokens; everyone trains it like this."""
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"tokenizer_class": name} if name else {}
    config |= {} if legacy is None else {"legacy": legacy}
    section = ModelSection(path=str(folder_of(tmp_path / "model", "llama", SHARED / "llama2", config)))
    for is_adapter in (False, True):
        encoder = build_encoder(load_tokenizer(section), "alpaca", {}, DATE)
        require_one_reading(section, encoder, tiny_config("llama"), is_adapter)


@needs_shared
@pytest.mark.parametrize("name", ["gemma", "yi"])
def test_other_sentence_piece_tokenizers_as_the_hub_has_them(tmp_path: Path, name: str) -> None:
    """Gemma's components; and a LlamaTokenizer whose tokenizer.json does not prepend a space."""
    parts = json.loads((SHARED / "llama2" / "tokenizer.json").read_text(encoding="utf-8")) | {"post_processor": None}
    parts["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    parts["pre_tokenizer"] = split if name == "gemma" else None
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    config = {"tokenizer_class": "GemmaTokenizer" if name == "gemma" else "LlamaTokenizer", "unk_token": "<unk>"}
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    family = "gemma2" if name == "gemma" else "llama"
    section = ModelSection(path=str(folder_of(tmp_path / "model", family, tmp_path / "files", config)))
    require_one_reading(section, build_encoder(load_tokenizer(section), "alpaca", {}, DATE), tiny_config(family))


@needs_shared
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", [None, "GPT2Tokenizer", "GPT2TokenizerFast"])
def test_gpt_2_as_the_hub_has_it(tmp_path: Path, family: str, name: str | None) -> None:
    core = ByteLevelBPETokenizer(str(SHARED / "gpt2" / "encoder.json"), str(SHARED / "gpt2" / "vocab.bpe"))
    core.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "files").mkdir()
    core.save(str(tmp_path / "files" / "tokenizer.json"))
    config = {"tokenizer_class": name} if name else {"eos_token": "<|endoftext|>"}
    section = ModelSection(path=str(folder_of(tmp_path / "model", family, tmp_path / "files", config)))
    tokenizer = load_tokenizer(section)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = "<|endoftext|>"
    require_one_reading(section, build_encoder(tokenizer, "alpaca", {}, DATE), tiny_config(family))


QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.parametrize("normalizer", [normalizers.NFC(), None], ids=["NFC", "none"])
def test_qwen_2_as_the_hub_has_it(ours: Path, tmp_path: Path, normalizer: Any, is_adapter: bool) -> None:
    """The distilled ones too, whose tokenizer.json may lack NFC."""
    core = Tokenizer.from_file(str(ours / "tokenizer.json"))
    core.normalizer = normalizer  # type: ignore[assignment]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_REGEX), "isolated"), byte_level])  # type: ignore[assignment]
    core.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>", "<think>")])
    core.save(str(ours / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    require(folder_of(tmp_path / "model", "qwen2", ours, config | {"bos_token": None}), "qwen2", is_adapter)


KINDS: dict[str, Callable[[], Any]] = {
    "words": lambda: models.WordLevel({"<unk>": 0, "<end>": 1, "Hello": 2, "a": 3}, unk_token="<unk>"),
    "pieces": lambda: models.WordPiece({"<unk>": 0, "<end>": 1, "a": 2, "##b": 3}, unk_token="<unk>"),
    "unigram": lambda: models.Unigram([("<unk>", 0.0), ("<end>", 0.0), ("a", -1.0), ("\u2581", -2.0)], unk_id=0),
    "characters": lambda: models.BPE({"<unk>": 0, "<end>": 1, "a": 2, "b": 3}, [], unk_token="<unk>"),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_tokenizers(tmp_path: Path, kind: str, family: str) -> None:
    core = Tokenizer(KINDS[kind]())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # type: ignore[assignment]
    core.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "unigram" else pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>").save_pretrained(tmp_path / "t")
    section = ModelSection(path=str(folder_of(tmp_path / "model", family, tmp_path / "t")), add_tokens=["<NEW>"])
    encoder = build_encoder(load_tokenizer(section), "none", {}, DATE)
    require_one_reading(section, encoder, tiny_config(family))


def test_each_difference_is_named(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    encoder = build_encoder(own, None, {}, DATE)
    assert find_reopened_differences(encoder, None, False) == []
    assert find_reopened_differences(encoder, tiny_config("qwen3"), False) == []
    differences = find_reopened_differences(encoder, tiny_config("qwen2"), False)
    assert differences[0] == "the normalizer differs"


def test_the_saved_class_is_known_to_older_versions(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    words = ("--model", model_folder, "--data", chats, "--data.max_seq_len", 64, "--train.max_steps", 1)
    code, _, err = run("train", *words, "--output", tmp_path / "run")
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "model" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert type(AutoTokenizer.from_pretrained(tmp_path / "run" / "model")).__name__ == "TokenizersBackend"


ALL = ["llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gpt2", "gemma2", "gemma3"]


@needs_shared
@pytest.mark.parametrize("name", ["ours", *tokenizers_of_others.NAMES, *tokenizers_of_others.LONG_NAMES])
def test_a_saved_folder_is_opened_by_transformers_alone_as_what_was_saved(name: str, tmp_path: Path) -> None:
    """Model and adapter folder of every architecture with every tokenizer: the same ids, or no folder."""
    if name not in ("ours", "minimind") and not os.environ.get("TUNESMITH_LONG"):
        pytest.skip("takes 10 to 30 s: TUNESMITH_LONG=1")
    core = train_tokenizer([WORDS] * 20, vocab_size=400) if name == "ours" else tokenizers_of_others.build(name)
    if core.eos_token is None:
        core.add_special_tokens({"eos_token": "<|end of turn|>", "pad_token": "<|end of turn|>"})
    for family in ALL:
        encoder = build_encoder(copy.deepcopy(core), "chatml" if name == "ours" else "alpaca", {}, DATE)
        small = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
        small = {"n_embd": 8, "n_head": 2} if family == "gpt2" else small
        model = build_model(tiny_config(family, len(core), **small))
        folder = tmp_path / family
        if family == "qwen2":  # transformers gives every tokenizer beside this model_type Qwen2's parts
            with raises(ModelError, "folder-reopens-differently", "the normalizer differs"):
                save_model(model, encoder, "card", folder)
            assert not list(tmp_path.glob(f"*{family}*"))
            continue
        save_model(model, encoder, "card", folder)
        opened = AutoTokenizer.from_pretrained(folder)
        assert opened.chat_template == encoder.tokenizer.chat_template
        for text in [*PLAIN_TEXTS, *draw_texts(200), "a<|im_start|>b <|end of turn|> c<|im_end|>"]:
            assert opened(text)["input_ids"] == core(text)["input_ids"], (family, text)
            ids = core(text)["input_ids"]
            assert opened.decode(ids) == core.decode(ids), (family, text)
        assert AutoConfig.from_pretrained(folder).model_type == model.config.model_type
        stops = GenerationConfig.from_pretrained(folder).eos_token_id
        assert (stops if isinstance(stops, int) else stops[0]) == encoder.stop_ids[0]


@pytest.mark.parametrize(
    ("file", "change", "difference"),
    [
        ("tokenizer.json", lambda text: text.replace('"ByteLevel"', '"ByteLevel" '), None),
        ("tokenizer.json", lambda text: text.replace('"add_prefix_space": false', '"add_prefix_space": true'), "pre-tok"),
        ("tokenizer_config.json", lambda text: text.replace("<|im_end|>", "<|im_start|>"), "eos_token_id"),
        ("chat_template.jinja", lambda text: text + " ", "the chat template differs"),
        ("config.json", lambda text: text.replace('"hidden_act": "silu"', '"hidden_act": "gelu"'), "hidden_act"),
        ("generation_config.json", lambda text: text.replace('"eos_token_id": 2', '"eos_token_id": 1'), "stop tokens"),
    ],
)  # fmt: skip
def test_whatever_others_would_read_differently_is_found(
    tokenizer: Any, tmp_path: Path, file: str, change: Callable[[str], str], difference: str | None
) -> None:
    model = build_model(tiny_config("qwen3"))
    encoder = build_encoder(copy.deepcopy(tokenizer), None, {}, DATE)
    save_model(model, encoder, "card", tmp_path / "model")
    written = (tmp_path / "model" / file).read_text(encoding="utf-8")
    assert change(written) != written
    (tmp_path / "model" / file).write_text(change(written), encoding="utf-8")
    if difference is None:
        require_reads_as(tmp_path / "model", "model", encoder, model)
    else:
        with raises(ModelError, "folder-reopens-differently", difference):
            require_reads_as(tmp_path / "model", "model", encoder, model)


def test_a_merge_that_would_change_the_tokenizer_is_refused(
    run: Run, fails: Any, tokenizer: Any, ours: Path, chats: Path, tmp_path: Path
) -> None:
    """An adapter with a tokenizer of its own on a base of model_type qwen2, made by other tools."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = build_model(tiny_config("qwen2"))
    model.save_pretrained(base)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).save_pretrained(
        str(adapter)
    )
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer.save_pretrained(adapter)
    error = fails("merge", adapter, "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("tokenizer-reopens-differently", 1)
    assert not list(tmp_path.glob("*merged*"))
