"""Load on `tunesmith serve` for some minutes: clients that read, leave, read slowly, and send broken bodies.

    python bench/serve_load.py MODEL --minutes 30 [--clients 24] [--output load.json]

Prints the server's memory over time and what each kind of client got. Exit code 1: a status other than 200, 400, 404, 413,
415 and 429, a traceback in an answer, a reply that is not whole, a row that is not free at the end, or memory that grows
after the first third by more than 10 % and 32 MiB.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ALLOWED = {200, 400, 404, 413, 415, 429}
QUESTIONS = (
    "Say hello.",
    "Who are you?",
    "Tell me a long story about a fox and a dog.",
    "你好，你是谁？",
    "Count to ten.",
)
ODD: list[Any] = [None, True, -1, 1.5, 10**30, "", "x", [], {}, [[]], "a" * 5000, "<|im_end|>", "\u0000"]


class Load:
    """Clients of a server, and what they saw."""

    def __init__(self, url: str, model: str, end: float) -> None:
        self.address, self.model, self.end = urlsplit(url), model, end
        self.seen: Counter[str] = Counter()
        self.problems: list[str] = []
        self.lock = threading.Lock()

    def note(self, what: str, problem: str = "") -> None:
        with self.lock:
            self.seen[what] += 1
            if problem and len(self.problems) < 100:
                self.problems.append(problem)

    def run(self, kind: str, seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                getattr(self, kind)(choose)
            except (OSError, http.client.HTTPException) as error:
                self.note(f"{kind}: {type(error).__name__}", f"{kind}: {error!r}")
                time.sleep(0.5)

    def fields(self, choose: random.Random, **more: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": choose.choice(QUESTIONS)}]
        if choose.random() < 0.3:  # a conversation
            turns = [
                *turns,
                {"role": "assistant", "content": "I see."},
                {"role": "user", "content": choose.choice(QUESTIONS)},
            ]
        asked = {
            "model": self.model,
            "messages": turns,
            "max_tokens": choose.choice([1, 8, 40, 120]),
            "temperature": 1.0,
        }
        return {**asked, "n": choose.choice([1, 1, 1, 3]), **more}

    def send(self, body: bytes) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.address.netloc, timeout=120)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse()

    def whole(self, choose: random.Random) -> None:
        """Asks and reads, streamed or not."""
        is_streamed = choose.random() < 0.6
        answer = self.send(json.dumps(self.fields(choose, stream=is_streamed)).encode())
        text = answer.read().decode()
        is_complete = answer.status != 200 or (
            text.endswith("data: [DONE]\n\n") if is_streamed else "finish_reason" in text
        )
        problem = "" if is_complete and answer.status in (200, 429) else f"whole: {answer.status} {text[-300:]}"
        self.note(f"whole: {answer.status}", problem)
        if answer.status == 429:
            time.sleep(float(answer.headers["Retry-After"]))

    def leaves(self, choose: random.Random) -> None:
        """Closes the connection after a while, also before the first byte."""
        body = json.dumps(self.fields(choose, stream=choose.random() < 0.5, max_tokens=400)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((self.address.hostname, self.address.port), timeout=120) as connection:
            connection.sendall(head.encode() + body[: choose.choice([len(body), len(body), len(body) // 2])])
            time.sleep(choose.choice([0, 0.01, 0.1, 1.0]))
        self.note("leaves: left")

    def slow(self, choose: random.Random) -> None:
        """Reads a long stream a few bytes at a time."""
        body = json.dumps(self.fields(choose, stream=True, max_tokens=300, logprobs=True, top_logprobs=5)).encode()
        answer = self.send(body)
        until = time.monotonic() + choose.choice([1, 5, 20])
        while time.monotonic() < min(until, self.end) and answer.read(64):
            time.sleep(0.01)
        answer.close()
        self.note(f"slow: {answer.status}")

    def broken(self, choose: random.Random) -> None:
        """Sends fields of wrong types, and bytes that are no JSON."""
        fields = self.fields(choose, max_tokens=2)
        for key in choose.sample([*fields, "tools", "stop", "seed", "response_format", "surprise"], 2):
            fields[key] = choose.choice(ODD)
        body = bytearray(json.dumps(fields).encode())
        if choose.random() < 0.4:
            body[choose.randrange(len(body))] = choose.randrange(256)
        answer = self.send(bytes(body))
        text = answer.read().decode()
        is_bad = answer.status not in ALLOWED or "Traceback" in text
        self.note(
            f"broken: {answer.status}",
            f"broken: {answer.status} {text[:300]} for {bytes(body)[:300]!r}" if is_bad else "",
        )
        time.sleep(0.05)


def memory_mib(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def gauges(url: str) -> dict[str, float]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "tunesmith",
        "serve",
        options.model,
        "--port",
        "0",
        "--name",
        "m",
        "--max-rows",
        "32",
        "--max-queue",
        "32",
    ]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    url = "http://" + line.partition("http://")[2].partition("/v1")[0]
    start = time.monotonic()
    load = Load(url, "m", start + 60 * options.minutes)
    kinds = ("whole", "whole", "leaves", "slow", "broken", "leaves")
    threads = [threading.Thread(target=load.run, args=(kinds[at % len(kinds)], at)) for at in range(options.clients)]
    for thread in threads:
        thread.start()
    samples: list[tuple[float, float, float]] = []
    while time.monotonic() < load.end:
        now = gauges(url)
        samples.append((time.monotonic() - start, memory_mib(server.pid), now["tunesmith_generated_tokens_total"]))
        print(
            f"{samples[-1][0]:6.0f} s  {samples[-1][1]:7.1f} MiB  {samples[-1][2]:10.0f} tokens  {now['tunesmith_rows_open']:3.0f} replies open",
            flush=True,
        )
        time.sleep(min(30, max(1, options.minutes * 2)))
    for thread in threads:
        thread.join()
    time.sleep(2)
    last = gauges(url)
    left = {kind: last[f"tunesmith_rows_{kind}"] for kind in ("running", "waiting", "open")}
    if any(left.values()):
        load.problems.append(f"rows that are not free: {left}")
    load.whole(random.Random(0))
    third = samples[len(samples) // 3][1]
    if samples[-1][1] > max(1.1 * third, third + 32):
        load.problems.append(f"memory has grown from {third:.0f} to {samples[-1][1]:.0f} MiB")
    server.terminate()
    _, errors = server.communicate(timeout=60)
    if server.returncode:
        load.problems.append(f"the server ended with {server.returncode}: {errors[-500:]}")
    print(*(f"{what:20} {count}" for what, count in sorted(load.seen.items())), sep="\n")
    print(*(load.problems or ["no problems"]), sep="\n")
    if errors.strip():
        print(f"on the server's standard error: {errors[-2000:]}")
    if options.output:
        found = {"minutes": options.minutes, "samples": samples, "seen": load.seen, "problems": load.problems}
        options.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 1 if load.problems else 0


if __name__ == "__main__":
    sys.exit(main())
