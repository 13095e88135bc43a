"""train.compile: blocks compiled one by one, with the gradients of the others, and not again for each batch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import DeepseekV3Config

from conftest import build_model, killed_after, tiny_config
from tunesmith.adapters.fused import fuse_lora
from tunesmith.distributed import blocks
from tunesmith.distributed.blocks import compile_blocks, compile_now, find_blocks
from tunesmith.distributed.spread import Spread
from tunesmith.layers import products
from tunesmith.model.isolation import use_packed_attention
from tunesmith.model.loss import SupervisedLM, supervised_loss

pytestmark = pytest.mark.filterwarnings("default")  # raised inside torch's compiler
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without its code generator: what is traced, and when, is the same."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend="aot_eager"))
    torch._dynamo.reset()
    blocks._compiled.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()
    blocks._compiled.cache_clear()


def language_model(name: str, is_adapted: bool = False, recomputes: bool = False) -> SupervisedLM:
    model = build_model(tiny_config(name), torch.float64)
    use_packed_attention(model)
    adapter = None
    if is_adapted:
        settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        adapter = get_peft_model(model, settings)
        model.to(torch.float64)
        assert fuse_lora(model)
    if recomputes:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return SupervisedLM(model, True, "decoder", adapter).train()


def gradients(lm: SupervisedLM, lens: list[int]) -> dict[str, torch.Tensor]:
    batch = blocks.blank_batch(lens)
    batch.input_ids[:] = torch.arange(sum(lens)).remainder(300).numpy()
    lm.zero_grad()
    supervised_loss(lm, batch).loss.backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "is_adapted", "recomputes"),
    [("qwen3", False, False), ("gemma2", False, False), ("qwen3", True, False), ("llama", True, True)],
)
def test_gradients_of_compiled_blocks(name: str, is_adapted: bool, recomputes: bool, tracer: None) -> None:
    plain = language_model(name, is_adapted, recomputes)
    lm = copy.deepcopy(plain)
    compile_blocks(lm.model)
    compile_now(lm, Spread(), nullcontext(), [7, 6])
    assert all(p.grad is None for p in lm.parameters())
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for lens in ([12], [5, 9, 11], [3] * 9):
        wanted, found = gradients(plain, lens), gradients(lm, lens)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.allclose(found[key], tensor, rtol=0, atol=1e-8), key  # norms compute in fp32
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_values_narrower_than_keys(tracer: None) -> None:
    """Multi-head latent attention."""
    config = DeepseekV3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
        kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, vocab_size=400,
        first_k_dense_replace=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = build_model(config, torch.float64)
    use_packed_attention(model)
    plain = SupervisedLM(model, True, "decoder").train()
    lm = copy.deepcopy(plain)
    compile_blocks(lm.model)
    compile_now(lm, Spread(), nullcontext(), [7, 6])
    wanted, found = gradients(plain, [5, 9, 11]), gradients(lm, [5, 9, 11])
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-6) for key in wanted)


def test_an_adapter_in_fp32_breaks_no_graph(tracer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has oneDNN multiply the products of uncompiled layers."""
    products.onednn_is_faster.cache_clear()
    monkeypatch.setattr(products, "is_amd", lambda: True)
    model = build_model(tiny_config("llama"), torch.float32)
    use_packed_attention(model)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapter = get_peft_model(model, settings)
    assert fuse_lora(model)
    compile_blocks(model)
    compile_now(SupervisedLM(model, True, "decoder", adapter), Spread(), nullcontext(), [7, 6])
    assert not counters["graph_break"]
    products.onednn_is_faster.cache_clear()


def test_a_run_does_not_use_what_another_has_compiled(tracer: None) -> None:
    """A resumed run, in another process, could not either."""
    for number in (1, 2):
        lm = language_model("llama")
        compile_blocks(lm.model)
        compile_now(lm, Spread(), nullcontext(), [7 * number, 6])
        if number == 1:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == 2 * graphs


def test_a_copy_computes_with_its_own_weights(tracer: None) -> None:
    lm = language_model("llama")
    compile_blocks(lm.model)
    other = copy.deepcopy(lm)
    before = gradients(lm, [9])
    with torch.no_grad():
        for block in find_blocks(other.model):
            for parameter in block.parameters():
                parameter += 0.1
    found, again = gradients(other, [9]), gradients(lm, [9])
    assert any(not torch.allclose(found[key], before[key]) for key in before)
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_evaluation_is_not_compiled(tracer: None) -> None:
    lm = language_model("llama")
    compile_blocks(lm.model)
    with torch.no_grad():
        supervised_loss(lm, blocks.blank_batch([9]))
    lm.eval()
    supervised_loss(lm, blocks.blank_batch([9]))
    assert not counters["stats"]["unique_graphs"]


def test_blocks_without_names() -> None:
    model = nn.ModuleDict({"few": nn.ModuleList([nn.Linear(2, 2)]), "many": nn.ModuleList([nn.Linear(2, 2)] * 3)})
    assert len(find_blocks(model)) == 3


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(run: Run, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    """It sees other batches first than the run that it continues."""
    output = tmp_path / "run"
    code, out, err = run("train", "--model", model_folder, "--data", chats, "--output", output, "--train.max_steps", 6,
                         "--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--train.save_steps", 3,
                         "--train.compile", "true")  # fmt: skip
    assert code == 0, err
    assert "torch.compile: the model's blocks were compiled in " in out
    killed = killed_after(output, 3, tmp_path / "killed")
    torch._dynamo.reset()
    blocks._compiled.cache_clear()
    code, _, err = run("resume", killed)
    assert code == 0, err
    for place in ("model/model.safetensors",):
        assert (killed / place).read_bytes() == (output / place).read_bytes()
