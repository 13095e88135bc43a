"""`tunesmith serve`: open a model and answer over HTTP until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tunesmith.config.schema import ModelSection
from tunesmith.errors import InterruptedRun, RunError, TunesmithError, UsageError
from tunesmith.serve.settings import KEY_VARIABLE, LOOPBACK_NAMES, ServeSettings, is_readable_by_others, read_api_key
from tunesmith.terminal.status import show_status

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from tunesmith.generation.speaker import Speaker
    from tunesmith.serve.runs import ServedRun
    from tunesmith.serve.serving import Serving

logger = logging.getLogger(__name__)

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_ADDRESS = "Give 127.0.0.1 or an address of this machine."
_HEAD_S = 20.0  # a client has at most twice as long to send the head of a request
_EXTRA_GRACE_S = 5.0  # for replies that are ended at the end of the grace period to be sent


def run_serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        TunesmithError: an extra package is missing, the key or address cannot be used, or the model cannot be opened.
        InterruptedRun: a second signal has ended replies before they were complete.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise TunesmithError(
            f"serve needs {', '.join(missing)}. To install: pip install 'tunesmith[serve]'", code="extra-missing"
        )
    settings = _settings(options)
    listener = _bind(options.host, options.port)  # before the model is loaded, which takes a while
    try:
        _warn(options, settings)
        show_status("loading the model")
        from tunesmith.generation.speaker import load_speaker
        from tunesmith.serve.app import create_app

        section = ModelSection(
            path=options.model,
            tokenizer=options.tokenizer,
            config=options.model_config,
            trust_remote_code=options.trust_remote_code,
        )
        speaker = load_speaker(section, options.chat_template, options.more, options.allow_changed_base)
        base = _open_base(section) if options.base and not speaker.adapter_names else None  # adapters have one
        app = create_app(speaker, model_name(options.model), settings, _runs(options), options.name, base)
        _serve(app, listener, options.host, settings)
    finally:
        listener.close()


def _open_base(section: ModelSection) -> Speaker:
    """The model that a full run began from, with its own template where it has one.

    Raises:
        ModelError: the model is not of a run, or began from random weights.
    """
    from tunesmith.evaluation.candidates import find_base, find_run, saved_template
    from tunesmith.generation.speaker import load_speaker
    from tunesmith.model.tokenizer import load_tokenizer

    run = find_run(section.path)
    base = find_base(section, run)
    base = base.model_copy(update={"trust_remote_code": section.trust_remote_code})
    if run is not None and run.config.data.chat_template == "none":
        return load_speaker(base, "none")
    return load_speaker(base, None if load_tokenizer(base).chat_template else saved_template(run))


def _runs(options: argparse.Namespace) -> list[ServedRun]:
    """The runs that the page shows: those of --runs, else those that are served to this machine only.

    Whoever may use a model from elsewhere need not see what it was trained on.

    Raises:
        TunesmithError: --runs names a folder that is not a run.
    """
    from tunesmith.serve.runs import find_runs, open_runs

    if options.runs:
        return open_runs(options.runs)
    served = find_runs([options.model, *options.more])
    if served and not is_loopback(options.host):
        names = ", ".join(run.name for run in served)
        logger.warning("note: the page shows neither curves nor training data of %s. --runs RUN shows them.", names)
        return []
    return served


def model_name(path: str) -> str:
    """The name of a model in requests: a hub id itself, of a folder or file its own name only."""
    place = Path(path).expanduser()
    if not place.exists():
        return path
    place = place.resolve()
    parts = [part for part in place.parts if part not in ("model", "adapter")]
    return Path(parts[-1]).stem if place.is_file() else parts[-1]


def _settings(options: argparse.Namespace) -> ServeSettings:
    names = frozenset(name.lower() for name in options.allowed_hosts)
    if is_loopback(options.host):
        names |= LOOPBACK_NAMES | {_bracketed(options.host).lower()}
    sampling = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return ServeSettings(
        sampling={name: getattr(options, name) for name in sampling},
        api_key=read_api_key(options.api_key_file, os.environ),
        allowed_hosts=names or None,
        max_rows=options.max_rows,
        max_queue=options.max_queue,
        max_new_tokens=options.max_new_tokens,
        max_body_bytes=options.max_body_bytes,
        timeout_s=options.timeout,
        grace_s=options.grace,
    )


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _warn(options: argparse.Namespace, settings: ServeSettings) -> None:
    if options.api_key_file is not None and is_readable_by_others(options.api_key_file):
        logger.warning(
            "warning: %s can be read by other users of this machine; chmod 600 changes that", options.api_key_file
        )
    if settings.api_key is None and not is_loopback(options.host):
        logger.warning(
            "WARNING: --host %s without an API key: everyone who reaches this machine can use the model. Set %s or "
            "give --api-key-file FILE, or listen on 127.0.0.1.",
            options.host,
            KEY_VARIABLE,
        )


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address; connections are accepted later.

    Raises:
        UsageError: there is no such address here, or another program has it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise UsageError(f"--host {host}: no such address. {_ADDRESS}", code="no-such-address") from None
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)  # two sockets may be bound to a port, only one may listen
    except OSError as error:
        listener.close()
        where = f"{_bracketed(host)}:{port}"
        if error.errno == errno.EADDRINUSE:
            reason = "another program listens there. Stop it, or give another --port (0: any free one)."
            raise RunError(f"{where}: {reason}", code="port-in-use") from None
        reasons = {
            errno.EADDRNOTAVAIL: f"this machine has no such address. {_ADDRESS}",
            errno.EACCES: "ports below 1024 need more rights. Give another --port.",
        }
        reason = reasons.get(error.errno or 0, f"{error.strerror}. Give another --host or --port.")
        raise RunError(f"{where}: {reason}", code="no-such-address") from None
    return listener


def server_config(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    from tunesmith.serve.delivery import ABORT

    class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """Ends itself when its client does not complete the head of a request."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            own: Any = self
            own.app_state = {**own.app_state, ABORT: transport.abort}
            super().connection_made(transport)
            self._end_if_idle(self)

        def _end_if_idle(self, before: object) -> None:
            """Compare with the request of the last time: a complete one, or none, for so long is only kept open."""
            if self.transport.is_closing():
                return
            is_idle = self.cycle is None or self.cycle.response_complete
            if is_idle and self.cycle is before:
                self.transport.abort()
                return
            asyncio.get_running_loop().call_later(_HEAD_S, self._end_if_idle, self.cycle)

    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a header must not change who a request seems to come from
        lifespan="on",
        timeout_graceful_shutdown=int(settings.grace_s + _EXTRA_GRACE_S),
    )


def _serve(app: FastAPI, listener: socket.socket, host: str, settings: ServeSettings) -> None:
    import uvicorn

    port = listener.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else _bracketed(host)
    serving: Serving = app.state.serving
    names = ", ".join(name for part in serving.parts for name in part.models)
    config = server_config(app, settings)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of each malformed request

    class Server(uvicorn.Server):
        """Stops at the first signal when replies are complete, and at once at the second."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                place = f"http://{shown}:{port}"
                print(f"serving {names} at {place}/v1, with a page at {place}/  (Ctrl-C ends)", flush=True)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            numbers = [signal.SIGINT, signal.SIGTERM]
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                self.force_exit = True
                logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it logs what it cancels with a traceback
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if num_open := sum(worker.num_open for worker in serving.workers):
                logger.warning("note: completing %d replies; Ctrl-C again cuts them off", num_open)
            loop = asyncio.get_running_loop()
            endings = [loop.call_later(settings.grace_s, worker.stop) for worker in serving.workers]
            await super().shutdown(sockets=sockets)
            for ending in endings:
                ending.cancel()

    server = Server(config)
    server.run(sockets=[listener])
    if server.force_exit or any(worker.num_cut for worker in serving.workers):
        raise InterruptedRun("stopped; replies that were not complete have been cut off", code="replies-cut")
