"""Greedy text of exports in other engines: llama.cpp's server through the `openai` client, and mlx-lm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tunesmith
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
    pieces = stream_generate(model, tokenizer, ids, max_tokens=int(sys.argv[3]), sampler=make_sampler(temp=0.0))
    said.append("".join(piece.text for piece in pieces))
json.dump(said, open(sys.argv[4], "w"))
"""


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


def test_llama_cpps_server_says_the_same(tmp_path: Path) -> None:
    if reader_version() is None:
        pytest.skip("xllamacpp is not installed")
    from openai import OpenAI

    file = tunesmith.export(DEMO, format="gguf", type="f32", output=tmp_path / "demo.gguf")
    model: Any = tunesmith.load(DEMO)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    chats[::4] = [[{"role": "system", "content": "Answer briefly."}, *chat] for chat in chats[::4]]
    ours = model.batch(chats, max_new_tokens=MAX_TOKENS, temperature=0)
    with served(file) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="unused")
        theirs = []
        for chat in chats:
            said = client.chat.completions.create(model="m", messages=chat, max_tokens=MAX_TOKENS, temperature=0)
            theirs.append(said.choices[0].message.content or "")
    # a reply that is cut within a character ends in other ways
    same = [one.rstrip("\ufffd") == other.rstrip("\ufffd") for one, other in zip(ours, theirs, strict=True)]
    assert len(same) == 64
    assert all(same), [(ours[i], theirs[i]) for i, is_same in enumerate(same) if not is_same][:3]


def test_mlx_lm_says_the_same(tmp_path: Path) -> None:
    """With TUNESMITH_MLX, a folder in which mlx and mlx-lm are installed (pip install --target)."""
    folder = os.environ.get("TUNESMITH_MLX")
    if not folder:
        pytest.skip("set TUNESMITH_MLX to a folder with mlx, mlx-cpu and mlx-lm (pip install --no-deps --target)")
    from transformers import AutoModelForCausalLM

    whole = tmp_path / "model"  # in fp32: ours computes so
    AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32").save_pretrained(whole)
    model: Any = tunesmith.load(DEMO)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (whole / name).write_bytes((DEMO / name).read_bytes())
    ours = model.batch(PROMPTS, max_new_tokens=MAX_TOKENS, temperature=0)
    asked, said = tmp_path / "asked.json", tmp_path / "said.json"
    encoder = model.speaker.encoder
    tokens = [encoder.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                                    return_dict=False) for text in PROMPTS]  # fmt: skip
    asked.write_text(json.dumps([list(map(int, ids)) for ids in tokens]))
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", MLX, str(whole), str(asked), str(MAX_TOKENS), str(said)], check=True, timeout=600,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    theirs = json.loads(said.read_text())
    same = [one.rstrip("\ufffd") == other.rstrip("\ufffd") for one, other in zip(ours, theirs, strict=True)]
    assert all(same), [(ours[i], theirs[i]) for i, is_same in enumerate(same) if not is_same][:3]
