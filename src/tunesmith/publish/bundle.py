"""The files of a model or adapter that are published: named one by one, opened and checked before they leave."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.adapters.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_adapter
from tunesmith.adapters.base import BASE_RECORD, weight_files
from tunesmith.cards.licence import CARD
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.minimind.read import is_weight_file
from tunesmith.model.source import explain_folder, open_path, require_plain_files
from tunesmith.publish.private import without_own_path
from tunesmith.reading import read_text
from tunesmith.runfolder import RunFolder, latest_stage

INDEX = "model.safetensors.index.json"
_CONFIGS = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
_MODULE = re.compile(r"(\w+)\.\w+")  # of a config's auto_map, in the model's own folder
_BESIDE = re.compile(r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import\b", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file of the repository.

    Attributes:
        content: where it is not the file on this machine, byte for byte.
    """

    name: str
    path: Path | None = None
    content: bytes | None = None

    @property
    def size(self) -> int:
        if self.content is not None:
            return len(self.content)
        assert self.path is not None
        return self.path.stat().st_size


@dataclass(frozen=True, slots=True)
class Bundle:
    """Attributes:
    folder: of the model or adapter.
    run: the RUN that trained it, where it is one's model/ or adapter/.
    is_adapter: what it holds.
    files: without the card.
    left_out: names of other files in the folder.
    """

    folder: Path
    run: RunFolder | None
    is_adapter: bool
    files: tuple[PublishedFile, ...]
    left_out: tuple[str, ...]


def find_bundle(name: str) -> Bundle:
    """Resolve what is given to the files that will be published; nothing is loaded.

    Raises:
        TunesmithError: it is not a finished model or adapter on this machine, or a file is missing.
    """
    folder, is_adapter = _find_folder(name)
    require_plain_files(folder)
    files = tuple(_adapter_files(folder) if is_adapter else _model_files(folder))
    taken = {file.name for file in files} | {CARD}
    left_out = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in taken)
    above = RunFolder(folder.resolve().parent)
    run = above if folder.resolve().name in ("model", "adapter") and above.config.is_file() else None
    return Bundle(folder, run, is_adapter, files, tuple(left_out))


def _find_folder(name: str) -> tuple[Path, bool]:
    path = latest_stage(open_path(name))
    if path.is_dir():
        if adapter := find_adapter(path):
            return adapter, True
        for folder in (path, RunFolder(path).model):
            if (folder / "config.json").is_file():
                return folder, False
        raise explain_folder(path)
    if is_weight_file(path) and path.exists():
        raise ModelError(
            f"{name}: is a .pth. Make a Hugging Face folder of it, and push that: tunesmith export {name} --format hf "
            "--output DIR.",
            code="not-a-model-folder",
        )
    what = "is a file" if path.exists() else "no such folder"
    raise ModelError(
        f"{name}: {what}. Give the folder of a RUN, a model or an adapter on this machine.", code="model-not-found"
    )


def _adapter_files(folder: Path) -> Iterator[PublishedFile]:
    yield from _named(folder, (ADAPTER_CONFIG, ADAPTER_WEIGHTS), must=True)
    yield from _named(folder, (BASE_RECORD, "generation_config.json", *_TOKENIZER))


def _model_files(folder: Path) -> Iterator[PublishedFile]:
    weights = weight_files(folder)
    if not weights or not all(path.suffix == ".safetensors" for path in weights):
        what = "has no weights" if not weights else f"has its weights in {weights[0].name}, whose format can hold code"
        raise ModelError(
            f"{folder}: {what}. push takes .safetensors; save_pretrained of transformers writes them.",
            code="no-safetensors",
        )
    yield from _named(folder, ("config.json",), must=True)
    yield from _named(folder, ("generation_config.json",))
    index = INDEX if (folder / INDEX).is_file() and weights[0].name != "model.safetensors" else None
    yield from _named(folder, (*([index] if index else []), *(path.name for path in weights)), must=True)
    yield from _named(folder, (*_TOKENIZER, *_modules(folder)))


def _modules(folder: Path) -> list[str]:
    """Python files in the folder that the configs name, and those that these import from beside them."""
    waiting = [name for config in ("config.json", "tokenizer_config.json") for name in _mapped(folder / config)]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in found or not (folder / name).is_file():
            continue
        found.add(name)
        waiting += [f"{module}.py" for module in _BESIDE.findall(read_text(folder / name, errors="replace"))]
    return sorted(found)


def _mapped(path: Path) -> list[str]:
    """Files of the classes in a config's auto_map."""
    mapped = _read_json(path).get("auto_map") if path.is_file() else None
    named = mapped.values() if isinstance(mapped, Mapping) else ()
    values = [one for value in named for one in (value if isinstance(value, list) else [value])]
    matches = [_MODULE.fullmatch(value) for value in values if isinstance(value, str)]
    return [f"{match[1]}.py" for match in matches if match]


def _named(folder: Path, names: tuple[str, ...], must: bool = False) -> Iterator[PublishedFile]:
    for name in names:
        path = folder / name
        if path.is_file():
            changed = (
                without_own_path(_read_json(path)) if name in _CONFIGS or name == "tokenizer_config.json" else None
            )
            content = None if changed is None else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
            yield PublishedFile(name, path, content)
        elif must:
            raise ModelError(f"{path}: is missing. Copy or save the folder again.", code="model-file-missing")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: cannot be read. Copy or save the folder again.", code="model-config-unreadable")
    return content


def require_run_finished(bundle: Bundle, name: str) -> None:
    """Raises:
    TunesmithError: the run goes on, so that its model/ is not the one that the card would describe.
    """
    if bundle.run is None:
        return
    from tunesmith.report.records import read_run
    from tunesmith.report.write import is_of_last_step

    run = read_run(bundle.run.path)
    if run.records and not is_of_last_step(run):
        raise TunesmithError(
            f"{name}: is being trained longer: its {bundle.folder.name}/ is of step "
            f"{run.run.get('finished_at_step'):,}, its metrics go to step {run.last_step:,}. Finish it first: "
            f"tunesmith resume {bundle.run.path}",
            code="run-not-finished",
        )
