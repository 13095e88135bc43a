"""Promise 6: a merged model gives the logits of base and adapter, or the command fails and leaves no files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import killed_after
from test_adapters import KINDS, base_of, logits_of, train_words
from tunesmith.config.choices import MERGE_METHODS
from tunesmith.config.schema import ModelSection
from tunesmith.errors import TunesmithError
from tunesmith.generation.speaker import load_speaker
from tunesmith.use import merge as merging

Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., TunesmithError]


@pytest.fixture
def base(tmp_path: Path, tokenizer: Any) -> Path:
    return base_of(tmp_path / "base", tokenizer)


def train(run: Run, base: Path, chats: Path, output: Path, kind: str = "lora", *more: Any) -> Path:
    code, _, err = run(*train_words(base, chats, output, kind), *more)
    assert code == 0, err
    return output


def on_base(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter / "adapter"
    )


def merged_logits(folder: Path) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("dropout", "lora+", "nf4", "int8", "8-bit optimizer")]
)
def test_every_kind(run: Run, base: Path, chats: Path, tmp_path: Path, kind: str) -> None:
    trained = train(run, base, chats, tmp_path / "run", kind)
    code, out, err = run("merge", trained, "--output", tmp_path / "merged")
    assert code == 0, err
    assert "proof      logits on 5 prompts differ by " in out
    wanted = logits_of(on_base(base, trained))
    assert torch.allclose(merged_logits(tmp_path / "merged"), wanted, atol=1e-5 * wanted.abs().max().item())
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "merged", trained / "adapter"))
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    stop = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    assert (stop[0] if isinstance(stop, list) else stop) == ours.convert_tokens_to_ids("<|im_end|>")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3_moe"])
def test_other_architectures(run: Run, tokenizer: Any, chats: Path, tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path / "base", tokenizer, name)
    trained = train(run, base, chats, tmp_path / "run")
    code, _, err = run("merge", trained, "--output", tmp_path / "merged")
    assert code == 0, err
    wanted = logits_of(on_base(base, trained))
    assert torch.allclose(merged_logits(tmp_path / "merged"), wanted, atol=1e-5 * wanted.abs().max().item())


def test_an_adapter_trained_in_4_bits_goes_onto_the_full_base(
    run: Run, tokenizer: Any, chats: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base = base_of(tmp_path / "base", tokenizer, hidden_size=64, intermediate_size=128, head_dim=16)
    trained = train(run, base, chats, tmp_path / "run", "nf4")
    code, _, err = run("merge", trained, "--output", tmp_path / "merged")
    assert code == 0, err
    wanted = logits_of(on_base(base, trained))
    assert (merged_logits(tmp_path / "merged") - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_bf16_and_shards(run: Run, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tokenizer)
    trained = train(run, base, chats, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    code, out, err = run("merge", trained, "--allow-changed-base", "--output", tmp_path / "merged")
    assert code == 0, err
    assert "allowed for bfloat16: 5e-02" in out
    names = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == names
    assert {t.dtype for t in load_file(tmp_path / "merged" / names[0]).values()} == {torch.bfloat16}


def test_tied_embeddings_with_whole_modules(run: Run, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    """A tied base stays tied; training the head alone unties it, and the command says so."""
    base = base_of(tmp_path / "base", tokenizer, "llama", tie_word_embeddings=True)
    both = train(run, base, chats, tmp_path / "both", "whole modules")
    code, out, err = run("merge", both, "--output", tmp_path / "both-merged")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "both-merged")
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied or "untied" in out
    assert torch.allclose(logits_of(model), logits_of(on_base(base, both)), atol=1e-4)


@pytest.fixture
def two(run: Run, base: Path, chats: Path, tmp_path: Path) -> tuple[Path, Path]:
    return (
        train(run, base, chats, tmp_path / "one"),
        train(run, base, chats, tmp_path / "two", "lora", "--train.seed", 5, "--optim.lr", 3e-2),
    )


@pytest.mark.parametrize("method", [m for m in MERGE_METHODS if m != "sequential"])
def test_two_adapters_by_each_method_equal_pefts_own(
    run: Run, base: Path, two: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    code, out, err = run("merge", *two, "--method", method, "--weights", 1, 0.5, "--output", tmp_path / "merged")
    assert code == 0, err
    assert f"compared, {method}" in out
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), two[0] / "adapter", adapter_name="a")
    theirs.load_adapter(two[1] / "adapter", adapter_name="b")
    torch.manual_seed(0)
    more = {} if method in ("linear", "cat", "svd") else {"density": 0.5}
    theirs.base_model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "c", combination_type=method, **more)
    theirs.set_adapter("c")
    wanted = logits_of(theirs)
    assert (merged_logits(tmp_path / "merged") - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_one_after_another(run: Run, base: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    """As in background/003: merge, unload, merge the next."""
    code, _, err = run("merge", *two, "--output", tmp_path / "merged")
    assert code == 0, err
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    for folder in two:
        model = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    wanted = logits_of(model)
    assert (merged_logits(tmp_path / "merged") - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["dora", "whole modules", "biases"])
def test_what_peft_does_not_combine_is_refused(
    run: Run, fails: Fails, base: Path, chats: Path, tmp_path: Path, kind: str
) -> None:
    """Combined by peft it would become zeros, or half of it, and still agree with itself."""
    one, two = train(run, base, chats, tmp_path / "one"), train(run, base, chats, tmp_path / "two", kind)
    error = fails("merge", one, two, "--method", "cat", "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("not-combinable", 1)
    assert run("merge", one, two, "--output", tmp_path / "merged")[0] == 0


def test_rslora_is_added_up_at_its_own_scale(run: Run, base: Path, chats: Path, tmp_path: Path) -> None:
    folders = [
        train(run, base, chats, tmp_path / name, "rslora", "--train.seed", seed) for seed, name in enumerate("ab")
    ]
    assert run("merge", *folders, "--method", "cat", "--output", tmp_path / "cat")[0] == 0
    assert run("merge", *folders, "--output", tmp_path / "sequential")[0] == 0  # plain sums: the order does not matter
    one, two = merged_logits(tmp_path / "cat"), merged_logits(tmp_path / "sequential")
    assert torch.allclose(one, two, atol=1e-4 * one.abs().max().item())


@pytest.mark.filterwarnings("ignore")  # peft advises against it
def test_a_low_rank_head_on_a_tied_base(run: Run, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tokenizer, "llama", tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="40KB")
    (base / "model.safetensors").unlink()
    trained = train(run, base, chats, tmp_path / "run", "lora", "--lora.target_modules", "q_proj", "lm_head")
    code, out, err = run("merge", trained, "--output", tmp_path / "merged")
    assert code == 0, err
    assert "untied" in out
    wanted = logits_of(on_base(base, trained))
    assert torch.allclose(merged_logits(tmp_path / "merged"), wanted, atol=1e-5 * wanted.abs().max().item())
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" in index["weight_map"]


def test_an_adapter_trained_without_a_template_leaves_none(run: Run, base: Path, tmp_path: Path) -> None:
    from conftest import write_jsonl

    data = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": f"What is {i}?\n", "completion": f"It is {i}."} for i in range(40)]
    )
    trained = train(run, base, data, tmp_path / "run", "lora", "--data.chat_template", "none")
    assert run("merge", trained, "--output", tmp_path / "merged")[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template is None


def test_a_checkpoint_as_the_base(run: Run, base: Path, chats: Path, tmp_path: Path) -> None:
    code, _, err = run("train", "--model", base, "--data", chats, "--output", tmp_path / "full", "--data.max_seq_len", 64,
                       "--train.max_steps", 1)  # fmt: skip
    assert code == 0, err
    checkpoint = tmp_path / "full" / "checkpoints" / "step-000001"
    trained = train(run, checkpoint, chats, tmp_path / "run")
    assert run("merge", trained, "--output", tmp_path / "merged")[0] == 0
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors")] == ["model.safetensors"]


# on any error, no files are left


def test_a_base_cut_short(run: Run, fails: Fails, base: Path, chats: Path, tmp_path: Path) -> None:
    trained = train(run, base, chats, tmp_path / "run")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    error = fails("merge", trained, "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("base-changed", 1)
    (trained / "adapter" / "base.json").unlink()  # as if saved by another tool
    error = fails("merge", trained, "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("merge-failed", 1)
    assert not (tmp_path / "merged").exists()
    assert run("merge", trained, "--method", "ties", "--output", tmp_path / "merged")[0] == 2


def test_a_corrupted_merge_fails_and_cleans_up(
    run: Run, fails: Fails, base: Path, chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    trained = train(run, base, chats, tmp_path / "run")
    apply = merging.Delta.apply

    def corrupted(self: Any, name: str, tensor: torch.Tensor, *more: Any) -> torch.Tensor:
        changed = apply(self, name, tensor, *more)
        return changed + 0.01 if name.endswith("layers.1.self_attn.q_proj.weight") else changed

    monkeypatch.setattr(merging.Delta, "apply", corrupted)
    error = fails("merge", trained, "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("merged-logits-differ", 4)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_a_file_that_is_written_otherwise_fails(
    run: Run, fails: Fails, base: Path, chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    trained = train(run, base, chats, tmp_path / "run")

    def damaging(tensors: dict[str, torch.Tensor], path: Path, metadata: Any) -> None:
        save_file({name: t + 1e-3 if "norm" in name else t for name, t in tensors.items()}, path, metadata)

    monkeypatch.setattr(merging, "save_file", damaging)
    error = fails("merge", trained, "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("written-differently", 4)
    assert not (tmp_path / "merged").exists()


def damage_weights(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


def other_base(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in tensors.items()}, path)


def no_such_layer(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.9"): t for name, t in load_file(path).items()}, path)


def base_gone(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere/base"}))


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (damage_weights, "adapter-weights-damaged"),
        (damage_config, "adapter-config-unreadable"),
        (other_base, "adapter-does-not-fit"),
        (no_such_layer, "adapter-does-not-fit"),
        (base_gone, "model-not-found"),
    ],
)
def test_bad_adapters(
    run: Run, fails: Fails, base: Path, chats: Path, tmp_path: Path, damage: Callable[[Path], None], code: str
) -> None:
    trained = train(run, base, chats, tmp_path / "run")
    damage(trained / "adapter")
    for command in (("merge", trained, "--output", tmp_path / "merged"), ("chat", trained, "--prompt", "Hi")):
        error = fails(*command)
        assert (error.code, error.exit_code) == (code, 1), command
    assert not (tmp_path / "merged").exists()


def test_what_is_no_adapter(fails: Fails, base: Path, tmp_path: Path) -> None:
    error = fails("merge", base, "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("not-an-adapter", 1)
    error = fails("merge", tmp_path / "none", "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("not-an-adapter", 1)


def test_no_room(run: Run, fails: Fails, base: Path, chats: Path, tmp_path: Path, make_disk: Any) -> None:
    trained = train(run, base, chats, tmp_path / "run")
    disk = make_disk("64k")
    error = fails("merge", trained, "--output", disk / "merged")
    assert (error.code, error.exit_code) == ("disk-too-small", 4)
    assert not (disk / "merged").exists()


def test_an_adapter_as_the_model_of_everything(run: Run, fails: Fails, base: Path, chats: Path, tmp_path: Path) -> None:
    trained = train(run, base, chats, tmp_path / "run")
    for name in (trained, trained / "adapter"):
        code, out, err = run(
            "chat", name, "--prompt", "What is the answer 3?", "--temperature", 0, "--max-new-tokens", 8
        )
        assert code == 0, err
        assert run("preview", "--model", name, "--data", chats, "--rows", 1)[0] == 0
    code, out, err = run("train", "--model", trained, "--data", chats, "--output", tmp_path / "full", "--data.max_seq_len",
                         64, "--train.max_steps", 1)  # fmt: skip
    assert code == 0, err
    assert "all trained" in out
    shutil.rmtree(base)
    error = fails("chat", trained, "--prompt", "Hi")
    assert (error.code, error.exit_code) == ("model-not-found", 1)


def test_adapters_are_switched_in_chat(
    run: Run, fails: Fails, base: Path, two: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    import io

    lines = ["What is the answer 3?", "/reset", "/adapter two", "What is the answer 3?", "/reset", "/adapter base",
             "What is the answer 3?", "/adapter three", "/exit"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, err = run("chat", *two, "--temperature", 0, "--max-new-tokens", 12)
    assert code == 0, err
    assert "adapters: one, two; /adapter NAME switches" in out
    assert "(now two)" in out
    assert "no adapter 'three'; there are: one, two, base" in out
    replies = [line.removeprefix("you> ") for line in out.splitlines() if line.startswith("you> ")]
    alone = []
    for name in (*two, base):
        alone.append(
            run("chat", name, "--prompt", "What is the answer 3?", "--temperature", 0, "--max-new-tokens", 12)[1]
        )
    assert [replies[0], replies[3], replies[6]] == [text.splitlines()[0] for text in alone]
    assert len(set(alone)) > 1
    error = fails("chat", two[0], base, "--prompt", "Hi")
    assert (error.code, error.exit_code) == ("not-an-adapter", 1)


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_added_tokens_train_their_rows_alone(run: Run, tokenizer: Any, chats: Path, tmp_path: Path, name: str) -> None:
    """Two tokens more than the base has rows: trained, resumed, opened in chat, merged, opened by transformers."""
    from conftest import chat_row, write_jsonl

    base = base_of(
        tmp_path / "base", tokenizer, "llama" if name == "tied" else name, tie_word_embeddings=name != "llama"
    )
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row(f"What is {i}?", f"<note>{i}</note> is it.") for i in range(40)])
    words = ("--model.add_tokens", "<note>", "</note>", "--data.control_text", "allow")
    trained = train(run, base, data, tmp_path / "run", "lora", *words)
    vocabulary = AutoTokenizer.from_pretrained(trained / "adapter").get_vocab()
    new = [vocabulary["<note>"], vocabulary["</note>"]]
    rows = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert min(new) >= len(rows)
    saved = load_file(trained / "adapter" / "adapter_model.safetensors")
    deltas = {key: tensor for key, tensor in saved.items() if "trainable_tokens_delta" in key}
    assert len(deltas) == (2 if name == "llama" else 1)
    assert all(len(tensor) == 2 for tensor in deltas.values())
    part = killed_after(trained, 4, tmp_path / "part")
    code, _, err = run("resume", part)
    assert code == 0, err
    assert (part / "adapter" / "adapter_model.safetensors").read_bytes() == (
        trained / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert run("chat", trained, "--prompt", "What is 3?", "--max-new-tokens", 4, "--temperature", 0)[0] == 0
    code, _, err = run("merge", trained, "--output", tmp_path / "merged")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    merged = model.get_input_embeddings().weight
    assert len(merged) == model.config.vocab_size == max(new) + 1
    assert torch.equal(merged[: len(rows)], rows)
    assert torch.equal(
        merged[new],
        next(iter(deltas.values()))
        if name != "llama"
        else deltas["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"],
    )
    assert (model.get_output_embeddings().weight is merged) == (name != "llama")


def test_added_tokens_in_full_fine_tuning(run: Run, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tokenizer, "llama")
    code, _, err = run("train", "--model", base, "--data", chats, "--output", tmp_path / "run", "--model.add_tokens", "<note>",
                       "--data.max_seq_len", 64, "--train.max_steps", 4, "--train.save_steps", 2, "--train.keep_checkpoints", 9)  # fmt: skip
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "run" / "model"))
    killed_after(tmp_path / "run", 2, tmp_path / "part")
    code, _, err = run("resume", tmp_path / "part")
    assert code == 0, err
    names = [tmp_path / folder / "model" / "model.safetensors" for folder in ("run", "part")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("how", ["full", "lora"])
def test_tokens_that_the_tokenizer_has_are_not_added_again(
    run: Run, tokenizer: Any, chats: Path, tmp_path: Path, how: str
) -> None:
    """A second stage with the first one's config: the trained rows of its tokens must not begin anew."""
    base = base_of(tmp_path / "base", tokenizer, "llama")
    words = ("--data", chats, "--model.add_tokens", "<note>", tokenizer.eos_token, "--data.max_seq_len", 64,
             "--train.max_steps", 1, "--optim.lr", 1e-6)  # fmt: skip
    code, out, err = run("train", "--model", base, "--output", tmp_path / "first", *words)
    assert code == 0, err
    assert f"the tokenizer has {tokenizer.eos_token} already" in out
    rows = [AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight]
    first = tmp_path / "first" / "model"
    kinds = ("--lora.kind", "lora") if how == "lora" else ()
    code, _, err = run("train", "--model", first, "--output", tmp_path / "second", *words, *kinds)
    assert code == 0, err
    if how == "lora":
        saved = load_file(tmp_path / "second" / "adapter" / "adapter_model.safetensors")
        assert not any("trainable_tokens_delta" in key for key in saved)
        return
    for folder in (first, tmp_path / "second" / "model"):
        rows.append(AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight)
        before, after = rows[-2], rows[-1][: len(rows[-2])]
        assert torch.allclose(before, after, atol=1e-5)
        flags = [token.special for token in AutoTokenizer.from_pretrained(folder).added_tokens_decoder.values()]
        assert flags[: len(tokenizer.added_tokens_decoder)] == [
            token.special for token in tokenizer.added_tokens_decoder.values()
        ]


def stored_by_peft(base: Path, folder: Path, rows: int | None, **settings: Any) -> torch.Tensor:
    """An adapter as plain peft saves it by default, and its logits."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows)
    values: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]} | settings
    wrapped = get_peft_model(model, LoraConfig(init_lora_weights=False, **values))
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return logits_of(wrapped)


ENDS = ["embed_tokens", "lm_head"]


@pytest.mark.filterwarnings("ignore")  # peft warns about what it saves
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (410, {}),
        (None, {"target_modules": ["lm_head", "q_proj"]}),
        (None, {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 2}}),
        (410, {"target_modules": ENDS}),
        (410, {"modules_to_save": ENDS}),
        (410, {"modules_to_save": ["embed_tokens"]}),
        (410, {"trainable_token_indices": [3, 405]}),
    ],
)
def test_embedding_and_head_that_peft_saves_itself(
    run: Run, tokenizer: Any, tmp_path: Path, is_tied: bool, rows: int | None, settings: dict[str, Any]
) -> None:
    base = base_of(tmp_path / "base", tokenizer, "llama", tie_word_embeddings=is_tied)
    wanted = stored_by_peft(base, tmp_path / "adapter", rows, **settings)
    assert any(
        mark in key
        for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        for mark in ("lm_head.weight", "base_layer", "embed_tokens.weight")
    )
    code, _, err = run("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert code == 0, err
    assert (merged_logits(tmp_path / "merged") - wanted).abs().max() < 1e-5 * wanted.abs().max()
    opened = load_speaker(ModelSection(path=str(tmp_path / "adapter"))).model
    assert (logits_of(opened) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_a_stored_embedding_that_cannot_be_used(fails: Fails, base: Path, tmp_path: Path) -> None:
    stored_by_peft(base, tmp_path / "half", 410, target_modules=["lm_head"])
    stored_by_peft(base, tmp_path / "whole", 410)
    stored_by_peft(base, tmp_path / "plain", None)
    error = fails("merge", tmp_path / "half", "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("stored-base-rows", 1)
    for order in (("whole", "plain"), ("plain", "whole")):
        names = [tmp_path / name for name in order]
        for words in (("merge", *names, "--output", tmp_path / "merged"), ("chat", *names, "--prompt", "Hi")):
            error = fails(*words)
            assert (error.code, "save_embedding_layers" in str(error)) == ("several-stored-weights", True), error
    assert not (tmp_path / "merged").exists()


def test_an_output_that_takes_no_rename_is_refused_at_once(
    run: Run, fails: Fails, base: Path, tmp_path: Path, make_disk: Any
) -> None:
    stored_by_peft(base, tmp_path / "adapter", None)
    disk = make_disk("8m")
    error = fails("merge", tmp_path / "adapter", "--output", disk)
    assert (error.code, error.exit_code) == ("output-is-mount", 1)
    assert (str(disk) in str(error), str(base) in str(error)) == (True, False), error
    code, _, err = run("merge", tmp_path / "adapter", "--output", disk / "merged")
    assert code == 0, err
    (tmp_path / "empty").mkdir()
    code, _, err = run("merge", tmp_path / "adapter", "--output", tmp_path / "empty")
    assert code == 0, err
    error = fails("merge", tmp_path / "adapter", "--output", "/proc/x")
    assert (error.code, error.exit_code) == ("output-not-usable", 1)


@pytest.mark.parametrize("name", ["adapter/merged", "checkpoints/merged", "model", "checkpoints/step-000002/a/b"])
def test_an_output_inside_a_run(run: Run, fails: Fails, base: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    stored_by_peft(base, tmp_path / "run" / "adapter", None)
    error = fails("merge", tmp_path / "run", "--output", tmp_path / "run" / name)
    assert (error.code, error.exit_code) == ("output-in-run", 1)
    code, _, err = run("merge", tmp_path / "run", "--output", tmp_path / "run" / "merged")
    assert code == 0, err


def test_a_damaged_index_is_named(fails: Fails, base: Path, tmp_path: Path) -> None:
    stored_by_peft(base, tmp_path / "adapter", None)
    (base / "model.safetensors").unlink()
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": 3, "b": "model.safetensors"}}))
    for words in (
        ("merge", tmp_path / "adapter", "--output", tmp_path / "merged"),
        ("chat", base, "--prompt", "Hi"),
        ("chat", tmp_path / "adapter", "--prompt", "Hi"),
    ):
        error = fails(*words)
        assert (error.code, str(index) in str(error)) == ("weight-index-unreadable", True), error


def test_another_base_is_advised_only_where_it_helps(fails: Fails, base: Path, tmp_path: Path) -> None:
    stored_by_peft(base, tmp_path / "adapter", None)
    base.rename(tmp_path / "moved")
    error = fails("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert (error.code, error.exit_code, "--base" in str(error)) == ("model-not-found", 1, True)
    (tmp_path / "adapter" / "base.json").write_text("{")
    error = fails("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert (error.code, error.exit_code) == ("base-record-unreadable", 1)
    assert ("base.json" in str(error), "--base" in str(error)) == (True, False), error


def test_a_base_in_bin_files(run: Run, base: Path, chats: Path, tmp_path: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    trained = train(run, base, chats, tmp_path / "run")
    code, _, err = run("merge", trained, "--output", tmp_path / "merged")
    assert code == 0, err
    assert not list((tmp_path / "merged").glob("*.bin"))
    wanted = logits_of(on_base(base, trained))
    assert (merged_logits(tmp_path / "merged") - wanted).abs().max() < 1e-5 * wanted.abs().max()
