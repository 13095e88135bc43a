"""An adapter is only used on its own base, compared by file contents; hostile adapters end in an error message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import chat_row, raises, save_folder, tiny_config, write_jsonl
from test_adapter_matrix import train
from test_adapters import base_of, logits_of
from tunesmith.adapters.adapter_config import PatternError, match_names, resolve_pattern
from tunesmith.config.schema import ModelSection
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.generation.speaker import load_speaker
from tunesmith.run.resume import run_resume

Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., TunesmithError]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def train_adapter(base: Path, output: Path, **flags: Any) -> Path:
    rows = [chat_row(f"What is {i}?", f"It is {i}.") for i in range(8)]
    data = write_jsonl(output.parent / f"{output.name}.jsonl", rows)
    values = {"lora.kind": "lora", "lora.rank": 4, "optim.lr": 1e-2, "train.max_steps": 2, "train.save_steps": 1}
    values |= {"data.max_seq_len": 64, "train.keep_checkpoints": 9, "data.train": [str(data)]} | flags
    code, err = train(**values, model__path=str(base), train__output_dir=str(output))
    assert code == 0, err
    return output


def kill_before_the_end(trained: Path) -> None:
    shutil.rmtree(trained / "adapter")
    shutil.rmtree(trained / "checkpoints" / "step-000002")


def made_by_peft(base: Path, folder: Path, **changes: Any) -> Path:
    """An adapter saved by another tool, with B matrices that are not 0."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    change_config(folder, **{"init_lora_weights": True} | changes)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_base(base: Path) -> None:
    """Replace the weights by others of the same shapes."""
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})


@pytest.fixture
def base(tmp_path: Path, tokenizer: Any) -> Path:
    return base_of(tmp_path / "base", tokenizer)


# the base


def test_a_base_changed_in_place_is_refused_everywhere(run: Run, fails: Fails, base: Path, tmp_path: Path) -> None:
    trained = train_adapter(base, tmp_path / "run")
    assert (trained / "checkpoints" / "step-000001" / "base.json").is_file()
    good = tmp_path / "good"
    shutil.copytree(base, good)
    stat = (base / "model.safetensors").stat()
    change_base(base)
    os.utime(base / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    data = ("--data", tmp_path / "run.jsonl", "--data.max_seq_len", 64)
    for words in (
        ("merge", trained, "--output", tmp_path / "merged"),
        ("chat", trained, "--prompt", "Hi"),
        ("train", "--model", trained, *data, "--output", tmp_path / "further"),
    ):
        error = fails(*words)
        assert (error.code, error.exit_code) == ("base-changed", 1), words
        assert "model.safetensors" in str(error)
        assert "--allow-changed-base" in str(error)
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "further").exists()
    # the contents of the files decide, not their location
    code, out, err = run("merge", trained, "--base", good, "--output", tmp_path / "merged")
    assert code == 0, err
    assert "note:" not in out
    code, out, err = run("merge", trained, "--allow-changed-base", "--output", tmp_path / "other")
    assert code == 0, err
    assert "note: " in out
    assert run("chat", trained, "--prompt", "Hi", "--allow-changed-base", "--max-new-tokens", 2)[0] == 0


def test_a_config_changed_in_place_is_refused(fails: Fails, base: Path, tmp_path: Path) -> None:
    trained = train_adapter(base, tmp_path / "run")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "transformers_version": "9"}))
    error = fails("merge", trained, "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("base-changed", 1)


def test_resume_refuses_a_base_changed_in_the_middle(base: Path, tmp_path: Path) -> None:
    trained = train_adapter(base, tmp_path / "run")
    kill_before_the_end(trained)
    change_base(base)
    with raises(TunesmithError, "run-changed", "model: "):
        run_resume(str(trained), {})


def test_an_adapter_on_another_architecture(run: Run, fails: Fails, tokenizer: Any, tmp_path: Path) -> None:
    """Another base with the same names and shapes; the adapter was trained on a Llama."""
    llama = save_folder(tmp_path / "llama", tiny_config("llama", eos_token_id=0), tokenizer)
    qwen3 = save_folder(tmp_path / "qwen3", tiny_config("qwen3", eos_token_id=0), tokenizer)
    trained = train_adapter(llama, tmp_path / "run")
    error = fails("merge", trained, "--base", qwen3, "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("base-changed", 1)
    # adapters of other tools have no record, and a remark says so
    (trained / "adapter" / "base.json").unlink()
    code, out, err = run("merge", trained, "--base", qwen3, "--output", tmp_path / "merged")
    assert code == 0, err
    assert "has no record of its base's weights" in out


def test_an_adapter_on_random_weights_is_refused_before_any_work(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row("a", "b")] * 4)
    code, err = train(**{"lora.kind": "lora", "model.path": "new:minimind-26m", "data.train": [str(data)],
                         "model.tokenizer": str(tmp_path / "tokenizer"), "train.output_dir": str(tmp_path / "run")})  # fmt: skip
    assert code == 1
    assert "new:minimind-26m: " in err
    assert not (tmp_path / "run").exists()


def test_a_hub_base_is_pinned_to_its_commit(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Trained on a commit of main; after main has moved on, the adapter still opens on that commit."""
    repo = tmp_path / "hub" / "models--own--tiny"
    for folder in ("refs", "blobs"):
        (repo / folder).mkdir(parents=True)
    commits = ["a" * 40, "b" * 40]
    for commit, source in zip(commits, (base, base_of(tmp_path / "next", tokenizer, "llama")), strict=True):
        (repo / "snapshots" / commit).mkdir(parents=True)
        for file in source.iterdir():
            blob = repo / "blobs" / f"{commit}-{file.name}"
            shutil.copy(file, blob)
            (repo / "snapshots" / commit / file.name).symlink_to(blob)
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row(f"What is {i}?", f"It is {i}.") for i in range(8)])
    words = ["train", "--model", "own/tiny", "--data", str(data), "--output", str(tmp_path / "run"), "--lora.kind", "lora",
             "--train.max_steps", "1", "--data.max_seq_len", "64"]  # fmt: skip
    merge = ["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]
    longer = ["resume", str(tmp_path / "run"), "--train.max_steps", "2"]
    script = (
        "import json, pathlib, sys\n"
        "from tunesmith.cli import main\n"
        "for ref, words in json.load(sys.stdin):\n"
        f"    pathlib.Path({str(repo / 'refs' / 'main')!r}).write_text(ref)\n"
        "    print('exit code', main(words), flush=True)\n"
    )
    commands = [(commits[0], words), (commits[1], merge), (commits[1], longer)]
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(commands), text=True, capture_output=True, check=False,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 0", "exit code 0", "exit code 1"], done.stderr
    assert json.loads((tmp_path / "run" / "adapter" / "base.json").read_text())["commit"] == commits[0]
    assert f"snapshots/{commits[0]}" in done.stdout
    assert "model: own/tiny has changed since the run began" in done.stderr


# the initial matrices of PiSSA and OLoRA


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_first_matrices_of_pissa_are_verified_and_made_again(base: Path, tmp_path: Path, damage: str) -> None:
    trained = train_adapter(base, tmp_path / "run", **{"lora.kind": "pissa"})
    wanted = (trained / "adapter" / WEIGHTS).read_bytes()
    kill_before_the_end(trained)
    weights = trained / "adapter_init" / WEIGHTS
    if damage == "changed":
        save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    else:
        shutil.rmtree(trained / "adapter_init")
    run_resume(str(trained), {})
    assert (trained / "adapter" / WEIGHTS).read_bytes() == wanted


def test_a_checkpoint_of_pissa_is_not_an_adapter(fails: Fails, base: Path, tmp_path: Path) -> None:
    trained = train_adapter(base, tmp_path / "run", **{"lora.kind": "pissa"})
    error = fails("merge", trained / "checkpoints" / "step-000001", "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("adapter-config-invalid", 1)
    assert "tunesmith resume RUN" in str(error)


# adapters of other tools, and the contents of their files

HOSTILE: dict[str, tuple[dict[str, Any], str, str]] = {
    "a pattern without end": ({"target_modules": r"(a|a|m|o|d|e|l|\w|\.)*(\w|\.)*(\w+\.?)*!"}, "bad-pattern or adapter-does-not-fit", ""),
    "a broken pattern": ({"target_modules": "(q_proj"}, "bad-pattern", "(q_proj"),
    "a broken alpha_pattern": ({"alpha_pattern": {"(": 3.0}}, "bad-pattern", "("),
    "r a word": ({"r": "4"}, "adapter-config-invalid", "r is '4'"),
    "r nothing": ({"r": None}, "adapter-config-invalid", "r is None"),
    "r 0": ({"r": 0}, "adapter-config-invalid", "r is 0"),
    "r huge": ({"r": 10**12}, "adapter-config-invalid", "r is 1000000000000"),
    "another r": ({"r": 8}, "adapter-does-not-fit", ""),
    "alpha infinite": ({"lora_alpha": float("inf")}, "adapter-config-invalid", "lora_alpha is inf"),
    "lists of lists": ({"target_modules": [["q_proj"]]}, "adapter-config-invalid", "target_modules is [['q_proj']]"),
    "a module that is a pattern": ({"modules_to_save": ["(a+)+$"]}, "adapter-config-invalid", "modules_to_save"),
    "a rank of nothing": ({"rank_pattern": {"q_proj": 0}}, "adapter-config-invalid", "rank_pattern"),
    "rows without end": ({"trainable_token_indices": [2**30]}, "adapter-does-not-fit", "1,073,741,824"),
    "another kind": ({"peft_type": "LOHA"}, "adapter-kind-unknown", "LOHA"),
    "another task": ({"task_type": "SEQ_CLS"}, "adapter-config-invalid", "SEQ_CLS"),
    "layers twice": ({"layer_replication": [[0, 2], [0, 2]]}, "adapter-config-invalid", "layer_replication"),
    "a base that changes": ({"init_lora_weights": "pissa_niter_4"}, "adapter-config-invalid", "pissa_niter_4"),
    "no base": ({"base_model_name_or_path": None}, "adapter-without-base", "base_model_name_or_path"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configs_end_in_words(base: Path, tmp_path: Path, name: str) -> None:
    changes, code, fact = HOSTILE[name]
    adapter = made_by_peft(base, tmp_path / "adapter", **changes)
    began = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load_speaker(ModelSection(path=str(adapter)))
    assert caught.value.code in code.split(" or ")  # a time limit may end a pattern, or not
    assert fact in str(caught.value)
    assert time.monotonic() - began < 20


def test_what_peft_can_say_is_still_opened(base: Path, tmp_path: Path) -> None:
    """Patterns, ranks and scales by module: the logits are those that plain peft computes."""
    from peft import PeftModel

    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=r".*\.(q|v)_proj", rank_pattern={r".*\.0\..*q_proj": 2},
        alpha_pattern={"v_proj": 32, r"layers\.1\..*q_proj": 3}, init_lora_weights=False, layers_to_transform=None,
    )  # fmt: skip
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ours = load_speaker(ModelSection(path=str(tmp_path / "adapter"))).model
    assert torch.allclose(logits_of(ours), logits_of(theirs), atol=1e-5)


def test_a_pattern_has_a_time_limit() -> None:
    began = time.monotonic()
    with pytest.raises(PatternError, match="takes too long"):
        match_names(r"(\w|\w\w|\.)*(\w|\w\w|\.)*[^\w]", ["model.layers.0.self_attn.q_proj" * 3])
    assert time.monotonic() - began < 10
    assert resolve_pattern({"q_proj": 1, r".*": 2}, ["a.q_proj", "a.v"]) == {"a.q_proj": 1, "a.v": 2}


@pytest.mark.parametrize(
    ("change", "code", "fact"),
    [
        (lambda t: t.to(torch.int8), "adapter-dtype-unknown", "int8"),
        (lambda t: t.to(torch.float8_e4m3fn), "adapter-dtype-unknown", "float8_e4m3fn"),
        (lambda t: t.to(torch.complex64), "adapter-dtype-unknown", "complex64"),
        (lambda t: t * float("nan"), "adapter-not-finite", "NaN"),
    ],
)
def test_what_is_not_a_weight(
    base: Path, tmp_path: Path, change: Callable[[torch.Tensor], Any], code: str, fact: str
) -> None:
    adapter = made_by_peft(base, tmp_path / "adapter")
    weights = load_file(adapter / WEIGHTS)
    first = min(weights)
    save_file(weights | {first: change(weights[first]).contiguous()}, adapter / WEIGHTS, {"format": "pt"})
    with raises(ModelError, code, fact):
        load_speaker(ModelSection(path=str(adapter)))


def test_half_of_an_adapter(base: Path, tmp_path: Path) -> None:
    adapter = made_by_peft(base, tmp_path / "adapter")
    weights = load_file(adapter / WEIGHTS)
    kept = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    save_file(kept, adapter / WEIGHTS, {"format": "pt"})
    with raises(ModelError, "adapter-incomplete", "lacks 4 tensors"):
        load_speaker(ModelSection(path=str(adapter)))


def test_adapters_that_are_each_others_base(fails: Fails, base: Path, tmp_path: Path) -> None:
    one, two = (made_by_peft(base, tmp_path / name) for name in ("one", "two"))
    for mine, other in ((one, one), (one, two), (two, one)):
        change_config(mine, base_model_name_or_path=str(other))
        error = fails("chat", mine, "--prompt", "Hi")
        assert (error.code, error.exit_code) == ("base-is-adapter", 1)


def test_names_of_adapters_do_not_meet_names_of_parameters(base: Path, tmp_path: Path) -> None:
    names = ("bias", "lora", "default", "weight", "a.b", "model")
    folders = [made_by_peft(base, tmp_path / name) for name in names]
    wanted = logits_of(load_speaker(ModelSection(path=str(folders[0]))).model)
    speaker = load_speaker(ModelSection(path=str(folders[0])), more=[str(folder) for folder in folders[1:]])
    assert speaker.adapter_names == list(names)
    for name in names:
        speaker.switch(name)
        assert torch.allclose(logits_of(speaker.model), wanted, atol=1e-6)
    speaker.switch("base")
    assert not torch.allclose(logits_of(speaker.model), wanted, atol=1e-3)


# merge: code, links, outputs


def test_code_of_the_base_is_never_run_unasked(fails: Fails, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    adapter = made_by_peft(base, tmp_path / "adapter")
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"}}
    (base / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    error = fails("merge", adapter, "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("model-needs-code", 1)
    assert "--trust-remote-code" in str(error)
    assert not (tmp_path / "ran").exists()


def test_links_out_of_a_folder_are_not_followed(run: Run, fails: Fails, base: Path, tmp_path: Path) -> None:
    adapter = made_by_peft(base, tmp_path / "adapter")
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (adapter / "vocab_notes.txt").symlink_to(secret)
    code, _, err = run("merge", adapter, "--output", tmp_path / "merged")
    assert code == 0, err
    assert not (tmp_path / "merged" / "vocab_notes.txt").exists()
    (adapter / "vocab.txt").symlink_to(secret)
    error = fails("merge", adapter, "--output", tmp_path / "again")
    assert (error.code, error.exit_code) == ("link-outside-folder", 1)
    assert not (tmp_path / "again").exists()


def test_what_cannot_be_an_output(run: Run, base: Path, tmp_path: Path) -> None:
    adapter = made_by_peft(base, tmp_path / "adapter")
    os.mkfifo(tmp_path / "pipe")
    for output in (tmp_path / "pipe", "~nosuchuser/x", "/dev/null", "/dev/null/x", tmp_path / "a\udcff"):
        code, _, err = run("merge", adapter, "--output", output)
        assert code in (1, 2), output
        assert "Traceback" not in err


def test_what_a_killed_merge_left_is_removed(run: Run, base: Path, tmp_path: Path) -> None:
    adapter = made_by_peft(base, tmp_path / "adapter")
    left = tmp_path / ".merged.0123abcd.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    code, _, err = run("merge", adapter, "--output", tmp_path / "merged")
    assert code == 0, err
    assert not left.exists()


def test_a_base_that_is_not_finite(fails: Fails, base: Path, tmp_path: Path) -> None:
    adapter = made_by_peft(base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    error = fails("merge", adapter, "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("base-not-finite", 1)


def test_names_in_adapter_config_are_in_order(base: Path, tmp_path: Path) -> None:
    trained = train_adapter(base, tmp_path / "run")
    names = json.loads((trained / "adapter" / CONFIG).read_text())["target_modules"]
    assert names == sorted(names)
