"""Cases that several processes run together: torchrun ... sharded_cases.py CASES.json

Each case is a command of tunesmith (with "late", its numbers are read as on a GPU), or a model folder whose shards are
compared with the whole model. Process 0 prints a JSON object: case -> exit code, or the names of the weights that differ.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tunesmith.run.training
from tunesmith.cli import main
from tunesmith.config.schema import ModelSection
from tunesmith.config.train_keys import TrainSection
from tunesmith.distributed.held import part_of, shard_rows
from tunesmith.distributed.load import load_held
from tunesmith.distributed.processes import joined_world
from tunesmith.model.load import load_config, load_model
from tunesmith.model.source import find_model
from tunesmith.report import replies

replies.NUM_SAMPLES, replies._REPLY_TOKENS = 1, 3


def compare_shards(folder: str) -> list[str]:
    """Weights and tables of a model loaded in shards that differ from the model loaded whole, in any process."""
    section, source = ModelSection(path=folder), find_model(folder)
    config = load_config(section, None, source)
    whole: Any = load_model(section, config, torch.float32, 0, source=source)
    wrong = []
    with joined_world(TrainSection(output_dir="x", parallel="fsdp")) as world:
        held = load_held(section, config, torch.float32, world.size, source, whole_rows=False)
        for name, parameter in held.named_parameters(remove_duplicate=False):
            part, expected = part_of(parameter), whole.get_parameter(name)
            if part is None:
                wrong.append(f"{name} is whole")
                continue
            rows = expected[slice(*shard_rows(len(expected), world.rank, world.size))]
            if not torch.equal(part, rows) or part.dtype != rows.dtype or parameter.shape != expected.shape:
                wrong.append(name)
        for name, buffer in held.named_buffers():
            if not torch.equal(buffer, whole.get_buffer(name)):
                wrong.append(name)
        ties = [{name for name, p in m.named_parameters(remove_duplicate=False)} for m in (held, whole)]
        wrong += sorted(ties[0] ^ ties[1])
        if len(list(held.parameters())) != len(list(whole.parameters())):
            wrong.append("tied weights")
        found: list[Any] = [None] * world.size
        dist.all_gather_object(found, wrong)
        return sorted({name for names in found for name in names})


def run(words: list[str], late: bool = False) -> int | str:
    tunesmith.run.training.can_read_late = lambda *_: late
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            code = main(words)
    except SystemExit as error:
        code = int(error.code or 0)
    return code or 0 if not code else f"{code}: {shown.getvalue()[-2000:]}"


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {name: compare_shards(c["folder"]) if "folder" in c else run(**c) for name, c in cases.items()}
    if os.environ["RANK"] == "0":
        print("\n" + json.dumps(results), flush=True)
