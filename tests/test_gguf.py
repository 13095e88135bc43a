"""GGUF files: what llama.cpp computes from them, what has no such form, and files that are not as written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tunesmith
from conftest import build_model, save_folder, tiny_config
from tunesmith.errors import TunesmithError
from tunesmith.exports import gguf as exporter
from tunesmith.gguf.architecture import describe_model
from tunesmith.gguf.modelfile import find_turn_texts, write_modelfile
from tunesmith.gguf.reader import Answers
from tunesmith.gguf.rope import describe_rope
from tunesmith.gguf.seal import find_seal
from tunesmith.gguf.tensors import interleave
from tunesmith.model.tokenizer import build_encoder

pytest.importorskip("gguf")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., TunesmithError]
is_long = pytest.mark.skipif("TUNESMITH_LONG" not in os.environ, reason="long; set TUNESMITH_LONG=1")
needs_reader = pytest.mark.skipif(exporter.reader_version() is None, reason="xllamacpp is not installed")


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
}
NORMALIZED = {"norm_topk_prob": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}),
    "llama eps": ("llama", {"rms_norm_eps": 1e-2}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                                 "original_max_position_embeddings": 32}}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 wide heads": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", NORMALIZED),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe without biases": ("qwen2_moe", {"qkv_bias": False}),
    "gpt2": ("gpt2", {}),
    "gpt2 inner": ("gpt2", {"n_inner": 96, "layer_norm_epsilon": 1e-3}),
    "gemma2": ("gemma2", {}),
    "gemma2 scale": ("gemma2", {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0,
                                "final_logit_softcapping": 8.0}),
    "gemma3": ("gemma3", {"layer_types": ["sliding_attention", "sliding_attention"]}),
    "gemma3 periodic": ("gemma3", {"rope_parameters": GEMMA3_ROPE, "query_pre_attn_scalar": 32}),
}  # fmt: skip
ALWAYS = ("llama3 rope", "gpt2", "gemma3 periodic")


@pytest.fixture
def folder(tmp_path: Path, plain_tokenizer: Any) -> Path:
    return save_folder(tmp_path / "model", tiny_config("qwen3", rope_parameters=None), plain_tokenizer)


def export(run: Run, folder: Path, output: Path, *words: object) -> str:
    code, out, err = run("export", folder, "--format", "gguf", "--output", output, *words)
    assert code == 0, err + out
    return out + err


@needs_reader
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else (is_long, pytest.mark.slow)) for name in MODELS]
)
def test_llama_cpp_computes_the_models_logits(name: str, tmp_path: Path, plain_tokenizer: Any, run: Run) -> None:
    kind, values = MODELS[name]
    folder = save_folder(tmp_path / "model", tiny_config(kind, **values), plain_tokenizer)
    said = export(run, folder, tmp_path / "m.gguf", "--type", "f32")
    assert "NOT PROVEN" not in said
    assert run("export", tmp_path / "m.gguf", "--verify")[0] == 0


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "activation": ("llama", {"hidden_act": "gelu"}),
    "dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "window of experts": ("qwen3_moe", {**NORMALIZED, "use_sliding_window": True, "sliding_window": 8}),
    "plain experts": ("qwen3_moe", {"norm_topk_prob": False}),
    "dense layers": ("qwen3_moe", {**NORMALIZED, "mlp_only_layers": [0]}),
    "sparse step": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "gated experts": ("qwen2_moe", NORMALIZED),
    "llama3 rope": ("qwen3", {"rope_parameters": LLAMA3_ROPE}),
    "scaled layers": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "unscaled": ("gpt2", {"scale_attn_weights": False}),
    "activation of gpt2": ("gpt2", {"activation_function": "relu"}),
    "untied gemma": ("gemma2", {"tie_word_embeddings": False}),
    "no cap": ("gemma2", {"attn_logit_softcapping": None}),
    "cap": ("gemma3", {"final_logit_softcapping": 30.0}),
    "both ways": ("gemma3", {"use_bidirectional_attention": True}),
    "no period": ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}),
    "biases": ("qwen3", {"attention_bias": True}),
    "other architecture": ("phi", {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gguf_form_is_named(name: str) -> None:
    import transformers

    kind, values = REFUSED[name]
    config = transformers.PhiConfig() if kind == "phi" else tiny_config(kind, **values)
    with pytest.raises(TunesmithError) as caught:
        describe_model("m", config)
    assert caught.value.code == "no-gguf-form"
    named = {"other architecture": "phi", "dynamic rope": "rope_type", "llama3 rope": "rope_type", "window": "window"}
    assert named.get(name, [*values][-1] if values else "") in str(caught.value)


def test_llama3_frequencies_are_transformers() -> None:
    config = tiny_config("llama", rope_parameters=LLAMA3_ROPE, head_dim=64)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    found = describe_rope(config.rope_parameters, 64, 512, reads_factors=True).factors
    plain = torch.tensor([10000.0 ** (-2 * pair / 64) for pair in range(32)])
    torch.testing.assert_close(plain / torch.tensor(found), wanted)
    assert len(set(found)) > 3  # short, long and between


def test_rows_are_interleaved_by_head() -> None:
    weight = torch.arange(16.0)[:, None].repeat(1, 3)
    assert interleave(weight, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def other_values(key: str, value: Any, config: Any) -> Iterator[Any]:
    """Values that change a field."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value * 2, value + 1)
    elif isinstance(value, float):
        yield from (value * 3 + 0.01,)
    elif value is None:
        yield from (2, 0.5, True)
    elif isinstance(value, str):
        yield from ("relu", "gelu")
    elif key == "layer_types":
        yield list(reversed(value))
        yield ["sliding_attention"] * len(value)


@is_long
@needs_reader
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "gpt2", "gemma2", "gemma3"])
def test_every_field_of_a_config_is_carried_over_or_refused(
    kind: str, tmp_path: Path, plain_tokenizer: Any, run: Run
) -> None:
    """Each field is changed; what can still be built and differs is exported and proven, or refused by name."""
    usual = tiny_config(kind, **(NORMALIZED if kind == "qwen3_moe" else {}))
    ids = torch.tensor([[5, 17, 200, 31, 8, 99, 300, 44, 12, 7, 260, 31]])
    seen = {"proven": 0, "refused": 0}
    for key, value in usual.to_dict().items():
        for number, other in enumerate(other_values(key, value, usual)):
            if key in ("dtype", "model_type", "vocab_size", "num_hidden_layers", "architectures") or "token_id" in key:
                continue
            try:
                config = tiny_config(kind, **{**(NORMALIZED if kind == "qwen3_moe" else {}), key: other})
                model = build_model(config)
                with torch.no_grad():
                    model(ids)
                target = tmp_path / f"{key}-{number}"
                save_folder(target, config, plain_tokenizer)
            except Exception:
                continue  # transformers has no such model
            code, out, err = run(
                "export", target, "--format", "gguf", "--type", "f32", "--output", tmp_path / f"{key}-{number}.gguf"
            )
            if code == 0:
                assert "NOT PROVEN" not in out + err, key
                seen["proven"] += 1
            else:
                assert "has no GGUF form" in err, (key, other, err)
                seen["refused"] += 1
    assert seen["proven"] > 3
    assert seen["refused"] > 0


@needs_reader
@pytest.mark.parametrize("kind", ["f16", pytest.param("bf16", marks=is_long), "q8_0"])
def test_types(kind: str, tmp_path: Path, plain_tokenizer: Any, run: Run) -> None:
    folder = save_folder(tmp_path / "model", tiny_config("llama"), plain_tokenizer)
    assert "NOT PROVEN" not in export(run, folder, tmp_path / "m.gguf", "--type", kind)


def test_a_file_changed_between_writing_and_proof_is_not_proven(
    folder: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporter.write_gguf

    def write_and_change(path: Path, *words: Any) -> dict[str, str]:
        hashes = write(path, *words)
        data = bytearray(path.read_bytes())
        data[-100] ^= 1  # in the last tensor
        path.write_bytes(data)
        return hashes

    monkeypatch.setattr(exporter, "write_gguf", write_and_change)
    error = fails("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf")
    assert error.code == "written-differently"
    assert not [*tmp_path.glob("*m.*"), *tmp_path.glob(".*")]


def test_a_changed_file_is_not_called_proven(
    folder: Path, tmp_path: Path, run: Run, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    monkeypatch.setattr(exporter, "reader_version", lambda: None)
    assert "NOT PROVEN" in export(run, folder, file)
    code, out, err = run("export", file, "--verify")
    assert code == 0
    assert "NOT PROVEN" in out + err
    seal = find_seal(file)
    assert seal is not None
    assert not seal.is_proven
    whole = file.read_bytes()
    for at in (-100, len(whole) // 2, seal.sha256_at):  # weights, and the hash itself
        data = bytearray(whole)
        data[at] ^= 1
        file.write_bytes(data)
        assert fails("export", file, "--verify").code == "gguf-changed"
    file.write_bytes(whole[:-40])
    assert fails("export", file, "--verify").code == "gguf-changed"
    file.write_bytes(b"GGUF" + bytes(100))
    assert fails("export", file, "--verify").code == "gguf-not-sealed"
    file.write_bytes(b"")
    assert fails("export", file, "--verify").code == "not-gguf"
    assert fails("export", tmp_path / "none.gguf", "--verify").code == "model-not-found"
    error = fails("export", file, "--verify", "--output", tmp_path / "n.gguf", "--type", "f16")
    assert error.code == "unused-option"
    assert "--output: --verify" in str(error)
    assert "--type: --verify" in str(error)


def test_the_longest_name_of_a_file(
    folder: Path, tmp_path: Path, run: Run, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Modelfile has a longer name than the GGUF file."""
    monkeypatch.setattr(exporter, "reader_version", lambda: None)
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - len(".Modelfile")
    error = fails("export", folder, "--format", "gguf", "--output", tmp_path / f"{'m' * (longest + 1)}.gguf")
    assert error.code == "output-not-writable"
    assert "too long" in str(error)
    out = export(run, folder, tmp_path / f"it's {'m' * (longest - 5)}.gguf")
    assert "ollama create NAME -f '" in out
    assert len(list(tmp_path.glob("it*"))) == 2
    assert not list(tmp_path.glob(".*"))


def test_mistakes_leave_no_files(
    folder: Path, tmp_path: Path, fails: Fails, make_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "reader_version", lambda: None)
    words = ("export", folder, "--format", "gguf", "--output")
    before = sorted(tmp_path.iterdir())
    assert fails(*words, tmp_path / "m.bin").code == "output-not-gguf"
    assert (
        fails("export", folder, "--format", "hf", "--type", "f16", "--output", tmp_path / "x").code == "unused-option"
    )
    assert fails("export", folder, "--format", "gguf").code == "missing-flag"
    with pytest.raises(TunesmithError) as caught:
        tunesmith.export(folder, format="gguf", type="q4_k_m", output=tmp_path / "m.gguf")
    assert caught.value.code == "unknown-choice"
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "taken.gguf").write_bytes(b"mine")
    (tmp_path / "other.Modelfile").write_bytes(b"mine")
    assert fails(*words, tmp_path / "taken.gguf").code == "output-exists"
    assert fails(*words, tmp_path / "other.gguf").code == "output-exists"
    assert (tmp_path / "taken.gguf").read_bytes() == b"mine"
    disk = make_disk("64k")
    assert fails(*words, disk / "m.gguf").code == "disk-too-small"
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    assert fails(*words, disk / "m.gguf").code == "disk-full"
    assert not list(disk.iterdir())


def test_without_the_package_the_extra_is_named(
    folder: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert fails("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf").code == "extra-missing"


@needs_reader
def test_a_crash_of_the_library_is_an_error(folder: Path, tmp_path: Path, fails: Fails) -> None:
    from tunesmith.gguf.reader import Job, ask

    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 200)
    with pytest.raises(TunesmithError) as caught:
        ask(Job(str(broken)))
    assert caught.value.code == "reader-failed"


def test_weights_that_cannot_be_written(tmp_path: Path, plain_tokenizer: Any, fails: Fails) -> None:
    for value, code in ((1e6, "weights-too-large"), (math.nan, "weights-not-finite")):
        config = tiny_config("llama")
        model = build_model(config)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = value
        target = tmp_path / code
        model.save_pretrained(target)
        plain_tokenizer.save_pretrained(target)
        words = ("--format", "gguf", "--type", "f16", "--output", tmp_path / "m.gguf")
        assert fails("export", target, *words).code == code
    assert not [*tmp_path.glob("*m.*"), *tmp_path.glob(".*")]


def test_other_tokens_must_be_allowed(
    tmp_path: Path, plain_tokenizer: Any, run: Run, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy

    from tokenizers import Regex, pre_tokenizers

    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    folder = save_folder(tmp_path / "model", tiny_config("qwen3"), tokenizer)
    error = fails("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf")
    assert error.code == "tokens-differ"
    assert "%" in str(error)
    said = export(run, folder, tmp_path / "m.gguf", "--allow", "tokens")
    assert "NOT PROVEN" in said


@needs_reader
def test_other_expressions_that_give_the_same_ids_are_no_obstacle(
    tmp_path: Path, plain_tokenizer: Any, run: Run
) -> None:
    """As in tokenizers of earlier versions, which cut at digits, with few merges."""
    import copy

    from tokenizers import Regex, pre_tokenizers

    tokenizer = copy.deepcopy(plain_tokenizer)
    digits = pre_tokenizers.Split(Regex(r" ?\p{N}"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    folder = save_folder(tmp_path / "model", tiny_config("qwen3"), tokenizer)
    said = export(run, folder, tmp_path / "m.gguf")
    assert "none of 3,000 random texts" in said
    assert "proven     by" in said


@needs_reader
def test_an_adapter_is_merged(folder: Path, tmp_path: Path, run: Run, fails: Fails) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(tmp_path / "adapter")
    said = export(run, tmp_path / "adapter", tmp_path / "m.gguf")
    assert "merged into" in said
    assert "NOT PROVEN" not in said
    folder.rename(tmp_path / "gone")
    words = ("--format", "gguf", "--output", tmp_path / "n.gguf")
    assert fails("export", tmp_path / "adapter", *words).code == "model-not-found"
    assert not list(tmp_path.glob("*n.gguf*"))


@needs_reader
def test_other_templates_must_be_allowed(
    folder: Path, tmp_path: Path, run: Run, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.gguf import proof

    ask = proof.ask

    def misread(job: Any) -> Answers:
        found = ask(job)
        found.rendered[0]["text"] += " "
        return found

    monkeypatch.setattr(proof, "ask", misread)
    words = ("--format", "gguf", "--output", tmp_path / "m.gguf")
    assert fails("export", folder, *words).code == "template-differs"
    assert not [*tmp_path.glob("*m.*"), *tmp_path.glob(".*")]
    assert "NOT PROVEN" in export(run, folder, tmp_path / "m.gguf", "--allow", "template")


def test_ollama_gets_the_template(plain_tokenizer: Any) -> None:
    import copy
    import datetime

    tokenizer = copy.deepcopy(plain_tokenizer)
    encoder = build_encoder(tokenizer, None, {}, datetime.datetime(2026, 1, 2))
    renderer = encoder.renderer()
    assert renderer is not None
    turns = find_turn_texts(renderer)
    assert turns is not None
    assert turns.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    text = write_modelfile("m.gguf", renderer, "", ["<|im_end|>"], 512)
    assert "FROM ./m.gguf\n" in text
    assert '{{ if eq .Role "system" }}{{ "<|im_start|>system\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "PARAMETER num_ctx 512" in text
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}{{ m.content }}<|im_end|>{% endfor %}"
    encoder = build_encoder(tokenizer, None, {}, datetime.datetime(2026, 1, 2))
    assert "TEMPLATE" not in write_modelfile("m.gguf", encoder.renderer(), "", ["<|im_end|>"], 512)


def test_metadata(folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFReader

    monkeypatch.setattr(exporter, "reader_version", lambda: None)
    settings = json.loads((folder / "generation_config.json").read_text())
    export(run, folder, tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["general.architecture"] == "qwen3"
    assert fields["qwen3.context_length"] == 512
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert "im_start" in fields["tokenizer.chat_template"]
    assert fields["tunesmith.proven"] is False
    assert settings
