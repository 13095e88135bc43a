"""tunesmith serve under attacks that other tests lack: connections held open, requests that multiply, lost pieces."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from conftest import WORDS, save_folder, tiny_config
from test_serve_limits import ASK, is_error, send, serving, wait_until_free
from tunesmith.config.schema import ModelSection
from tunesmith.generation.batcher import Batcher
from tunesmith.generation.request import Request
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import load_speaker
from tunesmith.model.bpe import train_tokenizer
from tunesmith.serve import chat, completions, delivery, run
from tunesmith.serve.worker import Worker


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("serve") / "m"
    save_folder(folder, tiny_config("qwen3", initializer_range=0.02), train_tokenizer([WORDS] * 20, vocab_size=400))
    return load_speaker(ModelSection(path=str(folder)))


def is_closed(client: socket.socket, within_s: float) -> bool:
    client.settimeout(within_s)
    try:
        while client.recv(1000):
            pass
        return True
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_connections_without_a_whole_request_are_ended(speaker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a head, nothing at all, or half a second head; a reply that takes longer is not touched."""
    monkeypatch.setattr(run, "_HEAD_S", 0.2)
    with serving(speaker) as (url, _):
        address = urlsplit(url).hostname, urlsplit(url).port
        clients = [socket.create_connection(address) for _ in range(4)]
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        clients[0].sendall(whole[:20])
        clients[2].sendall(whole)
        clients[2].recv(1000)
        clients[2].sendall(whole[:20])
        clients[3].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n")  # fmt: skip
        for client in clients[:3]:
            assert is_closed(client, 3)
        assert not is_closed(clients[3], 0.1)  # its body has a limit of its own
        status, _, _ = send(url, json.dumps({**ASK, "max_tokens": 400}))
        assert status == 200
        for client in clients:
            client.close()


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_reads_nothing_is_cut_off(
    speaker: Any, is_streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the whole answer has been made: it neither stays in memory nor leaves its place in the queue."""
    monkeypatch.setattr(delivery, "_SLACK_S", 0.1)
    with serving(speaker, max_rows=64, timeout_s=3.0) as (url, state):
        body = {**ASK, "n": 64, "max_tokens": 40, "stream": is_streamed, "logprobs": True, "top_logprobs": 20}
        data = json.dumps(body).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((urlsplit(url).hostname, urlsplit(url).port))
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)  # fmt: skip
        while not state.worker.num_open:
            time.sleep(0.01)
        num_open = 0
        while state.worker.num_running or state.worker.num_waiting:
            num_open = max(num_open, state.worker.num_open)
            time.sleep(0.01)
        assert max(num_open, state.worker.num_open) == 64
        wait_until_free(state)
        assert is_closed(client, 4)  # once what was on its way is read
        client.close()


def test_a_request_cannot_multiply_before_its_limit_is_checked(speaker: Any) -> None:
    with serving(speaker, max_rows=2, max_queue=6) as (url, _):
        body = {"model": "m", "prompt": ["a"] * 300_000, "n": 128}
        begun = time.monotonic()
        status, answer, _ = send(url, json.dumps(body), "/v1/completions")
        assert (status, answer["error"]["code"], is_error(answer)) == (400, "too_many_replies", True)
        assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"repetition_penalty": 1e-40}, "repetition_penalty"),
        ({"stop": ["a" * 100_000]}, "stop[0]"),
        ({"n": 128, "max_tokens": 4000, "logprobs": True, "top_logprobs": 20}, "top_logprobs"),
    ],
)
def test_values_that_cost_too_much_or_break_the_arithmetic(speaker: Any, change: Any, param: str) -> None:
    with serving(speaker) as (url, _):
        status, answer, _ = send(url, json.dumps({**ASK, "max_tokens": 2, **change}))
        assert (status, answer["error"]["param"]) == (400, param)


def test_paths_with_a_slash_too_many_are_not_redirected(speaker: Any) -> None:
    """The address of a redirect would say http, also where a proxy speaks https."""
    with serving(speaker) as (url, _):
        for path in ("/health/", "/v1/chat/completions/"):
            status, _, headers = send(url, None, path, "GET")
            assert (status, "location" in headers) == (404, False)
        request = urllib.request.Request(f"{url}/health", method="HEAD")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200


class Failing(Batcher):
    """Fails at each step."""

    def step(self) -> Any:
        raise MemoryError


def test_no_piece_is_lost_when_a_step_fails(speaker: Any) -> None:
    """A row that was refused just before gets its own error, and nobody waits for another batcher to be made."""

    async def ask() -> list[str]:
        made = 0  # attempts

        def make() -> Batcher:
            nonlocal made
            made += 1
            if made < 2:
                raise MemoryError
            return Batcher(speaker)

        worker = Worker(Failing(speaker), make, 4, 4)
        wrong = Request([], Sampling(4))  # an empty prompt
        replies = [worker.open([wrong]), worker.open([Request([5, 6], Sampling(4))])]
        worker.start()
        codes = []
        try:
            async with asyncio.timeout(0.9):
                for reply in replies:
                    codes += [piece.error.code async for piece in reply if piece.error]
            for reply in replies:
                reply.close()
            while made < 2:  # until then all requests fail
                await asyncio.sleep(0.05)
            async with asyncio.timeout(10):
                again = worker.open([Request([5, 6], Sampling(4, 0))])
                pieces = [piece async for piece in again]
            codes.append(pieces[-1].token.finish_reason)
        finally:
            worker.stop()
        return codes

    assert asyncio.run(ask()) == ["prompt-empty", "internal-error", "length"]


def test_health_tells_that_replies_have_ended(speaker: Any) -> None:
    with serving(speaker) as (url, state):
        assert send(url, None, "/health", "GET")[0] == 200
        state.worker.stop()
        state.worker.join(5)
        status, answer, _ = send(url, None, "/health", "GET")
        assert (status, is_error(answer)) == (503, True)


def test_a_name_that_another_model_has(speaker: Any, fails: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    from tunesmith.errors import UsageError
    from tunesmith.serve.app import create_app
    from tunesmith.serve.settings import ServeSettings

    adapted = replace(speaker, adapters={"one": "a", "two": "b"})
    for name in ("base", "two"):
        with pytest.raises(UsageError) as caught:
            create_app(adapted, "m", ServeSettings(), alias=name)
        assert caught.value.code == "name-taken"


def test_large_fields_are_not_kept_while_a_reply_is_generated(speaker: Any) -> None:
    with serving(speaker) as (_, state):
        body = {**ASK, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}
        _, fields, asked = chat._prepare(state, json.dumps(body).encode())
        assert (fields.messages, fields.tools, len(asked.requests)) == ([], None, 1)
        body = {"model": "m", "prompt": ["a", "b"], "n": 2}
        _, given, requests = completions._prepare(state, json.dumps(body).encode())
        assert (given.prompt, len(requests)) == (None, 4)
