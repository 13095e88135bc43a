"""Choose the device that a model runs on."""

from __future__ import annotations

import torch


def pick_device(local_rank: int | None = None) -> torch.device:
    """The GPU of this process, or an Apple GPU (not run on one yet), or the CPU.

    Args:
        local_rank: number of this process on its host, where there are several; each has a GPU of its own. Some
            launchers show each process only that one GPU.
    """
    if torch.cuda.is_available():
        if local_rank is None:
            return torch.device("cuda")
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
