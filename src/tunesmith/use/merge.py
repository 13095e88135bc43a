"""`tunesmith merge`: merge adapters into their base, file by file, and verify the result before it appears."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tunesmith.adapters.adapter import find_embedding_names
from tunesmith.adapters.adapter_config import find_adapter, read_adapter_config
from tunesmith.adapters.base import hub_folder, read_record, require_base, weight_files
from tunesmith.adapters.deltas import Delta
from tunesmith.adapters.open_adapter import SEVERAL_STORED, merge_adapter, open_adapter, read_adapter_weights
from tunesmith.adapters.stored_base import split_weights
from tunesmith.cards.licence import CARD
from tunesmith.cards.merged import merged_card
from tunesmith.display import format_bytes
from tunesmith.errors import ModelError, RunError, TunesmithError
from tunesmith.files import atomic_directory, is_no_room
from tunesmith.model.reopen import require_same_tokenizer
from tunesmith.model.source import (
    ModelSource,
    explain_load_error,
    find_base,
    find_model,
    open_path,
    require_plain_files,
    telling_text,
)
from tunesmith.older_keys import add_older_keys
from tunesmith.staging import locked, remove_abandoned
from tunesmith.use.combine import MergePlan, deltas_of, read_weights
from tunesmith.use.merge_output import is_ours, resolve_target
from tunesmith.use.proof import prove

logger = logging.getLogger(__name__)
_INDEX = "model.safetensors.index.json"
_SETTINGS = ("generation_config.json",)
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "sentencepiece.bpe.model", "bpe.codes", "tekken.json",
)  # fmt: skip
_ON_CHANGED = "If it has moved: --base FOLDER. To merge into the changed base: --allow-changed-base."


def run_merge(
    names: Sequence[str],
    output: str,
    method: str = "sequential",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    seed: int = 0,
    base: str | None = None,
    allow_changed_base: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Merge, verify, save.

    Args:
        allow_changed_base: merge even if the base has changed since the adapters were trained.

    Raises:
        ModelError: the adapters or the base cannot be used.
        RunError: verification failed, or the disk is full; no files are left.
    """
    folder = resolve_target(output)
    adapters = tuple(_find_adapter(name) for name in names)
    weights = read_weights(len(adapters), method, weights, density, seed)
    source = _find_base(adapters, base)
    folder_of_base = _fetch_base(source, adapters, trust_remote_code)
    plan = MergePlan(folder_of_base, adapters, method, weights, density, seed, trust_remote_code)
    _require_alone(adapters)
    remarks = [require_base(a, plan.base, allow_changed_base, _ON_CHANGED, True, source.shown) for a in adapters]
    require_room(plan.base, folder)
    try:
        with atomic_directory(folder) as partial, locked(partial), deltas_of(plan) as (deltas, combined):
            remove_abandoned(partial.parent, folder.name)
            changed = merge_files(plan, deltas, partial)
            if tokenizer := _copy_rest(plan, partial):
                require_same_tokenizer(tokenizer, partial, trust_remote_code)
            is_chat = any(partial.glob("chat_template.*"))
            card = merged_card(folder.name, source, adapters, plan.weights, method, is_chat)
            (partial / CARD).write_text(card, encoding="utf-8")
            said = prove(plan, combined, partial)
    except TunesmithError:
        raise
    except Exception as error:  # e.g. a truncated file of the base, its Python code, an unreadable tokenizer
        raise _explain(error, plan, output, folder) from None
    for remark in filter(None, remarks):
        logger.info(f"note: {remark}")
    _tell(plan, source.shown if source.file else str(plan.base), changed, said, output)
    return folder


def _explain(error: Exception, plan: MergePlan, output: str, folder: Path) -> TunesmithError:
    """The error of a failed merge, whose files have been removed."""
    if is_no_room(error):
        return RunError(f"{output}: no space left on the disk. No files were written.", code="disk-full")
    if isinstance(error, OSError) and is_ours(error.filename, folder):
        return RunError(
            f"{output}: cannot be written: {error.strerror}. No files were written.", code="output-not-writable"
        )
    return ModelError(
        f"{plan.base}: the merge failed: {telling_text(error)}. No files were written.", code="merge-failed"
    )


def _tell(plan: MergePlan, base: str, changed: int, said: str, output: str) -> None:
    how = f", {plan.method}" if len(plan.adapters) > 1 else ""
    logger.info(f"base       {base}")
    for adapter, weight in zip(plan.adapters, plan.weights, strict=True):
        logger.info(f"adapter    {adapter}" + (f", weight {weight:g}" if len(plan.adapters) > 1 else ""))
    logger.info(f"merged     {changed:,} tensors changed, each read back and compared{how}")
    logger.info(f"proof      {said}")
    logger.info(f"model saved: {output}\ntalk to it: tunesmith chat {output}")


def _require_alone(adapters: Sequence[Path]) -> None:
    """Refuse adapters that contain an embedding or head, which would undo the other adapters' changes to them."""
    for adapter in adapters if len(adapters) > 1 else ():
        if split_weights(read_adapter_config(adapter), read_adapter_weights(adapter)).stored:
            raise ModelError(f"{adapter}: {SEVERAL_STORED}", code="several-stored-weights")


def _find_adapter(name: str) -> Path:
    path = open_path(name)
    folder = find_adapter(path) if path.is_dir() else None
    if folder is None:
        raise ModelError(
            f"{name}: is not an adapter (a PEFT folder with adapter_config.json, or a RUN with adapter/).",
            code="not-an-adapter",
        )
    return folder


def _find_base(adapters: Sequence[Path], base: str | None) -> ModelSource:
    named = {str(read_adapter_config(adapter).base_model_name_or_path) for adapter in adapters}
    if base is None and len(named) > 1:
        raise ModelError(
            f"the adapters have different bases ({', '.join(sorted(named))}); if these are copies of one model, give "
            "it: --base FOLDER",
            code="different-bases",
        )
    if base is not None:
        source = find_base(base, read_record(adapters[0]))
        if source.adapter or source.kind == "preset":
            raise ModelError(
                f"{base}: is not a base model. Give --base a model folder or a hub id.", code="not-a-base-model"
            )
        return source
    sources = []
    for adapter in adapters:
        read_record(adapter)  # raises an error for a damaged adapter folder, which --base cannot repair
        require_plain_files(adapter)
        try:
            sources.append(find_model(str(adapter)))
        except ModelError as error:
            has_none = str(read_adapter_config(adapter).base_model_name_or_path).startswith("new:")
            message = str(error) if has_none else f"{error}Give it with --base FOLDER."
            raise ModelError(message, code=error.code) from None
    return sources[0]


def _fetch_base(source: ModelSource, adapters: Sequence[Path], trust_remote_code: bool) -> Path:
    """Folder of the base's files, downloaded from the hub if it is not local."""
    folder = Path(source.name)
    if source.kind == "hub":
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", *(["*.py"] if trust_remote_code else [])]
        revision = source.revision or read_adapter_config(adapters[0]).revision
        there = hub_folder(source.name, revision)
        if there is not None and any(path.suffix == ".bin" for path in weight_files(there)):  # as in training
            wanted += ["pytorch_model*.bin"]
        try:
            folder = Path(snapshot_download(source.name, revision=revision, allow_patterns=wanted))
        except Exception as error:
            raise explain_load_error(source.name, "the base", error) from None
    if "quantization_config" in describe_base_config(folder, trust_remote_code):
        raise ModelError(
            f"{folder}: is quantized; merging into rounded weights would change the model. Give the original in full "
            "precision: --base FOLDER",
            code="base-quantised",
        )
    return folder


def describe_base_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """config.json, after transformers has accepted it.

    Raises:
        ModelError: it cannot be read, or needs code that is not trusted.
    """
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise explain_load_error(str(folder), "its config", error, "--trust-remote-code") from None
    return config


def require_room(base: Path, output: Path) -> None:
    needed = sum(path.stat().st_size for path in _weights_of(base))
    parent = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise RunError(
            f"{output}: the merged model needs {format_bytes(needed)}; {format_bytes(free)} are free.",
            code="disk-too-small",
        )


def _weights_of(base: Path) -> list[Path]:
    files = weight_files(base)
    if not files:
        raise ModelError(
            f"{base}: has no weights (model.safetensors or an index). Download or copy it again.",
            code="base-without-weights",
        )
    if missing := [path for path in files if not path.is_file()]:
        raise ModelError(f"{missing[0]}: is missing. Download or copy the model again.", code="file-missing")
    return files


def merge_files(plan: MergePlan, deltas: Sequence[Delta], output: Path) -> int:
    """Write the merged weights, with one file in memory at a time; returns the number of changed tensors.

    Raises:
        ModelError: an adapter changes tensors that the base does not have.
        RunError: a file reads back differently from what was written.
    """
    base = plan.base
    files = _weights_of(base)
    if any(delta.has_experts for delta in deltas) or files[0].suffix != ".safetensors":
        return _merge_in_memory(plan, deltas, output)
    names = _NameMap(plan)
    for delta in deltas:
        delta.fit(names.embedding, names.head, names.is_tied, names.rows)
    wanted = {name for delta in deltas for name in delta.names()}
    left = set(wanted)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    pair: _TiedEmbeddings | None = None
    placed: dict[str, str] = {}
    size = 0
    for file in files:
        tensors = load_file(file)
        for key, tensor in tensors.items():
            _require_finite(file, key, tensor)
            name = names.in_model(key, wanted)
            if name == names.embedding:
                pair = _TiedEmbeddings(names, deltas, tensor)
            for delta in deltas:
                tensor = delta.apply(name, tensor, name in names.transposed)
            tensors[key] = tensor
            left.discard(name)
            placed[key] = file.name
        if file == files[-1] and names.is_tied and pair is not None and names.head not in placed:
            left.discard(names.head)
            if not pair.are_one:
                tensors[names.head] = pair.head.contiguous().clone()
                placed[names.head] = file.name
                _untie(config)
        _write_and_compare(tensors, output / file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if left:
        raise ModelError(
            f"the base {base} has no tensor {sorted(left)[0]}; the adapter belongs to another model. Give its own "
            "base with --base.",
            code="adapter-does-not-fit",
        )
    _grow_vocabulary(config, deltas, names.embedding)
    (output / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    add_older_keys(output, names.config_class)
    if (base / _INDEX).is_file() and len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (output / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return len(wanted)


def _require_finite(file: Path, key: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ModelError(
            f"{file}: {key} has NaN or infinite values; the base is damaged. Download or copy it again.",
            code="base-not-finite",
        )


class _NameMap:
    """Map names in a file to names in the model: the files of some models (GPT-2) lack the base prefix.

    Attributes:
        embedding, head: names of these two weights in the model.
        is_tied: whether they are tied in the base's config.
        rows: rows of the embedding.
        transposed: weights of shape [in, out].
        config_class: of the base.
    """

    def __init__(self, plan: MergePlan) -> None:
        trust = plan.trust_remote_code
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(plan.base, trust_remote_code=trust)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        pair = find_embedding_names(model)
        self.config_class = type(config)
        self._prefix = f"{model.base_model_prefix}."
        self._names = set(model.state_dict())
        self.embedding, self.head = f"{pair.embedding}.weight", f"{pair.head}.weight"
        self.is_tied, self.rows = pair.is_tied, int(model.get_input_embeddings().num_embeddings)
        self.transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}

    def in_model(self, key: str, wanted: set[str]) -> str:
        return key if key in wanted or key in self._names else f"{self._prefix}{key}"


class _TiedEmbeddings:
    """Tied embedding and head of the base, each with the changes of the adapters.

    Attributes:
        head: the head's weight after the merge.
        are_one: whether it still equals the embedding.
    """

    def __init__(self, names: _NameMap, deltas: Sequence[Delta], weight: Tensor) -> None:
        embedding = self.head = weight
        self.are_one = names.is_tied
        for delta in deltas:
            changed = delta.apply(names.embedding, embedding)
            if self.are_one and not delta.changes(names.head) and delta.ties_head(names.embedding):
                self.head = changed
            else:
                self.head = delta.apply(names.head, self.head)
            embedding = changed
            self.are_one = self.are_one and self.head.shape == embedding.shape and torch.equal(self.head, embedding)


def _untie(config: dict[str, Any]) -> None:
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    logger.info("note: the base's head is tied to its embedding, but the adapter changes only one of them: untied")


def _grow_vocabulary(config: dict[str, Any], deltas: Sequence[Delta], embedding: str) -> None:
    """Set vocab_size for added tokens, which make the embedding larger."""
    own = config if "vocab_size" in config else config.get("text_config", {})
    ends = [max(numbers) + 1 for delta in deltas for numbers, _ in delta.rows.values()]
    ends += [len(delta.whole[embedding]) for delta in deltas if embedding in delta.whole]
    for delta in deltas:
        if embedding in delta.stored:  # the base was resized, maybe to fewer rows
            own["vocab_size"] = len(delta.stored[embedding])
    if max(ends, default=0) > own.get("vocab_size", 0):
        own["vocab_size"] = max(ends)


def _write_and_compare(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, {"format": "pt"})
    with safe_open(path, "pt") as file:
        for key, tensor in tensors.items():
            if not torch.equal(file.get_tensor(key), tensor):
                raise RunError(
                    f"{path.name}: {key} reads back differently from what was written. No files were kept; check the "
                    "disk.",
                    code="written-differently",
                )


def _merge_in_memory(plan: MergePlan, deltas: Sequence[Delta], output: Path) -> int:
    """Merge the model in memory with peft, for fused experts (separate tensors in the files) and for pytorch_model.bin.

    transformers reads weights from a .bin file without running pickled code.
    """
    trust = plan.trust_remote_code
    model: Any = AutoModelForCausalLM.from_pretrained(plan.base, dtype="auto", trust_remote_code=trust)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in before.items():
        _require_finite(plan.base, name, tensor)
    was_tied = find_embedding_names(model).is_tied
    for delta in deltas:
        model = merge_adapter(open_adapter(model, delta.folder))
    after = model.state_dict()
    changed = sum(not torch.equal(before[name], after[name]) for name in before)
    if was_tied and not find_embedding_names(model).is_tied:
        logger.info("note: the base's head is tied to its embedding, but the adapter changes only one of them: untied")
    model.save_pretrained(output)
    add_older_keys(output, type(model.config))
    # compare what was written with what reads back
    again = AutoModelForCausalLM.from_pretrained(output, dtype="auto", trust_remote_code=trust).state_dict()
    for name, tensor in after.items():
        if not torch.equal(again[name], tensor):
            raise RunError(
                f"{name} reads back differently from what was written. No files were kept; check the disk.",
                code="written-differently",
            )
    return changed


def _copy_rest(plan: MergePlan, output: Path) -> Path | None:
    """Copy tokenizer and template of the last adapter, else those of the base; returns the folder they are from."""
    trained = plan.adapters[-1]
    has_own = (trained / "tokenizer_config.json").is_file()
    _copy_files(plan.base, _SETTINGS if has_own else (*_SETTINGS, *_TOKENIZER), output)
    _copy_files(trained, (*_SETTINGS, *_TOKENIZER), output)
    if plan.trust_remote_code:
        _copy_files(plan.base, [path.name for path in sorted(plan.base.glob("*.py"))], output)
    if not (output / "tokenizer_config.json").is_file():
        return None
    return trained if has_own else plan.base


def _copy_files(source: Path, names: Sequence[str], output: Path) -> None:
    """Copy regular files; links only within the folder, or within this model's folder in the hub cache.

    Raises:
        ModelError: a link leads elsewhere.
    """
    is_cache = source.parent.name == "snapshots" and (source.parent.parent / "blobs").is_dir()
    root = (source.parent.parent if is_cache else source).resolve()
    for name in names:
        file = source / name
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise ModelError(
                f"{file}: is a link to a file outside its folder. Copy the file there if it belongs to the model.",
                code="link-outside-folder",
            )
        if file.is_file():
            shutil.copyfile(file, output / name)
