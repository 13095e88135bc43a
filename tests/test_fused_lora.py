"""Fused LoRA layers against peft's own: values, gradients, and where they step aside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import build_model, tiny_config
from tunesmith.adapters import fused
from tunesmith.adapters.fused import fuse_lora

Tensors = dict[str, torch.Tensor]


def adapted(name: str = "llama", dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    model = build_model(tiny_config(name), dtype)
    keys: dict[str, Any] = {"r": 4, "lora_alpha": 9, "target_modules": "all-linear", "init_lora_weights": False}
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**keys, **settings}))
    return model.to(dtype).train()


def gradients(model: nn.Module, dtype: torch.dtype | None = None) -> Tensors:
    model.zero_grad()
    ids = torch.arange(40).view(2, 20) % 30
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def is_fused(model: nn.Module) -> list[bool]:
    return ["forward" in vars(module) for module in model.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_loss_and_gradients_equal_those_of_peft(name: str, use_rslora: bool) -> None:
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name == "qwen3_moe" else "all-linear"
    model = adapted(name, target_modules=targets, use_rslora=use_rslora)
    wanted = gradients(model)
    assert fuse_lora(model) == len(is_fused(model))
    found = gradients(model)
    assert all(is_fused(model))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=0, atol=1e-10 if name != "qwen3_moe" else 1e-8), key
    assert not torch.equal(found["loss"], wanted["loss"]) or any(
        not torch.equal(found[key], wanted[key]) for key in wanted
    )  # it was the other path


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_as_exact_as_peft(frozen: torch.dtype) -> None:
    """The base in bf16 under trained matrices in fp32, as in a run with train.precision bf16."""
    torch.manual_seed(1)
    exact = adapted()
    model = copy.deepcopy(exact).to(torch.float32)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen)
    true, plain = gradients(exact), gradients(model, torch.bfloat16)
    fuse_lora(model)
    ours = gradients(model, torch.bfloat16)
    for key, tensor in plain.items():
        assert ours[key].dtype == tensor.dtype
    errors = [sum(float((found[k] - true[k]).norm()) for k in true) for found in (ours, plain)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "target_modules": "all-linear"},
        {"bias": "all", "target_modules": "all-linear"},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ],
    ids=lambda settings: next(iter(settings)) if settings["target_modules"] else "experts",
)
def test_other_adapters_are_left_to_peft(settings: dict[str, Any]) -> None:
    model = adapted("qwen2" if settings["target_modules"] else "qwen3_moe", **settings)
    wanted = gradients(model)
    fused_layers = fuse_lora(model)
    biased = [m for m in model.modules() if hasattr(m, "lora_A") and getattr(m.base_layer, "bias", None) is not None]
    assert fused_layers == (len(is_fused(model)) - len(biased) if "bias" in settings else 0)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-8) for key in wanted)


def test_dropout_draws_the_same_numbers() -> None:
    model = adapted(lora_dropout=0.3)
    torch.manual_seed(3)
    wanted = gradients(model)
    assert fuse_lora(model) == len(is_fused(model))
    torch.manual_seed(3)
    found = gradients(model)
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-10) for key in wanted)
    other = gradients(model)
    assert not torch.allclose(other["loss"], wanted["loss"], rtol=0, atol=1e-6)
    wanted = gradients(model.eval())
    for module in model.modules():
        vars(module).pop("forward", None)
    found = gradients(model)
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-10) for key in wanted)


def test_modules_trained_whole_beside_fused_layers() -> None:
    model = adapted(modules_to_save=["norm", "lm_head"], rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    wanted = gradients(model)
    assert fuse_lora(model)
    found = gradients(model)
    assert any("modules_to_save" in key for key in wanted)
    assert {tensor.shape[0] for key, tensor in wanted.items() if "lora_A" in key} == {2, 4}
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-10) for key in wanted)


def test_recomputed_activations_give_the_same_bits() -> None:
    model = adapted()
    fuse_lora(model)
    wanted = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    found = gradients(model)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_only_what_the_backward_needs_is_kept() -> None:
    """peft keeps two inputs of B and of the sum besides; here each layer keeps its input, its weights and x A'."""
    kept: list[torch.Tensor] = []
    model = adapted()
    fuse_lora(model)
    layer: Any = next(m for m in model.modules() if hasattr(m, "lora_A"))
    x = torch.randn(6, layer.in_features, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x).sum()
    weights = [layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    mine = [tensor for tensor in kept if all(tensor is not weight for weight in weights) and tensor is not x]
    assert [tuple(tensor.shape) for tensor in mine] == [(6, 4)]


def test_no_gradient_for_an_input_that_needs_none() -> None:
    """Those of the first layer, whose input comes from frozen embeddings."""
    model = adapted(target_modules=["q_proj"])
    fuse_lora(model)
    layer: Any = next(m for m in model.modules() if hasattr(m, "lora_A"))
    x = torch.randn(6, layer.in_features, dtype=torch.float64)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.lora_A["default"].weight.grad.any()


def test_gpt2s_transposed_layers_are_left_to_peft() -> None:
    assert fuse_lora(adapted("gpt2", target_modules=["c_attn"], fan_in_fan_out=True)) == 0


def test_what_happens_later_is_left_to_peft_too() -> None:
    """Disabled, merged, another adapter, a hook on a part: peft decides, with the same result as without the function."""
    torch.manual_seed(1)
    model = adapted()
    fuse_lora(model)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    x = torch.randn(3, layers[0].in_features, dtype=torch.float64, requires_grad=True)

    def is_ours() -> bool:
        node = layers[0](x).grad_fn
        return "LoraLinear" in f"{node} {node.next_functions}"

    assert is_ours()
    with torch.no_grad():
        assert torch.equal(layers[0](x), type(layers[0]).forward(layers[0], x))
    handle = layers[0].lora_A["default"].register_forward_pre_hook(lambda *_: None)
    assert not is_ours()
    handle.remove()
    layers[0].enable_adapters(False)
    assert torch.equal(layers[0](x), layers[0].base_layer(x))
    layers[0].enable_adapters(True)
    wanted = layers[0](x)
    layers[0].merge()
    assert not is_ours()
    assert torch.allclose(layers[0](x), wanted, rtol=0, atol=1e-12)
    layers[0].unmerge()
    assert is_ours()
    layers[0].update_layer("other", 2, lora_alpha=1, config=LoraConfig(r=2))
    layers[0].set_adapter("other")
    assert not is_ours()


def test_a_copy_computes_with_its_own_weights() -> None:
    model = adapted()
    fuse_lora(model)
    other = copy.deepcopy(model)
    before = gradients(model)["loss"]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    assert gradients(other)["loss"] != before
    assert gradients(model)["loss"] == before


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3), (2, 1, 3)])
def test_inputs_of_any_shape_whose_outputs_are_changed_in_place(shape: tuple[int, ...]) -> None:
    model = adapted()
    layer: Any = next(m for m in model.modules() if hasattr(m, "lora_A"))
    x = torch.randn(*shape, layer.in_features, dtype=torch.float64, requires_grad=True)

    def results() -> list[torch.Tensor]:
        output = layer(x)
        output[..., 0] *= 2
        output.add_(1).relu_()
        return [output, *torch.autograd.grad(output.sum(), [x, layer.lora_A["default"].weight])]

    wanted = results()
    fuse_lora(model)
    assert all(torch.allclose(found, want, rtol=0, atol=1e-10) for found, want in zip(results(), wanted, strict=True))


def test_without_tokens() -> None:
    """An expert that no token chose."""
    model = adapted()
    fuse_lora(model)
    layer: Any = next(m for m in model.modules() if hasattr(m, "lora_A"))
    layer(torch.zeros(0, layer.in_features, dtype=torch.float64)).sum().backward()
    assert not layer.lora_A["default"].weight.grad.any()


def test_a_peft_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    own = Linear.forward
    fused._agrees_with_peft.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "forward", lambda self, x, *args, **kwargs: 2 * own(self, x, *args, **kwargs))
        assert fuse_lora(adapted()) == 0
    fused._agrees_with_peft.cache_clear()
    assert fuse_lora(adapted())
