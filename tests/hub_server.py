"""A server that answers as the hub does, for the real huggingface_hub client: repositories, LFS, commits, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

LARGE = 50_000  # bytes, from which on a file is stored apart from git
LICENCES = ("apache-2.0", "mit", "gemma", "llama3.2", "other", "cc-by-4.0")
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Repo:
    is_private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def add_commit(self, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        return oid


class HubServer(ThreadingHTTPServer):
    """Attributes:
    accounts: token -> answer of whoami.
    faults: name of a step (whoami, info, create, preupload, batch, put, commit, answer) -> status, "drop" or "hang".
    requests: method and path of each request, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.accounts: dict[str, dict[str, Any]] = {}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, int | str] = {}
        self.damaged: set[str] = set()  # names of files whose stored bytes differ
        self.ignored: set[str] = set()  # names that a .gitignore of the repository leaves out
        self.chunk_bytes = 0  # of a part of a large file; 0: in one piece
        self.requests: list[str] = []
        self.makes_public = False
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add_account(self, token: str, name: str, orgs: tuple[str, ...] = (), role: str = "write") -> None:
        self.accounts[token] = {
            "type": "user", "name": name, "orgs": [{"name": org} for org in orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }  # fmt: skip

    def add_repo(self, name: str, is_private: bool = True, files: dict[str, bytes] | None = None) -> Repo:
        repo = Repo(is_private)
        repo.add_commit({".gitattributes": ATTRIBUTES, **(files or {})}, "initial commit")
        self.repos[name] = repo
        return repo


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(name: str, content: bytes) -> bool:
    return name.endswith(".safetensors") or len(content) > LARGE


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

    def _answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        length = self.headers.get("Content-Length")
        if length is None and self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(int(length or 0))
        split = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in split.path.strip("/").split("/")]
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        self.account = self.server.accounts.get(token)
        if parts == ["api", "whoami-v2"]:
            self._whoami(token)
        elif parts == ["api", "repos", "create"]:
            self._create()
        elif parts == ["api", "validate-yaml"]:
            self._validate()
        elif parts[0] == "storage":
            self._store(parts)
        elif parts[:2] == ["api", "models"]:
            self._models("/".join(parts[2:4]), parts[4:])
        elif "resolve" in parts:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif len(parts) > 1 and parts[1].endswith(".git"):
            self._batch(f"{parts[0]}/{parts[1].removesuffix('.git')}")
        else:
            self._send(404, {"error": "no such page"})

    def _fault(self, step: str) -> bool:
        """Whether a step fails; then it was answered."""
        fault = self.server.faults.get(step)
        if fault is None:
            return False
        if fault == "hang":
            self.server.stopped.wait(30)
        if fault in ("drop", "hang"):
            self.close_connection = True
            self.connection.close()
        else:
            token = self.headers.get("authorization", "")
            self._send(int(fault), {"error": f"the server cannot {step} with {token}"})
        return True

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _whoami(self, token: str) -> None:
        if self._fault("whoami"):
            return
        if self.account is None:
            self._send(401, {"error": f"Invalid username or password: {token}"})
        else:
            self._send(200, self.account)

    def _may_write(self, name: str) -> bool:
        account = self.account or {"name": None, "orgs": []}
        return name.partition("/")[0] in [account["name"], *(one["name"] for one in account["orgs"])]

    def _create(self) -> None:
        if self._fault("create"):
            return
        given = json.loads(self.body)
        name = f"{given.get('organization') or self.account['name']}/{given['name']}"
        if not self._may_write(name):
            self._send(403, {"error": f"You don't have the rights to create a model under the namespace {name}"})
        elif name in self.server.repos:
            self._send(409, {"error": "You already created this model repo"})
        else:
            self.server.add_repo(name, given.get("visibility") == "private" and not self.server.makes_public)
            self._send(200, {"url": f"{self.server.url}/{name}"})

    def _validate(self) -> None:
        front = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
        licence = front.get("license")
        errors = []
        if licence is not None and licence not in LICENCES:
            errors.append({"message": f'"license" must be one of [{", ".join(LICENCES)}]'})
        self._send(400 if errors else 200, {"errors": errors, "warnings": [{"message": "no metrics"}]})

    def _models(self, name: str, rest: list[str]) -> None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.is_private and not self._may_write(name)):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["preupload"]:
            self._preupload(repo)
        elif rest[:1] == ["commit"]:
            self._commit(name, repo)
        elif rest[:1] == ["tree"]:
            self._send(200, [{**one, "type": "file", "path": one["rfilename"], "oid": one["blobId"]}
                             for one in self._siblings(self._at(repo, rest[1]))])  # fmt: skip
        elif not self._fault("info"):
            self._info(name, repo, rest[1] if rest[:1] == ["revision"] else "main")

    def _at(self, repo: Repo, revision: str) -> dict[str, bytes]:
        return repo.files if revision == "main" else repo.commits[revision]

    def _info(self, name: str, repo: Repo, revision: str) -> None:
        if revision != "main" and revision not in repo.commits:
            self._send(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            return
        files = self._at(repo, revision)
        card = files.get("README.md", b"").decode().split("---\n")
        front = yaml.safe_load(card[1]) if len(card) > 2 else None
        sha = repo.head if revision == "main" else revision
        self._send(200, {"id": name, "modelId": name, "private": repo.is_private, "sha": sha, "tags": [],
                         "downloads": 0, "likes": 0, "siblings": self._siblings(files),
                         **({"cardData": front} if front else {})})  # fmt: skip

    def _siblings(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        found = []
        for name, content in files.items():
            content = content[:-1] + bytes([content[-1] ^ 1]) if name in self.server.damaged else content
            one: dict[str, Any] = {"rfilename": name, "size": len(content)}
            one["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if is_large(name, content):
                one["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
                one["lfs"]["sha256"] = one["lfs"]["oid"]
            found.append(one)
        return found

    def _preupload(self, repo: Repo) -> None:
        if self._fault("preupload"):
            return
        answer = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            is_lfs = name.endswith(".safetensors") or file["size"] > LARGE
            stored = repo.files.get(name)
            oid = None
            if stored is not None:
                oid = hashlib.sha256(stored).hexdigest() if is_lfs else hashlib.sha1(
                    b"blob %d\0" % len(stored) + stored).hexdigest()  # fmt: skip
            answer.append({"path": name, "uploadMode": "lfs" if is_lfs else "regular",
                           "shouldIgnore": name in self.server.ignored, "oid": oid})  # fmt: skip
        self._send(200, {"files": answer})

    def _batch(self, name: str) -> None:
        if self._fault("batch"):
            return
        answer = []
        for one in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.server.objects:
                href = f"{self.server.url}/storage/{one['oid']}"
                header = {}
                if self.server.chunk_bytes:
                    count = -(-one["size"] // self.server.chunk_bytes)
                    header = {"chunk_size": str(self.server.chunk_bytes)}
                    header |= {str(n): f"{href}/{n}?X-Amz-Signature=secret-of-{n}" for n in range(1, count + 1)}
                    href += "/done"
                else:
                    href += "?X-Amz-Signature=secret-of-all"
                entry["actions"] = {"upload": {"href": href, "header": header}}
            answer.append(entry)
        self._send(200, {"transfer": "basic", "objects": answer})

    def _store(self, parts: list[str]) -> None:
        if self._fault("put"):
            return
        oid, part = parts[1], parts[2] if len(parts) > 2 else ""
        if part == "done":
            pieces = [self.server.objects.pop(f"{oid}/{one['partNumber']}") for one in json.loads(self.body)["parts"]]
            self.body = b"".join(pieces)
        elif part:
            self.server.objects[f"{oid}/{part}"] = self.body
            self._send(200, b"", {"ETag": f'"{part}"'})
            return
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._send(400, {"error": "another content"})
            return
        self.server.objects[oid] = self.body
        self._send(200, b"")

    def _commit(self, name: str, repo: Repo) -> None:
        if self._fault("commit"):
            return
        lines = [json.loads(line) for line in self.body.decode().splitlines()]
        head = lines[0]["value"]
        if head.get("parentCommit") not in (None, repo.head):
            self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(repo.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.add_commit(files, head["summary"])
        if not self._fault("answer"):
            self._send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.server.repos.get(name)
        files = self._at(repo, revision) if repo and (not repo.is_private or self._may_write(name)) else {}
        if repo is None or file not in files:
            code = "EntryNotFound" if repo else "RepoNotFound"
            self._send(404, {"error": "not found"}, {"X-Error-Code": code})
            return
        content = files[file]
        etag = hashlib.sha256(content).hexdigest()
        commit = repo.head if revision == "main" else revision
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})
