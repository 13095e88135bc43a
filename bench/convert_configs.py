"""Convert every YAML file of a folder as `tunesmith convert-config` does, and count what becomes of them.

Each file is classified (SFT, pre-training, refused as something else), and each of its keys is checked: without it or with
another value, the run file or the remarks must differ, else the key has disappeared. With --run, each converted file is trained for two
steps on a tiny model of its architecture with random weights, on rows that have the columns that the file names.
Replaced for that: model.path, model.revision, data.train, data.eval, train.output_dir, train.max_steps, train.trackers
(none) and train.compile (off); everything else is as converted. The tokenizer is a small one with a ChatML template.

Prints a line for each file that fails or loses a key, then a table.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.config.runfile import read_yaml
from tunesmith.errors import TunesmithError
from tunesmith.foreign.classify import find_method, find_tool
from tunesmith.foreign.convert import Converted, convert, convert_file, nest
from tunesmith.foreign.draft import is_on

# name of a model -> its model_type in transformers, first match; behind a colon, a kind of it
FAMILIES = (
    ("mixtral", "mixtral"), ("ministral-3|mistral-small-4|mistral-medium", "ministral3"), ("ministral", "ministral"),
    ("mistral|zephyr|devstral|magistral|voxtral", "mistral"), ("qwen3-next", "qwen3_next"), ("qwen3\\.?5.*-a\\d", "qwen3_5_moe_text"),
    ("qwen3\\.?5", "qwen3_5_text"), ("qwen3.*a\\d+b", "qwen3_moe"), ("qwen3|plano", "qwen3"), ("qwen1.5-moe", "qwen2_moe"),
    ("qwen|deepcoder|mimo", "qwen2"), ("gemma-2-", "gemma2"), ("gemma-3n", "gemma3n_text"), ("gemma-3", "gemma3_text"),
    ("gemma-4.*-a\\d+b", "gemma4_text:moe"), ("gemma-4", "gemma4_text"), ("gemma", "gemma"), ("llama-4", "llama4_text"), ("phi-3", "phi3"), ("phi-", "phi"),
    ("falcon-h1", "falcon_h1"), ("falcon", "falcon"), ("gpt-oss", "gpt_oss"), ("gpt-j", "gptj"), ("cerebras-gpt", "gpt2"),
    ("pythia|incite", "gpt_neox"), ("jamba", "jamba"), ("mamba", "mamba"), ("mpt", "mpt"), ("lfm2.*a\\d", "lfm2_moe"), ("lfm2", "lfm2"),
    ("granite-4", "granitemoehybrid"), ("granite", "granite"), ("glm-4.[57]", "glm4_moe"), ("glm-4", "glm4"),
    ("glm-5", "glm_moe_dsa"), ("deepseek-v4", "deepseek_v4"), ("deepseek-v2", "deepseek_v2"), ("deepseek", "deepseek_v3"),
    ("nemotron-3|nemotron-h", "nemotron_h"), ("nemotron", "nemotron"), ("olmo-3", "olmo3"), ("seed-oss", "seed_oss"),
    ("command-r", "cohere2"), ("afm", "arcee"), ("trinity", "afmoe"), ("apertus", "apertus"), ("hunyuan", "hunyuan_v1_dense"),
    ("starcoder2", "starcoder2"), ("stablelm", "stablelm"), ("minimax", "minimax_m2"), ("smollm3", "smollm3"),
    ("dbrx", "dbrx"), ("kimi", "kimi_linear"), ("", "llama"),
)  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8, "global_head_dim": 8,
    "num_kv_shared_layers": 0, "vocab_size_per_layer_input": None,
}  # fmt: skip
# what a family needs besides SMALL; None: the size of the vocabulary
SHAPES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT, "deepseek_v3": _LATENT,
    "glm_moe_dsa": _LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "laurel_rank": 4, "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4, "vocab_size_per_layer_input": None,
    },
    "gemma4_text": _GEMMA4, "gemma4_text:moe": _GEMMA4 | {"enable_moe_block": True, "top_k_experts": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen3_5_text": _LINEAR, "qwen3_5_moe_text": _LINEAR, "qwen3_next": _LINEAR,
}  # fmt: skip
FALLBACK = "llama"
WORDS = [
    "the",
    "answer",
    "to",
    "your",
    "question",
    "is",
    "a",
    "small",
    "number",
    "and",
    "the",
    "fox",
    "says",
    "hello",
    "to",
    "you",
    "again",
]


def part_of(files: list[Path], part: str) -> list[Path]:
    """ "2/3": the second third of the files, taken in turns."""
    number, _, count = part.partition("/")
    return files[int(number) - 1 :: int(count)]


def silent_keys(theirs: Mapping[str, Any], folder: Path, info: Path | None) -> list[str]:
    """Keys that say something, and whose absence and any other value give the same run file and remarks."""
    whole = convert(theirs, folder, info)
    silent = []
    for key, *others in _with_other_values(theirs):
        for other in others:
            try:
                changed = convert(other, folder, info)
            except Exception:  # the key was needed
                break
            if find_tool(other) != whole.tool or (changed.text, changed.remarks()) != (whole.text, whole.remarks()):
                break
        else:
            silent.append(key)
    return silent


def _with_other_values(theirs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each key, the file without it, and the file with another value; also for the keys of a data set."""
    for key, value in theirs.items():
        if not is_on(value):
            continue
        less = {name: below for name, below in theirs.items() if name != key}
        yield key, less, {**theirs, key: _other(value)}
        entries = value if isinstance(value, list) else []
        for at, entry in enumerate(entries):
            for name in entry if isinstance(entry, Mapping) else ():
                if is_on(entry[name]):
                    less, changed = copy.deepcopy(dict(theirs)), copy.deepcopy(dict(theirs))
                    del less[key][at][name]
                    changed[key][at][name] = _other(entry[name])
                    yield f"{key}.{at}.{name}", less, changed


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 if 0 < value < 1 else 7 if value < 0 else value + 1
    return {list: ["other"], dict: {"other": 1}}.get(type(value), "other")


def family_of(model: str) -> str:
    return next(family for pattern, family in FAMILIES if re.search(pattern, model.lower()))


def shape_of(family: str, length: int, vocab_size: int) -> dict[str, Any]:
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": length, "n_positions": length}
    shape = (
        SMALL | sizes | {name: vocab_size if value is None else value for name, value in SHAPES.get(family, {}).items()}
    )
    if family == "falcon":
        del shape["head_dim"]  # computed there
    return shape


def build_base(family: str, length: int, tokenizer: Any, folder: Path) -> str:
    """A tiny model of a family with random weights; the family that it is of, the fallback where it cannot be built."""
    import torch
    import transformers

    ids = torch.arange(3, 11)[None]
    for name in (family, FALLBACK):
        try:
            config = transformers.AutoConfig.for_model(name.partition(":")[0], **shape_of(name, length, len(tokenizer)))
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model(ids)
            model.save_pretrained(folder)
        except Exception:  # a family whose tiny form needs more than these values
            continue
        tokenizer.save_pretrained(folder)
        return name
    raise SystemExit("no model can be built; is transformers installed?")


def say(number: int) -> str:
    return " ".join(WORDS[(number * 3 + at) % len(WORDS)] for at in range(5 + number % 6))


def rows_of(theirs: Mapping[str, Any], entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with the columns that a data set of their file has."""
    kind = str(entry.get("type") or entry.get("formatting") or "")
    if kind in ("completion", "pretrain") or theirs.get("stage") == "pt":
        columns = entry.get("columns") or {}
        column = entry.get("field") or entry.get("text_column") or columns.get("prompt") or "text"
        return [{column: say(i)} for i in range(60)]
    if kind.startswith("chat_template") or kind in ("sharegpt", "openai", "messages"):
        return [{_messages(entry): _turns(entry, i)} for i in range(60)]
    if kind == "jeopardy":
        return [{"question": say(i), "answer": say(i + 1), "category": "words"} for i in range(60)]
    return [{"instruction": say(i), "input": say(i + 2) if i % 2 else "", "output": say(i + 1)} for i in range(60)]


def _messages(entry: Mapping[str, Any]) -> str:
    columns = entry.get("columns") or {}
    named = columns.get("messages") if isinstance(columns, Mapping) else None
    return str(entry.get("field_messages") or named or ("conversations" if entry.get("formatting") else "messages"))


def _turns(entry: Mapping[str, Any], number: int) -> list[dict[str, str]]:
    names = entry.get("message_property_mappings") or {}
    tags = entry.get("tags") or {}
    role = names.get("role") or entry.get("message_field_role") or tags.get("role_tag")
    content = names.get("content") or entry.get("message_field_content") or tags.get("content_tag")
    is_sharegpt = entry.get("formatting") == "sharegpt"
    role, content = role or ("from" if is_sharegpt else "role"), content or ("value" if is_sharegpt else "content")
    user = tags.get("user_tag") or ("human" if role == "from" else "user")
    assistant = tags.get("assistant_tag") or ("gpt" if role == "from" else "assistant")
    return [{role: user, content: say(number)}, {role: assistant, content: say(number + 1)}]


def write_data(theirs: Mapping[str, Any], converted: Converted, info: Path | None, folder: Path) -> dict[str, Any]:
    """Rows for every data set of a file; our keys that name them."""
    ours: dict[str, Any] = {}
    for part, keys in (("data.train", ("datasets", "pretraining_dataset")), ("data.eval", ("test_datasets",))):
        given = next((theirs[key] for key in keys if isinstance(theirs.get(key), list)), [])
        names = []
        for at, name in enumerate(converted.ours.get(part) or []):
            head, _, title = str(name).rpartition(":")
            if converted.tool == "llama-factory" and head and "train_dataset" not in theirs:
                entry = _entry(info, title)
                names.append(_write_entry(folder / f"{part}-{at}", title, entry, rows_of(theirs, entry)))
                continue
            kinds = {"trl": {"type": "messages"}, "llama-factory": {"type": "alpaca"}, "axolotl": {}}[converted.tool]
            entry = given[at] if at < len(given) and isinstance(given[at], Mapping) else {}
            file = folder / f"{part}-{at}.jsonl"
            _write_rows(file, rows_of(theirs, {**kinds, **entry}))
            names.append(str(file))
        if names:
            ours[part] = names
    return ours


def _entry(info: Path | None, name: str) -> dict[str, Any]:
    file = info / "dataset_info.json" if info else None
    entries = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    entry = {key: value for key, value in entries.get(name, {}).items() if key in ("formatting", "columns", "tags")}
    return entry | {"file_name": "rows.jsonl"}


def _write_entry(folder: Path, name: str, entry: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps({name: entry}), encoding="utf-8")
    _write_rows(folder / "rows.jsonl", rows)
    return f"{folder}:{name}"


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(theirs: Mapping[str, Any], converted: Converted, info: Path | None, tokenizer: Any, folder: Path) -> str:
    """Two steps; the family of the model.

    Raises:
        TunesmithError: what tunesmith says of it.
    """
    import torch
    import transformers

    from tunesmith.config.runfile import resolve_config
    from tunesmith.config.schema import RunConfig
    from tunesmith.run.start import run_training

    named = theirs.get("special_tokens")
    if isinstance(named, Mapping):  # the tokenizer of the real model has them
        tokenizer.add_tokens([text for text in named.values() if isinstance(text, str)], special_tokens=True)
    length = max(512, int(converted.ours.get("data.max_seq_len", 512)))
    family = build_base(family_of(str(converted.ours.get("model.path"))), length, tokenizer, folder / "base")
    # transformers reads some tokenizers otherwise beside a config of this family; a real model's is saved as it is read
    transformers.AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "base")
    ours = converted.ours | write_data(theirs, converted, info, folder)
    ours |= {"model.path": str(folder / "base"), "train.output_dir": str(folder / "run"), "train.max_steps": 2}
    ours |= {"train.trackers": [], "train.compile": False}
    if ours.get("train.precision") == "fp16" and not torch.cuda.is_available():
        ours["train.precision"] = "fp32"  # fp16 needs a GPU
    ours.pop("model.revision", None)
    for name, text in converted.templates.items():
        (folder / Path(name).name).write_text(text, encoding="utf-8")
        ours["data.chat_template"] = str(folder / Path(name).name)
    config = resolve_config(RunConfig, None, {}, arguments=nest(ours))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run_training(config)
    return family


class Counts:
    """What became of the files of one tool."""

    def __init__(self) -> None:
        self.files = self.sft = self.pretraining = self.keys = self.silent = self.by_hand = 0
        self.ran = self.failed = self.seconds = 0.0
        self.refused: collections.Counter[str] = collections.Counter()
        self.families: collections.Counter[str] = collections.Counter()


def handle(path: Path, info: Path | None, count: Counts, tokenizer: Any) -> None:
    """One file; `tokenizer` is None where nothing is trained."""
    count.files += 1
    try:
        theirs = read_yaml(path)
        converted = convert_file(path, None, info)
    except TunesmithError as error:
        is_other = error.code == "other-method"
        count.refused[find_method(theirs).partition(" (")[0] if is_other else error.code] += 1
        return
    if converted.method == "sft":
        count.sft += 1
    else:
        count.pretraining += 1
    count.keys += sum(1 for _ in _with_other_values(theirs))
    count.by_hand += bool(converted.problems)
    for key in silent_keys(theirs, path.parent, info):
        count.silent += 1
        print(f"{path}: {key} is neither converted nor named", flush=True)
    if tokenizer is None:
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            count.families[train(theirs, converted, info, copy.deepcopy(tokenizer), Path(folder))] += 1
            count.ran += 1
        except Exception as error:  # a file that fails must not end the others
            count.failed += 1
            print(f"{path}: failed: {type(error).__name__}: {str(error)[:400]}", flush=True)
    count.seconds += time.monotonic() - started


def show(counts: Mapping[str, Counts], has_run: bool) -> None:
    print("\n| tool | files | SFT | pre-training | refused | keys | lost silently | to correct by hand | trained |")
    print("|---|---|---|---|---|---|---|---|---|")
    for tool, c in counts.items():
        tried = int(c.ran + c.failed)
        ran = f"{int(c.ran)} of {tried} ({100 * c.ran / tried:.1f} %)" if has_run and tried else ""
        refused = sum(c.refused.values())
        print(
            f"| {tool} | {c.files} | {c.sft} | {c.pretraining} | {refused} | {c.keys} | {c.silent} | {c.by_hand} | {ran} |"
        )
    for tool, c in counts.items():
        print(f"\n{tool}: refused: {', '.join(f'{what} {n}' for what, n in c.refused.most_common()) or 'none'}")
        if has_run:
            families = ", ".join(f"{name} {n}" for name, n in c.families.most_common())
            print(f"{tool}: families: {families}; {c.seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog=os.path.basename(__file__)
    )
    parser.add_argument("folder", type=Path, help="folder of YAML files, searched with its subfolders")
    parser.add_argument(
        "--dataset-info", type=Path, metavar="DIR", help="folder with LLaMA-Factory's dataset_info.json"
    )
    parser.add_argument("--run", action="store_true", help="train each converted file for two steps")
    parser.add_argument("--part", default="1/1", metavar="N/M", help="only every M-th file, from the N-th on")
    options = parser.parse_args()
    files = part_of(sorted(p for p in options.folder.rglob("*.y*ml") if p.is_file()), options.part)
    if not files:
        raise SystemExit(f"{options.folder}: no YAML files")
    tokenizer = None
    if options.run:
        import transformers

        from tunesmith.model.bpe import train_tokenizer

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        tokenizer = train_tokenizer([" ".join(WORDS)] * 20, vocab_size=400)
    counts: dict[str, Counts] = {}
    for path in files:
        try:
            tool = find_tool(read_yaml(path)) or "other"
        except TunesmithError:
            tool = "other"
        handle(path, options.dataset_info, counts.setdefault(tool, Counts()), tokenizer)
    show(counts, options.run)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
