"""GGUF files of runs with template variables, stop tokens of generation_config, long samples, and odd vocabularies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from conftest import build_model, save_folder, tiny_config
from tunesmith.chat_template.template import ChatTemplate, RenderSettings
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.exports import gguf as exporter
from tunesmith.gguf import proof
from tunesmith.gguf.architecture import describe_model
from tunesmith.gguf.variables import set_variables
from tunesmith.gguf.vocabulary import _list_tokens
from tunesmith.rows.conversation import Message

gguf: Any = pytest.importorskip("gguf")
needs_reader = pytest.mark.skipif(exporter.reader_version() is None, reason="xllamacpp is not installed")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., TunesmithError]
TURNS = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor -%}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES: dict[str, tuple[str, dict[str, Any]]] = {
    "white space in front": ("\n\n### Head {{ x }}\n", {"x": True}),
    "spaces in front": ("  \n{{ x }}|", {"x": "v"}),
    "spaces before a block": ("  {% if x %}yes{% endif %}|", {"x": 1}),
    "null in a list": ("{% for i in x %}[{{ i }}]{% endfor %}", {"x": [None, 1, "a"]}),
    "null in a mapping": ("{% if x.a is none %}NONE{% else %}SOME{% endif %}{{ x.b.c }}", {"x": {"a": None, "b": {"c": 2}}}),
    "needs its variable": ("{{ x.items() | list | length }}", {"x": {"a": 1}}),
    "numbers": ("{{ x }} {{ y }} {{ z }}", {"x": -3, "y": 0.25, "z": 1e-7}),
    "letters": ("{{ x }}", {"x": "a \"b\" 'c' \\n \\ {{ d }} %} é 你好 \t.\n."}),
    "a name that no template can say": ("{{ x }}", {"x": 1, "my-key": 2, "none": 3, "not": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_with_its_variables_renders_as_with_variables_given(name: str) -> None:
    head, variables = TEMPLATES[name]
    template = ChatTemplate(head + TURNS, "test", {}, False)
    whole = ChatTemplate(set_variables(head + TURNS, variables), "test", {}, False)
    chat = [Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "Hm")]
    date = exporter.datetime.datetime(2026, 1, 1)
    wanted = template.with_settings(RenderSettings(date, variables)).render(chat, add_generation_prompt=True)
    assert whole.with_settings(RenderSettings(date, {})).render(chat, add_generation_prompt=True) == wanted


@pytest.mark.parametrize("value", [math.inf, math.nan, object()])
def test_a_value_that_no_template_can_say_is_named(value: Any) -> None:
    with pytest.raises(ModelError, match=r"template_kwargs\.x"):
        set_variables("", {"x": value})


def trained(tmp_path: Path, tokenizer: Any, head: str, variables: dict[str, Any], **config: Any) -> Path:
    tokenizer.chat_template = head + TURNS
    base = save_folder(tmp_path / "base", tiny_config("qwen3", **config), tokenizer)
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho " * 60}]}] * 4
    run = tunesmith.train(
        model=str(base), output=str(tmp_path / "run"), train={"max_steps": 1},
        data={"train": rows, "max_seq_len": 400, "template_kwargs": variables},
    )  # fmt: skip
    return Path(run.path)


@needs_reader
@pytest.mark.parametrize("name", ["white space in front", "null in a mapping", "needs its variable"])
def test_a_run_with_variables_is_proven_against_what_it_was_trained_on(
    name: str, tmp_path: Path, plain_tokenizer: Any, run: Run
) -> None:
    head, variables = TEMPLATES[name]
    folder = trained(tmp_path, plain_tokenizer, head, variables)
    code, out, err = run("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf")
    assert code == 0, out + err
    assert "NOT PROVEN" not in out + err


@needs_reader
def test_a_template_that_says_something_else_than_the_run_is_noticed(
    tmp_path: Path, plain_tokenizer: Any, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(tmp_path, plain_tokenizer, "\n\n### {{ x }}\n", {"x": 1})
    monkeypatch.setattr(exporter, "set_variables", lambda text, variables: "{%- set x = 1 -%}" + text)
    assert fails("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf").code == "template-differs"


@needs_reader
def test_a_context_shorter_than_the_runs_samples(tmp_path: Path, plain_tokenizer: Any, run: Run) -> None:
    folder = trained(tmp_path, plain_tokenizer, "", {}, max_position_embeddings=64)
    code, out, err = run("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf")
    assert code == 0, out + err
    assert "num_ctx 400" in (tmp_path / "m.Modelfile").read_text()
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert int(fields["qwen3.context_length"].contents()) == 400


@pytest.mark.parametrize("context", [1, 2**31, 2**40])
def test_a_context_that_llama_cpp_cannot_have(context: int, tmp_path: Path, plain_tokenizer: Any, fails: Fails) -> None:
    folder = save_folder(tmp_path / "model", tiny_config("qwen3"), plain_tokenizer)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"max_position_embeddings": context}))
    error = fails("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf")
    assert error.code == "no-gguf-form"
    assert "max_position_embeddings" in str(error)


def with_stops(folder: Path, stops: list[int]) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


@needs_reader
def test_stop_tokens_of_generation_config_go_along(
    tmp_path: Path, plain_tokenizer: Any, run: Run, fails: Fails
) -> None:
    folder = save_folder(tmp_path / "model", tiny_config("qwen3"), plain_tokenizer)
    with_stops(folder, [2, 23])
    code, out, err = run("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf")
    assert code == 0, out + err
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    ends = [int(fields[key].contents()) for key in fields if key.endswith(("eos_token_id", "eot_token_id", "eom_token_id"))]  # fmt: skip
    assert {2, 23} <= set(ends)
    assert (tmp_path / "m.Modelfile").read_text().count("PARAMETER stop") == 2
    with_stops(folder, [2, 23, 24, 25, 26])
    error = fails("export", folder, "--format", "gguf", "--output", tmp_path / "n.gguf")
    assert error.code == "stop-token-ignored"
    assert "generation_config.json" in str(error)


@needs_reader
@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_a_wrong_value_that_rounding_would_hide_is_noticed(
    kind: str, tmp_path: Path, plain_tokenizer: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("gemma3", sliding_window=600, max_position_embeddings=1024)
    folder = save_folder(tmp_path / "model", config, plain_tokenizer)
    monkeypatch.setattr(
        exporter, "describe_model", lambda *words, **more: _with(describe_model(*words, **more), 550)
    )  # fmt: skip
    code, out, err = run("export", folder, "--format", "gguf", "--type", kind, "--output", tmp_path / "m.gguf")
    assert code == 4, out + err
    assert "log-probabilities differ" in err
    assert not list(tmp_path.glob("*.gguf*"))


def _with(form: Any, window: int) -> Any:
    import dataclasses

    return dataclasses.replace(form, metadata={**form.metadata, "attention.sliding_window": window})


def test_another_model_is_noticed_where_all_logits_are_far_from_zero() -> None:
    """A constant that is added to all logits changes no probability, so it must not widen the tolerance."""
    model, other = (build_model(tiny_config("gpt2"), seed=seed) for seed in (0, 1))
    prompts, lengths = [[5, 9, 31, 7, 22, 80, 3, 4]], [[2, 3, 4, 5, 6, 7, 8]]
    with torch.no_grad():
        found = other(torch.tensor(prompts)).logits[0].log_softmax(-1)
    tops = [found[end - 1].topk(64) for end in lengths[0]]
    next_tokens = [[dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in tops]]
    plain = model.forward
    model.forward = lambda **words: _moved(plain(**words), -100.0)
    with pytest.raises(TunesmithError) as caught:
        proof._compare_logits(model, prompts, lengths, proof.Answers([], [], next_tokens), "q8_0")
    assert caught.value.code == "exported-logits-differ"


def _moved(output: Any, offset: float) -> Any:
    output.logits = output.logits + offset
    return output


def test_placeholders_differ_from_the_tokens_that_there_are() -> None:
    settings = {"model": {"vocab": {"a": 0, "[UNUSED3]": 1}}, "added_tokens": [{"id": 2, "content": "[UNUSED_4]", "special": False}]}  # fmt: skip
    tokens, _ = _list_tokens(settings, 6)
    assert len(set(tokens)) == 6
    assert tokens[:3] == ["a", "[UNUSED3]", "[UNUSED_4]"]
