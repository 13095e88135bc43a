"""What all engines of compare.py get: rows, tokenizer, initial weights, and hyper-parameters, as files in one folder."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

WORDS = ["river", "stone", "garden", "letter", "morning", "window", "bread", "silver", "mountain", "paper", "summer", "voice",
         "street", "hand", "fire", "water", "road", "forest", "winter", "music", "king", "ship", "field", "cloud", "glass"]  # fmt: skip
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "hidden_size": 512, "intermediate_size": 1408, "tie_word_embeddings": True, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    # new:minimind-26m with Qwen3's norms on queries and keys
    "26m": {**_QWEN3, "vocab_size": 6400},
    # Qwen2.5-0.5B with 4 of its 24 layers
    "qwen2.5-0.5b-4-layers": {
        "model_type": "qwen2", "num_hidden_layers": 4, "num_attention_heads": 14, "num_key_value_heads": 2,
        "hidden_size": 896, "intermediate_size": 4864, "tie_word_embeddings": True, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # new:minimind-3-moe with the width and depth of 26m
    "moe": {
        **_QWEN3, "model_type": "qwen3_moe", "vocab_size": 6400, "moe_intermediate_size": 1408, "num_experts": 4,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "router_aux_loss_coef": 5e-4,
    },
    # GPT-2's small shape
    "gpt2": {
        "model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "smallest": {
        **_QWEN3, "vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "hidden_size": 32, "intermediate_size": 64,
    },
}  # fmt: skip
for _name, (_hidden, _layers, _vocab) in {
    "1m": (128, 4, 2048), "4m": (256, 4, 4096), "26m-growth": (512, 8, 6400), "100m": (768, 16, 6400), "500m": (1408, 24, 6400),
}.items():  # fmt: skip
    SHAPES[_name] = {
        **_QWEN3, "vocab_size": _vocab, "hidden_size": _hidden, "num_hidden_layers": _layers,
        "num_attention_heads": _hidden // 64, "num_key_value_heads": max(1, _hidden // 128), "intermediate_size": _hidden * 11 // 4,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """What an engine trains, as it is in a file.

    Attributes:
        model: folder with config, weights and tokenizer.
        rows: JSON Lines with prompt and completion as messages.
        tokens: of one packed forward, which is one step.
        padded_rows: of one padded step: as many as have about `tokens` real tokens.
        workers: processes that prepare the rows.
        checkout: a copy of MiniMind, with the model's weights in out/.
    """

    name: str
    model: str
    rows: str
    folder: str
    shape: str
    method: str
    tokens: int
    max_seq_len: int
    padded_rows: int
    steps: int
    workers: int | None = None
    checkout: str = ""
    lora_rank: int = 16
    lr: float = 1e-4
    seed: int = 0

    def write(self) -> Path:
        path = Path(self.folder) / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str) -> Task:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def read_pairs(path: Path | None, count: int | None = None) -> list[tuple[str, str]]:
    """Questions and answers of a file of Alpaca's form (instruction, input, output); generated ones without a file."""
    if path is None:
        rng = random.Random(3)
        return [
            (f"Say: {' '.join(rng.choices(WORDS, k=rng.randint(1, 8)))}", " ".join(rng.choices(WORDS, k=rng.randint(1, 20))))
            for _ in range(count or 64)
        ]  # fmt: skip
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    pairs = [("\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]) for row in rows]
    pairs = [pair for pair in pairs if pair[1]]
    if count is None:
        return pairs
    return [  # the same rows, each with a number of its own: no two are equal
        (pairs[n % len(pairs)][0] if n < len(pairs) else f"Question {n}. {pairs[n % len(pairs)][0]}", pairs[n % len(pairs)][1])
        for n in range(count)
    ]  # fmt: skip


def write_rows(path: Path, pairs: list[tuple[str, str]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            row = {"prompt": [{"role": "user", "content": question}],
                   "completion": [{"role": "assistant", "content": answer}]}  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def write_model(folder: Path, shape: str, tokenizer: Path | None, seed: int = 0) -> int:
    """Write random weights, and a tokenizer with the template chatml; returns the number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if tokenizer is None:
        found = _small_tokenizer()
    else:
        found = AutoTokenizer.from_pretrained(tokenizer)
    found.chat_template = resources.files("tunesmith").joinpath("templates", "chatml.jinja").read_text("utf-8")
    found.eos_token = "<|im_end|>"
    if found.pad_token is None or found.pad_token == found.eos_token:
        found.pad_token = "<|endoftext|>"
    values = dict(SHAPES[shape])
    values["vocab_size"] = max(values["vocab_size"], len(found))
    config = AutoConfig.for_model(
        values.pop("model_type"), **values, eos_token_id=found.eos_token_id, pad_token_id=found.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    found.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def write_minimind(
    checkout: Path, folder: Path, work: Path, hidden: int, layers: int, seed: int = 0
) -> tuple[Path, int]:
    """Copy a checkout of MiniMind with random weights of its class, and save the same model in transformers' form;
    returns the copy and the number of parameters."""
    import torch
    from minimind_checkout import build, copy_checkout

    from tunesmith.exports.request import Export
    from tunesmith.exports.run import run_export

    copy = copy_checkout(checkout, work)
    torch.manual_seed(seed)
    model = build(copy, hidden, layers, False)
    weights = copy.out / f"pretrain_{hidden}.pth"
    torch.save(model.state_dict(), weights)
    run_export(Export(str(weights), str(folder), "hf", None, tokenizer=str(copy.tokenizer)))
    return copy.folder, sum(weight.numel() for weight in model.parameters())


def _small_tokenizer() -> Any:
    """Byte-level BPE of a few words, made here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[2], pad_token=special[0])


def mean_tokens(folder: Path, pairs: list[tuple[str, str]], sample: int = 500) -> float:
    """Tokens of a row, template included, for the number of rows of a padded step."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = [
        len(tokenizer(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n").input_ids)
        for q, a in pairs[:sample]
    ]
    return sum(lengths) / len(lengths)
