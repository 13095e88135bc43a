"""llama.cpp in a process of its own: what it makes of a GGUF file.

`python -m tunesmith.gguf.reader JOB RESULT` opens the file with llama.cpp's server (the package xllamacpp), asks it and
writes the answers as JSON. A crash of the library then ends this process only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError

PACKAGE = "xllamacpp"
_LOADED = "the library is loaded"  # in the log
_TIMEOUT_S = 600  # of one answer
_STALLED_S = _TIMEOUT_S + 60  # without an answer or a line of the log; a large model on few cores takes hours in all


@dataclass(frozen=True, slots=True)
class Job:
    """What to ask llama.cpp.

    Attributes:
        file: the GGUF file.
        texts: to tokenize; spellings of control tokens become these tokens.
        chats: requests of the chat API (messages, tools), to render with the file's template.
        prompts: token ids.
        lengths: of each prompt, lengths of the beginnings after which the next token is predicted.
        num_probs: likeliest next tokens to report.
        stops: ids at which a reply should end.
        context: largest number of tokens of a prompt.
    """

    file: str
    texts: Sequence[str] = ()
    chats: Sequence[Mapping[str, Any]] = ()
    prompts: Sequence[Sequence[int]] = ()
    lengths: Sequence[Sequence[int]] = ()
    num_probs: int = 64
    stops: Sequence[int] = ()
    context: int = 512


@dataclass(frozen=True, slots=True)
class Answers:
    """llama.cpp's answers to a job, in its order.

    Attributes:
        ids: of each text.
        rendered: of each chat its "text" and the number of tokens that the chat API makes of it ("num_tokens"), or the
            "error".
        next_tokens: of each prompt and each of its lengths, log-probabilities of the likeliest next tokens by id; empty
            where llama.cpp reports none, since the likeliest token is a part of a character.
        stopping: of the job's stops, those at which it stops.
    """

    ids: list[list[int]]
    rendered: list[dict[str, Any]]
    next_tokens: list[list[dict[int, float]]] = field(default_factory=list)
    stopping: list[int] = field(default_factory=list)


def reader_version() -> str | None:
    """Name and version of the installed reader; None if it is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


def ask(job: Job) -> Answers:
    """Open the file with llama.cpp and ask.

    Raises:
        RunError: llama.cpp does not work here, cannot open the file, ended, or did not answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-gguf-") as name:
        asked, answered, log = (Path(name) / part for part in ("job.json", "result.json", "log.txt"))
        asked.write_text(json.dumps(asdict(job)), encoding="utf-8")
        # without -P, files in the current folder would shadow modules
        command = [sys.executable, "-P", "-m", __name__, str(asked), str(answered)]
        with log.open("wb") as out:
            code = _wait(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out), log)
        if code != 0 or not answered.is_file():
            if _LOADED not in log.read_text(encoding="utf-8", errors="replace"):
                raise RunError(
                    f"the package {PACKAGE}, with which files are proven, does not work here ({_explain(code, log)}). "
                    f"Install it again, or export without a proof: pip uninstall {PACKAGE}. No files were kept.",
                    code="reader-broken",
                )
            raise RunError(
                f"llama.cpp cannot read the file ({_explain(code, log)}). No files were kept.", code="reader-failed"
            )
        return _parse(answered.read_text(encoding="utf-8"))


def _parse(text: str) -> Answers:
    found = json.loads(text)
    next_tokens = [
        # llama.cpp's JSON has null for NaN
        [{int(key): math.nan if value is None else value for key, value in place.items()} for place in places]
        for places in found["next_tokens"]
    ]
    return Answers(found["ids"], found["rendered"], next_tokens, found["stopping"])


def _wait(process: subprocess.Popen[bytes], log: Path) -> int | str:
    """The exit code, or how the reader stalled; the reader ends in any case."""
    size, changed = -1, time.monotonic()
    try:
        while True:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                now = log.stat().st_size
                if now != size:
                    size, changed = now, time.monotonic()
                if time.monotonic() - changed > _STALLED_S:
                    return f"no answer within {_STALLED_S} s"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _explain(code: int | str, log: Path) -> str:
    """The last telling line of the reader's log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line.lower() for word in ("error", "fail", "assert"))]
    why = " ".join((telling or lines or ["no message"])[0].split())[:200]
    how = code if isinstance(code, str) else f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {why}"


def _num_threads() -> int:
    """The cores, or fewer if OMP_NUM_THREADS says so: its threads wait in loops, and too many slow each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(given)) if given.isdecimal() and int(given) else cores


class _Server:
    """llama.cpp's server in this process, asked over HTTP."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        import xllamacpp

        print(_LOADED, flush=True)
        params = xllamacpp.CommonParams()
        params.model.path = job["file"]
        params.n_ctx = job["context"]
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = _num_threads()
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = False
        params.use_jinja = True
        params.port = 0
        self._server = xllamacpp.Server(params)
        self._address = self._server.listening_address
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the address is of this machine

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as response:
                print(f"answered: {path}", flush=True)  # a sign of life
                return dict(json.loads(response.read()))
        except urllib.error.HTTPError as error:
            try:
                said = json.loads(error.read())["error"]["message"]
            except (ValueError, KeyError, TypeError):
                said = str(error)
            return {"error": str(said)}


def _tokenize(server: _Server, text: str) -> list[int]:
    found = server.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})
    return [int(number) for number in found["tokens"]]


def _render(server: _Server, chat: Mapping[str, Any]) -> dict[str, Any]:
    found = server.post("/apply-template", chat)
    if "error" in found:
        return {"error": found["error"]}
    said = server.post("/v1/chat/completions", {**chat, "max_tokens": 1, "temperature": 0})
    return {
        "text": found["prompt"],
        "num_tokens": said.get("usage", {}).get("prompt_tokens"),
        "error": said.get("error"),
    }


def _predict(server: _Server, ids: Sequence[int], num_probs: int) -> dict[str, float]:
    """Log-probabilities of the likeliest next tokens.

    Without the cache of an earlier prompt, which gives other logits where a window is shorter than the prompt.
    """
    body = {"prompt": list(ids), "n_predict": 1, "temperature": 0, "n_probs": num_probs, "cache_prompt": False}
    found = server.post("/completion", body)
    if "error" in found:
        raise RuntimeError(f"error: {found['error']}")
    places = found.get("completion_probabilities") or [{"top_logprobs": []}]
    return {str(token["id"]): token["logprob"] for token in places[0]["top_logprobs"]}


def _stops_at(server: _Server, prompt: Sequence[int], token: int) -> bool:
    """Whether a token ends a reply: it is made the likeliest one."""
    body = {
        "prompt": list(prompt),
        "n_predict": 2,
        "temperature": 0,
        "logit_bias": [[token, 1e6]],
        "cache_prompt": False,
    }
    return server.post("/completion", body).get("stop_type") == "eos"


def main(asked: str, answered: str) -> None:
    job = json.loads(Path(asked).read_text(encoding="utf-8"))
    server = _Server(job)
    answers = {
        "ids": [_tokenize(server, text) for text in job["texts"]],
        "rendered": [_render(server, chat) for chat in job["chats"]],
        "next_tokens": [
            [_predict(server, ids[:length], job["num_probs"]) for length in lengths]
            for ids, lengths in zip(job["prompts"], job["lengths"], strict=True)
        ],
        "stopping": [token for token in job["stops"] if _stops_at(server, (job["prompts"] or [[token]])[0], token)],
    }
    Path(answered).write_text(json.dumps(answers), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the library's threads may crash while the interpreter ends


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
