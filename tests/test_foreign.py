"""Names and files of other tools are understood: hints for their keys, and convert-config."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import write_jsonl
from tunesmith.adapters.adapter_config import match_names
from tunesmith.config.foreign import OTHERWISE, SAME, explain_key
from tunesmith.config.foreign_reasons import HARMLESS_KEYS, MISSING_KEYS
from tunesmith.config.runfile import leaf_fields, resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.errors import ConfigError
from tunesmith.foreign import axolotl, llamafactory, trl
from tunesmith.foreign.classify import find_method, find_tool
from tunesmith.foreign.convert import convert, convert_file, nest
from tunesmith.foreign.settings import TURNS

OURS = leaf_fields(RunConfig)
GOLDEN = Path(__file__).parent / "golden" / "foreign_keys.json"  # names of fields in each tool's source, at a version


@pytest.mark.parametrize(("tool", "names"), json.loads(GOLDEN.read_text(encoding="utf-8")).items())
def test_every_key_of_another_tool_has_a_hint(tool: str, names: str) -> None:
    own = {key.rpartition(".")[2] for key in OURS} | {"model", "data"}
    assert [name for name in names.split() if not explain_key(name) and name not in own] == []


def test_the_keys_of_the_installed_libraries_have_hints() -> None:
    import peft
    import transformers

    own = {key.rpartition(".")[2] for key in OURS}
    for kind in (transformers.TrainingArguments, peft.LoraConfig):
        names = [field.name for field in dataclasses.fields(kind) if not field.name.startswith("_")]
        assert [name for name in names if not explain_key(name) and name not in own] == []


def test_a_name_has_one_hint_that_leads_to_a_key() -> None:
    tables = [set(table) for table in (SAME, OTHERWISE, HARMLESS_KEYS, MISSING_KEYS)]
    assert len(set().union(*tables)) == sum(map(len, tables))
    assert set(SAME.values()) <= set(OURS)
    words = " ".join(OTHERWISE.values())
    for word in words.replace(",", " ").replace(";", " ").split():
        section, _, name = word.partition(".")
        if section in ("model", "data", "optim", "lora", "train") and name and "config." not in name:
            assert any(key == word or key.startswith(f"{word}.") for key in OURS) or "kwargs" in word, word


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("max_seq_length", "data.max_seq_len"), ("num_train_epochs", "train.epochs"), ("batch_size", "train.micro_batch_tokens"),
        ("per_device_train_batch_size", "train.micro_batch_tokens"), ("learning_rate", "optim.lr"), ("grad_clip", "optim.max_grad_norm"),
        ("evaluation_strategy", "train.eval_steps"), ("lora_alpha", "lora.alpha"), ("accumulation_steps", "train.grad_accum_steps"),
        ("save_dir", "train.output_dir"), ("save_weight", ""), ("from_weight", "model.path"), ("from_resume", "tunesmith resume"),
        ("dim", "model.config.hidden_size"), ("n_layers", "model.config.num_hidden_layers"), ("use_moe", "new:minimind-3-moe"),
        ("load_best_model_at_end", "train.early_stop_patience"), ("device_map", "CUDA_VISIBLE_DEVICES"), ("bias", "lora.bias"),
        ("formatting_func", "data.fields.prompt"), ("task_type", ""), ("packing", ""), ("completion_only_loss", "data.train_on"),
    ],
)  # fmt: skip
def test_names_of_other_tools_are_answered(fails, tmp_path: Path, key: str, ours: str) -> None:
    base = "model: {path: x}\ndata: {train: y}\ntrain: {output_dir: z"
    for name, text in ((key, f"{base}}}\n{key}: 1\n"), (f"train.{key}", f"{base}, {key}: 1}}\n")):
        (tmp_path / "run.yaml").write_text(text)
        problem = fails("train", tmp_path / "run.yaml").problems[0]
        assert problem.startswith(f"{name}: unknown key; ")
        assert ours in problem
    error = fails("train", "--model", "x", "--data", "y", "--output", "z", f"--{key}", "1")
    assert error.exit_code == 2
    assert error.problems[0].startswith(f"--{key}: unknown flag; ")
    assert ours in error.problems[0]


def test_a_mistyped_name_of_another_tool_is_answered(fails) -> None:
    error = fails("train", "--model", "x", "--data", "y", "--output", "z", "--num_train_epoch", "1")
    assert "num_train_epochs" in error.problems[0]
    assert "train.epochs" in error.problems[0]


TRL = {
    "model_name_or_path": "m", "dataset_name": "d", "learning_rate": 2e-4, "num_train_epochs": 1, "max_length": 512, "packing": True,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "use_peft": True, "lora_r": 16, "lora_alpha": 32,
    "lora_target_modules": "all-linear", "lora_modules_to_save": ["lm_head"], "bf16": True, "adam_beta2": 0.95, "max_steps": -1,
    "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "report_to": "none", "output_dir": "o",
    "neftune_noise_alpha": 5, "deepspeed": "zero3.json",
}  # fmt: skip
LLAMA_FACTORY = {
    "model_name_or_path": "m", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all",
    "dataset": "identity, chats", "template": "llama3", "cutoff_len": 2048, "val_size": 0.1, "per_device_train_batch_size": 1,
    "learning_rate": "1.0e-4", "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "quantization_bit": 4, "max_samples": 100,
    "train_on_prompt": False, "mask_history": True, "ddp_timeout": 1, "output_dir": "o", "some_new_key": 1,
}  # fmt: skip
AXOLOTL = {
    "base_model": "m", "load_in_4bit": True, "adapter": "qlora", "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True,
    "datasets": [{"path": "a/b", "name": "en", "split": "train[:20%]", "type": "chat_template", "field_messages": "talk",
                  "message_property_mappings": {"role": "who", "content": "said"}, "shards": 10}],
    "val_set_size": 0.05, "sequence_len": 4096, "sample_packing": True, "micro_batch_size": 2, "gradient_accumulation_steps": 4,
    "num_epochs": 2, "optimizer": "adamw_bnb_8bit", "learning_rate": 0.0002, "bf16": "auto", "train_on_inputs": False,
    "warmup_steps": 10, "output_dir": "./out", "special_tokens": {"pad_token": "x", "eos_token": "<|end|>"}, "chat_template": "chatml",
    "saves_per_epoch": 1, "evals_per_epoch": 4, "fsdp_config": {"offload": True}, "wandb_project": "p", "seed": 7,
    "plugins": ["axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.odd.OddPlugin"],
}  # fmt: skip
WANTED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "trl": (
        TRL,
        {"model": {"path": "m"}, "data": {"train": ["d:train"], "max_seq_len": 512},
         "optim": {"lr": 2e-4, "betas": [0.9, 0.95], "schedule": "cosine", "min_lr_ratio": 0.1, "warmup_ratio": 0.0},
         "lora": {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": ["all-linear"],
                  "modules_to_save": ["lm_head"]},
         "train": {"epochs": 1, "micro_batch_tokens": 1024, "grad_accum_steps": 8, "precision": "bf16", "output_dir": "o",
                   "seed": 42, "gradient_checkpointing": True, "deepspeed": "zero3.json"}},
        ["neftune_noise_alpha"],
    ),
    "llama-factory": (
        LLAMA_FACTORY,
        {"model": {"path": "m"},
         "data": {"train": [{"path": "data:identity", "limit": 100}, {"path": "data:chats", "limit": 100}],
                  "max_seq_len": 2048, "eval_split": 0.1, "train_on": "last_assistant"},
         "optim": {"lr": 1e-4, "schedule": "cosine", "warmup_ratio": 0.1},
         "lora": {"kind": "lora", "rank": 8, "target_modules": ["all-linear"], "quantize": "nf4"},
         "train": {"micro_batch_tokens": 2048, "epochs": 3.0, "output_dir": "o", "seed": 42, "gradient_checkpointing": True}},
        ["some_new_key"],
    ),
    "axolotl": (
        AXOLOTL,
        {"model": {"path": "m", "add_tokens": ["<|end|>"]},
         "data": {"train": ["a/b:en:train[:20%]"], "fields": {"messages": "talk", "role": "who", "content": "said"},
                  "eval_split": 0.05, "max_seq_len": 4096, "chat_template": "chatml"},
         "optim": {"name": "adamw_8bit", "lr": 0.0002, "warmup_steps": 10},
         "lora": {"quantize": "nf4", "kind": "lora", "rank": 32, "alpha": 16, "target_modules": ["all-linear"]},
         "train": {"micro_batch_tokens": 8192, "grad_accum_steps": 4, "epochs": 2, "precision": "auto", "output_dir": "./out",
                   "save_steps": 0.5, "eval_steps": 0.125, "seed": 7}},
        ["datasets.shards", "plugins"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("tool", WANTED)
def test_files_of_other_tools_are_converted(run, tmp_path: Path, tool: str) -> None:
    theirs, wanted, lost = WANTED[tool]
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(theirs))
    code, out, err = run("convert-config", path)
    assert code == 0, err
    ours = yaml.safe_load(out)
    for section in ours:
        assert ours[section] == wanted[section], section
    RunConfig.model_validate(ours)
    named = [
        line.removeprefix("no counterpart: ").split(": ")[0] for line in err.splitlines() if line.startswith("no c")
    ]
    assert sorted(named) == sorted(lost)
    assert (ours["train"].get("deepspeed") == "zero3.json") == (tool == "trl")
    assert ("#   offload: true" in out) == (tool == "axolotl")


@pytest.mark.parametrize("tool", WANTED)
def test_no_key_disappears(tool: str) -> None:
    """Without a key that says something, the run file or the remarks are others."""
    theirs = WANTED[tool][0]
    whole = convert(theirs)
    off = {"train_on_prompt", "train_on_inputs", "max_steps", "report_to"}  # say what holds anyway
    for key in theirs:
        less = convert({name: value for name, value in theirs.items() if name != key})
        assert key in off or (less.text, less.remarks()) != (whole.text, whole.remarks()), key


@pytest.mark.parametrize(
    ("theirs", "what"),
    [
        ({"model_name_or_path": "m", "stage": "dpo", "dataset": "d"}, "dpo"),
        ({"model_name_or_path": "m", "stage": "rm", "dataset": "d"}, "reward"),
        ({"base_model": "m", "rl": "kto", "datasets": [{"path": "d"}]}, "kto"),
        ({"base_model": "m", "rl": "grpo", "datasets": [{"path": "d"}]}, "reinforcement"),
        ({"base_model": "m", "reward_model": True, "datasets": [{"path": "d"}]}, "reward"),
        ({"model_name_or_path": "m", "beta": 0.1, "dataset_name": "d"}, "preference"),
        ({"model_name_or_path": "m", "export_dir": "x", "template": "t"}, "merge"),
        ({"model_name_or_path": "m", "infer_backend": "vllm", "template": "t"}, "inference"),
        ({"model_name_or_path": "m", "do_predict": True, "eval_dataset": "d", "stage": "sft"}, "prediction"),
        ({"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP"}, "launch"),
        ({"base_model": "m", "processor_type": "AutoProcessor", "datasets": [{"path": "d"}]}, "pictures"),
        ({"base_model": "m", "num_labels": 2, "datasets": [{"path": "d"}]}, "classifier"),
    ],
)  # fmt: skip
def test_files_for_something_else_are_refused_as_that(fails, tmp_path: Path, theirs: dict[str, Any], what: str) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(theirs))
    error = fails("convert-config", tmp_path / "x.yaml")
    assert (type(error), error.code) == (ConfigError, "other-method")
    assert what in str(error)


@pytest.mark.parametrize(
    ("text", "code"), [("a: 1\n", "no-known-keys"), ("a: [\n", "broken-yaml"), ("- 1\n", "no-sections")]
)
def test_what_is_no_file_of_another_tool(fails, tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert fails("convert-config", tmp_path / "x.yaml").code == code
    assert fails("convert-config", tmp_path / "none.yaml").code == "file-unreadable"


def test_raw_text_is_converted_to_pre_training() -> None:
    axolotl = convert(
        {
            "base_model": "m",
            "pretraining_dataset": [{"path": "a/b", "name": "en", "type": "pretrain", "text_column": "body"}],
        }
    )
    assert axolotl.method == "pretraining"
    assert axolotl.ours["data.train"] == ["a/b:en:train"]
    assert (axolotl.ours["data.format"], axolotl.ours["data.fields.text"]) == ("text", "body")
    assert convert({"model_name_or_path": "m", "stage": "pt", "dataset": "wiki"}).ours["data.format"] == "text"


@pytest.mark.parametrize("prefix", ["model.language_model.layers", "language_model.model.layers", "model.layers"])
def test_patterns_of_a_model_that_reads_pictures_fit_its_text_model(prefix: str) -> None:
    pattern = rf"{prefix}.[\d]+.(mlp|self_attn).(up|q)_proj"
    theirs = {"base_model": "m", "datasets": [{"path": "d", "type": "alpaca"}], "lora_target_modules": pattern}
    (ours,) = convert({**theirs, "adapter": "lora", "lora_r": 8}, Path(), None).ours["lora.target_modules"]
    assert match_names(ours, ["model.layers.0.self_attn.q_proj", f"{prefix}.0.mlp.up_proj", "vision.0.mlp.up_proj"]) == [
        "model.layers.0.self_attn.q_proj", f"{prefix}.0.mlp.up_proj"
    ]  # fmt: skip


def test_names_lead_to_the_files_and_columns_of_dataset_info(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": "m.jsonl", "columns": {"prompt": "q", "response": "a"}}})
    )
    write_jsonl(data / "m.jsonl", [{"q": "Hello", "a": "Hi"}])
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "x.yaml"
    path.write_text(
        yaml.safe_dump({"model_name_or_path": "m", "stage": "sft", "dataset": "mine,other", "max_samples": 3})
    )
    for given in (None, data, data / "dataset_info.json"):
        found = convert_file(path, None, given)
        assert found.ours["data.train"] == [{"path": f"{data}:{name}", "limit": 3} for name in ("mine", "other")]
        assert [line.split(":")[0] for line in found.lost] == ["dataset"]
    assert (
        convert({"model_name_or_path": "m", "stage": "sft", "dataset": "mine", "max_samples": 3}, data).ours[
            "data.limit"
        ]
        == 3
    )


def test_a_template_in_the_file_is_written_beside_the_run_file(run, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path, output = tmp_path / "x.yaml", tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "chat_template": template})
    )
    code, out, _ = run("convert-config", path, "--output", output)
    assert code == 0
    assert (tmp_path / "run.jinja").read_text() == template
    config = resolve_config(RunConfig, output, {})
    assert config.data.chat_template == str(tmp_path / "run.jinja")
    assert str(output) in out


def test_odd_values_are_named_and_never_crash() -> None:
    dotted = convert({"model_name_or_path": "m", "finetuning_type": "full", "lora_rank": 8})
    assert not any(key.startswith("lora.") for key in dotted.ours)
    assert dotted.left_out["the file trains all weights"] == ["lora.rank"]
    odd = {"base_model": "m", "micro_batch_size": "auto", "adam_beta1": "auto", "val_set_size": "5%", "warmup_steps": "few",
           "optimizer": "muon", "lr_scheduler": "rex", "report_to": ["mlflow"]}  # fmt: skip
    assert {line.split(":")[0] for line in convert(odd).lost} == {*odd} - {"base_model"}
    for key in (*SAME, *OTHERWISE, *HARMLESS_KEYS, *MISSING_KEYS):
        for value in (True, -1, "x", [], ["x"], [{"path": 1, "type": 2}], {"a": {"b": []}}, 1e400, "{{ x }}"):
            for base in ({"base_model": "m"}, {"model_name_or_path": "m", "stage": "sft"}, {"model_name_or_path": "m"}):
                convert({**base, key: value})


def test_shares_of_an_epoch() -> None:
    base = {"base_model": "m", "datasets": [{"path": "d", "type": "completion"}], "val_set_size": 0.1}
    assert convert({**base, "num_epochs": 1, "saves_per_epoch": 1}).ours.get("train.save_steps") is None
    assert convert({**base, "num_epochs": 3, "saves_per_epoch": 1}).ours["train.save_steps"] == pytest.approx(
        1 / 3, abs=1e-6
    )
    assert "saves_per_epoch" in convert({**base, "max_steps": 9, "saves_per_epoch": 1}).lost[0]
    assert nest({"train.seed": 0}) == {"train": {"seed": 0}}


ODD: list[Any] = [
    None, True, -1, 0, 0.5, float("inf"), float("nan"), 10**30, "", "1e-4", "no", [], [None], [[1]], {}, {"a": 1}, {"path": None},
    [{"path": ["a"], "type": ["b"], "split": 3, "roles": 3, "data_files": {"a": 1}, "message_property_mappings": {"role": None}}],
    {"datasets": [1, {"id": None, "weight": "x"}]}, "{{ x }}", {"name": ["x"], "r": "y", "target_modules": None},
]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return rng.choice(ODD)
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    place = rng.choice(list(changed)) if isinstance(changed, dict) else rng.randrange(len(changed))
    changed[place] = mutated(changed[place], rng)
    return changed


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_converted_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    files = [theirs for theirs, _, _ in WANTED.values()]
    for _ in range(150):
        theirs = dict(rng.choice(files))
        for _ in range(rng.randrange(1, 6)):
            other = rng.choice(files)
            key = rng.choice(list(other))
            theirs[key] = mutated(other[key], rng)
        if find_tool(theirs) and find_method(theirs) == "sft":
            assert all(isinstance(line, str) and len(line) < 10_000 for line in convert(theirs).remarks())


_BASES = {
    "axolotl": ({"base_model": "m", "datasets": [{"path": "d"}], "adapter": "lora", "output_dir": "o"},
                TURNS | axolotl.TURNS | axolotl.LAST),
    "llama-factory": ({"model_name_or_path": "m", "stage": "sft", "dataset": "d", "output_dir": "o"},
                      TURNS | llamafactory.TURNS),
    "trl": ({"model_name_or_path": "m", "dataset_name": "d", "use_peft": True, "output_dir": "o"}, TURNS | trl.TURNS),
}  # fmt: skip


@pytest.mark.parametrize("value", ["fast", -3, 0.3, [7], {"zebra": 1}], ids=str)
@pytest.mark.parametrize("tool", _BASES)
def test_an_invalid_value_of_any_key_is_named(tool: str, value: Any) -> None:
    """What is written is valid, or the remarks name the key; a value that is written is found in the run file."""
    base, turns = _BASES[tool]
    for key in {**SAME, **turns}:
        converted = convert(base | {key: value})
        said = "\n".join(converted.remarks())
        word = next(iter(value)) if isinstance(value, list | dict) else value
        is_written = any(str(word) in str(ours) for ours in converted.ours.values())
        assert key in said or SAME.get(key, key) in said or is_written, key
        if not converted.problems:
            RunConfig.model_validate(yaml.safe_load(converted.text))


def test_an_invalid_value_is_named_with_their_key() -> None:
    theirs = _BASES["axolotl"][0] | {"learning_rate": "fast", "num_epochs": -3, "lora_r": 0, "saves_per_epoch": "often"}
    converted = convert(theirs)
    assert [problem.split(":")[0] for problem in converted.problems] == [
        "optim.lr (from learning_rate)", "lora.rank (from lora_r)", "train.epochs (from num_epochs)",
    ]  # fmt: skip
    assert [lost.split(":")[0] for lost in converted.lost] == ["saves_per_epoch"]


def test_mixing_of_rows_is_not_taken_for_shares_of_tokens() -> None:
    theirs = {"model_name_or_path": "m", "stage": "sft", "dataset": "a,b"}
    assert not convert({**theirs, "mix_strategy": "concat"}, Path()).lost
    found = convert({**theirs, "mix_strategy": "interleave_under", "interleave_probs": "0.3,0.7"}, Path())
    assert [line.split(":")[0] for line in found.lost] == ["mix_strategy", "interleave_probs"]
    assert all("weight" in line for line in found.lost)
