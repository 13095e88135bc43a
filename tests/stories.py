"""stories260K (llama2.c format) as a Hugging Face Llama folder: a small, trained model."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import SHARED

FOLDER = SHARED / "weights" / "stories260K"


def read_model() -> LlamaForCausalLM:
    """The fp32 weights; q and k rows go from interleaved to half-split rotary order."""
    raw = (FOLDER / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = struct.unpack("7i", raw[:28])
    floats = np.frombuffer(raw, dtype=np.float32, offset=28)
    place = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal place
        count = int(np.prod(shape))
        place += count
        return torch.from_numpy(floats[place - count : place].copy().reshape(shape))

    head_dim = dim // heads

    def half_split(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
        return weight.view(num_heads, head_dim // 2, 2, dim).transpose(1, 2).reshape(weight.shape)

    names = [("input_layernorm", (dim,)), ("self_attn.q_proj", (dim, dim)), ("self_attn.k_proj", (kv_heads * head_dim, dim)),
             ("self_attn.v_proj", (kv_heads * head_dim, dim)), ("self_attn.o_proj", (dim, dim)), ("post_attention_layernorm", (dim,)),
             ("mlp.gate_proj", (hidden, dim)), ("mlp.down_proj", (dim, hidden)), ("mlp.up_proj", (hidden, dim))]  # fmt: skip
    state = {"model.embed_tokens.weight": take(vocab, dim)}
    for name, shape in names:
        for layer in range(layers):
            weight = take(*shape)
            if name.endswith(("q_proj", "k_proj")):
                weight = half_split(weight, heads if name.endswith("q_proj") else kv_heads)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=seq_len, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    model.tie_weights()
    return model


def read_tokenizer() -> PreTrainedTokenizerFast:
    """The 512 SentencePiece pieces as a BPE with byte fallback; a merge's rank is its piece's score."""
    raw = (FOLDER / "tok512.bin").read_bytes()
    place, pieces = 4, []
    while place < len(raw):
        score, length = struct.unpack_from("<fi", raw, place)
        text = raw[place + 8 : place + 8 + length].decode("utf-8").replace(" ", "▁")
        pieces.append((text, score))
        place += 8 + length
    pieces[:3] = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocab = {text: index for index, (text, _) in enumerate(pieces)}
    merges = [
        (text[:cut], text[cut:])
        for text, _ in sorted(pieces[259:], key=lambda piece: -piece[1])
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save_stories(folder: Path) -> Path:
    read_model().save_pretrained(folder)
    read_tokenizer().save_pretrained(folder)
    return folder
