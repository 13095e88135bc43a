"""From raw text to a chat model: presets, tokenizer, pre-training, then fine-tuning on that run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import chat_row, write_jsonl
from tunesmith.config.runfile import find_recipe, resolve_config
from tunesmith.config.schema import OptimSection, RunConfig
from tunesmith.data.store import open_store
from tunesmith.model.presets import PRESETS, build_preset_config
from tunesmith.training.cost import Cost, count_step_flops
from tunesmith.training.optim import lr_at
from tunesmith.use.tokenizer import sample_texts

# with MiniMind's vocabulary of 6,400; its models are named after these numbers in millions
PARAMETERS = {
    "tiny": 1_607_040,
    "laptop": 2_803_648,
    "minimind-26m": 25_829_888,
    "minimind-64m": 63_912_192,
    "minimind-104m": 104_030_976,
    "minimind-moe": 145_034_880,
    "minimind-3-moe": 198_416_640,
}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
SMALL_MOE = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}
FAST = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_that_they_are_named_after(name: str, tokenizer: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_preset_config(name, {"vocab_size": 6400}, tokenizer))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_saves_and_opens_in_plain_transformers(
    run, name: str, tokenizer: Any, chats: Path, tmp_path: Path
) -> None:
    """The preset's architecture with small overrides; all of its widths can be overridden."""
    tokenizer.save_pretrained(tmp_path / "tok")
    overrides = dict(SMALL)
    if "head_dim" in PRESETS[name]:
        overrides["head_dim"] = 16
    overrides |= {key: value for key, value in SMALL_MOE.items() if key in PRESETS[name]}
    flags = [word for key, value in overrides.items() for word in (f"--model.config.{key}", value)]
    output = tmp_path / "run"
    code, out, err = run("train", "--model", f"new:{name}", "--tokenizer", tmp_path / "tok", *flags, "--data", chats, "--output", output,
                         *FAST, "--train.max_steps", 5, "--optim.lr", 1e-3)  # fmt: skip
    assert code == 0, err
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 5
    assert records[-1]["loss"] < records[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.config.model_type == PRESETS[name]["model_type"]
    assert model.config.hidden_size == 64
    gates = [weight for key, weight in model.named_parameters() if "shared_expert_gate" in key]
    assert len(gates) == (2 if name == "minimind-moe" else 0)
    assert not any(gate.any() for gate in gates)  # MiniMind's shared expert has no gate
    if "moe" in name:
        assert "router loss added" in out
        assert records[0]["router_loss"] > 0
        assert len(records[0]["expert_load"]) == 4
        assert sum(records[0]["expert_load"]) == pytest.approx(1, abs=1e-3)


def test_initialisation_is_transformers_own_and_decided_by_the_seed(tokenizer: Any) -> None:
    from tunesmith.config.schema import ModelSection
    from tunesmith.model.load import load_model

    config = build_preset_config("tiny", {}, tokenizer)
    one, two, other = (
        load_model(ModelSection(path="new:tiny"), config, torch.float32, seed).state_dict() for seed in (3, 3, 4)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert one["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(config.initializer_range, rel=0.05)
    assert (one["model.norm.weight"] == 1).all()


def test_a_shared_expert_without_gate_changes_no_other_weight(tokenizer: Any) -> None:
    from tunesmith.config.schema import ModelSection
    from tunesmith.model.load import load_model

    config = build_preset_config("minimind-moe", {**SMALL, **SMALL_MOE}, tokenizer)
    ours = load_model(ModelSection(path="new:minimind-moe"), config, torch.float32, 3).state_dict()
    torch.manual_seed(3)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    changed = {name.split(".", 3)[3] for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {"mlp.shared_expert_gate.weight"}


@pytest.mark.parametrize(("name", "is_divided"), [("minimind-moe", False), ("minimind-3-moe", True)])
def test_one_expert_a_token_is_weighted_as_in_its_generation(name: str, is_divided: bool, tokenizer: Any) -> None:
    """MiniMind 3 divides the single weight by itself; before, it stayed the router's score."""
    assert build_preset_config(name, {"num_experts_per_tok": 1}, tokenizer).norm_topk_prob == is_divided
    assert build_preset_config(name, {"num_experts_per_tok": 2}, tokenizer).norm_topk_prob
    assert build_preset_config(name, {"num_experts_per_tok": 1, "norm_topk_prob": True}, tokenizer).norm_topk_prob


TEXT = (
    "Der Fuchs läuft. 春眠不觉晓，处处闻啼鸟。\r\n\n  It was the best of times 🙂, 1859.\t\n床前明月光，疑是地上霜。\n"
    * 40
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "one.txt").write_bytes(TEXT.encode())
    (folder / "two.md").write_bytes(("# Two\n" + TEXT[:700]).encode())
    return folder


def test_tokenizer_command(run, fails, corpus: Path, tmp_path: Path) -> None:
    code, out, err = run("tokenizer", "--data", corpus, "--vocab-size", 300, "--output", tmp_path / "tok")
    assert code == 0, err
    assert "300 tokens" in out
    assert "Chinese" in out
    assert "Latin script" in out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    for text in (TEXT, "unseen: Привет 한국어 \x00 ﷽", " leading", "12345"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("12")["input_ids"]) == ["1", "2"]
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        "<|endoftext|>",
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    error = fails("tokenizer", "--data", corpus, "--vocab-size", 400, "--output", tmp_path / "tok")
    assert (error.code, error.exit_code) == ("output-exists", 1)


def test_a_tokenizer_of_much_text_is_trained_on_an_even_sample(run, tmp_path: Path) -> None:
    """Time and memory are those of the sample, however large the text is."""
    for number in range(6):
        word = "abcdef"[number] * 7
        lines = "".join(f"{word} {i} 春眠不觉晓，处处闻啼鸟\n" for i in range(10_000))
        (tmp_path / f"{number}.txt").write_text(lines)
    code, out, err = run(
        "tokenizer", "--data", tmp_path, "--vocab-size", 300, "--output", tmp_path / "tok", "--sample-mb", 1
    )
    assert code == 0, err
    assert "trained on 1 MB of the 2.8 MB of text" in out
    code, out, err = run("tokenizer", "--data", tmp_path, "--vocab-size", 300, "--output", tmp_path / "all")
    assert code == 0, err
    assert "drawn evenly" not in out


@pytest.mark.parametrize("texts", [["x" * 50_000], ["a b\n" * 9_000, "", "\n", "晓" * 20_000], ["ab" * 3] * 9_000])
def test_a_sample_of_text_is_bounded_even_and_in_order(texts: list[str]) -> None:
    total = sum(len(text.encode()) for text in texts)
    assert sample_texts(texts, total) == (texts, total)
    pieces, found_total = sample_texts(iter(texts), 20_000)
    assert found_total == total
    assert 20_000 - 6_200 < sum(len(piece.encode()) for piece in pieces) <= 20_000
    everything, start = "".join(texts), 0
    for piece in pieces:
        start = everything.index(piece, start) + len(piece)
    # no half favoured
    numbered = [f"{number:06}\n" * 300 for number in range(400)]
    drawn = [int(line) for piece in sample_texts(numbered, 300_000)[0] for line in piece.split()]
    assert 0.35 < sum(number < 200 for number in drawn) / len(drawn) < 0.65


def test_tokenizer_reads_chats_and_refuses_what_training_refuses(run, fails, chats: Path, tmp_path: Path) -> None:
    code, out, err = run("tokenizer", "--data", chats, "--vocab-size", 280, "--output", tmp_path / "tok")
    assert code == 0, err
    assert "tokens" in out
    write_jsonl(chats, [{"a": 1}])
    error = fails("tokenizer", "--data", chats, "--vocab-size", 280, "--output", tmp_path / "tok2")
    assert (error.code, error.exit_code) == ("text-unusable", 1)
    assert not (tmp_path / "tok2").exists()


def test_a_vocabulary_too_small_for_the_control_tokens(fails, corpus: Path, tmp_path: Path) -> None:
    error = fails("tokenizer", "--data", corpus, "--vocab-size", 258, "--output", tmp_path / "tok")
    assert (error.code, error.exit_code) == ("vocab-too-small", 1)


@pytest.mark.parametrize(
    ("content", "code", "fact"),
    [("ä".encode("latin-1"), "wrong-encoding", "byte 0xe4 in line 1"), (b"", "file-empty", "")],
)
def test_text_that_cannot_be_read(fails, tmp_path: Path, content: bytes, code: str, fact: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    error = fails("tokenizer", "--data", tmp_path / "x.txt", "--output", tmp_path / "tok")
    assert (error.code, error.exit_code, fact in str(error)) == (code, 1, True)


def test_a_tokenizer_larger_than_the_presets_vocabulary(fails, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    error = fails("train", "--model", "new:tiny", "--tokenizer", tmp_path / "tok", "--model.config.vocab_size", 300,
                  "--data", chats, "--output", tmp_path / "run")  # fmt: skip
    assert (error.code, error.exit_code, "300" in str(error)) == ("vocab-too-small", 1, True)
    assert not (tmp_path / "run").exists()


def test_packed_documents_hold_every_byte_of_the_text_exactly_once(run, corpus: Path, tmp_path: Path) -> None:
    run("tokenizer", "--data", corpus, "--vocab-size", 300, "--output", tmp_path / "tok")
    code, _, err = run("train", "--model", "new:tiny", "--tokenizer", tmp_path / "tok", "--data", corpus, "--output", tmp_path / "run",
                         *FAST, "--train.max_steps", 1)  # fmt: skip
    assert code == 0, err
    store = open_store(tmp_path / "run" / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    for number, name in enumerate(("one.txt", "two.md")):
        samples = [store[i] for i in range(len(store)) if store.file_numbers[i] == number]
        assert all(len(sample.input_ids) <= 64 for sample in samples)
        trained = [int(t) for s in samples for t, mask in zip(s.input_ids, s.loss_mask, strict=True) if mask]
        assert trained.pop() == tokenizer.eos_token_id
        assert samples[0].input_ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(trained).encode() == (corpus / name).read_bytes()
        # every trained token has a token before it to be predicted from
        assert sum(sample.num_targets for sample in samples) == len(trained) + 1


def test_minimind_schedule_goes_from_eleven_tenths_to_a_tenth() -> None:
    optim = OptimSection(lr=5e-4, schedule="minimind", warmup_ratio=0)
    assert lr_at(0, 1000, optim) == pytest.approx(5.5e-4)
    assert lr_at(500, 1000, optim) == pytest.approx(5e-4 * 0.6)
    assert lr_at(1000, 1000, optim) == pytest.approx(5e-5)


def test_recipes_resolve_and_an_unknown_one_names_the_known(run) -> None:
    folder = find_recipe(Path("recipe:minimind-sft")).parent
    for path in sorted(folder.glob("*.yaml")):
        if "stages" in yaml.safe_load(path.read_text()):  # tests/test_recipes.py resolves them stage by stage
            continue
        config = resolve_config(
            RunConfig, Path(f"recipe:{path.stem}"), {"model.path": "m", "data.train": ["d"], "train.output_dir": "o"}
        )
        written = yaml.safe_load(path.read_text()).get("optim", {})
        assert {key: config.optim.model_dump(mode="json")[key] for key in written} == written
    code, _, err = run("train", "recipe:minimind-stf", "--data", "x")
    assert code == 1
    assert "no such recipe; known: chinese-instructions, gpt2-full" in err


def test_the_whole_way(run, corpus: Path, tmp_path: Path) -> None:
    """Train a tokenizer, pre-train by recipe, fine-tune that run by recipe, chat."""
    steps = [
        ("tokenizer", "--data", corpus, "--vocab-size", 400, "--output", tmp_path / "tok"),
        ("train", "recipe:laptop-pretrain", "--model", "new:tiny", "--tokenizer", tmp_path / "tok", "--data", corpus, "--output",
         tmp_path / "base", *FAST, "--data.eval_split", 0.05, "--train.max_steps", 20, "--train.eval_steps", 10),
        ("train", "recipe:laptop-sft", "--model", tmp_path / "base", "--data", tmp_path / "chats.jsonl", "--output", tmp_path / "chat",
         *FAST, "--optim.lr", 5e-3, "--train.max_steps", 60, "--train.eval_steps", 20),
    ]  # fmt: skip
    write_jsonl(tmp_path / "chats.jsonl", [chat_row("Wer läuft?", "Der Fuchs läuft.")] * 50)
    for words in steps:
        code, _, err = run(*words)
        assert code == 0, err
    assert run("chat", tmp_path / "chat", "--prompt", "Wer läuft?", "--temperature", 0)[1] == "Der Fuchs läuft.\n"
    for name in ("base", "chat"):
        evals = [
            json.loads(line)
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if "eval_loss" in line
        ]
        assert evals[0]["step"] == 0
        assert min(record["eval_loss"] for record in evals[1:]) < evals[0]["eval_loss"]


@pytest.mark.parametrize("recipe", ["laptop-pretrain", "laptop-sft"])
def test_a_laptop_recipe_takes_as_long_whatever_the_data(tokenizer: Any, recipe: str) -> None:
    """Its steps are counted, not its epochs; few rows stop it early, and it fits into small memory."""
    flags = {"model.path": "new:laptop", "data.train": ["d"], "train.output_dir": "o"}
    config = resolve_config(RunConfig, Path(f"recipe:{recipe}"), flags)
    train, data = config.train, config.data
    assert train.max_steps
    assert train.micro_batch_tokens
    assert train.max_steps * train.micro_batch_tokens * train.grad_accum_steps <= 3_000_000
    assert train.early_stop_patience
    assert train.eval_steps
    assert train.max_steps / train.eval_steps <= 5
    assert data.eval_split <= 0.02
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_preset_config("laptop", {}, tokenizer))
    cost = Cost(count_step_flops(model, train.micro_batch_tokens), train.max_steps, 0)
    assert cost.step_flops * cost.steps < 20 * 60 * 5e10  # 20 minutes at a third of what two cores multiply


def test_little_text_stops_before_it_is_learnt_by_heart(run, tmp_path: Path) -> None:
    """laptop-pretrain's settings: training stops where the held-out loss rises, and the best weights are saved."""
    rng = random.Random(0)
    words = ["".join(rng.sample("abcdefghij", 4)) for _ in range(30)]
    (tmp_path / "x.txt").write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(40)))
    assert run("tokenizer", "--data", tmp_path / "x.txt", "--vocab-size", 300, "--output", tmp_path / "tok")[0] == 0
    sizes = [word for key, value in SMALL.items() for word in (f"--model.config.{key}", value)]
    code, out, err = run("train", "recipe:laptop-pretrain", "--model", "new:tiny", *sizes, "--tokenizer", tmp_path / "tok", "--data",
                         tmp_path / "x.txt", "--output", tmp_path / "run", *FAST, "--data.eval_split", 0.1, "--optim.warmup_steps", 10,
                         "--optim.warmup_ratio", 0, "--train.eval_steps", 40)  # fmt: skip
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] <= 400
    assert "best eval_loss" in out
