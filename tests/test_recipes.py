"""Recipes run on tiny models of their architectures; names and files of other tools are understood."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import chat_row, save_folder, tiny_config, write_jsonl
from tunesmith.config.foreign import ALWAYS, SAME, convert, explain_key, nest
from tunesmith.config.runfile import find_recipe, leaf_fields, list_recipes, resolve_config
from tunesmith.config.schema import RunConfig

Run = Callable[..., tuple[int, str, str]]
ARCHITECTURES = {
    "gpt2": "gpt2",
    "qwen2.5": "qwen2",
    "minimind": "qwen3",
    "reasoning": "qwen3",
    "tool": "qwen2",
    "chinese": "qwen2",
}
TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.first and tools %}{{ tools | tojson }}{% endif %}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def base_for(recipe: str, folder: Path, tokenizer: Any) -> Path:
    name = next(value for key, value in ARCHITECTURES.items() if recipe.startswith(key))
    own = copy.deepcopy(tokenizer)
    own.chat_template = None if name == "gpt2" else TOOLS
    wide: dict[str, Any] = {"n_embd": 64} if name == "gpt2" else {"hidden_size": 64, "head_dim": 16}
    length = {"n_positions": 1024} if name == "gpt2" else {"max_position_embeddings": 4096}
    return save_folder(folder, tiny_config(name, initializer_range=0.02, **wide, **length), own)


def rows_for(recipe: str) -> list[Any]:
    if recipe.startswith("gpt2"):
        return [{"instruction": f"Say {i}", "input": "", "output": f"The answer is {i}."} for i in range(60)]
    if recipe == "tool-calling":
        tool = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": "you"}}}
        turns = [{"role": "user", "content": "look"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return [{"messages": turns, "tools": [tool]}] * 60
    if recipe == "reasoning":
        return [chat_row(f"What is {i}?", f"<think>\nWho says {i}?\n</think>\n\nA fox {i}.") for i in range(60)]
    if recipe == "minimind-pretrain":
        return [{"text": f"the quick brown fox {i} jumps over the lazy dog"} for i in range(300)]
    return [chat_row(f"What is the answer {i}?", f"The answer is {i} and you.") for i in range(60)]


@pytest.mark.parametrize("recipe", [name for name, _ in list_recipes()])
def test_every_recipe_runs(run: Run, tokenizer: Any, tmp_path: Path, recipe: str) -> None:
    if "qlora" in recipe:
        pytest.importorskip("bitsandbytes")
    base = base_for(recipe, tmp_path / "base", tokenizer)
    data = write_jsonl(tmp_path / "data.jsonl", rows_for(recipe))
    words = ("train", f"recipe:{recipe}", "--model", base, "--data", data, "--output", tmp_path / "run", "--train.max_steps", 2,
             "--data.eval_split", 0.05)  # fmt: skip
    code, out, err = run(*words)
    assert code == 0, err
    what = "adapter" if "lora:" in find_recipe(Path(f"recipe:{recipe}")).read_text() else "model"
    assert f"{what} saved: {tmp_path / 'run' / what}" in out
    if what == "adapter":
        code, _, err = run("merge", tmp_path / "run", "--output", tmp_path / "merged")
        assert code == 0, err


def test_recipes_are_listed_with_what_they_do(run: Run) -> None:
    code, out, _ = run("recipes")
    assert code == 0
    for name, text in list_recipes():
        assert f"{name} " in out
        assert len(text) > 20
        comment = find_recipe(Path(f"recipe:{name}")).read_text().split("model:")[0]
        assert f"tunesmith train recipe:{name} " in comment


def test_the_background_recipe_for_qwen_is_what_the_text_says() -> None:
    """background/002: r 16, alpha 32, all-linear, lm_head and embed_tokens in full; full at 5e-6 with 100 warmup steps."""
    flags = {"train.output_dir": "o"}
    lora = resolve_config(RunConfig, Path("recipe:qwen2.5-0.5b-lora"), flags)
    assert (lora.lora.rank, lora.lora.scale_alpha, lora.lora.dropout, lora.optim.lr) == (16, 32, 0.05, 2e-4)
    assert (lora.lora.target_modules, lora.lora.modules_to_save) == (["all-linear"], ["lm_head", "embed_tokens"])
    full = resolve_config(RunConfig, Path("recipe:qwen2.5-0.5b-full"), flags)
    assert (full.lora.kind, full.optim.lr, full.optim.warmup_steps) == ("none", 5e-6, 100)
    assert full.data.train == lora.data.train == ["trl-lib/Capybara"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("max_seq_length", "here it is called data.max_seq_len"),
        ("num_train_epochs", "here it is called train.epochs"),
        ("per_device_train_batch_size", "here it is train.micro_batch_tokens"),
        ("learning_rate", "here it is called optim.lr"),
        ("evaluation_strategy", "train.eval_steps N evaluates every N steps"),
        ("lora_alpha", "here it is called lora.alpha"),
        ("packing", "every pack is full"),
        ("completion_only_loss", "only replies are trained"),
    ],
)
def test_old_names_are_explained(run: Run, tmp_path: Path, key: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: x}}\ndata: {{train: y}}\ntrain: {{output_dir: z}}\n{key}: 1\n")
    code, _, err = run("train", path)
    assert code == 1
    assert f"{key}: unknown key; {words}" in err
    path.write_text(f"model: {{path: x}}\ndata: {{train: y}}\ntrain: {{output_dir: z, {key}: 1}}\n")
    assert f"train.{key}: unknown key; {words}" in run("train", path)[2]
    code, _, err = run("train", "--model", "x", "--data", "y", "--output", "z", f"--{key}", "1")
    assert code == 2
    assert f"--{key}: unknown flag; {words}" in err


def test_every_foreign_name_leads_to_a_key_of_ours() -> None:
    known = leaf_fields(RunConfig)
    assert set(SAME.values()) <= set(known)
    assert all(explain_key(name) for name in (*SAME, *ALWAYS))


FILES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "trl": (
        {"model_name_or_path": "m", "dataset_name": "d", "learning_rate": 2e-4, "num_train_epochs": 1, "max_length": 512, "packing": True,
         "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "use_peft": True, "lora_r": 16, "lora_alpha": 32,
         "lora_target_modules": "all-linear", "lora_modules_to_save": ["lm_head"], "bf16": True, "adam_beta2": 0.95,
         "lr_scheduler_type": "linear", "report_to": "none", "output_dir": "o", "neftune_noise_alpha": 5},
        {"model": {"path": "m"}, "data": {"train": ["d"], "max_seq_len": 512},
         "optim": {"lr": 2e-4, "betas": [0.9, 0.95], "schedule": "linear"},
         "lora": {"kind": "lora", "rank": 16, "alpha": 32, "target_modules": ["all-linear"], "modules_to_save": ["lm_head"]},
         "train": {"epochs": 1, "micro_batch_tokens": 1024, "grad_accum_steps": 8, "precision": "bf16", "output_dir": "o"}},
        ["neftune_noise_alpha: 5"],
    ),
    "llama-factory": (
        {"model_name_or_path": "m", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all",
         "dataset": "a, b", "template": "llama3", "cutoff_len": 2048, "val_size": 0.1, "per_device_train_batch_size": 1,
         "learning_rate": "1.0e-4", "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "quantization_bit": 4,
         "train_on_prompt": False, "mask_history": True, "ddp_timeout": 1, "output_dir": "o", "some_new_key": 1},
        {"model": {"path": "m"}, "data": {"train": ["a", "b"], "max_seq_len": 2048, "eval_split": 0.1, "train_on": "last_assistant"},
         "optim": {"lr": 1e-4, "schedule": "cosine", "warmup_ratio": 0.1},
         "lora": {"kind": "lora", "rank": 8, "target_modules": ["all-linear"], "quantize": "nf4"},
         "train": {"micro_batch_tokens": 2048, "epochs": 3.0, "output_dir": "o"}},
        ["some_new_key: 1"],
    ),
    "axolotl": (
        {"base_model": "m", "load_in_4bit": True, "adapter": "qlora", "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True,
         "datasets": [{"path": "d.jsonl", "type": "chat_template"}], "val_set_size": 0.05, "sequence_len": 4096, "sample_packing": True,
         "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 2, "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine",
         "learning_rate": 0.0002, "bf16": "auto", "train_on_inputs": False, "warmup_steps": 10, "output_dir": "./out",
         "special_tokens": {"pad_token": "x"}},
        {"model": {"path": "m"}, "data": {"train": ["d.jsonl"], "eval_split": 0.05, "max_seq_len": 4096},
         "optim": {"name": "adamw_8bit", "schedule": "cosine", "lr": 0.0002, "warmup_steps": 10},
         "lora": {"quantize": "nf4", "kind": "lora", "rank": 32, "alpha": 16, "target_modules": ["all-linear"]},
         "train": {"micro_batch_tokens": 8192, "grad_accum_steps": 4, "epochs": 2, "precision": "auto", "output_dir": "./out"}},
        ["special_tokens: {'pad_token': 'x'}"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("tool", FILES)
def test_files_of_other_tools_are_converted(run: Run, tmp_path: Path, tool: str) -> None:
    theirs, wanted, lost = FILES[tool]
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(theirs))
    code, out, err = run("convert-config", path)
    assert code == 0, err
    ours = yaml.safe_load(out)
    assert ours == wanted
    RunConfig.model_validate(ours)
    assert [
        line.removeprefix("no counterpart: ") for line in err.splitlines() if line.startswith("no counterpart")
    ] == lost
    handled = {key for key in theirs if any(line.split(": ")[1].startswith(key) for line in err.splitlines())}
    assert convert({key: theirs[key] for key in theirs if key not in handled})[2] == []


def test_a_count_of_eval_rows_is_no_share() -> None:
    dotted, _, lost = convert({"model_name_or_path": "m", "val_size": 200})
    assert dotted == {"model.path": "m"}
    assert lost == ["data.eval_split: 200 rows; here it is a share of the rows"]
    assert nest(dotted) == {"model": {"path": "m"}}


def test_what_is_no_file_of_another_tool(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, words in (("a: 1\n", "no known key"), ("a: [\n", "line 2"), ("- 1\n", "must contain sections")):
        path.write_text(text)
        code, _, err = run("convert-config", path)
        assert code == 1
        assert words in err
    assert run("convert-config", tmp_path / "none.yaml")[0] == 1
    assert json.dumps(FILES["trl"][1])


def test_full_fine_tuning_stays_full_and_odd_values_are_named() -> None:
    dotted, notes, lost = convert({"model_name_or_path": "m", "finetuning_type": "full", "lora_rank": 8})
    assert dotted == {"model.path": "m"}
    assert notes == ["lora.rank: left out; the file trains all weights"]
    assert convert({"base_model": "m", "adapter": None, "lora_r": 8})[0] == {"model.path": "m"}
    theirs = {"base_model": "m", "micro_batch_size": "auto", "adam_beta1": "auto", "val_set_size": "5%"}
    dotted, _, lost = convert(theirs)
    assert {line.split(":")[0] for line in lost} == {"micro_batch_size", "adam_beta1", "data.eval_split"}
