"""Ask a chat model over HTTP: retries where the server is busy, and the key goes to no other host."""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tunesmith.display import one_line
from tunesmith.errors import TunesmithError
from tunesmith.judging.settings import JudgeSettings

ANSWER_TOKENS = 4096  # a model that reasons first needs many
_LARGEST_ANSWER = 4 * 2**20  # bytes
_LONGEST_WAIT_S = 120.0
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)  # worth another try
_SHOWN = 300  # characters of what a server says


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server made of one question.

    Attributes:
        text: of the model; "" where there is none.
        problem: why there is none: the server refused this question, or its answer is not a chat completion.
    """

    text: str
    problem: str = ""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the API key and the rows to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class Endpoint:
    """Chat completions of one server; may be used by several threads.

    Attributes:
        stopped: set to end all waiting.
    """

    settings: JudgeSettings
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        own = [urllib.request.ProxyHandler({})] if _is_loopback(self.settings.url) else []
        self._opener = urllib.request.build_opener(_NoRedirects(), *own)
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": ANSWER_TOKENS}

    def ask(self, messages: Sequence[Mapping[str, str]]) -> Answer:
        """The model's answer.

        Raises:
            TunesmithError: the server cannot be reached, stays busy, or refuses every question alike.
        """
        problem = ""
        waits = 0
        while waits < self.settings.tries and not self.stopped.is_set():
            options = dict(self._options)
            try:
                return _read_answer(self._post({"model": self.settings.model, "messages": list(messages)} | options))
            except urllib.error.HTTPError as error:
                with error:
                    said = self._shown(_read_some(error))
                if error.code == 400 and self._adapt(said, options):
                    continue
                if error.code not in _BUSY:
                    return self._refused(error.code, error.headers.get("Location"), said)
                problem, after = f"answers {error.code}: {said}", _retry_after(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # no connection, a timeout, half an answer
                reason = getattr(error, "reason", None) or error
                problem, after = self._shown(str(reason) or type(error).__name__), None
            waits += 1
            pause = after if after is not None else self.settings.backoff_s * 2 ** (waits - 1)
            if pause > _LONGEST_WAIT_S and after is not None:
                problem += f" (it asks to wait {pause:.0f} s)"
                break
            if waits < self.settings.tries:
                self.stopped.wait(min(pause, _LONGEST_WAIT_S))
        raise TunesmithError(
            f"--judge {self.settings.shown_url}: no answer after {waits} tr{'y' if waits == 1 else 'ies'}: {problem}. "
            "Its answers so far are kept; the same command goes on from there.",
            code="judge-unreachable",
        )

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "tunesmith"}
        if self.settings.key:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        request = urllib.request.Request(self.settings.url, json.dumps(body).encode(), headers, method="POST")
        deadline = time.monotonic() + self.settings.timeout_s
        with self._opener.open(request, timeout=self.settings.timeout_s) as response:
            parts, size = [], 0
            while part := response.read1(65536):
                parts.append(part)
                size += len(part)
                if size > _LARGEST_ANSWER:
                    break  # no judge has so much to say: it is not read as an answer
                if time.monotonic() > deadline:  # a server that sends a byte now and then
                    raise TimeoutError("timed out")
            if response.length and size <= _LARGEST_ANSWER:  # read1 does not tell that the connection broke
                raise http.client.IncompleteRead(b"", response.length)
            return b"".join(parts)

    def _adapt(self, said: str, sent: Mapping[str, Any]) -> bool:
        """Leave out, or rename, an option that the server does not take; whether there is something else to send."""
        name = next((name for name in sent if name in said), None)
        if name is None:
            return False
        with self._lock:  # another thread may have been told the same, or of another option
            self._options = {key: value for key, value in self._options.items() if key != name}
            if name == "max_tokens" and "max_completion_tokens" in said:
                self._options["max_completion_tokens"] = ANSWER_TOKENS
        return True

    def _refused(self, status: int, location: str | None, said: str) -> Answer:
        """The answer to a question that the server refuses; an error where it would refuse all of them."""
        if 300 <= status < 400:
            where = self._shown(location or "?")
            why = f"redirects to {where}, where the key and the rows are not sent. Give the right address"
        elif status in (401, 403):
            key = "its key" if self.settings.key else "no key (--judge-key-env NAME)"
            why = f"refuses {key}: {status} {said}"
        elif status in (404, 405, 410):
            why = f"has no such address or no model {self.settings.model}: {status} {said}"
        else:
            return Answer("", f"{status}: {said}")
        raise TunesmithError(f"--judge {self.settings.shown_url}: {why}", code="judge-refused")

    def _shown(self, text: str) -> str:
        """What a server says, in one short line without the key."""
        text = text.replace(self.settings.key, "***") if self.settings.key else text
        text = one_line(" ".join(text.split()))
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _is_loopback(url: str) -> bool:
    """Whether a server is on this machine; a proxy of the environment does not reach it, and must not see the rows."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_some(error: urllib.error.HTTPError) -> str:
    try:
        raw = error.read(65536)
    except (OSError, http.client.HTTPException):
        return ""
    text = raw.decode("utf-8", errors="replace")
    try:
        found = json.loads(text)["error"]
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, TypeError, KeyError, RecursionError):
        return text


def _read_answer(raw: bytes) -> Answer:
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return Answer("", f"is not a chat completion: {raw[:_SHOWN].decode('utf-8', errors='replace')}")
    return Answer(content) if isinstance(content, str) else Answer("", "has no text")


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number of seconds or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if value.strip().replace(".", "", 1).isdigit() else _until(value)
    except (ValueError, TypeError, OverflowError):
        return None


def _until(date: str) -> float:
    return max(0.0, email.utils.parsedate_to_datetime(date).timestamp() - time.time())
