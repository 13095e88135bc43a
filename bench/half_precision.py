"""Compare fp32, autocast to bf16, and copies of the weights in bf16: what a forward keeps, and the time of a step.

    python bench/half_precision.py [--shape 26m] [--tokens 2048] [--rounds 8]

All three compute the same layers on the same ids, in turn, in one process. Kept is what grows with the number of
tokens: tensors saved for the backward, weights and their copies aside. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from compare_inputs import SHAPES, write_model
from transformers import AutoModelForCausalLM

from tunesmith.layers.copies import HalfCopies
from tunesmith.layers.speedup import speed_up

NAMES = ("fp32", "autocast", "copies")


class Way:
    """One way to compute: a model of its own, and the context of its forward."""

    def __init__(self, name: str, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        speed_up(self.model, self.model.get_output_embeddings(), is_checkpointed=False)
        self.name = name
        self.copies = HalfCopies(self.model, torch.bfloat16) if name == "copies" else None

    def computing(self) -> AbstractContextManager[object]:
        if self.name == "autocast":
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return self.copies or nullcontext()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with self.computing():
            return self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.float()

    def kept_bytes(self, ids: torch.Tensor) -> int:
        """Of the tensors that a forward saves."""
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.forward(ids)
        return sum(saved.values())

    def step_s(self, ids: torch.Tensor) -> float:
        self.model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        self.forward(ids).square().mean().backward()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="26m", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="half-") as name:
        write_model(Path(name), args.shape, None)
        ways = [Way(kind, Path(name)) for kind in NAMES]
    ids = torch.randint(0, 400, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(args.rounds + 1):
        for way in ways:
            times[way.name].append(way.step_s(ids))
    print("| | kept, KB a token | a layer | step, over fp32 |\n|---|--:|--:|--:|")
    for way in ways:
        whole, half = (way.kept_bytes(ids[:, :length]) for length in (args.tokens, args.tokens // 2))
        kept = (whole - half) / (args.tokens - args.tokens // 2) / 1000
        ratios = [mine / base for mine, base in zip(times[way.name][1:], times["fp32"][1:], strict=True)]
        layers = way.model.config.num_hidden_layers
        print(f"| {way.name} | {kept:.1f} | {kept / layers:.1f} | {statistics.median(ratios):.2f} |")
    print(f"autocast over copies: {statistics.median(map(ratio, times['autocast'][1:], times['copies'][1:])):.2f}")


def ratio(one: float, other: float) -> float:
    return one / other


if __name__ == "__main__":
    main()
