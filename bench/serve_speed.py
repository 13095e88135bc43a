"""Speed of `tunesmith serve` beside `transformers serve`, alone and with its continuous batching, over HTTP.

Each server gets 1, 8 and 64 streamed chat requests at once, of --new tokens each, greedy. The model has the demo's
shape and tokenizer and random weights, so that no reply stops early. The servers take turns, the others are halted
meanwhile, and the medians of the rounds are printed: tokens per second of wall time, and per CPU second of the
server's own processes (which other work on the machine disturbs less).

    OMP_NUM_THREADS=1 python bench/serve_speed.py --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tunesmith.demo.run import base_folder

TRANSFORMERS = ["-c", "from transformers.cli.transformers import main; main()", "serve", "{model}", "--port", "{port}"]
SERVERS = {
    "tunesmith serve": ["-m", "tunesmith", "serve", "{model}", "--port", "{port}", "--name", "model"],
    "transformers serve": [*TRANSFORMERS, "--device", "cpu"],
    "with continuous batching": [*TRANSFORMERS, "--device", "cpu", "--continuous-batching"],
}  # fmt: skip


@dataclass(slots=True)
class Server:
    process: psutil.Process
    port: int

    def cpu_seconds(self) -> float:
        return sum(sum(one.cpu_times()[:2]) for one in [self.process, *self.process.children(recursive=True)])

    def send(self, number: signal.Signals) -> None:
        for one in [self.process, *self.process.children(recursive=True)]:
            one.send_signal(number)


def make_model(folder: Path, seed: int) -> None:
    config = AutoConfig.from_pretrained(base_folder())
    config.dtype = torch.float32
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder()).save_pretrained(folder)


async def ask(port: int, model: str, number: int, new: int) -> int:
    """Stream one chat reply; returns its number of tokens."""
    words = " ".join(str((number * 7919 + place * 104729) % 1000) for place in range(8))
    body: dict[str, Any] = {
        "model": model, "stream": True, "max_tokens": new, "temperature": 0,
        "messages": [{"role": "user", "content": f"Continue these numbers: {words}"}],
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + payload)
    await writer.drain()
    answer = (await reader.read()).decode("utf-8", "replace")
    writer.close()
    if " 200 " not in answer.partition("\r\n")[0]:
        raise RuntimeError(answer[:600])
    pieces = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    counts = [piece["usage"]["completion_tokens"] for piece in pieces if piece.get("usage")]
    return int(counts[-1]) if counts else sum(bool(piece.get("choices")) for piece in pieces)


async def ask_all(port: int, model: str, streams: int, new: int) -> list[int]:
    return list(await asyncio.gather(*[ask(port, model, number, new) for number in range(streams)]))


def start(words: Sequence[str], folder: str, log: Path) -> Server:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    filled = [word.format(model=folder, port=port) for word in words]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        child = subprocess.Popen([sys.executable, *filled], stdout=out, stderr=out, env=environment)
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return Server(psutil.Process(child.pid), port)
        if child.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(log.read_text()[-3000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=list(SERVERS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = str(Path(work) / "model")
        make_model(Path(folder), seed=0)
        running: dict[str, Server] = {}
        try:
            for number, name in enumerate(options.servers):
                running[name] = start(SERVERS[name], folder, Path(work) / f"{number}.log")
                model = "model" if name == "tunesmith serve" else folder
                asyncio.run(ask_all(running[name].port, model, 2, 4))  # loads the model
                running[name].send(signal.SIGSTOP)
            measure(running, folder, options)
        finally:
            for server in running.values():
                server.send(signal.SIGCONT)
                server.send(signal.SIGKILL)


def measure(running: dict[str, Server], folder: str, options: argparse.Namespace) -> None:
    print(f"{'streams':>8}  " + "".join(f"{name:>28}" for name in running) + "   tokens/s (per CPU second)")
    for streams in options.streams:
        walls: dict[str, list[float]] = {name: [] for name in running}
        costs: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(options.rounds):
            for name, server in running.items():
                server.send(signal.SIGCONT)
                model = "model" if name == "tunesmith serve" else folder
                before, start_s = server.cpu_seconds(), time.perf_counter()
                tokens = sum(asyncio.run(ask_all(server.port, model, streams, options.new)))
                walls[name].append(tokens / (time.perf_counter() - start_s))
                costs[name].append(tokens / max(server.cpu_seconds() - before, 0.01))
                server.send(signal.SIGSTOP)
        cells = [f"{statistics.median(walls[name]):,.0f} ({statistics.median(costs[name]):,.0f})" for name in running]
        print(f"{streams:8}  " + "".join(f"{cell:>28}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
