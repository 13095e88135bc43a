"""The least time of a step: the matrix products that it must do, at the rate this machine reaches on their shapes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from compare_inputs import Task


@dataclass(frozen=True, slots=True)
class Product:
    """Weights of one shape.

    Attributes:
        number: of such weights in the model.
        is_trained: else there is no product for the gradient of the weight.
        is_head: it works on supervised tokens alone.
    """

    rows: int
    columns: int
    number: int
    is_trained: bool
    is_head: bool = False

    @property
    def flops(self) -> float:
        """Of one token."""
        return (6.0 if self.is_trained else 4.0) * self.rows * self.columns * self.number


def list_products(config: Any, lora_rank: int | None) -> list[Product]:
    """The linear layers of a model, of its adapters, and its head."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts: dict[tuple[int, int, bool, bool], int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        rows, columns = module.weight.shape
        is_head = name == "lm_head"
        shapes = [(rows, columns, lora_rank is None)]
        if lora_rank is not None and not is_head:
            shapes += [(lora_rank, columns, True), (rows, lora_rank, True)]
        for r, c, is_trained in shapes:
            key = (r, c, is_trained, is_head)
            counts[key] = counts.get(key, 0) + 1
    return [Product(r, c, number, is_trained, is_head) for (r, c, is_trained, is_head), number in counts.items()]


def attention_flops(config: Any) -> float:
    """Of causal attention within a document, divided by the square of its length: two products of queries and keys in
    the forward and four in the backward, each half a square."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 6.0 * width * config.num_hidden_layers


class Limit:
    def __init__(self, task: Task) -> None:
        import torch
        from transformers import AutoConfig

        self._config = AutoConfig.from_pretrained(task.model)
        self._products = list_products(self._config, task.lora_rank if task.method == "lora" else None)
        self._tokens = task.tokens
        self._torch = torch

    def describe(self) -> dict[str, float]:
        return {
            "flops_per_token": sum(p.flops for p in self._products if not p.is_head),
            "flops_per_target": sum(p.flops for p in self._products if p.is_head),
            "flops_per_square": attention_flops(self._config),
        }

    def measure(self) -> float:
        """FLOP/s over all products, each shape measured once, weighted as in a step (half of the tokens supervised)."""
        seconds = flops = 0.0
        for product in self._products:
            tokens = self._tokens // 2 if product.is_head else self._tokens
            seconds += product.number * self._seconds(product, tokens)
            flops += product.flops * tokens
        return flops / seconds

    def _seconds(self, product: Product, tokens: int) -> float:
        torch = self._torch
        inputs, weight = torch.randn(tokens, product.columns), torch.randn(product.rows, product.columns)
        outputs, inputs_again, weight_again = inputs @ weight.T, torch.empty_like(inputs), torch.empty_like(weight)
        best = float("inf")
        repeats = 1 if 2.0 * tokens * weight.numel() > 1e11 else 3
        for _ in range(repeats):
            began = time.perf_counter()
            torch.mm(inputs, weight.T, out=outputs)
            torch.mm(outputs, weight, out=inputs_again)
            if product.is_trained:
                torch.mm(outputs.T, inputs, out=weight_again)
            best = min(best, time.perf_counter() - began)
        return best
