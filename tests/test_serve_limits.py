"""tunesmith serve against hurried, rude and hostile clients: keys, names, limits, clients that leave, broken bodies."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import tunesmith
from conftest import raises, save_folder, tiny_config
from serving import served
from tunesmith.config.schema import ModelSection
from tunesmith.errors import ModelError, RunError, UsageError
from tunesmith.generation.speaker import load_speaker
from tunesmith.serve.app import create_app
from tunesmith.serve.settings import ServeSettings, read_api_key

ASK = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 1.0}
JSON = {"Content-Type": "application/json"}
BODIES = int(os.environ.get("TUNESMITH_BODIES", 2000 if os.environ.get("TUNESMITH_LONG") else 200))


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from conftest import WORDS
    from tunesmith.model.bpe import train_tokenizer

    folder = tmp_path_factory.mktemp("serve") / "m"
    save_folder(folder, tiny_config("qwen3", initializer_range=0.02), train_tokenizer([WORDS] * 20, vocab_size=400))
    return load_speaker(ModelSection(path=str(folder)))


@contextmanager
def serving(speaker: Any, **settings: Any) -> Iterator[tuple[str, Any]]:
    app = create_app(speaker, "m", ServeSettings(**settings))
    with served(app) as url:
        yield url, app.state.serving


@pytest.fixture(scope="module")
def shared(speaker: Any) -> Iterator[tuple[str, Any]]:
    with serving(speaker, max_body_bytes=20_000) as found:
        yield found


def send(
    url: str, body: bytes | str | None = None, path: str = "/v1/chat/completions", method: str = "POST",
    headers: dict[str, str] | None = None,
) -> tuple[int, Any, dict[str, str]]:  # fmt: skip
    """Status, body (of JSON if it is) and headers of an answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        data = body.encode() if isinstance(body, str) else body
        connection.request(method, path, data, JSON if headers is None else headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else text, dict(answer.headers)
    finally:
        connection.close()


def is_error(answer: Any) -> bool:
    """Whether a body is an error in OpenAI's shape that shows no internals."""
    error = answer["error"]
    assert set(answer) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return not any(word in json.dumps(answer) for word in ("Traceback", "site-packages", ".py", "/tmp"))


def wait_until_free(state: Any) -> None:
    end = time.monotonic() + 10
    while state.worker.num_open or state.worker.num_running or state.worker.num_waiting:
        assert time.monotonic() < end, (state.worker.num_open, state.worker.num_running, state.worker.num_waiting)
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", JSON, 400, "invalid_json"),
        (b"{", JSON, 400, "invalid_json"),
        (b"[]", JSON, 400, "invalid_json"),
        (b"\xff\xfe{}", JSON, 400, "not_utf_8"),
        (b'{"model": "m", "model": "n"}', JSON, 400, "invalid_json"),
        (b'{"model": NaN}', JSON, 400, "invalid_json"),
        (b'{"temperature": 1e999}', JSON, 400, "invalid_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", JSON, 400, "invalid_json"),
        (b'{"model": "\\ud800"}', JSON, 400, "lone_surrogate"),
        (b"[" * 9000 + b"]" * 9000, JSON, 400, "invalid_json"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, JSON, 400, "invalid_json"),
        (b" " * 20_001, JSON, 413, "body_too_large"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "content_type"),
        (b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "content_type"),
        (b"{}", {**JSON, "Content-Encoding": "gzip"}, 415, "content_encoding"),
        (b"{}", {**JSON, "Host": "evil.example"}, 403, "host_not_allowed"),
    ],
)  # fmt: skip
def test_broken_bodies(shared: Any, body: bytes, headers: dict[str, str], status: int, code: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        found, answer, _ = send(shared[0], body, path, headers=headers)
        assert (found, answer["error"]["code"]) == (status, code)
        assert is_error(answer)


def test_a_body_in_chunks_is_limited_too(shared: Any) -> None:
    address = urlsplit(shared[0])
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(30):
            connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert b"413" in connection.recv(4096)


def test_other_paths_and_methods(shared: Any) -> None:
    for path, method, status in (("/v1/nope", "GET", 404), ("/v1/chat/completions", "GET", 405), ("/docs", "GET", 404), ("/openapi.json", "GET", 404),
                                 ("/v1/models", "DELETE", 405), ("/v1/chat/completions", "OPTIONS", 405), ("/../../etc/passwd", "GET", 404)):  # fmt: skip
        found, answer, headers = send(shared[0], None, path, method)
        assert (found, is_error(answer)) == (status, True)
        assert not any(name.lower().startswith("access-control") or name.lower() == "server" for name in headers)


def test_names_of_the_server(speaker: Any, shared: Any) -> None:
    port = urlsplit(shared[0]).port
    for host, status in (("localhost", 200), (f"LOCALHOST:{port}", 200), (f"127.0.0.1:{port}", 200), (f"[::1]:{port}", 200),
                         ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403), ("evil@localhost", 403)):  # fmt: skip
        assert send(shared[0], None, "/health", "GET", {"Host": host})[0] == status, host
    with serving(speaker, allowed_hosts=None) as (url, _):
        assert send(url, None, "/health", "GET", {"Host": "anything"})[0] == 200


def test_a_key_is_needed(speaker: Any) -> None:
    with serving(speaker, api_key="s3cret") as (url, _):
        for given, status in ((None, 401), ("Bearer wrong", 401), ("Bearer s3cre", 401), ("Basic s3cret", 401), ("s3cret", 401), ("Bearer s3cret\xe9", 401),
                              ("Bearer s3cret", 200), ("bearer  s3cret", 200)):  # fmt: skip
            headers = {**JSON, **({"Authorization": given} if given else {})}
            for path, method in (("/v1/models", "GET"), ("/metrics", "GET"), ("/v1/chat/completions", "POST")):
                body = json.dumps({**ASK, "max_tokens": 1}) if method == "POST" else None
                found, answer, found_headers = send(url, body, path, method, headers)
                assert found == status, (given, path)
                if status == 401:
                    assert is_error(answer)
                    assert "s3cret" not in str(answer)
                    assert found_headers["www-authenticate"] == "Bearer"
        assert send(url, None, "/health", "GET")[0] == 200


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(" abc\n", encoding="utf-8")
    assert read_api_key(str(file), {}) == "abc"
    assert read_api_key(str(file), {"TUNESMITH_API_KEY": "other"}) == "abc"
    assert read_api_key(None, {"TUNESMITH_API_KEY": "other"}) == "other"
    assert read_api_key(None, {}) is None
    for text in ("", "two words", "zwei\u00e4", "line\nline"):
        file.write_text(text, encoding="utf-8")
        with raises(UsageError, "api-key"):
            read_api_key(str(file), {})
    for name in ("missing", "."):
        with raises(UsageError, "api-key", name):
            read_api_key(str(tmp_path / name), {})
    with raises(UsageError, "api-key"):
        read_api_key(None, {"TUNESMITH_API_KEY": ""})


def test_a_full_queue_is_said(speaker: Any) -> None:
    with serving(speaker, max_rows=16, max_queue=24) as (url, state):
        body = json.dumps({**ASK, "max_tokens": 30})
        with ThreadPoolExecutor(320) as pool:
            answers = list(pool.map(lambda _: send(url, body), range(320)))
        assert {status for status, _, _ in answers} == {200, 429}
        refused = [(answer, headers) for status, answer, headers in answers if status == 429]
        assert all(is_error(answer) and answer["error"]["code"] == "queue_full" for answer, _ in refused)
        assert all(int(headers["retry-after"]) >= 1 for _, headers in refused)
        assert sum(status == 200 for status, _, _ in answers) >= 40
        wait_until_free(state)
        status, answer, _ = send(url, json.dumps({**ASK, "n": 41}))
        assert (status, answer["error"]["code"]) == (400, "too_many_replies")


def test_a_reply_takes_only_so_long(speaker: Any) -> None:
    with serving(speaker, timeout_s=0.2) as (url, state):
        status, answer, _ = send(url, json.dumps({**ASK, "n": 40, "max_tokens": 400}))
        assert (status, answer["error"]["code"], is_error(answer)) == (504, "timeout", True)
        status, text, _ = send(url, json.dumps({**ASK, "n": 40, "max_tokens": 400, "stream": True}))
        last = text.strip().rpartition("data: ")[2]
        assert (status, json.loads(last)["error"]["code"]) == (200, "timeout")
        wait_until_free(state)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_clients_that_leave_free_their_rows(speaker: Any, is_streamed: bool) -> None:
    """While their reply runs, and while they wait in the queue."""
    with serving(speaker, max_rows=2, max_queue=20) as (url, state):
        address = urlsplit(url)
        body = json.dumps({**ASK, "max_tokens": 490, "stream": is_streamed}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        clients = [socket.create_connection((address.hostname, address.port)) for _ in range(8)]
        for client in clients:
            client.sendall(head.encode() + body)
        while state.worker.num_open < 8:
            time.sleep(0.01)
        for client in clients:
            client.close()
        wait_until_free(state)
        assert send(url, json.dumps({**ASK, "max_tokens": 2}))[0] == 200


def test_a_client_that_does_not_read_is_dropped(speaker: Any) -> None:
    with serving(speaker, timeout_s=0.5, max_rows=64) as (url, state):
        address = urlsplit(url)
        body = json.dumps(
            {**ASK, "n": 64, "max_tokens": 400, "stream": True, "logprobs": True, "top_logprobs": 20}
        ).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address.hostname, address.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        time.sleep(0.2)
        assert state.worker.num_open == 64
        assert send(url, json.dumps({**ASK, "max_tokens": 2}))[0] == 200  # others are served meanwhile
        wait_until_free(state)
        client.close()


def test_unexpected_errors_show_nothing(speaker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug anywhere: 500 without internals, its traceback in the log, and the server goes on."""
    from tunesmith.generation.batcher import Batcher
    from tunesmith.serve import chat

    with serving(speaker) as (url, state):
        with monkeypatch.context() as patch:
            patch.setattr(Batcher, "step", lambda self: 1 / 0)
            for is_streamed in (False, True):
                status, answer, _ = send(url, json.dumps({**ASK, "stream": is_streamed}))
                found = json.loads(answer.strip().rpartition("data: ")[2]) if is_streamed else answer
                assert (status, found["error"]["code"], is_error(found)) == (
                    200 if is_streamed else 500,
                    "internal_error",
                    True,
                )
        with monkeypatch.context() as patch:
            patch.setattr(chat, "read_messages", lambda fields: 1 / 0)
            status, answer, _ = send(url, json.dumps(ASK))
            assert (status, is_error(answer)) == (500, True)
        wait_until_free(state)
        assert send(url, json.dumps({**ASK, "max_tokens": 2}))[0] == 200


def make_body(choose: random.Random) -> bytes:
    """A request with something odd in it."""
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        1.5,
        10**30,
        "",
        "x",
        "\ud83d",
        "\u0000",
        [],
        {},
        [[]],
        [None],
        {"a": None},
        "a" * 5000,
        [0] * 50,
        [-1],
        [10**9],
        [1, True],
        [[1], "x"],
        "<|im_end|>",
    ]
    keys = ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "n", "stream", "stop", "logprobs", "top_logprobs", "tools", "tool_choice",
            "response_format", "seed", "stream_options", "chat_template_kwargs", "echo", "user", "surprise", "best_of", "top_k"]  # fmt: skip
    turn = {"role": choose.choice(["user", "assistant", "tool", "system"]), "content": "hi"}
    body: dict[str, Any] = {"model": "m", "messages": [turn, {"role": "user", "content": "hi"}], "max_tokens": 2}
    kind = choose.random()
    if kind < 0.5:
        for key in choose.sample(keys, choose.randint(1, 3)):
            body[key] = choose.choice(odd)
    elif kind < 0.75:
        target = choose.choice([turn, body["messages"]])
        if isinstance(target, dict):
            target[
                choose.choice(
                    ["role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight", "zork"]
                )
            ] = choose.choice(odd)
        else:
            target.insert(choose.randint(0, 2), choose.choice(odd))
    elif kind < 0.9:
        body["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": choose.choice(["f", *odd]),
                    "parameters": choose.choice([{"type": "object"}, *odd]),
                },
            }
        ]
        body["tool_choice"] = choose.choice(["auto", "required", "none", *odd])
    else:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {
                "name": "x",
                "schema": choose.choice([{"type": choose.choice(odd)}, {"pattern": "((("}, *odd]),
            },
        }
    if choose.random() < 0.3:
        body = {("prompt" if key == "messages" else key): value for key, value in body.items()}
    text = json.dumps(body).encode()
    if choose.random() < 0.2:
        damaged = bytearray(text)
        for _ in range(choose.randint(1, 4)):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        text = bytes(damaged)
    return text[: choose.randrange(len(text))] if choose.random() < 0.1 else text


def test_no_body_breaks_the_server(shared: Any) -> None:
    url, state = shared
    choose = random.Random(7)
    bodies = [(make_body(choose), choose.choice(["/v1/chat/completions", "/v1/completions"])) for _ in range(BODIES)]

    def ask(given: tuple[bytes, str]) -> int:
        status, answer, _ = send(url, *given)
        if status == 200:
            return status
        assert status < 500, given
        assert is_error(answer), given
        return status

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, bodies))
    assert {200, 400} <= set(found)
    wait_until_free(state)
    assert send(url, json.dumps({**ASK, "max_tokens": 1}))[0] == 200


def test_addresses(fails: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        error = fails("serve", tmp_path, "--port", taken.getsockname()[1])
        assert (type(error), error.code) == (RunError, "port-in-use")
    error = fails("serve", tmp_path, "--host", "no.such.host.invalid")
    assert (type(error), error.code) == (UsageError, "no-such-address")
    error = fails("serve", tmp_path, "--host", "192.0.2.1")
    assert (type(error), error.code) == (RunError, "no-such-address")
    assert fails("serve", tmp_path, "--api-key", "secret").code == "unknown-flag"


def test_a_full_run_and_its_base_answer_in_one_process(
    speaker: Any, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    """The base has a worker of its own, and its replies are those that it gives alone."""
    from tunesmith.serve.run import _open_base

    tunesmith.train(
        model=model_folder, data=chats, output=tmp_path / "full", optim={"lr": 0.05},
        train={"max_steps": 2, "micro_batch_tokens": 128},
    )  # fmt: skip
    section = ModelSection(path=str(tmp_path / "full"))
    tuned, base = load_speaker(section), _open_base(section)
    plain = load_speaker(ModelSection(path=str(model_folder)))
    body = {"messages": [{"role": "user", "content": "What is 2?"}], "temperature": 0, "max_tokens": 8}
    said = {}
    for names, app in (
        (("full", "base"), create_app(tuned, "full", ServeSettings(), base=base)),
        (("alone",), create_app(plain, "alone", ServeSettings())),
    ):
        with served(app) as url:
            assert [one["id"] for one in send(url, None, "/v1/models", "GET")[1]["data"]] == list(names)
            for name in names:
                status, answer, _ = send(url, json.dumps({"model": name, **body}))
                assert status == 200, answer
                said[name] = answer["choices"][0]["message"]["content"]
            status, answer, _ = send(url, json.dumps({"model": "other", **body}))
            assert (status, all(name in answer["error"]["message"] for name in names)) == (404, True)
    assert said["base"] == said["alone"] != said["full"]
    with pytest.raises(UsageError) as refused:
        create_app(tuned, "m", ServeSettings(), alias="base", base=base)
    assert refused.value.code == "name-taken"
    with pytest.raises(ModelError) as refused:
        _open_base(ModelSection(path=str(model_folder)))
    assert refused.value.code == "no-base"
