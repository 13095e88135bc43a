"""Settings of the server: where it listens, who may use it, and its limits."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.errors import UsageError
from tunesmith.reading import read_text_or_pipe

KEY_VARIABLE = "TUNESMITH_API_KEY"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """How a server behaves.

    Attributes:
        sampling: temperature, top_p and so on of requests that give none.
        api_key: what a client must send as `Authorization: Bearer KEY`; None: everyone may ask.
        allowed_hosts: names of this server in the Host header, without port; None: any.
        max_rows: replies generated at once.
        max_queue: replies that wait or are not yet sent in full, beyond `max_rows`; more are answered with 429.
        max_new_tokens: longest reply; a request may ask for less.
        max_body_bytes: largest request.
        timeout_s: from a request to the end of its reply.
        grace_s: how long replies may go on after SIGTERM.
    """

    sampling: Mapping[str, float | None] = field(default_factory=dict)
    api_key: str | None = None
    allowed_hosts: frozenset[str] | None = LOOPBACK_NAMES
    max_rows: int = 64
    max_queue: int = 256
    max_new_tokens: int = 4096
    max_body_bytes: int = 4 * 2**20
    timeout_s: float = 600.0
    grace_s: float = 30.0


def read_api_key(file: str | None, environment: Mapping[str, str]) -> str | None:
    """The key from a file, else from the environment; None if neither has one.

    Raises:
        UsageError: the file cannot be read, or the key is empty or has characters that no header can carry.
    """
    if file is None:
        if KEY_VARIABLE not in environment:
            return None
        return _checked(environment[KEY_VARIABLE], KEY_VARIABLE)
    try:
        text = read_text_or_pipe(Path(file).expanduser())
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or "cannot be read") if isinstance(error, OSError) else "is not text"
        raise UsageError(f"--api-key-file {file}: {reason}. Give a file that holds the key.", code="api-key") from None
    return _checked(text, f"--api-key-file {file}")


def _checked(text: str, source: str) -> str:
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"{source}: a key is one line of printable ASCII characters without spaces. To make one: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            code="api-key",
        )
    return key


def is_readable_by_others(file: str) -> bool:
    try:
        mode = os.stat(Path(file).expanduser()).st_mode
    except OSError:
        return False
    return bool(mode & (stat.S_IRGRP | stat.S_IROTH))
