"""Recipes run on tiny models of their architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_row, save_folder, tiny_config, write_jsonl
from tunesmith.config.runfile import find_recipe, list_recipes, resolve_config
from tunesmith.config.schema import RunConfig

Run = Callable[..., tuple[int, str, str]]
ARCHITECTURES = {
    "gpt2": "gpt2",
    "qwen2.5": "qwen2",
    "minimind": "qwen3",
    "laptop": "qwen3",
    "reasoning": "qwen3",
    "tool": "qwen2",
    "chinese": "qwen2",
}
TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.first and tools %}{{ tools | tojson }}{% endif %}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def base_for(recipe: str, folder: Path, tokenizer: Any) -> Path:
    name = next(value for key, value in ARCHITECTURES.items() if recipe.startswith(key))
    own = copy.deepcopy(tokenizer)
    own.chat_template = None if name == "gpt2" else TOOLS
    wide: dict[str, Any] = {"n_embd": 64} if name == "gpt2" else {"hidden_size": 64, "head_dim": 16}
    length = {"n_positions": 1024} if name == "gpt2" else {"max_position_embeddings": 4096}
    return save_folder(folder, tiny_config(name, initializer_range=0.02, **wide, **length), own)


def rows_for(recipe: str) -> list[Any]:
    if recipe.startswith("gpt2"):
        return [{"instruction": f"Say {i}", "input": "", "output": f"The answer is {i}."} for i in range(60)]
    if recipe == "tool-calling":
        tool = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": "you"}}}
        turns = [{"role": "user", "content": "look"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return [{"messages": turns, "tools": [tool]}] * 60
    if recipe == "reasoning":
        return [chat_row(f"What is {i}?", f"<think>\nWho says {i}?\n</think>\n\nA fox {i}.") for i in range(60)]
    if recipe.endswith("-pretrain"):
        return [{"text": f"the quick brown fox {i} jumps over the lazy dog"} for i in range(300)]
    return [chat_row(f"What is the answer {i}?", f"The answer is {i} and you.") for i in range(60)]


@pytest.mark.parametrize("recipe", [name for name, _ in list_recipes()])
def test_every_recipe_runs(run: Run, tokenizer: Any, tmp_path: Path, recipe: str) -> None:
    if "qlora" in recipe:
        pytest.importorskip("bitsandbytes")
    base = base_for(recipe, tmp_path / "base", tokenizer)
    data = write_jsonl(tmp_path / "data.jsonl", rows_for(recipe))
    words = ("train", f"recipe:{recipe}", "--model", base, "--data", data, "--output", tmp_path / "run", "--train.max_steps", 2,
             "--data.eval_split", 0.05)  # fmt: skip
    code, out, err = run(*words)
    assert code == 0, err
    if recipe.endswith("-stages"):
        assert f"model saved: {tmp_path / 'run' / '2-sft' / 'model'}" in out
        return
    what = "adapter" if "lora:" in find_recipe(Path(f"recipe:{recipe}")).read_text() else "model"
    assert f"{what} saved: {tmp_path / 'run' / what}" in out
    if what == "adapter":
        code, _, err = run("merge", tmp_path / "run", "--output", tmp_path / "merged")
        assert code == 0, err


def test_recipes_are_listed_with_what_they_do(run: Run) -> None:
    code, out, _ = run("recipes")
    assert code == 0
    for name, text in list_recipes():
        assert f"{name} " in out
        assert len(text) > 20
        comment = find_recipe(Path(f"recipe:{name}")).read_text().split("model:")[0]
        assert f"tunesmith train recipe:{name} " in comment


def test_the_background_recipe_for_qwen_is_what_the_text_says() -> None:
    """background/002: r 16, alpha 32, all-linear, lm_head and embed_tokens in full; full at 5e-6 with 100 warmup steps."""
    flags = {"train.output_dir": "o"}
    lora = resolve_config(RunConfig, Path("recipe:qwen2.5-0.5b-lora"), flags)
    assert (lora.lora.rank, lora.lora.scale_alpha, lora.lora.dropout, lora.optim.lr) == (16, 32, 0.05, 2e-4)
    assert (lora.lora.target_modules, lora.lora.modules_to_save) == (["all-linear"], ["lm_head", "embed_tokens"])
    full = resolve_config(RunConfig, Path("recipe:qwen2.5-0.5b-full"), flags)
    assert (full.lora.kind, full.optim.lr, full.optim.warmup_steps) == ("none", 5e-6, 100)
    assert full.data.train == lora.data.train == ["trl-lib/Capybara"]
