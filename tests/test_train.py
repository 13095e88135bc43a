"""A run from files to a model that other tools open: its files and its output."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import chat_row, save_folder, tiny_config, write_jsonl

FAST = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--optim.lr", 3e-3)


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "model" / "model.safetensors")


def test_a_run_leaves_everything_that_it_promises(run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    code, out, err = run(
        "train", "--model", model_folder, "--data", chats, "--output", output, *FAST, "--train.epochs", 6
    )
    assert code == 0, err
    assert sorted(p.name for p in output.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "data_ledger.json",
        "metrics.jsonl",
        "model",
        "report.html",
        "run.json",
        "sample_replies.json",
        "tokens",
    ]
    records = metrics(output)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert set(records[0]) == {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "supervised_tokens",
        "tokens_per_s",
        "memory_gb",
        "time",
    }
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert records[-1]["epoch"] == 6.0
    ledger = json.loads((output / "data_ledger.json").read_text())
    assert ledger["train"]["rows"] == ledger["train"]["used"] == 40
    assert records[-1]["tokens"] == 6 * ledger["train"]["tokens"]
    assert records[-1]["supervised_tokens"] == 6 * ledger["train"]["target_tokens"]
    assert yaml.safe_load((output / "config.yaml").read_text())["optim"]["lr"] == 3e-3
    for words in ("40 rows of 1 file: 40 used, 0 refused, 0 truncated", "% supervised", "% full", "packed: packed and solo differ",
                  "at supervised positions only", f"talk to it: tunesmith chat {output}"):  # fmt: skip
        assert words in out
    assert not list(tmp_path.glob(".*partial*"))


def test_plain_transformers_opens_the_model_and_stops_where_training_taught_it(
    run, model_folder: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "one.jsonl", [chat_row("Who are you?", "I am a small model.")] * 60)
    output = tmp_path / "run"
    code, _, err = run(
        "train",
        "--model",
        model_folder,
        "--data",
        data,
        "--output",
        output,
        *FAST,
        "--optim.lr",
        1e-2,
        "--train.epochs",
        4,
    )
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(reply) == "I am a small model.<|im_end|>"
    assert GenerationConfig.from_pretrained(output / "model").eos_token_id == tokenizer.convert_tokens_to_ids(
        "<|im_end|>"
    )
    assert "attn_implementation" not in (output / "model" / "config.json").read_text()
    assert (output / "model" / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_the_real_stop_token_goes_into_generation_config_before_the_models_own(
    run, tokenizer: Any, tmp_path: Path, chats: Path
) -> None:
    """As with Gemma and Qwen base models: tokenizer.eos_token is not the token that ends a turn."""
    import copy

    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    folder = save_folder(tmp_path / "base", tiny_config("llama", eos_token_id=0), other)
    code, out, err = run(
        "train", "--model", folder, "--data", chats, "--output", tmp_path / "run", *FAST, "--train.max_steps", 1
    )
    assert code == 0, err
    assert "replies end with <|im_end|>" in out
    stop = other.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(tmp_path / "run" / "model").eos_token_id == [stop, 0]


def test_one_seed_decides_everything(run, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    base = save_folder(tmp_path / "gpt2", tiny_config("gpt2", resid_pdrop=0.1, initializer_range=0.02), tokenizer)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, _, err = run(
            "train",
            "--model",
            base,
            "--data",
            chats,
            "--output",
            tmp_path / name,
            *FAST,
            "--train.seed",
            seed,
            "--data.eval_split",
            0.1,
        )
        assert code == 0, err
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


def test_accumulation_trains_what_one_big_forward_trains(run, model_folder: Path, tmp_path: Path) -> None:
    """All rows in one step: the order cannot matter, only the loss's bookkeeping can."""
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row(f"What {i}?", "you and me " * (i + 1)) for i in range(6)])
    for name, tokens, steps in (("whole", 512, 1), ("parts", 64, 8)):
        code, _, err = run("train", "--model", model_folder, "--data", data, "--output", tmp_path / name, "--data.max_seq_len", 64,
                           "--train.micro_batch_tokens", tokens, "--train.grad_accum_steps", steps, "--train.epochs", 3)  # fmt: skip
        assert code == 0, err
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert len(whole) == len(parts) == 3
    for one, two in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_eval_split_early_stop_and_best_model(run, model_folder: Path, tmp_path: Path) -> None:
    """Training on noise with a high rate makes eval_loss rise: the run stops, and the best model is kept."""
    rows = [chat_row(f"What {i * 37 % 101}?", f"{i * 7919 % 9973} {i * 31 % 89}") for i in range(60)]
    data = write_jsonl(tmp_path / "noise.jsonl", rows)
    output = tmp_path / "run"
    code, out, err = run("train", "--model", model_folder, "--data", data, "--output", output, *FAST, "--optim.lr", 2e-2, "--train.epochs", 40,
                         "--data.eval_split", 0.2, "--train.eval_steps", 5, "--train.early_stop_patience", 2)  # fmt: skip
    assert code == 0, err
    assert "12 of 60 samples held out" in out
    assert "stopped early at step" in out
    evals = [r for r in metrics(output) if "eval_loss" in r]
    best = min(evals, key=lambda r: r["eval_loss"])
    assert best["step"] < evals[-1]["step"]
    assert f"best eval_loss {best['eval_loss']:.4f} was at step {best['step']}" in out
    assert set(best) >= {"eval_perplexity", "eval_token_accuracy"}
    kept = load_file(output / "checkpoints" / f"step-{best['step']:06d}" / "model.safetensors")
    assert all(torch.equal(kept[n], w) for n, w in weights(output).items())


def test_eval_data_of_its_own_and_checkpoints(run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "eval.jsonl", [chat_row("What is the answer 99?", "The answer is 99 and you.")])
    output = tmp_path / "run"
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--eval-data", held_out, "--output", output, *FAST,
                       "--train.max_steps", 7, "--train.save_steps", 2, "--train.keep_checkpoints", 2)  # fmt: skip
    assert code == 0, err
    assert [("eval_loss" in r) for r in metrics(output)] == [True] + [False] * 6 + [True]
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-000006", "step-000007"]
    checkpoint = output / "checkpoints" / "step-000006"
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 6
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert "model.embed_tokens.weight/exp_avg" in moments
    AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_precisions(run, model_folder: Path, chats: Path, tmp_path: Path, precision: str) -> None:
    output = tmp_path / "run"
    code, out, err = run(
        "train",
        "--model",
        model_folder,
        "--data",
        chats,
        "--output",
        output,
        *FAST,
        "--train.precision",
        precision,
        "--train.epochs",
        4,
    )
    assert code == 0, err
    assert precision in out
    records = metrics(output)
    assert records[-1]["loss"] < records[0]["loss"]
    dtypes = {w.dtype for w in weights(output).values()}
    assert dtypes == {torch.float32 if precision == "bf16" else torch.bfloat16}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # raised inside torch's compiler
def test_compile_and_gradient_checkpointing_give_the_same_losses(
    run, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # of what earlier tests compiled
    counters.clear()
    for name, flags in (
        ("plain", ()),
        ("checkpointing", ("--train.gradient_checkpointing",)),
        ("compile", ("--train.compile", "true")),
    ):
        code, _, err = run(
            "train",
            "--model",
            model_folder,
            "--data",
            chats,
            "--output",
            tmp_path / name,
            *FAST,
            "--train.max_steps",
            6,
            *flags,
        )
        assert code == 0, err
    assert counters["stats"]["unique_graphs"] > 0  # something was compiled,
    assert counters["stats"]["unique_graphs"] < 30  # and not again for every pack
    plain = [r["loss"] for r in metrics(tmp_path / "plain")]
    for name in ("checkpointing", "compile"):
        assert [r["loss"] for r in metrics(tmp_path / name)] == pytest.approx(plain, abs=1e-4), name


def test_schedules_and_log_steps(run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", output, *FAST, "--train.max_steps", 10, "--optim.lr", 1e-3,
                       "--optim.warmup_ratio", 0.2, "--optim.schedule", "linear", "--optim.min_lr_ratio", 0.5, "--train.log_steps", 3)  # fmt: skip
    assert code == 0, err
    assert [r["step"] for r in metrics(output)] == [3, 6, 9, 10]
    assert [r["lr"] for r in metrics(output)] == pytest.approx(
        [1e-3, 1e-3 * (1 - 0.5 * 3 / 8), 1e-3 * (1 - 0.5 * 6 / 8), 1e-3 * (1 - 0.5 * 7 / 8)]
    )


def test_raw_text_pre_trains(run, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the quick brown fox says hello to you and me\n" * 200)
    output = tmp_path / "run"
    code, out, err = run(
        "train",
        "--model",
        model_folder,
        "--data",
        tmp_path / "book.txt",
        "--output",
        output,
        *FAST,
        "--train.epochs",
        2,
        "--data.eval_split",
        0.05,
        "--data.share_prefix",
        "off",  # pieces of a text that repeats begin alike; in fewer packs there are fewer steps
    )
    assert code == 0, err
    assert "split to max_seq_len: 1 rows, every trained token kept" in out
    assert "raw text, every token trained" in out
    assert metrics(output)[-1]["eval_loss"] < 4


def test_a_model_that_mixes_documents_trains_one_document_a_forward(
    run, tokenizer: Any, chats: Path, tmp_path: Path
) -> None:
    from test_isolation import lfm2

    lfm2().save_pretrained(tmp_path / "lfm2")
    tokenizer.save_pretrained(tmp_path / "lfm2")
    output = tmp_path / "run"
    code, out, err = run("train", "--model", tmp_path / "lfm2", "--data", chats, "--output", output, *FAST)
    assert code == 0, err
    assert "one document per forward: packed and solo differ by" in out
    ledger = json.loads((output / "data_ledger.json").read_text())["train"]
    records = metrics(output)
    assert records[-1]["tokens"] == ledger["tokens"]
    assert len(records) < 15  # a step has as many documents as for any other model


def test_a_base_without_template_says_that_it_gets_alpaca(run, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    base = save_folder(tmp_path / "gpt2", tiny_config("gpt2"), bare)
    code, out, err = run(
        "train", "--model", base, "--data", chats, "--output", tmp_path / "run", *FAST, "--train.max_steps", 1
    )
    assert code == 0, err
    assert "alpaca, because the model has none of its own" in out
    assert "### Response:" in (tmp_path / "run" / "model" / "chat_template.jinja").read_text()


def test_moe_metrics_hold_the_router_loss(run, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    base = save_folder(tmp_path / "moe", tiny_config("qwen3_moe", initializer_range=0.02), tokenizer)
    code, out, err = run(
        "train", "--model", base, "--data", chats, "--output", tmp_path / "run", *FAST, "--train.max_steps", 2
    )
    assert code == 0, err
    assert "router loss added" in out
    record = metrics(tmp_path / "run")[0]
    assert record["router_loss"] > 0
    assert len(record["expert_load"]) == 4
    assert sum(record["expert_load"]) == pytest.approx(1, abs=1e-3)


def test_new_tiny_and_a_run_as_the_next_model(run, tokenizer: Any, chats: Path, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    code, _, err = run("train", "--model", "new:tiny", "--tokenizer", tmp_path / "tok", "--model.config.hidden_size", 64,
                       "--data", chats, "--output", tmp_path / "one", *FAST, "--train.max_steps", 2)  # fmt: skip
    assert code == 0, err
    code, _, err = run(
        "train",
        "--model",
        tmp_path / "one",
        "--data",
        chats,
        "--output",
        tmp_path / "two",
        *FAST,
        "--train.max_steps",
        2,
    )
    assert code == 0, err
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model").config
    assert (config.model_type, config.hidden_size) == ("qwen3", 64)


def test_tensorboard(run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    code, _, err = run(
        "train",
        "--model",
        model_folder,
        "--data",
        chats,
        "--output",
        tmp_path / "run",
        *FAST,
        "--train.max_steps",
        2,
        "--train.trackers",
        "tensorboard",
    )
    assert code == 0, err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]


def test_a_file_is_not_trained_and_evaluated_on_or_named_twice(
    fails, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    command = ("train", "--model", model_folder, "--output", tmp_path / "run")
    link = tmp_path / "link.jsonl"
    link.symlink_to(chats)
    assert fails(*command, "--data", chats, "--eval-data", link).code == "eval-is-trained"
    assert fails(*command, "--data", chats, chats).code == "file-named-twice"


def test_held_out_rows_are_in_the_ledger(run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    code, _, err = run(
        "train", "--model", model_folder, "--data", chats, "--output", tmp_path / "run", *FAST, "--data.eval_split", 0.1
    )
    assert code == 0, err
    held_out = json.loads((tmp_path / "run" / "data_ledger.json").read_text())["held_out"]
    assert len(held_out) == 4
    assert all(where.startswith(f"{chats}:") for where in held_out)


def test_evaluation_and_saving_do_not_count_in_tokens_per_s() -> None:
    """The clock stops during a pause, and the tokens of the window still count."""
    from tunesmith.training.progress import Window
    from tunesmith.training.step import StepResult

    window = Window()
    window.add(StepResult(1.0, None, 1.0, num_tokens=1000, num_targets=10))
    time.sleep(0.05)
    with window.pause():
        time.sleep(0.3)
    assert 0.05 <= window.seconds() < 0.2
    assert window.tokens == 1000


def test_a_small_micro_batch_lowers_the_default_length(run, model_folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row("Q", "you and me " * 40)] * 4)
    code, out, err = run(
        "train", "--model", model_folder, "--data", data, "--output", tmp_path / "run", "--train.micro_batch_tokens", 64,
        "--data.max_cut_replies", 1,
    )  # fmt: skip
    assert code == 0, err
    assert "max_seq_len 64 (from train.micro_batch_tokens)" in out
    assert "4 truncated" in out


def test_generation_settings_that_transformers_will_not_save_do_not_lose_the_model(
    run, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    path = model_folder / "generation_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"early_stopping": True, "length_penalty": 2.0, "temperature": 0.5})
    )
    code, _, err = run(
        "train", "--model", model_folder, "--data", chats, "--output", tmp_path / "run", *FAST, "--train.max_steps", 1
    )
    assert code == 0, err
    assert GenerationConfig.from_pretrained(tmp_path / "run" / "model").eos_token_id == 2


def test_output_folders_that_exist_and_are_empty(run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target", target_is_directory=True)
    for name in ("empty", "link"):
        code, _, err = run(
            "train",
            "--model",
            model_folder,
            "--data",
            chats,
            "--output",
            tmp_path / name,
            *FAST,
            "--train.max_steps",
            1,
        )
        assert code == 0, err
        assert (tmp_path / name / "model" / "config.json").is_file()
        assert not [p for p in (tmp_path / name).iterdir() if p.name.startswith(".")]


def test_a_failed_run_leaves_no_parent_folders(run, fails, model_folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [chat_row("Q", "")])
    code, _, _ = run("train", "--model", model_folder, "--data", data, "--output", tmp_path / "deep" / "a" / "b")
    assert code == 1
    assert not (tmp_path / "deep").exists()
    error = fails("train", "--model", model_folder, "--data", data, "--output", "x" * 400)
    assert (error.code, error.exit_code) == ("output-not-usable", 1)


def test_a_full_disk_while_the_data_is_prepared(fails, model_folder: Path, chats: Path, make_disk: Any) -> None:
    small_disk = make_disk("400k")
    (small_disk / "ballast").write_bytes(b"x" * 390 * 1024)
    error = fails(
        "train", "--model", model_folder, "--data", chats, "--output", small_disk / "run", *FAST, "--train.max_steps", 1
    )
    assert (error.code, error.exit_code, f"{small_disk / 'run'}: " in str(error)) == ("disk-full", 4, True), error
    assert not (small_disk / "run").exists()


def test_warmup_steps(run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", tmp_path / "run", *FAST, "--train.max_steps", 4,
                       "--optim.lr", 1e-3, "--optim.warmup_steps", 2, "--optim.schedule", "constant")  # fmt: skip
    assert code == 0, err
    assert [r["lr"] for r in metrics(tmp_path / "run")] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])


@pytest.mark.usefixtures("full_replies")
def test_every_run_leaves_a_report(run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    code, out, err = run(
        "train",
        "--model",
        model_folder,
        "--data",
        chats,
        "--output",
        tmp_path / "run",
        *FAST,
        "--train.max_steps",
        3,
        "--data.eval_split",
        0.1,
    )
    assert code == 0, err
    assert f"report: {tmp_path / 'run' / 'report.html'}" in out
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for words in ("<svg", "learning rate", "tokens per second", "evaluation perplexity", str(chats), "greedy replies to held-out rows",
                  "What is the answer", "output_dir"):  # fmt: skip
        assert words in page
    assert page.count("<script") == 1  # shows values under the pointer
    assert "http" not in page
