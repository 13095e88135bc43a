"""Train on a Ray cluster: python ray_train.py MODEL DATA OUTPUT [WORKERS]

OUTPUT is a folder that all hosts see. A worker that fails is started again with all others, up to three times, and the
run continues from its newest checkpoint. Needs ray[train] on all hosts.
"""

from __future__ import annotations

import sys
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict[str, Any]) -> str:
    """What each worker runs: Ray sets RANK, WORLD_SIZE and the others, and connects the processes."""
    import tunesmith

    return str(tunesmith.train(**config).path)


def main(model: str, data: str, output: str, workers: str = "2") -> None:
    import torch

    config = {"model": model, "data": data, "output": output, "train": {"resume": True, "parallel": "auto"}}
    trainer = TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=int(workers), use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    print(trainer.fit().return_value)


if __name__ == "__main__":
    main(*sys.argv[1:])
