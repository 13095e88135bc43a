"""The hub as push needs it: who is logged in, what a repository holds, one commit. Errors are ours, without secrets."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith import __version__
from tunesmith.cards.licence import split_front
from tunesmith.display import one_line
from tunesmith.errors import ModelError, RunError, TunesmithError, UsageError
from tunesmith.files import sha256_file, system_error
from tunesmith.model.source import causes_of
from tunesmith.publish.bundle import PublishedFile

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_LOG_IN = "Log in with: hf auth login (or set HF_TOKEN). The token needs write access."
_AGAIN = "A push is one commit, so the repository has all of it or nothing; the same command tries again."
_UNREACHED = (
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH,
    errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN,
)  # fmt: skip
_CONNECTION = ("ConnectError", "NetworkError", "TimeoutException", "TransportError", "OfflineModeIsEnabled")


def require_name(name: str) -> str:
    """Check that a repository's name is one of the hub.

    Raises:
        UsageError: it is not.
    """
    owner, slash, rest = name.partition("/")
    problem = ""
    if not slash or not owner or not rest:
        problem = "is not owner/name: your user name or organisation, a slash, and the name of the repository"
    elif "/" in rest or "://" in name:
        problem = "has more than owner/name"
    elif not _NAME.fullmatch(owner) or not _NAME.fullmatch(rest) or "--" in name or ".." in name:
        problem = "may have letters, digits, '-', '_' and '.' only, none of '-' and '.' at an end or twice in a row"
    elif rest.endswith(".git"):
        problem = "ends with .git, which the hub does not allow"
    if problem:
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        raise UsageError(f"{shown}: {problem}.", code="repository-name")
    return name


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a repository.

    Attributes:
        sha256: of a large file; None for one in git.
        blob: git's SHA-1.
    """

    size: int | None
    sha256: str | None
    blob: str | None

    def equals(self, file: PublishedFile) -> bool:
        """Whether it has the content of a file on this machine."""
        if self.size is not None and self.size != file.size:
            return False
        if self.sha256 is not None:
            return self.sha256 == _sha256(file)
        return self.blob is not None and self.blob == _git_sha1(file)


def _sha256(file: PublishedFile) -> str:
    if file.content is not None:
        return hashlib.sha256(file.content).hexdigest()
    assert file.path is not None
    return sha256_file(file.path)


def _git_sha1(file: PublishedFile) -> str:
    if file.content is None:
        assert file.path is not None
    content = file.content if file.content is not None else file.path.read_bytes()  # type: ignore[union-attr]
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Repository:
    """What the hub holds under a name.

    Attributes:
        commit: the newest of its main branch.
    """

    is_private: bool
    commit: str | None
    files: Mapping[str, StoredFile] = field(default_factory=dict)


class Hub:
    """The hub of HF_ENDPOINT, with the token of huggingface_hub's own places.

    Attributes:
        address: of the hub.
    """

    def __init__(self, repository: str) -> None:
        from huggingface_hub import HfApi

        self.repository = repository
        self._api: Any = HfApi(library_name="tunesmith", library_version=__version__)
        self.address = re.sub(r"(?<=//)[^/@]*@", "", str(self._api.endpoint))  # without a password

    def who(self) -> str:
        """The user's name, checked to be able to write to the repository's owner.

        Raises:
            TunesmithError: nobody is logged in, or not as somebody who may.
        """
        account = _dict(self._ask(self._api.whoami))
        owner = self.repository.partition("/")[0]
        orgs = account.get("orgs")
        every = [account, *map(_dict, orgs if isinstance(orgs, list) else ())]
        names = [self._shown(name) for one in every if isinstance(name := one.get("name"), str) and name]
        user = names[0] if isinstance(account.get("name"), str) and names else ""
        if not user:
            raise RunError(
                f"{self.repository}: {self.address} does not say who is logged in. Check HF_ENDPOINT.",
                code="hub-answer",
            )
        if _dict(_dict(account.get("auth")).get("accessToken")).get("role") == "read":
            raise ModelError(
                f"{self.repository}: your token ({user}) can only read. Make one that can write on "
                f"{self.address}/settings/tokens, and log in with it: hf auth login.",
                code="hub-token-reads-only",
            )
        if owner.casefold() not in [name.casefold() for name in names]:
            others = f" or {', '.join(names[1:6])}" if names[1:] else ""
            raise ModelError(
                f"{self.repository}: you are logged in as {user}, and {owner} is neither that nor an organisation of "
                f"yours. Give {user}/{self.repository.partition('/')[2]}{others and others + '/...'}, or log in as a "
                f"member of {owner}: hf auth login.",
                code="hub-owner",
            )
        return user

    def look(self, commit: str | None = None, name: str | None = None) -> Repository | None:
        """What a repository holds; None where it does not exist, or not for this user.

        Args:
            commit: default: the newest.
            name: another repository.
        """
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        asked = name or self.repository

        def ask() -> tuple[str, Repository] | None:
            try:
                info = self._api.model_info(asked, revision=commit, files_metadata=True)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None
            files = {
                str(one.rfilename): StoredFile(one.size, one.lfs.sha256 if one.lfs else None, one.blob_id)
                for one in info.siblings or ()
            }
            return str(info.id), Repository(bool(info.private), info.sha, files)

        answer = self._ask(ask, asked)
        if answer is None:
            return None
        is_named, found = answer
        if name is None and is_named.casefold() != asked.casefold():
            raise ModelError(
                f"{asked}: is named {self._shown(is_named)} by now. Give that name.", code="repository-renamed"
            )
        return found  # type: ignore[no-any-return]

    def licence_of(self, name: str) -> Mapping[str, Any]:
        """Metadata of the card of another model; empty where there is none."""
        card = self._ask(lambda: self._api.model_info(name).card_data, name)
        return dict(card.to_dict()) if card else {}

    def check_card(self, card: str) -> None:
        """Ask the hub whether it takes the metadata of a card. Only these are sent: a dry run uploads nothing.

        Raises:
            ModelError: it does not.
        """
        check = getattr(self._api, "_validate_yaml", None)  # a commit asks the same, once the repository is there
        if check is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._ask(lambda: check(card.removesuffix(split_front(card)[1]), repo_type="model"))

    def create(self, is_private: bool) -> None:
        self._ask(lambda: self._api.create_repo(self.repository, private=is_private, exist_ok=False))

    def commit(self, files: Sequence[PublishedFile], removed: Sequence[str], parent: str | None, message: str) -> str:
        """Upload files and make one commit of them; returns its id. Until then the repository is as it was.

        Args:
            removed: files of the repository that the commit deletes.
            parent: the commit that the repository must still be at.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def ask() -> Any:
            added = [
                CommitOperationAdd(file.name, file.content if file.content is not None else str(file.path))
                for file in files
            ]
            deleted = [CommitOperationDelete(name) for name in removed]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the hub about the card's metadata
                return self._api.create_commit(
                    self.repository, operations=[*added, *deleted], commit_message=message, parent_commit=parent
                )

        return str(self._ask(ask).oid)

    def _ask(self, call: Callable[[], Any], name: str = "") -> Any:
        """The answer, or our error. It has no context: the one of the library may hold the token or a signed address,
        which a traceback would show."""
        try:
            return call()
        except Exception as error:
            explained = explain(error, name or self.repository, self.address)
        raise type(explained)(self._shown(str(explained)), code=explained.code)

    def _shown(self, text: str) -> str:
        """A text with something of the server's in it, in one line and without the token."""
        from huggingface_hub import get_token

        token = get_token()
        return one_line(text.replace(token, "***") if token and len(token) > 3 else text)


def _dict(value: Any) -> Mapping[str, Any]:
    """The part of an answer, where it has the expected form."""
    return value if isinstance(value, dict) else {}


def explain(error: Exception, repository: str, address: str) -> TunesmithError:
    """An error of huggingface_hub in our words. Its text may hold a signed address, so that only what the server says
    is quoted."""
    causes = causes_of(error)
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    response = next((found for cause in causes if (found := getattr(cause, "response", None)) is not None), None)
    if isinstance(error, ValueError) and "README.md" in str(error):
        reason = " ".join(str(error).split())[:500]
        return ModelError(
            f"{repository}: the hub refuses the card: {reason}. Correct --license, or README.md in the folder.",
            code="hub-card",
        )
    if "GatedRepoError" in kinds:
        return ModelError(
            f"{repository}: is gated. Accept its terms on its page ({address}/{repository}).", code="model-gated"
        )
    if "UnicodeEncodeError" in kinds:
        return ModelError(f"{repository}: your token has characters that no token has. {_LOG_IN}", code="hub-token")
    if "LocalTokenNotFoundError" in kinds:
        return ModelError(f"{repository}: you are not logged in to {address}. {_LOG_IN}", code="hub-not-logged-in")
    if response is not None:
        return _explain_status(int(response.status_code), _said(causes, response), repository, address)
    refused = next((found for cause in causes if (found := system_error(cause)) is not None), None)
    is_unreached = refused is not None and (refused.errno in _UNREACHED or "gaierror" in kinds)
    if is_unreached or kinds & set(_CONNECTION) or "hf_xet" in {type(cause).__module__ for cause in causes}:
        return RunError(
            f"{repository}: {address} cannot be reached, or the connection was lost. Check the network, HF_ENDPOINT "
            f"and HF_HUB_OFFLINE. {_AGAIN}",
            code="hub-unreachable",
        )
    if refused is not None and refused.errno is not None and refused.filename:
        return RunError(f"{refused.filename}: cannot be read: {refused.strerror}.", code="file-unreadable")
    return RunError(
        f"{repository}: the hub answered in a way that huggingface_hub does not understand "
        f"({type(causes[-1]).__name__}). Check HF_ENDPOINT ({address}); update huggingface_hub.",
        code="hub-answer",
    )


def _explain_status(status: int, said: str, repository: str, address: str) -> TunesmithError:
    says = f" It says: {said}" if said else ""
    if status == 401:
        return ModelError(f"{repository}: {address} does not accept your token.{says} {_LOG_IN}", code="hub-token")
    if status in (402, 403):
        return ModelError(
            f"{repository}: your account may not do that.{says} Check your role in the organisation, the scopes of "
            f"your token ({address}/settings/tokens) and your storage.",
            code="hub-no-permission",
        )
    if status == 404:
        return ModelError(
            f"{repository}: no such repository or owner, or it is not yours.{says}", code="hub-repository-not-found"
        )
    if status in (409, 412):
        return ModelError(
            f"{repository}: it was changed meanwhile by somebody else, and is as they left it.{says} Run the command "
            "again to see what it holds.",
            code="repository-changed",
        )
    if status == 429:
        return RunError(f"{repository}: too many requests to {address}.{says} Try again later.", code="hub-busy")
    if status >= 500:
        return RunError(
            f"{repository}: {address} failed (status {status}).{says} {_AGAIN}",
            code="hub-failed",
        )
    return ModelError(f"{repository}: {address} refused it (status {status}).{says}", code="hub-refused")


def _said(causes: Sequence[BaseException], response: Any) -> str:
    """What the server said, in one line, without the token."""
    said = next((text for cause in causes if (text := getattr(cause, "server_message", None))), "")
    said = said or response.headers.get("X-Error-Message") or _body(response)
    said = " ".join(str(said).split())
    sent = str(response.request.headers.get("authorization", "")).removeprefix("Bearer ").strip()
    if len(sent) > 3:
        said = said.replace(sent, "***")
    return said if len(said) <= 300 else f"{said[:300]}..."


def _body(response: Any) -> str:
    try:
        content = json.loads(response.text)
    except Exception:  # not read, or no JSON
        return ""
    found = content.get("error") if isinstance(content, dict) else None
    return found if isinstance(found, str) else ""
