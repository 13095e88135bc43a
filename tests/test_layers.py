"""Faster layers compute what the model's own do."""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV4Config, SeedOssConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

from tunesmith.layers import products
from tunesmith.layers.norm import RMSNormFunction, speed_up_norm
from tunesmith.layers.speedup import speed_up
from tunesmith.layers.swiglu import SwiGLUFunction, speed_up_mlp

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
         "vocab_size": 64, "max_position_embeddings": 64}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
MODELS = {
    "llama": SIZES, "qwen2": SIZES, "qwen3": {**SIZES, "head_dim": 8}, "gemma2": {**SIZES, "head_dim": 8}, "gemma3_text": {**SIZES, "head_dim": 8},
    "qwen3_moe": {**SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": GPT2, "phi3": {**SIZES, "pad_token_id": 0}, "olmo2": SIZES, "granite": SIZES, "mistral": SIZES,
}  # fmt: skip


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MODELS[name])).eval()
    with torch.no_grad():  # norms begin as ones, biases as zeros
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def results(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def any_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both choices, whatever the processor is."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    for module in ("products", "speedup"):
        monkeypatch.setattr(f"tunesmith.layers.{module}.onednn_is_faster", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_same_loss_and_gradients(name: str, any_processor: bool) -> None:
    model = build(name)
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    loss, gradients = results(model, ids)
    names = set(model.state_dict())
    speed_up(model, model.get_output_embeddings(), False)
    again, faster = results(model, ids)
    assert set(model.state_dict()) == names
    assert torch.allclose(loss, again, rtol=1e-6)
    for (key, _), one, two in zip(model.named_parameters(), gradients, faster, strict=True):
        assert (one is None) == (two is None), key
        if one is not None and two is not None:
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-5 * float(one.abs().max())), key


def replaced(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in model.modules():
        if "forward" in vars(module):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return counts


def test_what_is_replaced_and_what_is_left_alone(any_processor: bool) -> None:
    linear = {"Linear": 14} if any_processor else {}
    expected = {
        "llama": {"LlamaRMSNorm": 5, "LlamaMLP": 2, **linear},
        "qwen3": {"Qwen3RMSNorm": 9, "Qwen3MLP": 2, **linear},
        "gemma2": linear,  # (1 + weight), gelu
        "gpt2": {},
    }
    for name, counts in expected.items():
        model = build(name)
        speed_up(model, model.get_output_embeddings(), False)
        assert replaced(model) == counts, name


def test_norms_agree_with_formulas_in_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: RMSNormFunction.apply(a, b, 1e-3), (x, weight))
    wanted = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
    found = RMSNormFunction.apply(x, weight, 1e-3)
    grad = torch.randn_like(found)
    for one, two in zip(torch.autograd.grad(wanted, (x, weight), grad), torch.autograd.grad(found, (x, weight), grad), strict=True):  # fmt: skip
        assert torch.allclose(one, two, rtol=0, atol=1e-12)


def test_swiglu_agrees_in_float64() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(SwiGLUFunction.apply, (gate, up))


def test_linear_layers_agree(any_processor: bool) -> None:
    torch.manual_seed(0)
    for bias in (False, True):
        layer = nn.Linear(24, 40, bias=bias)
        x = torch.randn(2, 9, 24, requires_grad=True)
        grad = torch.randn(2, 9, 40)
        inputs = [x, *layer.parameters()]
        wanted = layer(x)
        expected = torch.autograd.grad(wanted, inputs, grad)
        products.speed_up_linear(layer)
        found = layer(x)
        assert torch.allclose(wanted, found, atol=1e-5)
        for one, two in zip(expected, torch.autograd.grad(found, inputs, grad), strict=True):
            assert torch.allclose(one, two, atol=1e-4)
        frozen = copy.deepcopy(layer).requires_grad_(False)  # the copy multiplies with its own weights
        with torch.no_grad():
            frozen.weight.zero_()
        assert not torch.allclose(frozen(x), layer(x))


def test_outputs_of_norms_and_mlps_are_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 9, 32)
    config = AutoConfig.for_model("llama", **SIZES)
    norm: Any = LlamaRMSNorm(32)
    mlp: Any = LlamaMLP(config)
    with torch.no_grad():
        norm.weight.normal_()
    for module, speed_up_it in ((norm, speed_up_norm), (mlp, speed_up_mlp)):
        plain = module(x)
        gradients = torch.autograd.grad(plain.sum(), list(module.parameters()))
        assert speed_up_it(module)
        found = module(x)
        assert torch.equal(plain, found)
        if module is mlp:
            again = torch.autograd.grad(found.sum(), list(module.parameters()))
            assert all(torch.equal(one, two) for one, two in zip(gradients, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_half_precision(dtype: torch.dtype) -> None:
    """Outputs are the same to the bit; gradients are at least as exact as those of the model's own."""
    torch.manual_seed(0)
    exact: Any = LlamaRMSNorm(64).double()
    with torch.no_grad():
        exact.weight.normal_().copy_(exact.weight.to(dtype))
    x, grad = torch.randn(50, 64).to(dtype).double().requires_grad_(), torch.randn(50, 64).to(dtype)
    best = torch.autograd.grad(exact(x), [x, exact.weight], grad.double())
    norm: Any = copy.deepcopy(exact).to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_(), norm.weight]
    plain = norm(inputs[0])
    own = torch.autograd.grad(plain, inputs, grad)
    assert speed_up_norm(norm)
    found = norm(inputs[0])
    assert torch.equal(plain, found)
    assert type(found.grad_fn).__name__ == "RMSNormFunctionBackward"
    for ours, usual, right in zip(torch.autograd.grad(found, inputs, grad), own, best, strict=True):
        assert ours.dtype == dtype
        assert (ours - right).norm() <= 1.05 * (usual - right).norm()


def test_norms_that_round_elsewhere_keep_their_own_half_precision() -> None:
    torch.manual_seed(0)
    norm: Any = Olmo2RMSNorm(64).bfloat16()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(50, 64).bfloat16()
    plain = norm(x)
    assert speed_up_norm(norm)
    assert torch.equal(norm(x), plain)


def test_other_modules_are_left_alone() -> None:
    assert not speed_up_norm(Gemma2RMSNorm(8))

    class Odd(LlamaMLP):  # another class of the same parts
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert not speed_up_mlp(Odd(AutoConfig.for_model("llama", **SIZES)))
    assert not speed_up_mlp(LlamaMLP(AutoConfig.for_model("llama", **SIZES, hidden_act="gelu")))


def kept_mb(module: nn.Module, x: Tensor) -> float:
    """Memory that is taken after a forward and was not before, in tensors so large that each has pages of its own."""
    gc.collect()
    before = resident_mb()
    output = module(x)
    found = resident_mb() - before
    output.sum().backward()
    return found


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("is_trained", [True, False])
def test_less_is_kept_for_the_backward(is_trained: bool, any_processor: bool) -> None:
    config = AutoConfig.for_model("llama", **{**SIZES, "intermediate_size": 4096})
    x = torch.randn(4096, 32, requires_grad=True)  # 67 MB with 4096 numbers each
    mlp: Any = LlamaMLP(config).requires_grad_(is_trained)
    wide: Any = LlamaRMSNorm(4096).requires_grad_(is_trained)
    wide_x = torch.randn(4096, 4096, requires_grad=True)
    for module, inputs, plain, less in ((mlp, x, 4, 2), (wide, wide_x, 2, 1)):
        kept = kept_mb(module, inputs)
        speed_up(nn.Sequential(module), None, False)
        less_kept = kept_mb(module, inputs)
        assert less_kept < 67.2 * less + 20
        if is_trained:
            assert kept > 67 * plain - 10  # otherwise there is nothing to test


def test_checkpointed_layers_keep_only_their_input(any_processor: bool) -> None:
    """A saved tensor of the MLP must not escape the checkpoint."""
    config = AutoConfig.for_model("llama", **{**SIZES, "intermediate_size": 4096})
    mlp: Any = LlamaMLP(config)
    x = torch.randn(4096, 32, requires_grad=True)
    speed_up(nn.Sequential(mlp), None, True)
    output = torch.utils.checkpoint.checkpoint(mlp, x, use_reentrant=False)
    wanted = torch.autograd.grad(output.sum(), list(mlp.parameters()))
    found = torch.autograd.grad(mlp(x).sum(), list(mlp.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(wanted, found, strict=True))
    assert replaced(nn.Sequential(mlp)) == ({"Linear": 3} if any_processor else {})


def _large(module: Any) -> Tensor:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(50)
    return torch.randn(3, 8) * 50


def test_an_mlp_that_clamps_is_left_alone() -> None:
    module = DeepseekV4MLP(DeepseekV4Config(hidden_size=8, intermediate_size=16, moe_intermediate_size=16))
    x = _large(module)
    wanted = module(x)
    assert not speed_up_mlp(module)
    assert torch.equal(module(x), wanted)


def test_an_mlp_with_dropout_of_its_own_is_left_alone() -> None:
    module = SeedOssMLP(SeedOssConfig(hidden_size=8, intermediate_size=16, residual_dropout=0.1)).eval()
    state = torch.get_rng_state()
    assert not speed_up_mlp(module)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("is_trained", [True, False])
def test_a_frozen_layer_does_not_keep_its_input(is_trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    layer = nn.Linear(5, 4).requires_grad_(is_trained)
    products.speed_up_linear(layer)
    x = torch.randn(3, 5, requires_grad=True)
    output = layer(x)
    node: Any = output.grad_fn
    assert (node.saved_tensors[0] is not None) == is_trained
    output.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, 5), atol=1e-6)
