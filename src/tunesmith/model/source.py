"""Resolve model.path: a folder, a RUN, a hub id, new:PRESET or a .pth; explain why it cannot be used."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.adapters.adapter_config import ADAPTER_CONFIG, find_adapter, read_adapter_config
from tunesmith.adapters.base import read_record
from tunesmith.errors import ConfigError, ModelError, RunError, TunesmithError
from tunesmith.files import is_out_of_memory, lacking_memory
from tunesmith.minimind.opened import open_weights
from tunesmith.minimind.read import is_weight_file
from tunesmith.minimind.settings import settings_of
from tunesmith.runfolder import RunFolder, has_stages, latest_stage, moved_in_run, whole_run

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# files that transformers silently ignores, or reports misleadingly, if they are not regular files
_READ_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
_NO_NETWORK = ("couldn't connect", "offline", "name or service", "connection", "timed out", "requested files")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What model.path refers to.

    Attributes:
        kind: "local", "hub" or "preset".
        name: the folder, hub id or preset name; for an adapter, that of its base.
        adapter: the PEFT folder to add to it, if any.
        revision: of the hub base that the adapter was trained on.
        file: the .pth that `name` was made of.
        remark: what was read from it and assumed.
    """

    kind: str
    name: str
    adapter: Path | None = None
    revision: str | None = None
    file: Path | None = None
    remark: str = ""

    @property
    def shown(self) -> str:
        """The name for messages."""
        return str(self.file) if self.file else self.name


def find_model(path: str, given: Mapping[str, Any] | None = None) -> ModelSource:
    """Resolve `path` without loading anything; a .pth is converted to a temporary folder.

    Args:
        given: model.config, for what a .pth does not say.

    Raises:
        ModelError: the folder has no model, or the name matches nothing.
    """
    if path.startswith("new:"):
        return ModelSource("preset", path.removeprefix("new:"))
    folder = latest_stage(open_path(path))
    if folder.is_dir():
        if adapter := find_adapter(folder):
            require_plain_files(adapter)
            return _find_base(adapter)
        if (folder / "config.json").is_file():
            require_plain_files(folder)
            return ModelSource("local", str(folder))
        in_run = RunFolder(folder).model
        if (in_run / "config.json").is_file():
            require_plain_files(in_run)
            return ModelSource("local", str(in_run))
        if os.path.lexists(folder / "config.json"):
            require_plain_files(folder)
        raise explain_folder(folder)
    if is_weight_file(folder) and folder.exists():
        opened = open_weights(folder, given or {})
        return ModelSource("local", str(opened.folder), file=folder.resolve(), remark=opened.describe())
    if folder.is_file():
        raise ModelError(
            f"{path}: is a file; give the folder with config.json and the weights, or a .pth of MiniMind.",
            code="model-is-file",
        )
    if is_weight_file(folder) or not _HUB_ID.fullmatch(path) or (folder.parent != Path() and folder.parent.is_dir()):
        close = []
        if folder.parent.is_dir():
            close = difflib.get_close_matches(folder.name, [p.name for p in folder.parent.iterdir()], n=1)
        hint = f" Did you mean {folder.parent / close[0]}?" if close else ""
        what = "file." if is_weight_file(folder) else "model folder. Hub models are named owner/name."
        raise ModelError(f"{path}: no such {what}{hint}", code="model-not-found")
    return ModelSource("hub", path)


def _find_base(adapter: Path) -> ModelSource:
    config, record = read_adapter_config(adapter), read_record(adapter)
    base = config.base_model_name_or_path
    if not base:
        raise ModelError(
            f"{adapter}: {ADAPTER_CONFIG} has no base_model_name_or_path. Add it: the folder or hub id of the base.",
            code="adapter-without-base",
        )
    if base.startswith("new:"):
        raise ModelError(
            f"{adapter}: its base {base} had random weights, which were not saved. Train on a saved model.",
            code="base-not-saved",
        )
    base = moved_in_run(adapter, base)
    try:
        folder = open_path(base)
        if folder.is_dir() and find_adapter(folder):
            raise ModelError(f"{base} is itself an adapter. Merge it first: tunesmith merge.", code="base-is-adapter")
        source = find_base(base, record)
    except ModelError as error:
        moved = f" If it was moved: tunesmith merge {adapter} --base FOLDER --output MERGED."
        raise ModelError(
            f"{adapter}: its base model cannot be found: {error}{moved if error.code == 'model-not-found' else ''}",
            code=error.code,
        ) from None
    # the main branch of a hub model may change; use the commit that the adapter was trained on
    revision = (record or {}).get("commit") or config.revision
    return replace(source, adapter=adapter, revision=revision if source.kind == "hub" else None)


def find_base(base: str, record: Mapping[str, Any] | None) -> ModelSource:
    """The base of an adapter; a .pth is opened as in the adapter's training, which the record remembers.

    Raises:
        ModelError: no such model, or the .pth is another one than then.
    """
    if not record or not is_weight_file(open_path(base)):
        return find_model(base)
    try:
        return find_model(base, settings_of(record.get("config") or {}))
    except ConfigError as error:
        raise ModelError(
            f"{base}: is not the file that the adapter was trained on: {' '.join(str(error).split())}. Restore it.",
            code="base-changed",
        ) from None


def require_plain_files(folder: Path) -> None:
    """Check that a model folder has regular files only: transformers blocks on a pipe and ignores broken links.

    Raises:
        ModelError: the folder has something that is neither file nor folder, or a file that is read is not a file.
    """
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelError(f"{path}: is a pipe or a device, not a file. Replace it by the file.", code="not-a-file")
        if path.name in _READ_FILES and not path.is_file():
            kind = "a folder, not a file" if path.is_dir() else "a broken link"
            raise ModelError(f"{path}: is {kind}. Replace it by the file.", code="not-a-file")


def open_path(path: str) -> Path:
    """The path, checked to be usable: the name is not too long, and the user after ~ exists."""
    try:
        folder = Path(path).expanduser()
        folder.is_dir()
    except (OSError, RuntimeError) as error:
        shown = path if len(path) <= 60 else f"{path[:60]}..."
        reason = getattr(error, "strerror", None) or error
        raise ModelError(
            f"{shown}: cannot be a model folder: {reason}. Give a folder or a hub id.", code="bad-model-name"
        ) from None
    return folder


def explain_folder(folder: Path) -> ModelError:
    names = sorted(p.name for p in folder.iterdir())
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    run = RunFolder(folder)
    if run.config.is_file():
        checkpoints = sorted(run.checkpoints.glob("step-*")) if run.checkpoints.is_dir() else []
        hint = f" Its newest checkpoint is {checkpoints[-1]}." if checkpoints else ""
        hint += f" To finish it: tunesmith resume {whole_run(folder)}"
        return ModelError(f"{folder}: is an unfinished run without model/.{hint}", code="run-not-finished")
    if has_stages(folder):
        return ModelError(
            f"{folder}: none of its stages has begun. To train them: tunesmith resume {folder}", code="run-not-finished"
        )
    return ModelError(
        f"{folder}: no config.json, so not a Hugging Face model folder (found: {found}). Give the folder with "
        "config.json, model.safetensors and the tokenizer files.",
        code="not-a-model-folder",
    )


def causes_of(error: BaseException) -> list[BaseException]:
    """The error and its causes; transformers wraps the hub's errors."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def telling_text(error: BaseException) -> str:
    """The text of a library's error in one line, at most 300 characters."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError) or " " not in text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= 300 else f"{text[:297]}..."


def explain_load_error(
    name: str, what: str, error: Exception, trust_flag: str = "--model.trust_remote_code true"
) -> TunesmithError:
    """Convert an error of transformers or huggingface_hub: what is wrong and what to do."""
    if is_out_of_memory(error):
        return RunError(
            f"{name}: {what} do not fit into the memory of {lacking_memory(error)}. End other programs or use a "
            "smaller model.",
            code="out-of-memory",
        )
    causes = causes_of(error)
    kinds = {type(cause).__name__ for cause in causes}
    chain = " ".join(str(cause) for cause in causes).lower()
    begin = f"{name}: {what} cannot be loaded:"
    if "GatedRepoError" in kinds:
        return ModelError(
            f"{begin} the model is gated. Accept its licence on its page, then log in with: hf auth login.",
            code="model-gated",
        )
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return ModelError(
            f"{begin} no such hub model, or it is private. Check the name; for a private one: hf auth login.",
            code="hub-model-not-found",
        )
    if "RevisionNotFoundError" in kinds:
        return ModelError(f"{begin} the hub model has no such model.revision.", code="revision-not-found")
    if "trust_remote_code" in chain or "custom code" in chain:
        return ModelError(
            f"{begin} the model needs Python code from its folder. Read that code, and if you trust it: {trust_flag}.",
            code="model-needs-code",
        )
    if any(word in chain for word in _NO_NETWORK):
        return ModelError(
            f"{begin} it is not a local folder, and the hub cannot be reached. Check the spelling and the network, or "
            "give a downloaded folder.",
            code="hub-unreachable",
        )
    if "model_type" in chain:
        return ModelError(
            f"{begin} transformers does not know the architecture in its config.json ({telling_text(error)}).",
            code="unknown-architecture",
        )
    return ModelError(f"{begin} {telling_text(error)}.", code="model-not-loadable")
