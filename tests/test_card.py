"""Model cards: metadata that the hub reads, no path of this machine, and lines that load what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tunesmith
from conftest import save_folder, tiny_config, write_jsonl
from tunesmith.cards.card import describe_base, front_matter, hub_id, load_adapter_lines
from tunesmith.cards.sections import name_data
from tunesmith.model.source import ModelSource

Run = Callable[..., tuple[int, str, str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def execute(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


@pytest.mark.parametrize("more", [(), ("--model.add_tokens", "<one>", "<two>"), ("--lora.kind", "pissa")])
def test_the_lines_of_an_adapters_card_load_it(
    run: Run, tokenizer: Any, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    base = save_folder(tmp_path / "base", tiny_config("llama", vocab_size=len(tokenizer)), tokenizer)
    output = tmp_path / "mine"
    code, _, err = run("train", "--model", base, "--data", chats, "--output", output, "--lora.kind", "lora", *more,
                       "--optim.lr", 1e-2, "--train.max_steps", 3, "--data.max_seq_len", 64)  # fmt: skip
    assert code == 0, err
    card = (output / "adapter" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["tunesmith", "sft", "lora"]}
    assert str(tmp_path) not in card
    assert "a local model (base)" in card
    loading, asking, training = blocks(card)
    asking = asking.replace("max_new_tokens=200", "max_new_tokens=4")
    model = execute(loading + asking, output / "adapter", monkeypatch)
    ids = torch.arange(5, 25)[None]
    wanted = tunesmith.load(output).speaker.model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)
    stops = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (stops if isinstance(stops, list) else [stops])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model = execute(loading + training, output / "adapter", monkeypatch)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)
    assert any("lora_" in name and parameter.requires_grad for name, parameter in model.named_parameters())


def test_the_lines_of_a_models_card_load_it(
    run: Run, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "mine"
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}", encoding="utf-8")
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", output, "--train.max_steps", 1,
                       "--data.max_seq_len", 64, "--data.chat_template", template)  # fmt: skip
    assert code == 0, err
    card = (output / "model" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["tunesmith", "sft"]}
    assert str(tmp_path) not in card
    assert "own.jinja" in card
    loading, asking = blocks(card)
    ids = torch.arange(5, 25)[None]
    wanted = tunesmith.load(output).speaker.model(input_ids=ids).logits
    model = execute(loading + asking.replace("max_new_tokens=200", "max_new_tokens=4"), output / "model", monkeypatch)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize(
    ("source", "name", "revision", "words"),
    [
        (ModelSource("hub", "Qwen/Qwen2.5-0.5B"), "Qwen/Qwen2.5-0.5B", None, "Qwen/Qwen2.5-0.5B"),
        (ModelSource("hub", "gpt2", revision="main"), "gpt2", "main", "gpt2"),
        (ModelSource("local", f"/x/hub/models--Qwen--Qwen2.5-0.5B/snapshots/{COMMIT}"), "Qwen/Qwen2.5-0.5B", COMMIT, "Qwen/Qwen2.5-0.5B"),
        (ModelSource("local", "/home/me/secret/models/mine"), "", None, "a local model (mine)"),
        (ModelSource("preset", "tiny"), "", None, "new:tiny"),
    ],
)  # fmt: skip
def test_a_base_is_named_as_others_can_find_it(source: ModelSource, name: str, revision: str, words: str) -> None:
    assert hub_id(source) == (name, revision)
    assert describe_base(source) == words
    front = yaml.safe_load(front_matter(source, is_adapter=True).strip("-\n"))
    assert front.get("base_model", "") == name
    loading = blocks(load_adapter_lines(source, None, None))[0]
    compile(loading, "card", "exec")
    assert (f'AutoModelForCausalLM.from_pretrained("{name}"' in loading) == bool(name)
    assert (f'revision="{revision}"' in loading) == bool(revision)
    assert "/home/me" not in loading


def test_a_card_says_what_was_trained_on_and_how_it_went(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger's counts, the losses and the licence of the base; no row, also not in the reason of a refusal."""
    (model_folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own-1.0\n---\n# Base\n", encoding="utf-8"
    )
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"it is {n}"}] for n in range(9)]
    turns.append([{"role": "a secret", "content": "?"}, {"role": "assistant", "content": "!"}])
    data = write_jsonl(tmp_path / "chats.jsonl", [{"messages": one} for one in turns])
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [{"messages": turns[0]}])
    code, _, err = run("train", "--model", model_folder, "--data", data, "--eval-data", held_out, "--output", tmp_path / "mine",
                       "--train.max_steps", 2, "--train.eval_steps", 1, "--train.log_steps", 1, "--data.max_refused", 0.5,
                       "--data.max_seq_len", 64)  # fmt: skip
    assert code == 0, err
    card = (tmp_path / "mine" / "model" / "README.md").read_text(encoding="utf-8")
    assert "| chats.jsonl | 10 | 9 | 1 | 0 | 0 |" in card
    assert "Rows refused, by reason: 1 unknown-role." in card
    assert "| held-out.jsonl | 1 | 1 | 0 | 0 | 0 |" in card
    assert re.search(r"\| training loss \| [\d.]+ \(step 1\) \| [\d.]+ \(step 2\) \|", card)
    assert re.search(r"\| evaluation loss \| [\d.]+ \(step \d\) \|", card)
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "own-1.0")
    assert "own-1.0, as its base a local model" in card
    assert "tunesmith chat ." in card
    assert "it is " not in card
    assert "secret" not in card


def test_data_are_named_without_their_folders(tmp_path: Path) -> None:
    assert name_data("/home/me/clients/acme.jsonl", tmp_path) == "acme.jsonl"
    assert name_data("../clients/acme.jsonl", tmp_path) == "acme.jsonl"
    assert name_data("clients/acme.jsonl", tmp_path) == "acme.jsonl"
    assert name_data("owner/name:train", tmp_path) == "owner/name:train"
    (tmp_path / "owner").mkdir()
    assert name_data("owner/name:train", tmp_path) == "name:train"  # a folder
