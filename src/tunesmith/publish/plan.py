"""What a push would do, decided and shown before anything is uploaded."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.adapters.adapter_config import ADAPTER_CONFIG
from tunesmith.adapters.base import read_record
from tunesmith.cards.licence import CARD
from tunesmith.display import format_bytes, one_line
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.publish.bundle import Bundle, PublishedFile
from tunesmith.publish.card import (
    Base,
    add_evaluation,
    add_replies,
    choose_licence,
    complete_card,
    find_base,
    join_names,
    read_card,
)
from tunesmith.publish.hub import Hub, Repository
from tunesmith.publish.private import find_paths, plain_config, plain_metrics, run_cwd
from tunesmith.publish.report import plain_report
from tunesmith.report.records import RunRecords

logger = logging.getLogger(__name__)
# files that a model or adapter is read from: one of an earlier push that this push lacks would be mixed with it
_READ = re.compile(
    r"(config|generation_config|adapter_config|base|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)"
    r"\.json|.*\.safetensors|.*\.(safetensors|bin)\.index\.json|(pytorch|adapter)_model[\w-]*\.bin|merges\.txt"
    r"|vocab\.txt|tokenizer\.model|chat_template\.jinja"
)
_CANNOT_LOOK = ("hub-not-logged-in", "hub-unreachable", "hub-failed", "hub-busy", "hub-token")


@dataclass(frozen=True, slots=True)
class PushSettings:
    """What to push and where.

    Attributes:
        name: a RUN, a model or an adapter on this machine.
        repository: owner/name.
        licence: its id on the hub.
        base: hub id of the base.
        include: of a run, more to publish: config, metrics, report, replies.
        replaces: whether files of the repository may change.
        confirmed: whether to push without asking.
    """

    name: str
    repository: str
    is_public: bool = False
    licence: str | None = None
    base: str | None = None
    include: Sequence[str] = ()
    replaces: bool = False
    confirmed: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Push:
    """What a push uploads, or has uploaded.

    Attributes:
        repository: owner/name.
        is_private: its visibility.
        files: name -> size in bytes.
        status: name -> new, changed, equal or removed, as far as the repository could be read.
        card: text of README.md.
        commit: of the hub; None where nothing was pushed.
        url: of the repository.
        remarks: what a person should know before pushing.
    """

    repository: str
    is_private: bool
    files: Mapping[str, int]
    status: Mapping[str, str]
    card: str = field(repr=False)
    url: str
    remarks: Sequence[str] = ()
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Attributes:
    found: the repository as it is; None where it does not exist, or could not be read.
    is_known: whether it could be read.
    lines: for the terminal.
    """

    files: Sequence[PublishedFile]
    push: Push
    found: Repository | None
    is_known: bool
    lines: Sequence[tuple[str, str]]

    @property
    def uploaded(self) -> list[PublishedFile]:
        return [file for file in self.files if self.push.status[file.name] != "equal"]

    @property
    def removed(self) -> list[str]:
        return [name for name, status in self.push.status.items() if status == "removed"]

    @property
    def replaced(self) -> list[str]:
        return [name for name, status in self.push.status.items() if status in ("changed", "removed")]


@dataclass(frozen=True, slots=True)
class HubState:
    """Attributes:
    found: the repository; None where it does not exist, or could not be read.
    problem: why it could not be read; "" where it was.
    account: who is logged in.
    """

    found: Repository | None
    problem: str = ""
    account: str = ""


def make_plan(
    settings: PushSettings, hub: Hub, state: HubState, bundle: Bundle, run: RunRecords | None, base: Base, proof: str
) -> Plan:
    """All that is decided before anything is uploaded.

    Args:
        proof: what opening the folder has shown.

    Raises:
        TunesmithError: it cannot be pushed there.
    """
    found = state.found
    of_hub = {} if state.problem else _look_at_base(hub, bundle, base)
    licence, source = choose_licence(read_card(bundle), base, settings.licence, of_hub)
    card = complete_card(bundle, run, settings.repository, base, licence, source)
    card, remark = add_evaluation(card, bundle, run)
    remarks = [remark] if remark else []
    if "replies" in settings.include and run is not None:
        card, remark = add_replies(card, run)
        remarks.append(f"published with {remark}, which quote the data")
    if not state.problem:
        hub.check_card(card)
    files = [PublishedFile(CARD, content=card.encode()), *_files(settings, bundle, run, base)]
    remarks += _find_remarks(files)
    status = _compare(files, found)
    push = Push(
        settings.repository, not settings.is_public, {file.name: file.size for file in files}, status, card,
        f"{hub.address}/{settings.repository}", remarks,
    )  # fmt: skip
    stated = f"{licence.shown} ({source})" if licence else "unknown; state it with --license ID"
    lines = [
        ("from", f"{bundle.folder}: {'an adapter' if bundle.is_adapter else 'a model'}, {proof}"),
        ("repository", f"{push.url}{_describe(state)}"),
        ("visibility", "private" if push.is_private else "public: everybody can read and download it"),
        *([("account", state.account)] if state.account else []),
        *([("base", base.shown)] if base.shown else []),
        ("licence", stated),
        *_file_lines(push, found),
        *([("left out", join_names(bundle.left_out))] if bundle.left_out else []),
        *(("note", remark) for remark in remarks),
    ]
    return Plan(files, push, found, not state.problem, lines)


def ask_hub(hub: Hub, settings: PushSettings) -> HubState:
    """The repository and who asks. Only a dry run goes on without them.

    Raises:
        TunesmithError: it cannot be pushed there.
    """
    try:
        account = hub.who()
        found = hub.look()
    except TunesmithError as error:
        if settings.confirmed or error.code not in _CANNOT_LOOK:
            raise
        return HubState(None, str(error).removeprefix(f"{settings.repository}: "))
    if found is not None and found.is_private and settings.is_public:
        raise ModelError(
            f"{settings.repository}: is private, with all its earlier commits. Make it public yourself (hf repos "
            f"settings {settings.repository} --public), then push again; or push to another name.",
            code="repository-private",
        )
    if found is not None and not found.is_private and not settings.is_public:
        raise ModelError(
            f"{settings.repository}: is public, so that everybody could read what is pushed. Add --public if that is "
            "meant, or push to another name.",
            code="repository-public",
        )
    return HubState(found, account=account)


def _describe(state: HubState) -> str:
    found = state.found
    if state.problem:
        return f" (not looked at: {state.problem})"
    if found is None:
        return " (will be created)"
    return f" (exists, {count_files(len(found.files))})"


def choose_base(bundle: Bundle, run: RunRecords | None, settings: PushSettings) -> Base:
    """The base, which for an adapter must be on the hub.

    Raises:
        ModelError: others could not open the adapter, since its base is only on this machine.
    """
    base = find_base(bundle, run, settings.base)
    if not bundle.is_adapter:
        return base
    if base.name.startswith("new:"):
        raise ModelError(
            f"{bundle.folder}: its base {base.name} had random weights, which were not saved. Train on a saved model.",
            code="base-not-saved",
        )
    if not base.hub:
        raise ModelError(
            f"{bundle.folder}: its base is {base.name or 'not named'}, on this machine only, so that nobody else could "
            "open the adapter. If the base is on the hub, name it: --base owner/name. Else push the base first, or "
            f"merge and push the whole model: tunesmith merge {settings.name} --output DIR.",
            code="base-not-on-hub",
        )
    return base


def _look_at_base(hub: Hub, bundle: Bundle, base: Base) -> Mapping[str, Any]:
    """Metadata of the base's card, once its weights have been compared with those that the adapter was trained on.

    Raises:
        ModelError: there is no such model on the hub, or it is another one.
    """
    if not base.hub:
        return {}
    if bundle.is_adapter:
        record = read_record(bundle.folder) or {}
        found = hub.look(record.get("commit") or base.revision, base.hub)
        if found is None:
            raise ModelError(
                f"{base.hub}: there is no such model on {hub.address}, or it is not yours. Push the base first, or "
                "give its name: --base owner/name.",
                code="base-not-on-hub",
            )
        wanted = {name: entry["sha256"] for name, entry in record.get("files", {}).items() if not name.endswith(".py")}
        other = [name for name, sha in wanted.items() if name not in found.files or found.files[name].sha256 != sha]
        if other:
            raise ModelError(
                f"{base.hub}: is not the base that the adapter was trained on: {', '.join(other[:3])} differ"
                f"{'s' if len(other) == 1 else ''}. Push that base, and give its name with --base.",
                code="base-differs",
            )
    try:
        return hub.licence_of(base.hub)
    except TunesmithError:  # it only tells the licence, and may not be public
        return {}


def _files(settings: PushSettings, bundle: Bundle, run: RunRecords | None, base: Base) -> Iterator[PublishedFile]:
    for file in bundle.files:
        if file.name == ADAPTER_CONFIG and file.path is not None:
            content = json.loads(file.path.read_text(encoding="utf-8"))
            if content.get("base_model_name_or_path") != base.hub:
                content["base_model_name_or_path"] = base.hub
                yield replace(file, content=(json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
                continue
        yield file
    if run is None:
        return
    if "config" in settings.include:
        yield PublishedFile("config.yaml", content=plain_config(run.folder, run_cwd(run.run)))
    if "metrics" in settings.include:
        yield PublishedFile("metrics.jsonl", content=b"".join(plain_metrics(run.folder, run_cwd(run.run))))
    if "report" in settings.include:
        yield PublishedFile("report.html", content=plain_report(run, "replies" in settings.include))


def _find_remarks(files: Sequence[PublishedFile]) -> Iterator[str]:
    """Links to other folders, and texts that name folders of this machine. Of a tokenizer they are words."""
    for file in files:
        if file.path is not None and file.path.is_symlink() and _leaves(file.path):
            yield f"{file.name} is a link to {file.path.resolve()}"
        if file.name.endswith((".safetensors", ".index.json", ".model", ".txt")) or file.name in (
            "tokenizer.json",
            "vocab.json",
        ):
            continue
        content = file.content
        if content is None and file.path is not None:
            content = file.path.read_bytes()
        if found := find_paths((content or b"").decode("utf-8", errors="replace")):
            yield f"{file.name} names a place on this machine: {', '.join(found)}"


def _leaves(link: Path) -> bool:
    """Whether a link leads to another folder; in the hub's cache all files do."""
    target = link.resolve()
    return not target.is_relative_to(link.parent.resolve()) and target.parent.name != "blobs"


def _compare(files: Sequence[PublishedFile], found: Repository | None) -> dict[str, str]:
    """Name -> new, changed, equal; and removed for files of another model that would be read with these."""
    there = found.files if found else {}
    status = {
        file.name: "new" if file.name not in there else "equal" if there[file.name].equals(file) else "changed"
        for file in files
    }
    return status | {name: "removed" for name in there if name not in status and _READ.fullmatch(name)}


def _file_lines(push: Push, found: Repository | None) -> Iterator[tuple[str, str]]:
    width = max(len(name) for name in push.status)
    for index, (name, status) in enumerate(push.status.items()):
        size = _size(push.files[name]) if name in push.files else ""
        shown = status if found is not None else ""
        yield ("files" if index == 0 else "", f"{name:<{width}}  {size:>9}  {shown}".rstrip())
    total = sum(push.files.values())
    yield "", f"{count_files(len(push.files))}, {_size(total)}"
    kept = [name for name in (found.files if found else ()) if name not in push.status]
    if kept:
        yield "kept there", join_names(kept)


def count_files(number: int) -> str:
    return f"{number} file{'s' if number != 1 else ''}"


def _size(number: int) -> str:
    return f"{number} B" if number < 1024 else format_bytes(number)


def show_plan(plan: Plan, with_card: bool) -> None:
    if with_card:
        rule = "-" * min(79, shutil.get_terminal_size().columns)
        logger.info(f"{CARD}\n{rule}\n{plan.push.card.rstrip()}\n{rule}")
    for name, text in plan.lines:
        logger.info(one_line(f"{name:<10} {text}".rstrip()))
