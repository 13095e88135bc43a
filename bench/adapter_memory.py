"""Peak memory of full fine-tuning, LoRA and QLoRA on a model of Qwen2.5-0.5B's shape with random weights.

Each kind trains two steps in a separate process: on the CPU in fp32 (VmHWM of /proc, which includes the libraries), on a
GPU in bf16 (torch's peak allocation). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = {
    "full": [],
    "LoRA, rank 16": ["--lora.kind", "lora"],
    "int8 + LoRA": ["--lora.kind", "lora", "--lora.quantize", "int8"],
    "QLoRA, NF4": ["--lora.kind", "lora", "--lora.quantize", "nf4"],
    "QLoRA, NF4, head and embedding whole": [
        "--lora.kind", "lora", "--lora.quantize", "nf4", "--lora.modules_to_save", "lm_head", "embed_tokens",
    ],
}  # fmt: skip
_CHILD = """
import sys, torch
from tunesmith.cli import main
code = main(sys.argv[1:])
peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
if peak is None:
    line = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))
    peak = int(line.split()[1]) / 2**20
print(f'PEAK {code} {peak:.2f}')
"""


def make_base(folder: Path) -> None:
    code = (
        "import sys, transformers as t\n"
        "c = t.Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,"
        " intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True)\n"
        "t.AutoModelForCausalLM.from_config(c).save_pretrained(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def measure(name: str, base: Path, tokenizer: str, data: str, run: Path) -> str:
    """A row of the table for one kind."""
    words = ["train", "--model", str(base), "--tokenizer", tokenizer, "--data", data, "--output", str(run),
             "--data.max_seq_len", "512", "--train.micro_batch_tokens", "1024", "--train.max_steps", "2",
             "--data.limit", "50", *KINDS[name]]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", _CHILD, *words], capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    if not last.startswith("PEAK 0"):
        raise SystemExit(f"{name}: {done.stdout[-800:]}{done.stderr[-800:]}")
    model = next(line for line in done.stdout.splitlines() if line.startswith("model "))
    trained = "all" if "all trained" in model else model.split("parameters, ")[1].split(" trained")[0]
    return f"| {name} | {trained} | {last.split()[2]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="folder of a tokenizer")
    parser.add_argument("data", help="file of chats")
    parser.add_argument("--model", type=Path, help="base model (default: one with random weights)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which kinds (default: all)")
    parser.add_argument("--folder", type=Path, help="working folder, which is kept (default: a temporary folder)")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = options.model or folder / "base"
        if not base.exists():
            make_base(base)
        print("| | trained parameters | peak memory, GiB |\n| --- | ---: | ---: |")
        for number, name in enumerate(options.kinds):
            print(measure(name, base, options.tokenizer, options.data, folder / f"run-{number}"), flush=True)


if __name__ == "__main__":
    main()
