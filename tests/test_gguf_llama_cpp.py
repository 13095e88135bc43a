"""The table of pre-tokenizers against llama.cpp itself, whose library is in the wheel of xllamacpp."""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tokenizers_of_others
from conftest import needs_shared
from tunesmith.gguf.fuzz import draw_texts
from tunesmith.gguf.pretokenizer import PRE_TOKENIZERS, PreTokenizer, _ByteLevel, _read_steps

gguf: Any = pytest.importorskip("gguf")
_found = importlib.util.find_spec("xllamacpp")
pytestmark = pytest.mark.skipif(_found is None, reason="xllamacpp is not installed")
_VOCAB_ONLY = 72  # place of this flag in llama_model_params
_SLOW = {"gpt-4o", "tekken", "deepseek-v3", "seed-coder", "bailingmoe", "deepseek-coder"}  # std::regex


class _Params(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * 256)]  # longer than the C structure


@pytest.fixture(scope="module")
def library() -> Any:
    assert _found is not None
    assert _found.origin is not None
    lib = ctypes.CDLL(str(next(Path(_found.origin).parent.glob("xllamacpp*.so"))))
    lib.llama_model_default_params.restype = _Params
    lib.llama_model_load_from_file.argtypes, lib.llama_model_load_from_file.restype = (
        (ctypes.c_char_p, _Params),
        ctypes.c_void_p,
    )
    lib.llama_model_get_vocab.argtypes, lib.llama_model_get_vocab.restype = (ctypes.c_void_p,), ctypes.c_void_p
    lib.llama_model_free.argtypes = (ctypes.c_void_p,)
    lib.llama_tokenize.argtypes = (
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool,
        ctypes.c_bool,
    )  # fmt: skip
    return lib


def write_vocabulary(path: Path, settings: dict[str, Any], pre: str) -> None:
    """A GGUF file with a vocabulary and one small tensor."""
    ids = settings["model"]["vocab"] | {token["content"]: token["id"] for token in settings["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    writer = gguf.GGUFWriter(str(path), "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count", "head_count_kv",
                "rope_dimension_count"):  # fmt: skip
        getattr(writer, f"add_{key}")(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token not in settings["model"]["vocab"] else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in settings["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def encode(library: Any, path: Path, texts: list[str]) -> Iterator[list[int]]:
    params = library.llama_model_default_params()
    params.bytes[_VOCAB_ONLY] = 1
    model = library.llama_model_load_from_file(str(path).encode(), params)
    assert model
    ids = (ctypes.c_int32 * 4096)()
    for text in texts:
        data = text.encode()
        number = library.llama_tokenize(library.llama_model_get_vocab(model), data, len(data), ids, 4096, False, False)
        yield list(ids[:number])
    library.llama_model_free(model)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """GPT-2's tokenizer.json, whose tokens tell most cuts apart."""
    found: dict[str, Any] = json.loads(tokenizers_of_others.build("gpt2").backend_tokenizer.to_str())
    return found


@needs_shared
@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=lambda pre: pre.name)
def test_the_table_cuts_as_llama_cpp(library: Any, settings: dict[str, Any], tmp_path: Path, pre: PreTokenizer) -> None:
    write_vocabulary(tmp_path / "v.gguf", settings, pre.name)
    texts = draw_texts(300 if pre.name in _SLOW else 5000, seed=1)
    own = _ByteLevel(settings, _read_steps(settings["pre_tokenizer"])).encode_as(pre, texts)
    for text, ids, theirs in zip(texts, own, encode(library, tmp_path / "v.gguf", texts), strict=True):
        assert ids == theirs, ascii(text)
