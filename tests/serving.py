"""A tiny model that has learned a few chats by heart, and servers for it."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from peft import LoraConfig, get_peft_model

from conftest import WORDS, build_model, tiny_config
from tunesmith.model.bpe import train_tokenizer
from tunesmith.model.tokenizer import build_encoder
from tunesmith.rows.chats import read_question
from tunesmith.serve.run import server_config
from tunesmith.serve.settings import ServeSettings

TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{%- if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% if open %}<think>\n{% endif %}{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HELLO = "hello to you and me, the quick brown fox jumps over the lazy dog"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CHATS: list[tuple[str, list[Any], str]] = [
    ("Say hello.", [], HELLO),
    ("Who are you?", [], "<think>\nI am asked.\n</think>\n\nI am a small model."),
    ("Weather?", [WEATHER], CALL),
    ("Weather twice?", [WEATHER], f"Look:\n{CALL}\n{CALL}"),
]


def make_adapters(model: Any, base: Path) -> list[Path]:
    """Two adapters with random weights, beside the folder of their base."""
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    found = []
    for number in (1, 2):
        torch.manual_seed(number)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        found.append(base.parent / f"lora-{number}")
        tuned.save_pretrained(found[-1])
    return found


def make_model(folder: Path) -> Path:
    """Train the model until it answers `CHATS` word by word."""
    tokenizer = train_tokenizer([WORDS] * 20, vocab_size=420)
    tokenizer.chat_template = TEMPLATE
    encoder = build_encoder(tokenizer, None, {}, datetime.datetime(2026, 1, 2))
    config = tiny_config("qwen3", 420, initializer_range=0.02, eos_token_id=tokenizer.eos_token_id, hidden_size=64)
    model = build_model(config)
    rows = []
    for question, tools, reply in CHATS:
        prompt = encoder.encode_prompt(*read_question(question, list(tools)))
        rows.append((prompt, [*encoder.encode_ids([reply])[0], encoder.stop.id]))
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (prompt, reply) in enumerate(rows):
        ids[row, : len(prompt) + len(reply)] = torch.tensor([*prompt, *reply])
        labels[row, len(prompt) : len(prompt) + len(reply)] = torch.tensor(reply)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(300):
        loss = model(input_ids=ids, labels=labels).loss
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class ServerProcess:
    """`tunesmith serve` in a process of its own, on a free port."""

    def __init__(self, *words: object, **environment: str) -> None:
        command = [sys.executable, "-m", "tunesmith", "serve", *map(str, words), "--port", "0"]
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
        )
        self._url = ""

    @property
    def url(self) -> str:
        """Its address, as soon as it is ready."""
        while not self._url:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            assert line, self.process.stderr and self.process.stderr.read()
            self._url = line.partition("http://")[2].partition("/v1")[0]
        return f"http://{self._url}"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an application that is served by a thread of this process."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(app, ServeSettings(grace_s=1)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
