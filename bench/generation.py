"""Generated tokens per CPU second: the batcher beside transformers' generate (left-padded) and generate_batch.

All generate greedily from the same prompts of 10 to 60 random tokens with the model of the demo (or another), and must
agree; ties are counted. "equal": every row gets --new tokens; "mixed": each row a random number from 16 to --new, as
real replies end at different times (a padded batch runs until its longest row is done). The methods take turns in every
round; medians of the rounds are printed.

    OMP_NUM_THREADS=1 python bench/generation.py --rounds 5
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from tunesmith.config.schema import ModelSection
from tunesmith.demo.run import base_folder
from tunesmith.generation.batcher import Batcher
from tunesmith.generation.request import Request
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import Speaker, load_speaker

Generate = Callable[[Speaker, Sequence[list[int]], Sequence[int]], list[list[int]]]


def batched(speaker: Speaker, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
    batcher = Batcher(speaker)
    rows = [batcher.submit(Request(ids, Sampling(new, 0))) for ids, new in zip(prompts, limits, strict=True)]
    found: dict[int, list[int]] = {row: [] for row in rows}
    while batcher.has_work:
        for token in batcher.step():
            found[token.row].append(token.id)
    return list(found.values())


def sampled(speaker: Speaker, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
    batcher = Batcher(speaker)
    for place, (ids, new) in enumerate(zip(prompts, limits, strict=True)):
        batcher.submit(Request(ids, Sampling(new, 0.8, seed=place, top_p=0.9)))
    found: list[list[int]] = [[] for _ in prompts]
    while batcher.has_work:
        for token in batcher.step():
            found[token.row].append(token.id)
    return found


def padded(speaker: Speaker, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    model: Any = speaker.model
    output = model.generate(ids, attention_mask=mask, max_new_tokens=max(limits), do_sample=False, pad_token_id=0)
    return [row[width : width + new].tolist() for row, new in zip(output, limits, strict=True)]


def paged(speaker: Speaker, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
    """transformers' continuous batching, with sizes that fit a CPU; its defaults take over 10 GB."""
    config = ContinuousBatchingConfig(page_size=32, num_blocks=64 * 16, max_batch_tokens=256, use_async_batching=False)
    wanted = GenerationConfig(max_new_tokens=max(limits), do_sample=False, eos_token_id=-1, pad_token_id=0)
    model: Any = speaker.model
    own = model.config._attn_implementation
    try:
        found = model.generate_batch(list(prompts), generation_config=wanted, continuous_batching_config=config)
    finally:
        model.set_attn_implementation(own)
    by_prompt = sorted(found.values(), key=lambda one: int(one.request_id.rpartition("_")[2]))
    return [list(one.generated_tokens)[:new] for one, new in zip(by_prompt, limits, strict=True)]


METHODS: dict[str, Generate] = {
    "batcher": batched,
    "batcher, sampled": sampled,
    "generate, padded": padded,
    "generate_batch": paged,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(base_folder()))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    speaker = load_speaker(ModelSection(path=options.model))
    speaker.__dict__["stop_ids"] = frozenset()
    model: Any = speaker.model
    model.generation_config.eos_token_id = None
    vocab = speaker.num_embeddings
    print(f"{'case':8}{'rows':>6}  " + "".join(f"{name:>18}" for name in options.methods) + "   tokens per CPU second")
    for case in ("equal", "mixed"):
        for rows in options.rows:
            rng = random.Random(rows)
            prompts = [[rng.randrange(3, vocab) for _ in range(rng.randrange(10, 60))] for _ in range(rows)]
            limits = [options.new if case == "equal" else rng.randrange(16, options.new) for _ in range(rows)]
            speeds: dict[str, list[float]] = {name: [] for name in options.methods}
            replies: dict[str, list[list[int]]] = {}
            for _ in range(options.rounds):
                for name in options.methods:
                    start = time.process_time()
                    replies[name] = METHODS[name](speaker, prompts, limits)
                    speeds[name].append(sum(limits) / (time.process_time() - start))
            medians = "".join(f"{statistics.median(speeds[name]):18,.0f}" for name in options.methods)
            print(f"{case:8}{rows:6}  {medians}   {_differences(replies)}", flush=True)


def _differences(replies: dict[str, list[list[int]]]) -> str:
    """How many greedy replies of the others differ from the batcher's."""
    own = replies.get("batcher")
    others = [name for name in replies if name not in ("batcher", "batcher, sampled")]
    if own is None or not others:
        return ""
    counts = [sum(one != two for one, two in zip(own, replies[name], strict=True)) for name in others]
    return "differ: " + ", ".join(f"{name} {count}" for name, count in zip(others, counts, strict=True))


if __name__ == "__main__":
    main()
