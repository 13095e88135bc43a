"""Greedy text of what was trained here in other engines: llama.cpp's server through the `openai` client, and mlx-lm.

The demo's base, and a small model of each architecture that is trained on the demo's chats first, so that it stops.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from conftest import ARCHITECTURES, save_folder, tiny_config
from tunesmith.demo.chats import draw_chats, draw_held_out
from tunesmith.demo.run import SHARES
from tunesmith.gguf.reader import reader_version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TUNESMITH_LONG" not in os.environ, reason="long; set TUNESMITH_LONG=1"),
]
DEMO = Path(tunesmith.__file__).parent / "demo" / "base"
_WORDS = ("rain", "a fox", "bread", "the sea", "music", "winter", "a clock", "the moon")
_NAMES = ("雨", "狐狸", "面包", "大海", "音乐", "冬天", "钟", "月亮")
PROMPTS = [
    *(text.format(word) for word in _WORDS for text in ("What is {}?", "Tell me about {}.", "3 + 4, and {}?", "{}")),
    *(text.format(word) for word in _NAMES for text in ("{}是什么？", "请介绍一下{}。", "7 加 8 等于几？{}", "{}")),
]
CHATS = [[{"role": "user", "content": text}] for text in PROMPTS]
CHATS[::4] = [[{"role": "system", "content": "Answer briefly."}, *chat] for chat in CHATS[::4]]
MAX_TOKENS = 24
SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = sys.argv[1], 1024, 1, 0
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
print("ADDRESS", server.listening_address, flush=True)
sys.stdin.read()
import os
os._exit(0)
"""
MLX = """
import json, sys
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler
model, tokenizer = load(sys.argv[1])
said = []
for ids in json.load(open(sys.argv[2])):
    pieces = list(stream_generate(model, tokenizer, ids, max_tokens=int(sys.argv[3]), sampler=make_sampler(temp=0.0)))
    said.append(["".join(piece.text for piece in pieces), [int(piece.token) for piece in pieces]])
json.dump(said, open(sys.argv[4], "w"))
"""
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 54321.0}}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, **_ROPE},
    "qwen2": _ROPE,
    "qwen3_moe": {"norm_topk_prob": True, **_ROPE},
    "gemma2": {"sliding_window": 512},  # mlx-lm has no windows for Gemma 2, and one pattern of layers for Gemma 3
    "gemma3": {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]},
}
TABLED_GELU = ("gpt2", "gemma2", "gemma3")  # llama.cpp looks GELU up in a table of half precision


@dataclass(frozen=True, slots=True)
class Said:
    """A reply of another engine: its text, and its ids with the stop token, if it stopped."""

    text: str
    ids: Sequence[int]


@pytest.fixture(scope="module", params=["demo", *ARCHITECTURES])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name and folder of a model in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind, folder = request.param, tmp_path_factory.mktemp("trained")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    if kind == "demo":
        AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32").save_pretrained(folder / "demo")
        tokenizer.save_pretrained(folder / "demo")
        return kind, folder / "demo"
    config = tiny_config(
        kind, vocab_size=len(tokenizer), initializer_range=0.05, bos_token_id=0, eos_token_id=2, **CHANGES.get(kind, {})
    )
    _, kept_out = draw_held_out(1, list(SHARES))
    chats = draw_chats(1500, seed=0, held_out=kept_out, shares=SHARES)
    rows = [
        {"messages": [{"role": role, "content": text} for task in chat
                      for role, text in (("user", task.question), ("assistant", task.answer))]}
        for chat in chats
    ]  # fmt: skip
    start = save_folder(folder / "start", config, tokenizer)
    AutoTokenizer.from_pretrained(start).save_pretrained(start)  # Qwen2's cuts digits, whatever the file says
    run = tunesmith.train(
        model=str(start), data=rows, output=str(folder / "run"),
        train={"max_steps": 120, "precision": "fp32"}, optim={"lr": 5e-3},
    )  # fmt: skip
    return kind, Path(run.model_dir)


@contextmanager
def served(file: Path) -> Iterator[str]:
    """llama.cpp's server on a file; yields its address."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        yield next(line.split()[1] for line in server.stdout if line.startswith("ADDRESS"))
        server.kill()


def count_equal(model: Any, theirs: Sequence[Said], tolerance: float) -> int:
    """How many replies are equal; each other one must part from ours where two tokens are as likely.

    Args:
        tolerance: largest difference of two logits that count as equal, as a share of the largest logit.
    """
    ours = model.batch(CHATS, max_new_tokens=MAX_TOKENS, temperature=0)
    equal = 0
    for chat, own, said in zip(CHATS, ours, theirs, strict=True):
        # a reply that is cut within a character ends in other ways
        if own.rstrip("\ufffd") == said.text.rstrip("\ufffd"):
            equal += 1
            continue
        prompt = model.prompt_ids(chat)
        with torch.no_grad():
            logits = model.speaker.model(torch.tensor([[*prompt, *said.ids]])).logits[0, len(prompt) - 1 : -1].float()
        gaps = logits.max(dim=-1).values - logits.gather(1, torch.tensor(said.ids)[:, None])[:, 0]
        first = int(gaps.nonzero()[0, 0])
        assert gaps[first] < tolerance * logits[first].abs().max(), (own, said, first)
    return equal


def test_llama_cpps_server_says_the_same(trained: tuple[str, Path], tmp_path: Path) -> None:
    if reader_version() is None:
        pytest.skip("xllamacpp is not installed")
    from openai import OpenAI

    kind, folder = trained
    file = tunesmith.export(folder, format="gguf", type="f32", output=tmp_path / "model.gguf")
    model: Any = tunesmith.load(folder)
    theirs = []
    with served(file) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="unused")
        for chat in CHATS:
            answer = client.chat.completions.create(
                model="m", messages=chat, max_tokens=MAX_TOKENS, temperature=0, logprobs=True
            ).choices[0]
            tokens = answer.logprobs.content if answer.logprobs else []
            theirs.append(Said(answer.message.content or "", [token.id for token in tokens or []]))
    assert len(theirs) == 64
    equal = count_equal(model, theirs, 1e-3 if kind in TABLED_GELU else 1e-4)
    print(f"{kind}: {equal} of 64 texts equal in llama.cpp")
    assert equal >= (60 if kind in TABLED_GELU else 64)


def test_mlx_lm_says_the_same(trained: tuple[str, Path], tmp_path: Path) -> None:
    """With TUNESMITH_MLX, a folder in which mlx and mlx-lm are installed (pip install --target)."""
    packages = os.environ.get("TUNESMITH_MLX")
    if not packages:
        pytest.skip("set TUNESMITH_MLX to a folder with mlx, mlx-cpu and mlx-lm (pip install --no-deps --target)")
    kind, folder = trained
    if kind == "gpt2":
        pytest.skip("mlx-lm knows GPT-2's tensors only by the names of the original files")
    model: Any = tunesmith.load(folder)
    tokenizer = model.speaker.encoder.tokenizer
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in CHATS]
    asked, said = tmp_path / "asked.json", tmp_path / "said.json"
    asked.write_text(json.dumps([list(map(int, ids)) for ids in prompts]))
    path = os.pathsep.join([packages, os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", MLX, str(folder), str(asked), str(MAX_TOKENS), str(said)], check=True, timeout=600,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    theirs = [Said(text, ids) for text, ids in json.loads(said.read_text())]
    equal = count_equal(model, theirs, 1e-4)
    print(f"{kind}: {equal} of 64 texts equal in mlx-lm")
    assert equal == 64
