"""MiniMind's weight files: opened and written for each generation, and refused where they are something else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import minimind_reference as reference
import tunesmith
from conftest import chat_row, killed_after, write_jsonl
from minimind_reference import Sizes, make_state, sizes_of
from tunesmith.config.schema import ModelSection
from tunesmith.errors import ConfigError, TunesmithError, UsageError
from tunesmith.model.load import load_config, load_model
from tunesmith.model.source import find_model

Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., TunesmithError]
IDS = torch.tensor([3, 50, 7, 7, 120, 399, 1, 2, 88, 14, 260, 31])
GENERATIONS = ("2024", "2025", "minimind-3")
KINDS = [(generation, is_moe) for generation in GENERATIONS for is_moe in (False, True)]
FEW = [("2024", False), ("2025", True), ("minimind-3", True)]  # for what takes a training
KIND_NAMES = [f"{generation}{' MoE' if is_moe else ''}" for generation, is_moe in KINDS]


@pytest.fixture
def tokenizer_folder(tokenizer: Any, tmp_path: Path) -> Path:
    """A tokenizer of 400 tokens, as the small files have."""
    own = tmp_path / "tokenizer"
    tokenizer.save_pretrained(own)
    return own


def vocabulary(folder: Path) -> int:
    return len(AutoTokenizer.from_pretrained(folder))


def save(path: Path, state: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def open_file(path: Path, tokenizer_folder: Path, **config: Any) -> Any:
    section = ModelSection(path=str(path), tokenizer=str(tokenizer_folder), config=config)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return load_model(section, load_config(section, tokenizer), torch.float32, seed=0).eval()


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids[None]).logits[0]


def assert_close(found: torch.Tensor, wanted: torch.Tensor, generation: str) -> None:
    limit = 1e-5 if generation == "2024" else 1e-6  # complex rotary embeddings round otherwise
    assert (found.log_softmax(-1) - wanted.log_softmax(-1)).abs().max() < limit * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize(("generation", "is_moe"), KINDS, ids=KIND_NAMES)
def test_a_file_computes_what_minimind_computes(
    tokenizer_folder: Path, tmp_path: Path, generation: str, is_moe: bool
) -> None:
    sizes = sizes_of(generation, is_moe, vocab=vocabulary(tokenizer_folder))
    ids = IDS % sizes.vocab
    state = make_state(sizes)
    model = open_file(save(tmp_path / "out" / "full_sft_32.pth", state), tokenizer_folder)
    assert_close(logits_of(model, ids), reference.logits(state, sizes, ids), generation)
    # a pretrained file with twice the key-value heads, one expert, and other rotary base and epsilon
    odd = replace(sizes, heads=4, kv_heads=2 if generation != "minimind-3" else 4, top_k=1, theta=1e4, eps=1e-4)
    state = make_state(odd, seed=1)
    given: dict[str, Any] = {"rope_theta": 1e4, "rms_norm_eps": 1e-4}
    if generation != "minimind-3":
        given |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if is_moe:
        given["num_experts_per_tok"] = 1
    model = open_file(save(tmp_path / "odd.pth", state), tokenizer_folder, **given)
    assert_close(logits_of(model, ids), reference.logits(state, odd, ids), generation)


def test_several_shared_experts_become_one(tokenizer_folder: Path, tmp_path: Path) -> None:
    sizes = sizes_of("2025", True, vocab=vocabulary(tokenizer_folder), shared=3)
    state, ids = make_state(sizes), IDS % sizes.vocab
    model = open_file(save(tmp_path / "m.pth", state), tokenizer_folder)
    assert_close(logits_of(model, ids), reference.logits(state, sizes, ids), "2025")


def test_what_the_first_release_leaves_unsaid(tokenizer_folder: Path, tmp_path: Path) -> None:
    """16 heads, 8 key-value heads and a rotary base of 1e4."""
    sizes = Sizes("2024", hidden=64, heads=16, kv_heads=8, vocab=vocabulary(tokenizer_folder), theta=1e4)
    state, ids = make_state(sizes), IDS % sizes.vocab
    model = open_file(save(tmp_path / "m.pth", state), tokenizer_folder)
    assert_close(logits_of(model, ids), reference.logits(state, sizes, ids), "2024")


@pytest.mark.parametrize(("generation", "is_moe"), KINDS, ids=KIND_NAMES)
def test_a_file_exported_again_is_the_same_tensors(
    run: Run, tokenizer_folder: Path, tmp_path: Path, generation: str, is_moe: bool
) -> None:
    sizes = sizes_of(generation, is_moe, vocab=vocabulary(tokenizer_folder))
    state = make_state(sizes, dtype=torch.float16)
    source = save(tmp_path / "pretrain.pth", state)
    words = ("--tokenizer", tokenizer_folder, "--format", "minimind", "--generation", generation)
    code, out, err = run("export", source, *words, "--output", tmp_path / "out")
    assert code == 0, err
    file = tmp_path / "out" / f"full_sft_32{'_moe' if is_moe else ''}.pth"
    again = torch.load(file, weights_only=True)
    assert set(again) == set(state)
    assert all(
        torch.equal(again[name], tensor) and again[name].dtype == torch.float16 for name, tensor in state.items()
    )
    # the sizes of these small models are not those of MiniMind's config class
    assert "intermediate_size=64" in out or "hidden_dim=64" in out
    if (generation, is_moe) not in FEW:
        return
    # by way of a Hugging Face folder
    code, _, err = run("export", source, "--tokenizer", tokenizer_folder, "--format", "hf", "--output", tmp_path / "hf")
    assert code == 0, err
    ids = IDS % sizes.vocab
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert_close(logits_of(model, ids), reference.logits(state, sizes, ids), generation)
    code, _, err = run("export", tmp_path / "hf", *words[2:], "--weight", "pretrain", "--output", tmp_path / "back")
    assert code == 0, err
    again = torch.load(next((tmp_path / "back").glob("pretrain_32*.pth")), weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def train_words(base: Path, tokenizer: Path, data: Path, output: Path) -> tuple[Any, ...]:
    return ("train", "--model", base, "--tokenizer", tokenizer, "--data", data, "--output", output, "--data.max_seq_len", 64,
            "--train.micro_batch_tokens", 64, "--train.max_steps", 4, "--train.save_steps", 2, "--optim.lr", 1e-2,
            "--train.keep_checkpoints", 9)  # fmt: skip


@pytest.mark.parametrize(("generation", "is_moe"), FEW)
def test_a_run_from_a_file_resumes_chats_and_goes_back(
    run: Run, tokenizer_folder: Path, chats: Path, tmp_path: Path, generation: str, is_moe: bool
) -> None:
    sizes = sizes_of(generation, is_moe, vocab=vocabulary(tokenizer_folder))
    base = save(tmp_path / "out" / "pretrain_32.pth", make_state(sizes))
    code, out, err = run(*train_words(base, tokenizer_folder, chats, tmp_path / "run"))
    assert code == 0, err
    assert f"MiniMind {generation.removeprefix('minimind-')}" in out
    assert ("num_attention_heads 8" in out) == (generation != "minimind-3")  # what the file does not say
    part = killed_after(tmp_path / "run", 2, tmp_path / "part")
    code, _, err = run("resume", part)
    assert code == 0, err
    weights = [folder / "model" / "model.safetensors" for folder in (tmp_path / "run", part)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    code, _, err = run("export", tmp_path / "run", "--format", "minimind", "--output", tmp_path / "back")
    assert code == 0, err
    (file,) = (tmp_path / "back").glob("*.pth")
    ids = IDS % sizes.vocab
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    state = torch.load(file, weights_only=True)
    written = replace(sizes, generation="2025") if generation == "2024" else sizes  # the newest form is the default
    difference = (reference.logits(state, written, ids) - logits_of(trained, ids)).abs().max()
    assert difference < 0.02 * logits_of(trained, ids).abs().max()  # half precision
    words = ("chat", file, "--tokenizer", tokenizer_folder, "--prompt", "What is the answer 3?", "--max-new-tokens", 4)
    code, out, err = run(*words, "--temperature", 0)
    assert code == 0, err


def test_a_changed_file_is_noticed(run: Run, fails: Fails, tokenizer_folder: Path, chats: Path, tmp_path: Path) -> None:
    sizes = sizes_of("2025", False, vocab=vocabulary(tokenizer_folder))
    base = save(tmp_path / "pretrain_32.pth", make_state(sizes))
    code, _, err = run(*train_words(base, tokenizer_folder, chats, tmp_path / "run"), "--lora.kind", "lora")
    assert code == 0, err
    killed_after(tmp_path / "run", 2, tmp_path / "part")
    shutil.copytree(tmp_path / "part", tmp_path / "other")
    assert run("resume", tmp_path / "part")[0] == 0
    save(base, make_state(sizes, seed=1))
    assert fails("resume", tmp_path / "other").code.startswith("run-")
    assert fails("chat", tmp_path / "run", "--prompt", "hi").code == "base-changed"


def test_an_adapter_on_a_file_merges(run: Run, tokenizer_folder: Path, chats: Path, tmp_path: Path) -> None:
    """Also where model.config says what the file does not: the adapter's record of its base remembers it."""
    sizes = replace(sizes_of("2024", False, vocab=vocabulary(tokenizer_folder)), heads=4, kv_heads=1, theta=1e4)
    base = save(tmp_path / "pretrain_32.pth", make_state(sizes))
    given = ("--model.config.num_attention_heads", 4, "--model.config.num_key_value_heads=1",
             "--model.config.rope_theta", "1e4")  # fmt: skip
    code, _, err = run(*train_words(base, tokenizer_folder, chats, tmp_path / "run"), *given, "--lora.kind", "lora")
    assert code == 0, err
    code, _, err = run("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 0, err
    ids = IDS % sizes.vocab
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.num_attention_heads == 4
    code, _, err = run(
        "export", tmp_path / "run", "--format", "minimind", "--generation", "2024", "--output", tmp_path / "m"
    )
    assert code == 0, err
    state = torch.load(tmp_path / "m" / "full_sft_32.pth", weights_only=True)
    difference = (reference.logits(state, sizes, ids) - logits_of(merged, ids)).abs().max()
    assert difference < 0.02 * logits_of(merged, ids).abs().max()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_lora_files_in_and_out(run: Run, tokenizer_folder: Path, chats: Path, tmp_path: Path, generation: str) -> None:
    sizes = sizes_of(generation, False, vocab=vocabulary(tokenizer_folder))
    state, ids = make_state(sizes), IDS % sizes.vocab
    base = save(tmp_path / "full_sft_32.pth", state)
    torch.manual_seed(3)
    lora, added = {}, dict(state)
    for name in [n for n in state if n.endswith(("wq.weight", "wo.weight", "q_proj.weight", "o_proj.weight"))]:
        a, b = torch.randn(16, 32) * 0.1, torch.randn(32, 16) * 0.1
        stem = name.removesuffix(".weight")
        lora |= {f"{stem}.lora.A.weight": a.half(), f"{stem}.lora.B.weight": b.half()}
        added[name] = state[name] + b.half().float() @ a.half().float()
    file = save(tmp_path / "lora_medical_32.pth", lora)
    code, _, err = run("export", file, "--base", base, "--tokenizer", tokenizer_folder, "--format", "hf",
                       "--output", tmp_path / "adapter")  # fmt: skip
    assert code == 0, err
    theirs = PeftModel.from_pretrained(open_file(base, tokenizer_folder), tmp_path / "adapter")
    assert_close(logits_of(theirs, ids), reference.logits(added, sizes, ids), "2024")
    code, _, err = run("chat", tmp_path / "adapter", "--prompt", "hi", "--max-new-tokens", 2)
    assert code == 0, err
    code, _, err = run("export", tmp_path / "adapter", "--format", "minimind-lora", "--generation", generation,
                       "--weight", "lora_medical", "--output", tmp_path / "out")  # fmt: skip
    assert code == 0, err
    again = torch.load(tmp_path / "out" / "lora_medical_32.pth", weights_only=True)
    assert set(again) == set(lora)
    assert all(torch.equal(again[name], tensor) for name, tensor in lora.items())


def test_an_adapter_that_does_not_fit_a_lora_file(
    run: Run, fails: Fails, tokenizer_folder: Path, chats: Path, tmp_path: Path
) -> None:
    base = save(tmp_path / "p.pth", make_state(sizes_of("2025", False, vocab=vocabulary(tokenizer_folder))))
    for kind, words in {"all": (), "dora": ("--lora.target_modules", "q_proj")}.items():
        run_kind = "dora" if kind == "dora" else "lora"
        output = tmp_path / kind
        code, _, err = run(*train_words(base, tokenizer_folder, chats, output), "--lora.kind", run_kind, *words)
        assert code == 0, err
        error = fails("export", output, "--format", "minimind-lora", "--output", tmp_path / "x")
        assert error.code == "lora-does-not-fit"
    # one layer of two, with a scale
    words = ("--lora.kind", "rslora", "--lora.target_modules", r"model\.layers\.1\.self_attn\.o_proj", "--lora.rank", 4)
    code, _, err = run(*train_words(base, tokenizer_folder, chats, tmp_path / "one"), *words)
    assert code == 0, err
    code, out, err = run("export", tmp_path / "one", "--format", "minimind-lora", "--output", tmp_path / "lora")
    assert code == 0, err
    assert "rank=4" in out
    state = torch.load(tmp_path / "lora" / "lora_32.pth", weights_only=True)
    assert len(state) == 8  # q and o of two layers
    assert {tuple(tensor.shape) for tensor in state.values()} == {(4, 32), (32, 4)}


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("code has run",))


def bad_file(kind: str, path: Path, sizes: Sizes) -> Path:
    state: dict[str, Any] = dict(make_state(sizes))
    first = min(name for name in state if "q_proj" in name)
    if kind == "another project":
        state = {"transformer.wte.weight": torch.zeros(4, 4), "transformer.h.0.ln.weight": torch.zeros(4)}
    elif kind == "wrong size":
        state[first] = torch.zeros(16, 32)
    elif kind == "lacks a layer":
        del state[first]
    elif kind == "has biases":
        state[first.replace("weight", "bias")] = torch.zeros(32)
    elif kind == "code":
        state["x"] = Payload()
    elif kind == "not finite":
        state[first] = torch.full((32, 32), float("nan"))
    elif kind == "numbers":
        state[first] = torch.zeros(32, 32, dtype=torch.int64)
    elif kind == "a list":
        return save(path, [1, 2])  # type: ignore[arg-type]
    elif kind == "lora":
        state = {first.replace("weight", "lora.A.weight"): torch.zeros(4, 32)}
    save(path, state)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are no weights")
    return path


BAD = {
    "another project": "pth-of-another-project", "wrong size": "pth-wrong-shapes", "lacks a layer": "pth-of-another-project",
    "has biases": "pth-of-another-project", "code": "pth-has-code", "not finite": "pth-not-finite",
    "numbers": "pth-not-weights", "a list": "pth-not-weights", "lora": "pth-is-lora", "truncated": "pth-damaged",
    "empty": "pth-damaged", "text": "pth-damaged",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_other_files_are_refused(
    fails: Fails, capsys: pytest.CaptureFixture[str], tokenizer_folder: Path, chats: Path, tmp_path: Path, kind: str
) -> None:
    path = bad_file(kind, tmp_path / "full_sft_32.pth", sizes_of("2025", False, vocab=vocabulary(tokenizer_folder)))
    error = fails(*train_words(path, tokenizer_folder, chats, tmp_path / "run"))
    assert error.code == BAD[kind]
    assert str(path) in str(error)
    assert "code has run" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_opened_as_asked(fails: Fails, tokenizer_folder: Path, chats: Path, tmp_path: Path) -> None:
    size = vocabulary(tokenizer_folder)
    path = save(tmp_path / "full_sft_32.pth", make_state(sizes_of("2025", False, vocab=size)))
    words = train_words(path, tokenizer_folder, chats, tmp_path / "run")
    for key, value in {
        "num_attention_heads": 5,
        "num_key_value_heads": 8,
        "rope_theta": "x",
        "hidden_size": 64,
    }.items():
        error = fails(*words, f"--model.config.{key}", value)
        assert isinstance(error, ConfigError)
        assert key in str(error)
    assert (
        fails("train", "--model", path, "--data", chats, "--output", tmp_path / "run").code == "pth-without-tokenizer"
    )
    for rows in (size + 7, size - 7):  # a tokenizer of another vocabulary size
        other = save(tmp_path / f"{rows}.pth", make_state(sizes_of("2025", False, vocab=rows)))
        error = fails(*train_words(other, tokenizer_folder, chats, tmp_path / "run"))
        assert error.code == "tokenizer-does-not-match"
    missing = tmp_path / "full_sft_23.pth"
    assert "full_sft_32.pth" in str(fails(*train_words(missing, tokenizer_folder, chats, tmp_path / "run")))


def test_the_forms_of_a_training_state(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Saved through DistributedDataParallel and torch.compile, with buffers, without the head, as {weight}_resume.pth."""
    sizes = sizes_of("2025", False, vocab=vocabulary(tokenizer_folder))
    state = make_state(sizes)
    wrapped: dict[str, Any] = {
        f"_orig_mod.module.{name}": tensor for name, tensor in state.items() if "lm_head" not in name
    }
    wrapped |= {
        "_orig_mod.module.model.freqs_cos": torch.zeros(4, 4),
        "_orig_mod.module.model.freqs_sin": torch.zeros(4, 4),
    }
    path = save(tmp_path / "a.pth", {"model": wrapped, "optimizer": {"state": {}}, "epoch": 1})
    ids = IDS % sizes.vocab
    assert_close(logits_of(open_file(path, tokenizer_folder), ids), reference.logits(state, sizes, ids), "2025")
    legacy = tmp_path / "b.pth"
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    assert_close(logits_of(open_file(legacy, tokenizer_folder), ids), reference.logits(state, sizes, ids), "2025")


def test_models_that_minimind_has_no_place_for(run: Run, fails: Fails, model_folder: Path, tmp_path: Path) -> None:
    def refused(**values: Any) -> str:
        config = json.loads((model_folder / "config.json").read_text())
        (model_folder / "config.json").write_text(json.dumps(config | values))
        code = fails("export", model_folder, "--format", "minimind", "--output", tmp_path / "x").code
        (model_folder / "config.json").write_text(json.dumps(config))
        return code

    assert run("export", model_folder, "--format", "minimind", "--output", tmp_path / "fits")[0] == 0
    assert refused(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}) == "not-a-minimind-model"
    assert refused(hidden_act="gelu") == "not-a-minimind-model"
    assert fails("export", model_folder, "--format", "minimind", "--generation", "2025", "--output",
                 tmp_path / "x").code == "wrong-generation"  # fmt: skip
    assert fails("export", model_folder, "--format", "hf", "--output", tmp_path / "x").code == "already-hf"
    assert fails("export", model_folder, "--format", "hf", "--weight", "a", "--output", tmp_path / "x").exit_code == 2
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x*"))


def test_the_same_file_is_converted_once(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pth", make_state(sizes_of("minimind-3", True)))
    first, second = find_model(str(path)), find_model(str(path))
    assert first == second
    assert find_model(str(path), {"num_experts_per_tok": 2}).name != first.name


def test_labels_of_a_preview_are_those_of_the_run(run: Run, tokenizer_folder: Path, tmp_path: Path) -> None:
    base = save(tmp_path / "p.pth", make_state(sizes_of("2025", True, vocab=vocabulary(tokenizer_folder))))
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row("What is it?", "It is a fox.")])
    words = ("--model", base, "--tokenizer", tokenizer_folder, "--data", data)
    code, out, err = run("preview", *words, "--json")
    assert code == 0, err
    assert json.loads(out)["samples"]
    assert run("check", *words)[0] == 0


def test_python(tokenizer_folder: Path, tmp_path: Path) -> None:
    sizes = sizes_of("2025", False, vocab=vocabulary(tokenizer_folder))
    path = save(tmp_path / "full_sft_32.pth", make_state(sizes))
    model = tunesmith.load(
        path, tokenizer=tokenizer_folder, config={"num_attention_heads": 4, "num_key_value_heads": 1}
    )
    assert isinstance(model.reply("Hello", max_new_tokens=3, temperature=0), str)
    folder = tunesmith.export(path, tokenizer=tokenizer_folder, format="hf", output=tmp_path / "hf")
    assert tunesmith.export(folder, format="minimind", weight="dpo", output=tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out" / "dpo_32.pth").is_file()
    with pytest.raises(UsageError):
        tunesmith.export(folder, format="gguf", output=tmp_path / "x")


def damaged(state: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A state dict with a few random changes of names, shapes and kinds."""
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(state))
        value = state[name]
        change = rng.randrange(9)
        if change == 0:
            del state[name]
        elif change == 1:
            state[name + rng.choice([".x", "", "\n", "\x1b[2J"])] = torch.zeros(3)
        elif change == 2:
            state[name] = torch.zeros(rng.choice([(), (0,), (1,), (2, 3, 4), (0, 32)]))
        elif change == 3:
            state[name] = value[:1] if isinstance(value, torch.Tensor) and value.ndim else value
        elif change == 4:
            state[name] = rng.choice([None, 1, "text", [1.0], {"a": torch.zeros(1)}, torch.zeros(2, dtype=torch.int8)])
        elif change == 5:
            state[name.replace("0", "9999999999", 1)] = state.pop(name)
        elif change == 6:
            state[name.replace("layers.1", "layers.7")] = state.pop(name)
        elif change == 7 and isinstance(value, torch.Tensor) and value.is_floating_point():
            state[name] = value.to(rng.choice([torch.float64, torch.bfloat16, torch.float8_e4m3fn]))
        else:
            state[name.replace("model.", "module.", 1)] = state.pop(name)
        if not state:
            break
    return state


@pytest.mark.parametrize(("generation", "is_moe"), KINDS, ids=KIND_NAMES)
def test_damaged_files_are_opened_or_refused(tmp_path: Path, generation: str, is_moe: bool) -> None:
    """Whatever is in a file: a model whose tensors all come from it, or an error that says what is wrong."""
    refused = 0
    for seed in range(25):
        rng = random.Random(f"{generation} {is_moe} {seed}")
        state = damaged(dict(make_state(sizes_of(generation, is_moe, vocab=16))), rng)
        path = save(tmp_path / f"{seed}.pth", state)
        try:
            source = find_model(str(path))
        except TunesmithError:
            refused += 1
            continue
        model, report = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"], seed
        assert not report["unexpected_keys"], seed
        assert model(input_ids=torch.arange(4)[None]).logits.isfinite().all()
    assert refused > 15
