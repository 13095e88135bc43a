"""Which model judges, and how it is reached; imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

from tunesmith.errors import UsageError

OPENAI_HOST, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
DEFAULT_PARALLEL, DEFAULT_TIMEOUT_S = 4, 120.0


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """A judge as asked for.

    Attributes:
        url: of chat completions.
        shown_url: without its query, which may hold a secret.
        model: name of the model there.
        key: sent as a bearer token; "" sends none. Never printed.
        parallel: requests at once.
        timeout_s: of one request.
        tries: of one request, where the server is busy or fails.
        backoff_s: before the second try; doubled for each further one.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    parallel: int = DEFAULT_PARALLEL
    timeout_s: float = DEFAULT_TIMEOUT_S
    tries: int = 6
    backoff_s: float = 1.0

    @property
    def shown_url(self) -> str:
        return urlunsplit(urlsplit(self.url)._replace(query=""))


def judge_settings(
    url: str | None,
    model: str | None,
    key_env: str | None = None,
    parallel: int = DEFAULT_PARALLEL,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    environment: Mapping[str, str] = os.environ,
) -> JudgeSettings | None:
    """The judge of the flags; None without one.

    Raises:
        UsageError: one of them is missing or wrong.
    """
    if url is None:
        given = {"--judge-model": model, "--judge-key-env": key_env}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UsageError(
                f"{wrong[0]}: needs --judge URL, the address of an OpenAI-compatible server.", code="judge-incomplete"
            )
        return None
    if model is None:
        raise UsageError(
            f"--judge {_without_secrets(url)}: which model there? Give --judge-model M.", code="judge-incomplete"
        )
    address = chat_url(url)
    return JudgeSettings(address, model, find_key(address, key_env, environment), parallel, timeout_s)


def chat_url(url: str) -> str:
    """The address of chat completions: of http://host:8000, http://host:8000/v1 or the whole address.

    Raises:
        UsageError: it is no http address.
    """
    try:
        parts = urlsplit(url.strip())
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_right = False
    if not is_right or any(char.isspace() or ord(char) < 32 for char in url.strip()):
        raise UsageError(
            f"--judge {_without_secrets(url)}: is not the address of a server. Give one such as "
            "http://localhost:8000/v1 or https://api.openai.com/v1.",
            code="judge-url",
        )
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"--judge {_without_secrets(url)}: holds a name or a password. Put the key into an environment variable "
            "and give --judge-key-env NAME.",
            code="judge-url",
        )
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return urlunsplit(parts._replace(path=path, fragment=""))


def find_key(url: str, key_env: str | None, environment: Mapping[str, str]) -> str:
    """The API key: of the named variable; OPENAI_API_KEY goes to OpenAI alone unless it is named.

    Raises:
        UsageError: the named variable is not set, or cannot be a key.
    """
    if key_env is None:
        key = environment.get(OPENAI_KEY, "").strip() if urlsplit(url).hostname == OPENAI_HOST else ""
        name = OPENAI_KEY
    else:
        name, key = key_env, environment.get(key_env, "").strip()
        if not key:
            shown = key_env if key_env.replace("_", "").isalnum() and len(key_env) <= 40 else "its value"
            raise UsageError(
                f"--judge-key-env: no environment variable of this name is set ({shown}). Give the name of the "
                "variable, not the key itself.",
                code="judge-key",
            )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UsageError(f"{name}: holds characters that no API key has.", code="judge-key")
    return key


def _without_secrets(url: str) -> str:
    """An address as it may be shown: without user, password and query."""
    head, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{head}{mark}{host.rpartition('@')[2]}{slash}{path}".partition("?")[0] if mark else url.partition("?")[0]
