"""Fast tokenizers built from the vocabularies in ../shared/tokenizers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "tokenizers"
NAMES = ("minimind", "gpt2", "llama2")
LONG_NAMES = ("qwen", "llama3")
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(name: str) -> Any:
    """Without special tokens where its file has none."""
    if name in ("minimind", "llama2"):
        core = Tokenizer.from_file(str(FOLDER / name / "tokenizer.json"))
        core.post_processor = None
    elif name == "gpt2":
        core = _gpt2(FOLDER / name)
    else:
        path = FOLDER / name / ("qwen.tiktoken" if name == "qwen" else "tokenizer.model")
        core = _tiktoken(path, _QWEN if name == "qwen" else _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def _gpt2(folder: Path) -> Tokenizer:
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def _tiktoken(path: Path, pattern: str) -> Tokenizer:
    """Convert ranks of byte strings to BPE merges: each token is split into the two tokens that merge last."""
    ranks = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 60))
            if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    core = Tokenizer(models.BPE(vocab={spell(token): rank for token, rank in ranks.items()}, merges=merges))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core
