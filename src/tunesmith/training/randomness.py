"""Save and restore global state of the process: random generators, threads, determinism."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"  # set by train.deterministic


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_forward(*numbers: int) -> None:
    """Seed torch's generators from a run's seed and a forward's place, for its dropout."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def take_random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """torch's random states as tensors; those of Python and NumPy as JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    elif torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    return tensors, {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(place), int(has_gauss), float(cached)],
    }


def restore_random_states(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> None:
    torch.set_rng_state(tensors["cpu"])
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("cuda:")]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)
    if "mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["mps"])
    version, words, gauss = others["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, place, has_gauss, cached = others["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, cached))


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Restore the caller's global state after the block."""
    states = take_random_states()
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    variable = os.environ.get(CUBLAS_VARIABLE)
    try:
        yield
    finally:
        if variable is None:
            os.environ.pop(CUBLAS_VARIABLE, None)
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        restore_random_states(*states)
