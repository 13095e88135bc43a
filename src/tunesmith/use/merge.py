"""`tunesmith merge`: adapters into their base, file by file, proven before the result appears under its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError, RunError, TunesmithError
from tunesmith.files import atomic_directory, is_no_room
from tunesmith.model.adapters import (
    find_adapter,
    open_adapter,
    read_adapter_config,
)
from tunesmith.model.deltas import Delta
from tunesmith.model.source import explain_load_error, find_model, open_path, telling_text
from tunesmith.use.combine import MergePlan, deltas_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_PROMPTS = (
    "Who are you?",
    "Write a short poem about the sea.",
    "1, 2, 3, 4,",
    "def add(a, b):\n",
    "请介绍一下你自己。",
)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SETTINGS = ("generation_config.json",)
_TOKENIZER = (
    "tokenizer",
    "chat_template",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "spiece",
    "sentencepiece",
)
_HEAD = "lm_head.weight"
_DATA_FILES = ("config.json", "generation_config.json", "tokenizer", "chat_template", "vocab", "merges",
               "special_tokens", "added_tokens", "spiece", "sentencepiece")  # fmt: skip


def run_merge(
    names: Sequence[str],
    output: str,
    method: str = "sequential",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    seed: int = 0,
    base: str | None = None,
) -> Path:
    """Merge, prove, save.

    Raises:
        ModelError: adapters or base are not what they should be.
        RunError: the proof failed, or there is no room; nothing is left then.
    """
    folder = Path(output).expanduser()
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise TunesmithError(f"{output}: exists already; give --output a new folder.")
    adapters = tuple(_find_adapter(name) for name in names)
    if (weights or method != "sequential") and len(adapters) == 1:
        raise TunesmithError("--method and --weights: are for several adapters; this is one.")
    if weights and method == "sequential":
        raise TunesmithError("--weights: needs a --method that adds adapters up, such as linear.")
    weights = tuple(weights or [1.0] * len(adapters))
    if len(weights) != len(adapters):
        raise TunesmithError(f"--weights: {len(weights)} numbers for {len(adapters)} adapters; give one for each.")
    plan = MergePlan(_find_base(adapters, base), adapters, method, weights, density, seed)
    require_room(plan.base, folder)
    try:
        with deltas_of(plan) as (deltas, combined), atomic_directory(folder.resolve()) as partial:
            changed = merge_files(plan.base, deltas, partial)
            _copy_rest(plan, partial)
            said = prove(plan, combined, partial)
    except TunesmithError:
        raise
    except Exception as error:  # a file of the base cut short, code of its own, a tokenizer that is none
        if is_no_room(error):
            raise RunError(f"{output}: no room left on the disk; nothing was kept.") from None
        raise ModelError(f"{plan.base}: the merge failed, and nothing was kept: {telling_text(error)}.") from None
    _tell(plan, changed, said, output)
    return folder


def _tell(plan: MergePlan, changed: int, said: str, output: str) -> None:
    how = f", {plan.method}" if len(plan.adapters) > 1 else ""
    print(f"base       {plan.base}")
    for adapter, weight in zip(plan.adapters, plan.weights, strict=True):
        print(f"adapter    {adapter}" + (f", weight {weight:g}" if len(plan.adapters) > 1 else ""))
    print(f"merged     {changed:,} tensors changed, each read back and compared{how}")
    print(f"proof      {said}")
    print(f"model saved: {output}\ntalk to it: tunesmith chat {output}")


def _find_adapter(name: str) -> Path:
    path = open_path(name)
    folder = find_adapter(path) if path.is_dir() else None
    if folder is None:
        raise ModelError(f"{name}: is no adapter (a PEFT folder with adapter_config.json, or a RUN with adapter/).")
    return folder


def _find_base(adapters: Sequence[Path], base: str | None) -> Path:
    """A folder with the base's files; fetched from the hub where it is not a local one."""
    named = {str(read_adapter_config(adapter).get("base_model_name_or_path")) for adapter in adapters}
    if base is None and len(named) > 1:
        raise ModelError(
            f"the adapters have different bases ({', '.join(sorted(named))}); if they are one, name it: --base"
        )
    try:
        source = find_model(base or next(iter(named)))
    except ModelError as error:
        raise ModelError(f"{adapters[0]}: its base model cannot be found: {error} Name it: --base") from None
    if source.adapter or source.kind == "preset":
        raise ModelError(f"{base}: is no base model.")
    folder = Path(source.name)
    if source.kind == "hub":
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        revisions = {read_adapter_config(adapter).get("revision") for adapter in adapters}
        try:
            folder = Path(snapshot_download(source.name, revision=next(iter(revisions)), allow_patterns=wanted))
        except Exception as error:
            raise explain_load_error(source.name, "the base", error) from None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ModelError(
            f"{folder}: is stored quantised, and a merge into rounded weights would be another model. Name the "
            "original in full precision: --base"
        )
    return folder


def require_room(base: Path, output: Path) -> None:
    needed = sum(path.stat().st_size for path in _weight_files(base))
    parent = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise RunError(
            f"{output}: the merged model takes {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free."
        )


def _weight_files(base: Path) -> list[Path]:
    files = [base / _SINGLE] if (base / _SINGLE).is_file() else []  # a checkpoint holds other files of this kind
    if (base / _INDEX).is_file():
        index = json.loads((base / _INDEX).read_text(encoding="utf-8"))
        files = [base / name for name in sorted(set(index["weight_map"].values()))]
    if not files:
        raise ModelError(f"{base}: has no safetensors weights. Save it with save_pretrained first.")
    return files


def merge_files(base: Path, deltas: Sequence[Delta], output: Path) -> int:
    """Base weights with the changes, one file in memory at a time; the number of tensors changed.

    Raises:
        ModelError: an adapter changes what the base has not.
        RunError: what was read back is not what was to be written.
    """
    wanted = {name for delta in deltas for name in delta.names()}
    if any(delta.has_experts for delta in deltas):
        return _merge_in_memory(base, deltas, output)
    left, embedding = set(wanted), None
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    names, files = _NameMap(base), _weight_files(base)
    placed: dict[str, str] = {}
    size = 0
    for file in files:
        tensors = load_file(file)
        for key, tensor in tensors.items():
            name = names.in_model(key, wanted)
            original = tensor
            if name in wanted:
                for delta in deltas:
                    tensor = delta.apply(name, tensor, name in names.transposed)
                tensors[key] = tensor
                left.discard(name)
            if key.endswith(_EMBEDDINGS):
                embedding = original, tensor
        if file == files[-1] and left == {_HEAD} and embedding is not None:
            left = _untie(deltas, embedding, tensors, config)
        _write_and_compare(tensors, output / file.name)
        placed |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if left:
        raise ModelError(f"the base {base} has no tensor {sorted(left)[0]}; the adapter belongs to another model.")
    _grow_vocabulary(config, deltas)
    (output / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if (base / _INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (output / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return len(wanted)


class _NameMap:
    """Names in a file -> names in the model: hub files of some models leave the base prefix out (GPT-2's)."""

    def __init__(self, base: Path) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        self._prefix = f"{model.base_model_prefix}."
        self.transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}

    def in_model(self, key: str, wanted: set[str]) -> str:
        return key if key in wanted else f"{self._prefix}{key}"


def _untie(
    deltas: Sequence[Delta], embedding: tuple[Tensor, Tensor], tensors: dict[str, Tensor], config: dict[str, Any]
) -> set[str]:
    """A head of its own, where the base's is its embedding; equal to the embedding, it stays that.

    Args:
        embedding: before and after the merge.
    """
    head, merged = embedding
    for delta in deltas:
        head = delta.apply(_HEAD, head)
    if not (head.shape == merged.shape and torch.equal(head, merged)):
        tensors[_HEAD] = head.contiguous().clone()
        config["tie_word_embeddings"] = False
        print("note: the base's head is tied to its embedding, and the adapter changes it alone: untied")
    return set()


def _grow_vocabulary(config: dict[str, Any], deltas: Sequence[Delta]) -> None:
    """Added tokens make the embedding longer than the base's config says."""
    own = config if "vocab_size" in config else config.get("text_config", {})
    ends = [max(numbers) + 1 for delta in deltas for numbers, _ in delta.rows.values()]
    ends += [len(tensor) for delta in deltas for name, tensor in delta.whole.items() if name.endswith(_EMBEDDINGS)]
    if max(ends, default=0) > own.get("vocab_size", 0):
        own["vocab_size"] = max(ends)


def _write_and_compare(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, {"format": "pt"})
    with safe_open(path, "pt") as file:
        for key, tensor in tensors.items():
            if not torch.equal(file.get_tensor(key), tensor):
                raise RunError(f"{path.name}: {key} was read back otherwise than it was written. Nothing was kept.")


def _merge_in_memory(base: Path, deltas: Sequence[Delta], output: Path) -> int:
    """For fused experts, which lie in the files one by one: peft merges in the model."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for delta in deltas:
        model = open_adapter(model, delta.folder).merge_and_unload()
    changed = sum(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.save_pretrained(output)
    # what we write is compared with what is read back
    again = AutoModelForCausalLM.from_pretrained(output, dtype="auto").state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(again[name], tensor):
            raise RunError(f"{name} was read back otherwise than it was written. Nothing was kept.")
    return changed


def _copy_rest(plan: MergePlan, output: Path) -> None:
    """Tokenizer and template that the last adapter was trained with, where it has them, else the base's."""
    trained = plan.adapters[-1]
    has_own = (trained / "tokenizer_config.json").is_file()
    sources = [(plan.base, _SETTINGS if has_own else (*_SETTINGS, *_TOKENIZER)), (trained, (*_SETTINGS, *_TOKENIZER))]
    for source, names in sources:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name.startswith(names):
                shutil.copyfile(file, output / file.name)


@torch.no_grad()
def logits_of(model: nn.Module, prompts: Sequence[Tensor]) -> Tensor:
    """[all tokens, vocabulary], fp32."""
    model.eval()
    return torch.cat([model(input_ids=ids[None]).logits[0].float() for ids in prompts])


def prove(plan: MergePlan, combined: Sequence[Path], output: Path) -> str:
    """Logits of base and adapters against those of the merged model as it lies on the disk.

    Raises:
        RunError: they differ by more than rounding explains.
    """
    dtype = _dtype_of(output)
    size = sum(path.stat().st_size for path in _weight_files(plan.base)) * (4 / dtype.itemsize)
    if 2.5 * size > available_memory():
        return "too large for this memory, so its logits were not compared; its tensors were"
    prompts = encode_prompts(output)
    model: Any = AutoModelForCausalLM.from_pretrained(plan.base, dtype=torch.float32)
    if len(plan.adapters) > 1 and plan.method == "sequential":
        for folder in combined:
            model = open_adapter(model, folder).merge_and_unload()
        wrapped = model
    else:
        wrapped = open_adapter(model, combined[0])
    wanted = logits_of(wrapped, prompts)
    del model, wrapped
    found = logits_of(AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32), prompts)
    difference = ((wanted - found).abs().max() / wanted.abs().max()).item()
    if not difference <= TOLERANCE[dtype]:
        raise RunError(
            f"the merged model's logits differ from base and adapter by {difference:.1e} of the largest, more than the "
            f"{TOLERANCE[dtype]:.0e} that rounding to {str(dtype).removeprefix('torch.')} explains. Nothing was kept."
        )
    same = (wanted.argmax(-1) == found.argmax(-1)).float().mean().item()
    return (
        f"logits on {len(_PROMPTS)} prompts differ by {difference:.1e} of the largest (allowed for "
        f"{str(dtype).removeprefix('torch.')}: {TOLERANCE[dtype]:.0e}); the likeliest token is the same at {same:.1%}"
    )


def encode_prompts(folder: Path) -> list[Tensor]:
    """Real text where the model has a tokenizer, else its first ids."""
    if not (folder / "tokenizer_config.json").is_file():
        return [torch.arange(start, start + 16) for start in range(0, 80, 16)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in _PROMPTS]


def _dtype_of(folder: Path) -> torch.dtype:
    with safe_open(_weight_files(folder)[0], "pt") as file:
        dtypes = [file.get_tensor(key).dtype for key in list(file.keys())[:4]]
    return min((d for d in dtypes if d in TOLERANCE), key=lambda d: d.itemsize, default=torch.float32)


def available_memory() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return float("inf")
