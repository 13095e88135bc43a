"""config.json for readers older than transformers 5, which take other keys, or a default of their own."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from conftest import ARCHITECTURES, build_model, save_folder, tiny_config
from tunesmith.adapters.base import describe_base, find_changes
from tunesmith.model.save import save_model
from tunesmith.model.tokenizer import build_encoder
from tunesmith.older_keys import OLDER_KEYS, add_older_keys

Run = Callable[..., tuple[int, str, str]]
THETA = {"rope_type": "default", "rope_theta": 54321.0}
YARN = {"rope_type": "yarn", "rope_theta": 54321.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 4321.0},
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 54321.0},
}
SIX = {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"rope_parameters": THETA}) for name in ARCHITECTURES if name not in ("gpt2", "gemma3")},
    "gpt2": ("gpt2", {}),
    "gemma3": ("gemma3", {"rope_parameters": GEMMA3, **SIX}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 345, don't you think? 你好，世界"},
]
OLD = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype="auto", attn_implementation="eager")  # sdpa has no softcap there
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
chat = tokenizer.apply_chat_template(json.loads(sys.argv[3]), tokenize=True, add_generation_prompt=True)
stops = transformers.GenerationConfig.from_pretrained(sys.argv[1]).eos_token_id
print(json.dumps([str(logits.dtype), logits.double().tolist(), chat, stops]))
"""


def saved(name: str, folder: Path, tokenizer: Any) -> Any:
    """The model of MODELS, written as a run writes it."""
    kind, changes = MODELS[name]
    model = build_model(tiny_config(kind, **changes))
    model.config.save_pretrained(folder.with_name("start"))
    tokenizer.save_pretrained(folder.with_name("start"))
    tokenizer = AutoTokenizer.from_pretrained(folder.with_name("start"))  # Qwen2's cuts digits, whatever the file says
    save_model(model, build_encoder(tokenizer, None, {}, datetime.datetime(2026, 1, 1)), "# card\n", folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_older_names_stand_beside_the_new_ones(name: str, tmp_path: Path, plain_tokenizer: Any) -> None:
    model = saved(name, tmp_path / "model", plain_tokenizer)
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["torch_dtype"] == content["dtype"] == "float32"
    if name == "gpt2":
        assert content["n_ctx"] == 256
    else:
        assert content["rope_theta"] == 54321.0
    if name == "qwen3_moe":
        assert content["num_experts"] == 4
    if name == "gemma3":
        assert (content["rope_local_base_freq"], content["sliding_window_pattern"]) == (4321.0, 6)
    assert bool(content.get("rope_scaling")) == ("yarn" in name or name == "gemma3")
    before, after = (json.loads(c.to_json_string()) for c in (model.config, AutoConfig.from_pretrained(tmp_path / "model")))  # fmt: skip
    assert {**before, **{key: after[key] for key in OLDER_KEYS if key in after}} == after


def test_a_merged_model_has_them_too(tmp_path: Path, plain_tokenizer: Any, run: Run, chats: Path) -> None:
    base = save_folder(tmp_path / "base", tiny_config("llama", rope_parameters=THETA), plain_tokenizer)
    words = ("--model", base, "--data", chats, "--train.max_steps", 1, "--data.max_seq_len", 64, "--lora.kind", "lora")
    assert run("train", *words, "--output", tmp_path / "run")[0] == 0
    code, out, err = run("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 0, out + err
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["rope_theta"] == 54321.0


def test_classes_with_names_of_their_own(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 54321.0, "partial_rotary_factor": 0.5}
    transformers.GPTNeoXConfig(rope_parameters=rope, dtype="float32").save_pretrained(tmp_path)
    add_older_keys(tmp_path, transformers.GPTNeoXConfig)
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["rotary_emb_base"], content["rotary_pct"]) == (54321.0, 0.5)
    config = transformers.FalconH1Config()  # with an infinite number, which JSON has not
    config.save_pretrained(tmp_path)
    add_older_keys(tmp_path, transformers.FalconH1Config)
    again = transformers.FalconH1Config.from_pretrained(tmp_path)
    assert again.time_step_limit == config.time_step_limit
    assert "rope_theta" in json.loads((tmp_path / "config.json").read_text())


def test_an_older_key_that_says_something_else_is_mended(tmp_path: Path) -> None:
    config = tiny_config("llama", rope_parameters=THETA, dtype="float32")
    content = json.loads(config.to_json_string()) | {"rope_theta": 777.0, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    meant = AutoConfig.from_pretrained(tmp_path).to_dict()
    add_older_keys(tmp_path, type(config))
    found = json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == meant
    assert found["rope_theta"] == meant["rope_parameters"]["rope_theta"]
    assert f"torch.{found['torch_dtype']}" == str(meant["dtype"]) or found["torch_dtype"] == meant["dtype"]


def test_a_config_that_its_class_refuses_stays_as_it_is(tmp_path: Path) -> None:
    content = {"model_type": "llama", "hidden_size": "many"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    add_older_keys(tmp_path, transformers.LlamaConfig)
    assert json.loads((tmp_path / "config.json").read_text()) == content


def test_a_base_to_which_the_keys_were_added_is_the_same_base(tmp_path: Path, plain_tokenizer: Any) -> None:
    folder = save_folder(tmp_path / "base", tiny_config("qwen3_moe", rope_parameters=THETA), plain_tokenizer)
    record = describe_base(folder)
    add_older_keys(folder, transformers.Qwen3MoeConfig)
    assert find_changes(record, describe_base(folder)) == []
    content = json.loads((folder / "config.json").read_text())
    content["rope_parameters"]["rope_theta"] = 1.0
    (folder / "config.json").write_text(json.dumps(content))
    assert len(find_changes(record, describe_base(folder))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_4_computes_the_same(name: str, tmp_path: Path, plain_tokenizer: Any) -> None:
    """With TUNESMITH_TRANSFORMERS4, a folder in which transformers 4 is installed (pip install --target)."""
    packages = os.environ.get("TUNESMITH_TRANSFORMERS4")
    if not packages:
        pytest.skip("set TUNESMITH_TRANSFORMERS4 to a folder with transformers 4, huggingface_hub 0 and tokenizers")
    model = saved(name, tmp_path / "model", plain_tokenizer).eval()
    ids = torch.randint(3, 300, (1, 48), generator=torch.Generator().manual_seed(0))
    path = os.pathsep.join([packages, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", OLD, str(tmp_path / "model"), json.dumps(ids.tolist()), json.dumps(CHAT)],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dtype, found, chat, stops = json.loads(done.stdout.splitlines()[-1])
    assert dtype == "torch.float32"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert chat == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert stops == model.generation_config.eos_token_id
    with torch.no_grad():
        wanted = model(ids).logits.double()
    assert ((torch.tensor(found) - wanted).abs().max() / wanted.abs().max()).item() < 1e-5
