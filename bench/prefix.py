"""Speed-up of shared prefixes: the same samples as prefix trees and as naive packs, forward and backward, in turn.

    python bench/prefix.py --data sharegpt.jsonl --tokenizer TOKENIZER --limit 300 --max-seq-len 4096

Each measured pack of prefix trees is computed as it is, and as the naive packs that its samples make. The time of a
pack includes what builds its batch. Prints one JSON object: tokens for each computed one (`ratio`), the time of all
naive packs in times of the trees (`speed_up`), that divided by the ratio pack by pack (`speed_up_by_ratio`), and the
largest relative difference of loss and gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.data.dataset import Dataset
from tunesmith.data.feed import Batches
from tunesmith.lr_find import prepare
from tunesmith.model.loss import SupervisedLM, supervised_loss
from tunesmith.plans.packing import pack_lengths
from tunesmith.runfolder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--model", default="new:minimind-26m")
    parser.add_argument("--template")
    parser.add_argument("--history", default="unroll", choices=("auto", "unroll"))
    parser.add_argument("--limit", type=int, default=300, help="rows")
    parser.add_argument("--max-seq-len", type=int, default=4096)
    parser.add_argument("--layers", type=int, help="fewer layers, where time is short")
    parser.add_argument("--packs", type=int, default=8, help="how many packs are measured")
    args = parser.parse_args()
    flags = {
        "model.path": args.model, "model.tokenizer": args.tokenizer, "data.train": [args.data], "data.limit": args.limit,
        "data.history": args.history, "data.max_seq_len": args.max_seq_len, "train.output_dir": "bench-prefix",
        "train.micro_batch_tokens": args.max_seq_len, "data.share_prefix": True,
    }  # fmt: skip
    if args.template:
        flags["data.chat_template"] = args.template
    if args.layers:
        flags["model.config"] = {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(resolve_config(RunConfig, None, flags), Path(folder), args.packs), indent=1))


def measure(config: RunConfig, folder: Path, num_packs: int) -> dict[str, object]:
    ready = prepare(config, RunFolder(folder), {})
    assert isinstance(ready.dataset, Dataset)
    shares, differences, computed, tokens, seconds = [], [0.0], 0, 0, {True: 0.0, False: 0.0}
    capacity = ready.session.lengths.capacity
    steps = ready.feed.steps()
    for number in range(num_packs + 1):
        trees = next(steps).whole
        samples = torch.from_numpy(trees.packs[0]).numpy()
        lengths = trees.store.lengths_of(samples)
        packs = [samples[pack] for pack in pack_lengths(lengths.tolist(), capacity)]
        naive = replace(trees, packs=packs, prefixes=None, trains_once=False)
        both = [trees, naive] if number % 2 else [naive, trees]
        found = {one is trees: run(ready.lm, one) for one in both}
        if number == 0:  # memory is allocated, kernels are chosen
            continue
        (tree_s, tree_loss, tree_grads), (naive_s, naive_loss, naive_grads) = found[True], found[False]
        shares.append(naive_s / tree_s * trees.num_tokens / int(lengths.sum()))
        computed, tokens = computed + trees.num_tokens, tokens + int(lengths.sum())
        seconds = {True: seconds[True] + tree_s, False: seconds[False] + naive_s}
        differences += [abs(tree_loss - naive_loss) / abs(naive_loss)]
        differences += [
            float((one - two).abs().max() / two.abs().max().clamp_min(1e-30))
            for one, two in zip(tree_grads, naive_grads, strict=True)
        ]
    low, middle, high = statistics.quantiles(shares, n=4)
    return {
        "machine": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "model": config.model.path,
        "samples_an_epoch": ready.sharing.to_json(),
        "packs": len(shares),
        "ratio": round(tokens / computed, 3),
        "speed_up": round(seconds[False] / seconds[True], 3),
        "speed_up_by_ratio": {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]},
        "largest_difference": max(differences),
    }


def run(lm: SupervisedLM, batches: Batches) -> tuple[float, float, list[torch.Tensor]]:
    """Seconds, loss sum and gradients of all batches."""
    lm.train()
    lm.zero_grad(set_to_none=True)
    start, loss = time.perf_counter(), 0.0
    for batch in batches:
        sums = supervised_loss(lm, batch)
        sums.loss.backward()
        loss += float(sums.loss.detach())
    seconds = time.perf_counter() - start
    return seconds, loss, [p.grad.clone() for p in lm.parameters() if p.grad is not None]


if __name__ == "__main__":
    main()
