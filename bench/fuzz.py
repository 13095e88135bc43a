"""Damage inputs of tunesmith at random but reproducibly, and check how each command ends.

Usage: fuzz.py [--cases N] [--seed S] [--first N] [--case N] [--area NAME] [--folder DIR]

A case copies a small model, its adapter, data and runs, damages one file or one word of a command, and runs the command
in a forked child with limits on time and memory. It fails on a traceback, an unexplained error, more than one message or
none, a hang, high memory use, or leftover files; and on WRONG SUCCESS: the command reports success, but the outcome
differs from that of undamaged inputs without a remark. A resumed run must end with exactly the same weights (SHA-256),
and a trained or merged model must be finite.

Failed cases are kept in DIR/failed (seed and number, command, output, the damaged file); --case repeats one. At the end
a table of areas and verdicts is printed. Exit code 1 if a case failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import forks
from damage import Damage, damage_file, damage_words

LIMIT_S, LIMIT_RSS_MB, LIMIT_TEXT = 60, 3000, 20_000
NOTES = ("note: ", "nothing to do")  # remarks on differences from the original run
BAD = ("Traceback (most recent", "UNCAUGHT", "Exception ignored", "report it as a bug", "Fatal Python error")


@dataclass(frozen=True)
class Area:
    """Files to damage, and the commands that read them.

    Attributes:
        files: patterns in the work folder.
        commands: words of each command; WORK is the folder.
    """

    files: tuple[str, ...]
    commands: tuple[str, ...]


_GIVEN = "--model model --data data/chats.jsonl"
_STEPS = "--data.max_seq_len 64 --train.micro_batch_tokens 64 --train.max_steps 4 --train.save_steps 1"
TRAIN = f"train {_GIVEN} --output out {_STEPS}"
MODEL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "special_tokens_map.json", "model.safetensors")  # fmt: skip
RUN = ("run.json", "data_ledger.json", "metrics.jsonl", "config.yaml", "tokens/*", "eval_tokens/*",
       "checkpoints/*/manifest.json", "checkpoints/*/*.json", "checkpoints/*/*.safetensors", "adapter_init/*")  # fmt: skip
DATA = ("jsonl", "json", "csv", "parquet", "arrow", "txt")
AREAS: dict[str, Area] = {
    "model": Area(
        tuple(f"model/{name}" for name in MODEL),
        (f"preview {_GIVEN}", TRAIN, f"check {_GIVEN}", "chat model --prompt Hi --max-new-tokens 4",
         "merge adapter --output out", f"train {_GIVEN} --output out --lora.kind lora {_STEPS}"),
    ),
    "sharded model": Area(
        ("sharded/*",),
        (TRAIN.replace("--model model", "--model sharded"), "chat sharded --prompt Hi --max-new-tokens 4",
         "merge adapter --base sharded --output out"),
    ),
    "adapter": Area(
        ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/*"),
        ("merge adapter --output out", "chat adapter --prompt Hi --max-new-tokens 4",
         "merge adapter adapter2 --method linear --output out", "chat adapter2 adapter --prompt Hi --max-new-tokens 4"),
    ),
    "run": Area(tuple(f"half/{name}" for name in RUN), ("resume half --train.max_steps 4",)),
    "run of an adapter": Area(tuple(f"half-adapter/{name}" for name in RUN), ("resume half-adapter --train.max_steps 4",)),
    "what a run is of": Area(
        (*(f"model/{name}" for name in MODEL), "data/chats.jsonl"),
        ("resume half --train.max_steps 4", "resume half-adapter --train.max_steps 4"),
    ),
    "finished run": Area(
        ("full/run.json", "full/config.yaml", "full/data_ledger.json", "full/model/*", "full/tokens/*"),
        ("chat full --prompt Hi --max-new-tokens 4", "resume full", "preview --model full --data data/chats.jsonl"),
    ),
    "data": Area(
        (*(f"data/chats.{kind}" for kind in DATA), "set/dataset_info.json", "set/chats.json", "card/README.md"),
        ("preview --model model --data FILE", "check --model model --data FILE --html out",
         "tokenizer --vocab-size 300 --data FILE --output out", TRAIN.replace("data/chats.jsonl", "FILE")),
    ),
    "run file": Area(
        ("run.yaml", "trl.yaml"),
        (f"train FILE --output out {_STEPS}", "preview FILE", "check FILE --json", "tokenizer FILE --output out",
         "convert-config FILE"),
    ),
    "words": Area(
        (),
        (f"preview {_GIVEN} --rows 2 --html out", TRAIN, f"check {_GIVEN} --strict", "resume half --train.max_steps 4",
         "merge adapter adapter2 --method ties --weights 1 0.5 --density 0.5 --output out", "recipes", "convert-config trl.yaml",
         "tokenizer --data data/chats.jsonl --vocab-size 300 --output out", "train run.yaml --output out --lora.kind lora",
         "chat full --prompt Hi --max-new-tokens 4 --temperature 0.5 --seed 1 --system Be"),
    ),
}  # fmt: skip


def make_inputs(work: Path) -> int:
    """Create small inputs, to be damaged later."""
    import datasets
    import transformers

    from tunesmith.cli import main
    from tunesmith.model.bpe import train_tokenizer

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    words = "the quick brown fox jumps over a lazy dog and says hello 你好 世界"
    tokenizer = train_tokenizer([words] * 20, vocab_size=320)
    config = transformers.Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, max_position_embeddings=256, vocab_size=320, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, size in (("model", "1GB"), ("sharded", "60KB")):
        model.save_pretrained(work / name, max_shard_size=size)
        tokenizer.save_pretrained(work / name)
    rows = [{"messages": [{"role": "user", "content": f"fox {i}?"}, {"role": "assistant", "content": f"dog {i} 你好"}]}
            for i in range(12)]  # fmt: skip
    pairs = [{"instruction": f"fox {i}?", "input": "", "output": f"dog {i}"} for i in range(12)]
    data = work / "data"
    data.mkdir()
    (data / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "chats.json").write_text(json.dumps(pairs, ensure_ascii=False))
    (data / "chats.csv").write_text(
        "instruction,input,output\n" + "".join(f'"fox, {i}?",,dog {i}\n' for i in range(12))
    )
    (data / "chats.txt").write_text((words + "\n") * 12)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(data / "chats.parquet")
    table.save_to_disk(work / "saved")
    shutil.copy(next((work / "saved").glob("*.arrow")), data / "chats.arrow")
    for name in ("set", "card"):
        (work / name).mkdir()
        (work / name / "chats.json").write_text(json.dumps(pairs))
    (work / "set" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "chats.json", "columns": {
        "prompt": "instruction", "query": "input", "response": "output"}}}))  # fmt: skip
    (work / "card" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: chats.json\n---\n# x\n"
    )
    (work / "run.yaml").write_text(
        "model: {path: model}\ndata:\n  train: [data/chats.jsonl]\n  max_seq_len: 64\n  chat_template: chatml\n"
        "  template_kwargs: {thinking: false}\noptim: {lr: 1.0e-3, betas: [0.9, 0.99]}\ntrain: {output_dir: out, "
        "max_steps: 4, micro_batch_tokens: 64, seed: 1}\n"
    )
    (work / "trl.yaml").write_text("model_name_or_path: model\ndataset_name: data\nlearning_rate: 2.0e-5\nuse_peft: true\n"
                                   "lora_r: 8\nnum_train_epochs: 1\nmax_length: 64\noutput_dir: out\n")  # fmt: skip
    for name, flags in (("full", ""), ("half", ""), ("half-adapter", "--lora.kind pissa --lora.rank 2"),
                        ("adapters", "--lora.kind lora --lora.rank 2"), ("adapters2", "--lora.kind dora --lora.rank 4")):  # fmt: skip
        code = main(
            f"{TRAIN} --train.eval_steps 2 --eval-data data/chats.json {flags}".replace(
                "--output out", f"--output {name}"
            ).split()
        )
        if code:
            return code
    for name in ("adapter", "adapter2"):
        shutil.copytree(work / name.replace("adapter", "adapters") / "adapter", work / name)
        shutil.rmtree(work / name.replace("adapter", "adapters"))
    for name, made in (("half", "model"), ("half-adapter", "adapter")):  # as after a kill
        shutil.rmtree(work / name / made)
        for step in (3, 4):
            shutil.rmtree(work / name / "checkpoints" / f"step-{step:06d}")
        (work / name / "report.html").unlink()
    return 0


@dataclass
class Bench:
    """The folder of the bench: `pristine` is copied to `work` for each case, so that absolute names stay valid."""

    folder: Path
    seed: int
    references: dict[str, str]

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def renew(self) -> None:
        _remove(self.work)
        shutil.copytree(self.folder / "pristine", self.work, symlinks=True)

    def run_case(self, number: int, area_name: str | None = None) -> tuple[str, str, str]:
        """Area, verdict, and a description of the case."""
        rng = random.Random(f"{self.seed}-{number}")
        name = area_name or list(AREAS)[number % len(AREAS)]
        area = AREAS[name]
        self.renew()
        words = rng.choice(area.commands).split()
        if area.files:
            files = sorted({path for pattern in area.files for path in self.work.glob(pattern) if path.is_file()})
            file = rng.choice(files)
            given = str(file.relative_to(self.work))
            if "FILE" in words:
                inner = rng.choice([given, str(Path(given).parent)]) if given.startswith(("set", "card")) else given
                words = [inner if word == "FILE" else word for word in words]
            damage = damage_file(file, rng)
        else:
            words, damage = damage_words(words, rng, self.work)
        before = _listing(self.work)
        outcome = forks.run_forked(words, cwd=str(self.work), limit_s=LIMIT_S)
        verdict = self.judge(words, outcome, damage, before)
        what = f"{' '.join(words)[:300]}  |  {damage.file}: {damage.what[:200]}"
        if verdict.isupper():
            self.keep(number, name, what, outcome, damage)
        return name, verdict, what

    def judge(self, words: list[str], outcome: forks.Outcome, damage: Damage, before: dict[str, Any]) -> str:
        """The verdict of a case; failures are in upper case."""
        text = outcome.out + outcome.err
        if outcome.code is None:
            return "HANG"
        if any(bad in text for bad in BAD) or outcome.code not in (0, 1, 2, 4):
            return "CRASH"
        if outcome.max_rss_mb > LIMIT_RSS_MB:
            return "MEMORY"
        lines = outcome.err.splitlines()
        if outcome.code and (not lines or sum("error: " in line[:60] for line in lines) != 1):
            return "MESSAGE"
        if len(outcome.err) > LIMIT_TEXT:
            return "LONG TEXT"
        if left := self.find_left(words, outcome.code, before):
            print(f"left behind: {left}")
            return "LEFT BEHIND"
        if outcome.code:
            return f"refused ({outcome.code})"
        return self.judge_success(words, text, damage)

    def judge_success(self, words: list[str], text: str, damage: Damage) -> str:
        made = self.find_made(words)
        wanted = self.references.get(" ".join(words))
        if wanted is None or words[0] != "resume":
            if made and not is_finite(made):
                return "WRONG SUCCESS"
            return "done"
        if made and sha256(made) == wanted:
            return "done, the same"
        said = [line for line in text.splitlines() if any(line.startswith(note) or note in line for note in NOTES)]
        return "done, otherwise, and said" if said else "WRONG SUCCESS"

    def find_made(self, words: list[str]) -> Path | None:
        """The weights that a command wrote."""
        folder = self.work / (words[1] if words[0] == "resume" and len(words) > 1 else "out")
        for name in ("model/model.safetensors", "adapter/adapter_model.safetensors", "model.safetensors"):
            if (folder / name).is_file():
                return folder / name
        return None

    def find_left(self, words: list[str], code: int, before: dict[str, Any]) -> str:
        """Files that a command should not have left, or inputs that it changed."""
        after = _listing(self.work)
        run = words[1] if words[0] == "resume" and len(words) > 1 else "out"
        new = [name for name in after if name not in before]
        hidden = [name for name in new if name.endswith((".partial", ".old"))]
        if hidden:
            return hidden[0]
        if words[0] in ("train", "merge", "tokenizer", "preview", "check", "convert-config", "chat", "recipes"):
            changed = [name for name in before if after.get(name) != before[name]]
            if changed:
                return f"changed: {changed[0]}"
            if code in (1, 2) and new and words[0] != "check":
                return new[0]
            if code == 4 and words[0] in ("merge", "tokenizer", "preview") and new:
                return new[0]
            return ""
        changed = [name for name in before if after.get(name) != before[name] and name.split("/")[0] != run.strip("/.")]
        return f"changed: {changed[0]}" if changed else ""

    def keep(self, number: int, area: str, what: str, outcome: forks.Outcome, damage: Damage) -> None:
        folder = self.folder / "failed" / f"{self.seed}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "what.txt").write_text(f"--seed {self.seed} --case {number} --area '{area}'\n{what}\ncode {outcome.code}, "
                                         f"{outcome.seconds:.1f} s, {outcome.max_rss_mb} MB\n", errors="replace")  # fmt: skip
        (folder / "out").write_text(outcome.out, errors="replace")
        (folder / "err").write_text(outcome.err, errors="replace")
        path = self.work / damage.file
        if damage.file and path.is_file() and not path.is_symlink():
            shutil.copy(path, folder / path.name)


def _remove(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _listing(work: Path) -> dict[str, Any]:
    """Every path with data that shows a change."""
    found = {}
    for path in work.rglob("*"):
        stat = path.lstat()
        found[str(path.relative_to(work))] = stat.st_mode, stat.st_size if path.is_file() else 0, stat.st_ino
    return {name: value for name, value in found.items() if "__pycache__" not in name}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_finite(path: Path) -> bool:
    import numpy as np
    from safetensors.numpy import load_file

    return all(bool(np.isfinite(tensor).all()) for tensor in load_file(path).values() if tensor.dtype.kind == "f")


def in_child(work: Callable[[], int]) -> int:
    number = os.fork()
    if number:
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        code = work()
    finally:
        sys.stderr.flush()
        os._exit(code)


def prepare(folder: Path, seed: int) -> Bench:
    bench = Bench(folder, seed, {})
    _remove(bench.work)
    _remove(folder / "pristine")
    bench.work.mkdir(parents=True)

    def make() -> int:
        os.chdir(bench.work)
        return make_inputs(bench.work)

    if in_child(make):
        raise SystemExit("the inputs could not be made")
    bench.work.rename(folder / "pristine")
    for command in {command for area in AREAS.values() for command in area.commands}:
        if command.startswith("resume"):
            bench.renew()
            outcome = forks.run_forked(command.split(), cwd=str(bench.work), limit_s=LIMIT_S)
            made = bench.find_made(command.split())
            if outcome.code or made is None:
                raise SystemExit(f"undamaged, {command} ends with {outcome}")
            bench.references[command] = sha256(made)
    return bench


def run_fuzz(folder: Path, seed: int, numbers: range, area: str | None) -> int:
    bench = prepare(folder, seed)
    began = time.monotonic()
    counts: dict[str, Counter[str]] = {name: Counter() for name in AREAS}
    failures = 0
    for number in numbers:
        name, verdict, what = bench.run_case(number, area)
        counts[name][verdict] += 1
        if verdict.isupper() or len(numbers) == 1:
            failures += verdict.isupper()
            print(f"case {number} ({name}): {verdict}: {what}".encode(errors="replace").decode(), flush=True)
            if len(numbers) == 1:
                print("kept in", folder)
    _remove(bench.work)
    verdicts = sorted(
        {verdict for count in counts.values() for verdict in count}, key=lambda verdict: (verdict.isupper(), verdict)
    )
    print(f"\n{'':<20}" + "".join(f"{verdict:>26}" for verdict in verdicts))
    for name, count in counts.items():
        print(f"{name:<20}" + "".join(f"{count[verdict] or '':>26}" for verdict in verdicts))
    print(f"\n{len(numbers)} cases of seed {seed} in {time.monotonic() - began:.0f} s, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="repeat one case")
    parser.add_argument("--area", choices=list(AREAS), help="this area only")
    parser.add_argument("--folder", type=Path, help="working folder, which is kept (default: a temporary folder)")
    options = parser.parse_args()
    chosen = range(options.first, options.first + options.cases)
    if options.case is not None:
        chosen = range(options.case, options.case + 1)
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        sys.exit(run_fuzz(options.folder.resolve(), options.seed, chosen, options.area))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(run_fuzz(Path(temporary), options.seed, chosen, options.area))
