"""Rows, tokenizer and model of the comparison with TRL: the same bytes on every machine, generated from seeds.

Nothing here uses torch's generator, a trained tokenizer or the package, so the inputs stay the same when those change.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

ROWS_SEED, WEIGHTS_SEED, TRAIN_SEED = 3, 0, 5
STEPS, MAX_SEQ_LEN, MICRO_BATCH_TOKENS, LR = 50, 256, 512, 1e-3
MODES = ("none", "alpaca")
WORDS = ["river", "stone", "garden", "letter", "morning", "window", "bread", "silver", "mountain", "paper", "summer", "voice",
         "street", "hand", "fire", "water", "road", "forest", "winter", "music", "king", "ship", "field", "cloud", "glass"]  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
INIT_STD = 0.02


def draw_pairs(num_rows: int = 700) -> list[tuple[str, str]]:
    """Questions and answers of very unequal length; some are longer than MAX_SEQ_LEN. Python keeps `random()` stable."""
    rng = random.Random(ROWS_SEED)

    def pick(values: list[str]) -> str:
        return values[int(rng.random() * len(values))]

    pairs = []
    for _ in range(num_rows):
        items = [pick(WORDS) for _ in range(1 + int(rng.random() * 8))]
        kind = int(rng.random() * 4)
        given = " ".join(items)
        if kind == 0:
            pairs.append((f"Sort these words: {given}", " ".join(sorted(items))))
        elif kind == 1:
            pairs.append((f"How many words: {given}", str(len(items))))
        elif kind == 2:
            pairs.append((f"Join with commas: {given}", ", ".join(items)))
        else:
            one, two = int(rng.random() * 900), int(rng.random() * 900)
            pairs.append((f"What is {one} plus {two}?", f"It is {one + two}."))
    return pairs + [(f"Say it {n} times: hello", "hello " * n + "and that is all.") for n in range(1, 260, 5)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges spell WORDS, with and without a space before them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    merges = []
    for word in [*WORDS, "hello"]:
        for spelled in (word, f"Ġ{word}"):
            for end in range(1, len(spelled)):
                if spelled[: end + 1] not in vocabulary:
                    vocabulary[spelled[: end + 1]] = len(vocabulary)
                    merges.append((spelled[:end], spelled[end]))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=SPECIAL[0], pad_token=SPECIAL[0], eos_token=SPECIAL[2],
        additional_special_tokens=[SPECIAL[1]], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = resources.files("tunesmith").joinpath("templates", "alpaca.jinja").read_text("utf-8")
    return tokenizer


def build_model(vocab_size: int) -> Any:
    """A 2-layer Qwen3 whose weights are 24-bit integers of PCG64 times a power of two: exact on every machine.

    torch's own normal_() differs in the last bits between processors (it has an AVX2 form), so it is not used.
    """
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=256, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    bits = np.random.PCG64(WEIGHTS_SEED)
    scale = 2.0 ** round(math.log2(INIT_STD * math.sqrt(3)))  # half the width of the uniform distribution
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:  # norms stay at one
                drawn = (bits.random_raw(weight.numel()) >> np.uint64(40)).astype(np.int64) - 2**23
                weight.copy_(torch.from_numpy(drawn.astype(np.float32) * np.float32(scale / 2**23)).view_as(weight))
    return model


def hash_weights(model: Any) -> str:
    """SHA-256 of all parameters, by name."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode() + weight.detach().numpy().tobytes())
    return digest.hexdigest()


def write_inputs(folder: Path, mode: str) -> dict[str, str]:
    """Write folder/model and folder/rows.jsonl.

    Args:
        mode: none (prompt + completion + EOS) or alpaca (through the chat template).
    Returns:
        SHA-256 of what was written.
    """
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows: list[dict[str, Any]]
    if mode == "none":
        rows = [{"prompt": f"{q}\n", "completion": a} for q, a in draw_pairs()]
    else:
        rows = [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in draw_pairs()
        ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    spelled = json.dumps([sorted(tokenizer.get_vocab().items()), str(tokenizer.chat_template)])
    return {
        "weights": hash_weights(model),
        "tokenizer": hashlib.sha256(spelled.encode()).hexdigest(),
        "rows": hashlib.sha256(text.encode()).hexdigest(),
    }
