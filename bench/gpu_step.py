"""Measure the training step on a GPU: first that every fast path computes the same, then its speed and memory.

    python bench/gpu_step.py [--peers-python PEERS/bin/python] [--output gpu_step.json]

Stages:
- equal: attention kernels against the loop over documents, each kind of layer in bf16 and fp32, outputs and gradients;
  a model's gradients in bf16 by its chosen kernels against the loop; a run that reads its numbers a step late against one
  that reads them at once (with train.deterministic: the same bits).
- speed: real tokens/s of `tunesmith train`, the share of the measured bf16 matmul rate, peak memory, and operations,
  kernels and host waits of a step from a profile, with and without train.compile: Qwen2.5-0.5B's shape at 2,048 tokens
  a forward, 26M at 32,768.
- trl: the same rows and weights through TRL's SFTTrainer, packed, bf16, without the flash-attn package (needs
  --peers-python; see bench/compare.py for what to install).
- processes: bench/gpu_processes.py, where the machine has several GPUs.

The exit code is 1 if something is not equal. Speed decides nothing; the goals stand beside it: 45 % of the matmul rate
at 0.5B, 1.5 times TRL, a million tokens/s at 26M, on an H100. --device cpu --smallest runs the script's own code.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_inputs import SHAPES, read_pairs, write_model, write_rows
from compare_limit import attention_flops, list_products

STAGES = ("equal", "speed", "trl", "processes")
HERE = Path(__file__).resolve()
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
PROFILED = "12-13"
SHAPES["qwen2.5-0.5b"] = {**SHAPES["qwen2.5-0.5b-4-layers"], "num_hidden_layers": 24}
GOALS = {"qwen2.5-0.5b": {"share_of_matmul_rate": 0.45, "times_trl": 1.5}, "26m": {"tokens_per_s": 1e6}}


@dataclass(frozen=True, slots=True)
class Case:
    """One measured run.

    Attributes:
        tokens: of one packed forward, which is one step.
        rows: of the data, with generated text.
    """

    shape: str
    tokens: int
    rows: int
    steps: int = 40


CASES = (Case("qwen2.5-0.5b", 2048, 4000), Case("26m", 32768, 40000))
SMALLEST = (Case("smallest", 256, 200, 16),)


# ---------------------------------------------------------------- equal
LENS = ([7, 1, 300, 129, 128, 40, 9], [1] * 200)
HEADS = ((8, 2, 64), (8, 8, 64), (14, 2, 64), (4, 4, 128), (4, 2, 256))  # heads, kv_heads, head_dim


def compare_kernels(device: Any, number: int) -> list[dict[str, Any]]:
    """Each kernel on each kind of layer that it can do; `differs` is empty where it equals the loop.

    Args:
        number: of HEADS.
    """
    import torch

    from tunesmith.attention.choose import Recorder, kind_of
    from tunesmith.attention.kernels import KERNELS
    from tunesmith.attention.layout import PackedLayout
    from tunesmith.attention.loop import LayerOptions
    from tunesmith.data.pack import Documents

    found = []
    for lens, dtype in itertools.product(LENS, (torch.bfloat16, torch.float32)):
        layout = PackedLayout(Documents(lens))
        for heads, kv_heads, head_dim in HEADS[:number]:
            generator = torch.Generator(device).manual_seed(0)
            q, k, v = (
                torch.randn(1, sum(lens), n, head_dim, generator=generator, device=device).to(dtype).transpose(1, 2)
                for n in (heads, kv_heads, kv_heads)
            )
            for window, softcap, has_sinks in (
                (None, None, False), (64, None, False), (None, 5.0, False), (64, None, True),
            ):  # fmt: skip
                sinks = torch.linspace(-1, 1, heads, device=device) if has_sinks else None
                options = LayerOptions(head_dim**-0.5, window=window, softcap=softcap, sinks=sinks)
                for name, (can, _) in KERNELS.items():
                    if not can(q, options):
                        continue
                    recorder = Recorder((name,))
                    recorder.compare(q, k, v, layout, options)
                    entry = {"kernel": name, "documents": len(lens), "dtype": str(dtype), "heads": heads, "kv_heads": kv_heads,
                             "head_dim": head_dim, "window": window, "softcap": softcap, "sinks": has_sinks}  # fmt: skip
                    is_used = recorder.kernels[kind_of(q, options)] == (name,)
                    found.append({**entry, "differs": "" if is_used else recorder.refused[0]})
    return found


def compare_model(device: Any) -> dict[str, Any]:
    """Gradients of a small model in bf16 with its chosen kernels: as far from float32 as the loop's, and not farther."""
    import torch
    import transformers

    from tunesmith.attention.layout import LOOP_ONLY, make_layout
    from tunesmith.data.pack import Documents
    from tunesmith.model.isolation import choose_kernels, probe_isolation, use_packed_attention

    config = transformers.Qwen3Config(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                                      num_attention_heads=4, num_key_value_heads=2, head_dim=64)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).to(device)
    assert probe_isolation(model, 256, 1024).is_isolated
    use_packed_attention(model)
    half = torch.autocast(device.type, dtype=torch.bfloat16)
    chosen = choose_kernels(model, half, 256, 1024)
    lens = [100, 3, 256, 40, 201]
    ids = torch.randint(0, 512, (1, sum(lens)), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.cat([torch.arange(n) for n in lens])[None].to(device)

    def gradients(plan: Any, context: Any) -> Any:
        model.zero_grad()
        with context:
            hidden = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False,
                                         documents=make_layout(Documents(lens), device, plan)).last_hidden_state  # fmt: skip
        hidden.float().square().mean().backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])

    exact = gradients(LOOP_ONLY, nullcontext())
    errors = {
        name: float((gradients(plan, half) - exact).norm() / exact.norm())
        for name, plan in (("loop", LOOP_ONLY), ("chosen", chosen.plan()))
    }
    kernels = {str(kind): names for kind, names in chosen.kernels.items()}
    is_equal = errors["chosen"] < 2 * errors["loop"] + 1e-3
    return {"kernels": kernels, "refused": chosen.refused, "relative_error": errors, "is_equal": is_equal}


def compare_reading(device: Any, steps: int = 20) -> dict[str, Any]:
    """Weights after steps whose numbers are read at once and a step later."""
    import torch
    import transformers

    from tunesmith.config.schema import OptimSection
    from tunesmith.data.pack import Documents
    from tunesmith.distributed.world import OneProcess
    from tunesmith.model.isolation import use_packed_attention
    from tunesmith.model.loss import SupervisedLM
    from tunesmith.training.optim import build_optimizer
    from tunesmith.training.step import MadeGradient, update_unread
    from tunesmith.training.transfer import OnTheWay

    config = transformers.Qwen3Config(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, head_dim=16)  # fmt: skip
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for is_late in (False, True):
            torch.manual_seed(0)
            model = transformers.Qwen3ForCausalLM(config).to(device)
            use_packed_attention(model)
            lm = SupervisedLM(model, True, "decoder")
            optimizer = build_optimizer(model, OptimSection())
            losses, waiting = [], None
            for number in range(steps):
                ids = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(number)).to(device)
                positions = torch.arange(64, device=device)[None]
                loss = lm(ids, positions, ids[0, 1:], positions[0, :-1], Documents([64])).loss
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                made = MadeGradient(OnTheWay(torch.stack([loss.detach(), loss.detach() * 0, norm])), loss.detach(),
                                    norm, None, False, 64, 63)  # fmt: skip
                if is_late:
                    update_unread(optimizer, made, OneProcess())
                    losses += [waiting.read().loss] if waiting else []
                    waiting = made
                else:
                    losses.append(made.read().loss)
                    optimizer.step()
                    optimizer.zero_grad()
            losses += [waiting.read().loss] if waiting else []
            results.append((losses, [p.detach().cpu() for p in model.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    (losses, weights), (late_losses, late_weights) = results
    same = losses == late_losses and all(torch.equal(a, b) for a, b in zip(weights, late_weights, strict=True))
    return {"is_equal": same, "steps": steps}


def run_equal(device: Any, number: int) -> dict[str, Any]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    kernels, model, reading = compare_kernels(device, number), compare_model(device), compare_reading(device)
    is_equal = model["is_equal"] and reading["is_equal"]
    if device.type == "cuda":  # on a CPU there are no such kernels
        is_equal &= not any("errs by" in entry["differs"] for entry in kernels)  # one that fails is not used
    return {"is_equal": is_equal, "model": model, "reading": reading, "kernels": kernels}


# ---------------------------------------------------------------- speed
def matmul_rate(device: Any, size: int) -> float:
    """FLOP/s of a square product in bf16, the best of several."""
    import torch

    one, two = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(4):
            one @ two
        synchronize(device)
        best = min(best, (time.perf_counter() - began) / 4)
    return 2.0 * size**3 / best


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def train_ours(case: Case, folder: Path, run: str, device: str, more: list[str]) -> Path:
    """One run of the command, in a process of its own."""
    words = ["train", "--model", str(folder / case.shape), "--data", str(folder / f"{case.shape}.jsonl"),
             "--output", str(folder / run), "--data.max_seq_len", str(min(case.tokens, 2048)), "--train.max_steps",
             str(case.steps), "--train.micro_batch_tokens", str(case.tokens), "--train.epochs", "1000",
             "--train.precision", "bf16", "--train.log_steps", "10", "--train.keep_checkpoints", "1", *more]  # fmt: skip
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": "0"} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, "-m", "tunesmith", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return folder / run


def read_speed(run: Path) -> dict[str, float]:
    """The last logged steps, without the warm-up."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "tokens_per_s" in record]
    last, before = records[-1], records[-2] if len(records) > 1 else {"tokens": 0, "supervised_tokens": 0}
    tokens, targets = (last[key] - before[key] for key in ("tokens", "supervised_tokens"))
    return {"tokens_per_s": last["tokens_per_s"], "target_share": targets / tokens, "memory_gb": last.get("memory_gb")}


def flops_of_a_token(shape: Path, target_share: float, squares: float) -> float:
    """Forward and backward: products with weights, the head on targets, and attention within documents.

    Args:
        squares: mean over tokens of their document's length.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(shape)
    products = sum(p.flops * (target_share if p.is_head else 1.0) for p in list_products(config, None))
    return products + attention_flops(config) * squares


def mean_square(run: Path) -> float:
    from tunesmith.data.store import open_store

    lengths = open_store(run / "tokens").lengths[:].astype("float64")
    return float((lengths**2).sum() / lengths.sum())


def read_profile(run: Path) -> dict[str, float]:
    """Of one step: operations started by the host, kernels, and calls that make the host wait."""
    counts: collections.Counter[str] = collections.Counter()
    waits: collections.Counter[str] = collections.Counter()
    for path in (run / "profile").glob("*.json.gz"):
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
            kind, name = event.get("cat", ""), event.get("name", "")
            counts[kind] += 1
            waits[name] += name in WAITS
    first, last = map(int, PROFILED.split("-"))
    steps = last - first + 1
    return {
        "operations": counts["cpu_op"] / steps,
        "kernels": counts["kernel"] / steps,
        "host_waits": {name: count / steps for name, count in waits.items() if count},
    }


def run_speed(cases: tuple[Case, ...], folder: Path, device: Any, rate: float) -> dict[str, Any]:
    """Shape -> "eager" and "compiled" -> what was measured."""
    found: dict[str, Any] = {}
    for case in cases:
        found[case.shape] = {"tokens_a_forward": case.tokens, "goals": GOALS.get(case.shape, {})}
        for name, more in (("eager", []), ("compiled", ["--train.compile", "true"])):
            if name == "compiled" and device.type != "cuda":
                continue  # on a CPU it takes a minute and shows nothing about a GPU
            run = train_ours(case, folder, f"run-{name}-{case.shape}", device.type, more)
            speed, square = read_speed(run), mean_square(run)
            flops = flops_of_a_token(folder / case.shape, speed["target_share"], square)
            more = [*more, "--train.profile_steps", PROFILED]
            profiled = train_ours(case, folder, f"profile-{name}-{case.shape}", device.type, more)
            found[case.shape][name] = {
                **speed, "mean_length": square, "share_of_matmul_rate": flops * speed["tokens_per_s"] / rate,
                "profile": read_profile(profiled),
            }  # fmt: skip
            print(json.dumps({case.shape: {name: found[case.shape][name]}}), file=sys.stderr)
    return found


# ---------------------------------------------------------------- trl
def train_trl(folder: Path, case: Case) -> None:
    """Runs under --peers-python: prints real tokens/s of the last half of the steps."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    marks: list[float] = []
    tokens: list[int] = []

    class Counting(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            tokens.append(inputs["input_ids"].numel())
            return super().training_step(model, inputs, *rest, **more)

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    rows = [json.loads(line) for line in (folder / f"{case.shape}.jsonl").read_text().splitlines()]
    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"), max_steps=case.steps, packing=True, max_length=case.tokens, bf16=True,
        per_device_train_batch_size=1, gradient_checkpointing=False, save_strategy="no", report_to="none",
        logging_steps=10, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(folder / case.shape, dtype=torch.float32), args=arguments,
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(folder / case.shape),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    half = len(marks) // 2
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    speed = sum(tokens[half:]) / (marks[-1] - marks[half - 1])
    print(json.dumps({"tokens_per_s": speed, "memory_gb": memory}))


def run_trl(cases: tuple[Case, ...], folder: Path, python: str) -> dict[str, Any]:
    found = {}
    for case in cases:
        command = [python, str(HERE), "--train-trl", str(folder), "--case", json.dumps([case.shape, case.tokens, case.rows, case.steps])]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        found[case.shape] = json.loads(lines[-1]) if not done.returncode else {"failed": done.stderr[-2000:]}
    return found


# ---------------------------------------------------------------- all
def describe_machine(device: Any, rate: float) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_properties(0) if device.type == "cuda" else None
    return {
        "device": gpu.name if gpu else platform.processor() or platform.machine(),
        "gpus": torch.cuda.device_count() if gpu else 0,
        "memory_gb": round(gpu.total_memory / 1e9, 1) if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "bf16_matmul_tflops": round(rate / 1e12, 3),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    device = torch.device(options.device)
    cases = SMALLEST if options.smallest else CASES
    rate = matmul_rate(device, 256 if options.smallest else 8192)
    found: dict[str, Any] = {"machine": describe_machine(device, rate)}
    if "equal" in options.stages:
        found["equal"] = run_equal(device, 1 if options.smallest else len(HEADS))
    if {"speed", "trl"} & set(options.stages):
        for case in cases:
            write_model(folder / case.shape, case.shape, None)
            write_rows(folder / f"{case.shape}.jsonl", read_pairs(None, case.rows))
    if "speed" in options.stages:
        found["speed"] = run_speed(cases, folder, device, rate)
    if "trl" in options.stages and options.peers_python:
        found["trl"] = run_trl(cases, folder, options.peers_python)
    if "processes" in options.stages and device.type == "cuda" and torch.cuda.device_count() > 1:
        done = subprocess.run([sys.executable, str(HERE.with_name("gpu_processes.py"))], capture_output=True, text=True)
        lines = done.stdout.splitlines()
        found["processes"] = json.loads(lines[-1]) if lines else {"is_equal": False, "failed": done.stderr[-2000:]}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--peers-python", help="Python of an environment with TRL")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    parser.add_argument("--folder", type=Path, help="working folder, which is kept (default: a temporary folder)")
    parser.add_argument("--smallest", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--train-trl", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_trl:
        train_trl(options.train_trl, Case(*json.loads(options.case)))
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here. Run this on a machine with one, with a torch built for CUDA; or try the "
              "script itself with --device cpu --smallest.", file=sys.stderr)  # fmt: skip
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(options, folder)
    text = json.dumps(found, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0 if all(found[stage]["is_equal"] for stage in ("equal", "processes") if stage in found) else 1


if __name__ == "__main__":
    sys.exit(main())
