"""Check runs in several processes on GPUs: equality with one GPU, and the memory of large models.

Usage: gpu_processes.py [--gpus N] [--folder DIR] [--steps N]

Needs at least two GPUs of one host. It trains a small GPT-2 with dropout and a LoRA adapter on a small Qwen3 in fp32 on
one GPU and then, under torchrun, with ddp and fsdp over NCCL: the losses must be equal within 1e-4, otherwise the exit
code is 1. Then it measures the peak memory of each process for a LoRA adapter on a model shaped like a 7B one and for
all weights of one shaped like a 1.5B one, both with random weights and fsdp. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES = {
    "7B LoRA": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 32},
    "1.5B full": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                  "num_key_value_heads": 2},
}  # fmt: skip
MEMORY_STEPS = 3


def make_inputs(folder: Path, shapes: dict[str, dict[str, int]]) -> None:
    """The small models of chaos.py, its chats, and models of the given shapes with random weights in bf16."""
    import torch
    import transformers
    from chaos import make_inputs as make_small

    make_small(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "qwen3")
    for name, shape in shapes.items():
        config = transformers.LlamaConfig(vocab_size=32000, max_position_embeddings=4096, bos_token_id=0,
                                          eos_token_id=2, **shape)  # fmt: skip
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        del model
        torch.cuda.empty_cache()


def train(gpus: int, folder: Path, model: str, run: str, flags: list[str]) -> Path:
    words = ["train", "--model", str(folder / model), "--data", str(folder / "train.jsonl"), "--output",
             str(folder / run), "--optim.lr", "1e-3", *flags]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    environment = os.environ | ({} if gpus > 1 else {"CUDA_VISIBLE_DEVICES": "0"})
    subprocess.run([sys.executable, *launcher, "-m", "tunesmith", *words], env=environment, check=True)
    return folder / run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(gpus: int, folder: Path, steps: int) -> dict[str, float]:
    """Kind of run -> largest difference of a loss from one GPU's."""
    flags = ["--train.precision", "fp32", "--data.max_seq_len", "96", "--train.micro_batch_tokens", "128",
             "--train.grad_accum_steps", str(2 * gpus), "--train.max_steps", str(steps)]  # fmt: skip
    kinds = {"full": ("gpt2", []), "lora": ("qwen3", ["--lora.kind", "lora", "--lora.dropout", "0.1"])}
    found = {}
    for kind, (model, more) in kinds.items():
        wanted = losses(train(1, folder, model, f"one-{kind}", [*flags, *more]))
        for parallel in ("ddp", "fsdp"):
            run = train(gpus, folder, model, f"{parallel}-{kind}", [*flags, *more, "--train.parallel", parallel])
            pairs = zip(losses(run), wanted, strict=True)
            found[f"{kind} {parallel}"] = max(abs(one - other) for one, other in pairs)
    return found


def peak_memory(gpus: int, folder: Path, name: str) -> dict[str, Any]:
    """GiB in use on each GPU while a model of this shape is trained, as the driver counts them."""
    flags = ["--data.max_seq_len", "96", "--train.micro_batch_tokens", "2048", "--train.grad_accum_steps", str(gpus),
             "--train.max_steps", str(MEMORY_STEPS), "--train.epochs", "1000", "--train.parallel", "fsdp",
             "--train.gradient_checkpointing", "true", "--train.keep_checkpoints", "1"]  # fmt: skip
    flags += ["--lora.kind", "lora"] if name.endswith("LoRA") else []
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "200"]
    with (folder / "memory.txt").open("w+") as file:
        watcher = subprocess.Popen(query, stdout=file)
        try:
            train(gpus, folder, name, f"memory-{name}", flags)
        finally:
            watcher.terminate()
            watcher.wait()
        file.seek(0)
        used = [int(line) for line in file if line.strip().isdigit()]
    return {"peak_gib_of_a_gpu": round(max(used) / 1024, 2), "gpus": gpus}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="default: all of this host")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="working folder, which is kept (default: a temporary folder)")
    options = parser.parse_args()
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = options.gpus or found
    if found < 2 or not 2 <= gpus <= found:
        print(
            f"error: this host has {found} GPU{'' if found == 1 else 's'} that torch can use, and {gpus or 'two'} are "
            "needed. Run this on a host with at least two, with a torch built for CUDA.",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_inputs(folder, SHAPES)
        differences = compare(gpus, folder, options.steps)
        memory = {name: peak_memory(gpus, folder, name) for name in SHAPES}
    is_equal = max(differences.values()) < 1e-4
    print(json.dumps({"largest_difference_of_a_loss": differences, "is_equal": is_equal, "memory": memory}))
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
