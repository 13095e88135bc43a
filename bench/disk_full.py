"""Fill a real disk at the moment when a writer of the project opens its file, and check what is left.

Usage: disk_full.py [--folder DIR] [--only WORD]      (as root: it mounts a tmpfs of 12 MB)

Each case runs one command in a forked process whose audit hook writes a ballast file to the disk when a matching file is
opened for writing (or its folder is created), leaving a few KB free. Either the disk stays full, or the ballast is
removed 0.05 seconds later, which a library may not notice. After the command there is space again, and the result must
be one of: the exact weights of a run without a full disk; a run that `resume` completes to these weights; no files, exit
code 4 and one message. Anything else gives exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos import in_child, make_inputs, wait

from tunesmith.cli import main

FILLED = "(the disk is full now)"
FREED_AFTER_S = 0.05
BUSY = ("--data.max_seq_len", "96", "--train.micro_batch_tokens", "128", "--train.max_steps", "6", "--train.save_steps",
        "2", "--train.keep_checkpoints", "9", "--optim.lr", "1e-3")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One writer.

    Attributes:
        command: train, pissa, resume, relabel, merge, tokenizer or preview.
        opened: regex of the path whose opening or creation fills the disk.
        time: which opening of that path; the first one is 1.
        spare: KB left free.
    """

    name: str
    command: str
    opened: str
    time: int = 1
    spare: int = 0


CASES = (
    Case("tokens", "train", r"/tokens/tokens\.bin$"),
    Case("index of the tokens", "train", r"/tokens/index\.npz$"),
    Case("data_ledger.json", "train", r"/\.data_ledger\.json\."),
    Case("run.json", "train", r"/\.run\.json\."),
    Case("metrics.jsonl", "train", r"/metrics\.jsonl$"),
    Case("first checkpoint, weights", "train", r"/checkpoints/\..*/config\.json$", spare=8),
    Case("second checkpoint, optimizer", "train", r"/checkpoints/\..*/tokenizer_config\.json$", time=2, spare=64),
    Case("second checkpoint, state", "train", r"/checkpoints/\..*/state\.json$", time=2),
    Case("last checkpoint, manifest", "train", r"/checkpoints/\..*/manifest\.json$", time=3),
    Case("model, weights", "train", r"/\.model\..*/config\.json$", spare=8),
    Case("model, tokenizer", "train", r"/\.model\..*/tokenizer_config\.json$"),
    Case("model, card", "train", r"/\.model\..*/README\.md$"),
    Case("run.json at the end", "train", r"/\.run\.json\.", time=2),
    Case("report.html", "train", r"/\.report\.html\."),
    Case("first matrices", "pissa", r"/adapter_init(/|$)", spare=4),
    Case("adapter", "pissa", r"/\.adapter\.[^/]*(/|$)", spare=4),
    Case("tokens read again", "relabel", r"/\.tokens\..*/tokens\.bin$"),
    Case("ledger read again", "relabel", r"/\.data_ledger\.json\."),
    Case("config.yaml of a resume", "resume", r"/\.config\.yaml\."),
    Case("run.json of a resume", "resume", r"/\.run\.json\."),
    Case("metrics.jsonl of a resume", "resume", r"/\.?metrics\.jsonl"),
    Case("merged weights", "merge", r"/\.out\.[^/]*\.partial$", spare=8),
    Case("merged config", "merge", r"/\.out\..*/config\.json$"),
    Case("tokenizer", "tokenizer", r"/\.out\.[^/]*\.partial(/|$)", spare=4),
    Case("page of preview", "preview", r"/\.?out[^/]*$"),
)


def fill(disk: Path, spare: int) -> None:
    """Leave `spare` KB free."""
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 65536):
            pass
    size = (disk / "ballast").stat().st_size
    os.truncate(disk / "ballast", max(0, size - spare * 1024) // 4096 * 4096)


def free(disk: Path) -> None:
    (disk / "ballast").unlink(missing_ok=True)


def watch(disk: Path, case: Case, is_freed: bool) -> None:
    """In the child: fill the disk when the writer opens its file."""
    pattern, seen = re.compile(case.opened), [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir") or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.fspath(arguments[0])
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if isinstance(path, str) and path.startswith(str(disk)) and pattern.search(path):
            seen[0] += 1
            if seen[0] == case.time:
                fill(disk, case.spare)
                print(FILLED, flush=True)
                if is_freed:
                    threading.Timer(FREED_AFTER_S, free, [disk]).start()

    sys.addaudithook(hook)


def call(
    words: Sequence[str], log: Path, disk: Path | None = None, case: Case | None = None, freed: bool = False
) -> int:
    def work() -> int:
        if disk and case:
            watch(disk, case, freed)
        return main(list(words))

    return wait(in_child(work, log))


class Bench:
    """The inputs, the results of each command with free space, and the disk."""

    def __init__(self, folder: Path, disk: Path) -> None:
        self.folder, self.disk, self.log = folder, disk, folder / "log.txt"
        if wait(in_child(lambda: make_inputs(folder), self.log)):
            raise SystemExit(self.log.read_text())
        self.model, self.data = folder / "gpt2", folder / "train.jsonl"
        self.adapted = folder / "qwen3"
        for command in ("train", "pissa"):
            if call(self.words(command, folder / f"whole-{command}"), self.log):
                raise SystemExit(self.log.read_text())
        for command in ("merge", "tokenizer", "preview"):
            if call(self.words(command, folder / f"whole-{command}"), self.log):
                raise SystemExit(self.log.read_text())
        shutil.copytree(folder / "whole-train", folder / "cut-off")
        for name in ("model", "checkpoints/step-000004", "checkpoints/step-000006"):
            shutil.rmtree(folder / "cut-off" / name)

    def words(self, command: str, output: Path) -> list[str]:
        train = ["train", "--data", str(self.data), "--output", str(output), *BUSY]
        return {
            "train": [*train, "--model", str(self.model)],
            "pissa": [*train, "--model", str(self.adapted), "--lora.kind", "pissa", "--lora.rank", "4"],
            "resume": ["resume", str(output)],
            "relabel": ["resume", str(output), "--allow", "template", "--data.chat_template", "alpaca"],
            "merge": ["merge", str(self.folder / "whole-pissa"), "--output", str(output)],
            "tokenizer": ["tokenizer", "--data", str(self.data), "--vocab-size", "300", "--output", str(output)],
            "preview": ["preview", "--model", str(self.model), "--data", str(self.data), "--html", str(output)],
        }[command]

    def run(self, case: Case, is_freed: bool) -> str:
        """The result of a case, or "WRONG: ..."."""
        output = self.disk / ("out" if case.command in ("merge", "tokenizer", "preview") else "run")
        if case.command in ("resume", "relabel"):
            shutil.copytree(self.folder / "cut-off", output, symlinks=True)
        self.log.write_text("")
        words = self.words(case.command, output)
        code = call(words, self.log, self.disk, case, is_freed)
        time.sleep(FREED_AFTER_S if is_freed else 0)
        free(self.disk)
        text = self.log.read_text()
        if "Traceback" in text or code not in (0, 4) or FILLED not in text:
            return f"WRONG: exit code {code}, {text[-2000:]}"
        if code == 0:
            return f"finished; {self.compare(case, output)}"
        if (output / "run.json").exists():
            again = words if case.command == "relabel" else ["resume", str(output)]
            if call(again, self.log):
                return f"WRONG: exit code {code}, and resume fails: {self.log.read_text()[-2000:]}"
            return f"exit code {code}, resumed; {self.compare(case, output)}"
        left = sorted(path.name for path in self.disk.iterdir())
        return f"WRONG: exit code {code}, and left {left}" if left else f"exit code {code}, nothing left"

    def compare(self, case: Case, output: Path) -> str:
        whole = self.folder / f"whole-{'train' if case.command == 'resume' else case.command}"
        if case.command == "relabel":  # the template differs from the whole run's, so it has its own second run
            whole = self.folder / "whole-relabel"
            if not whole.exists():
                shutil.copytree(self.folder / "cut-off", whole)
                if call(self.words("relabel", whole), self.log):
                    return f"WRONG: {self.log.read_text()[-2000:]}"
        wanted, found = fingerprint(whole), fingerprint(output)
        different = sorted(name for name in wanted if found.get(name) != wanted[name])
        return f"WRONG: {', '.join(different)} differ" if different else "the same bytes"


def fingerprint(path: Path) -> dict[str, str]:
    """Hashes of the files that training, merging or printing wrote."""
    if path.is_file():
        return {"page": hashlib.sha256(path.read_bytes()).hexdigest()}
    files = [file for pattern in ("tokens/*", "*.safetensors", "*/*.safetensors", "tokenizer.json", "*/tokenizer.json")
             for file in sorted(path.glob(pattern))]  # fmt: skip
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_bench(folder: Path, only: str) -> int:
    disk = folder / "disk"
    disk.mkdir()
    bench = Bench(folder, disk)
    wrong = count = 0
    for case in CASES:
        if only not in case.name:
            continue
        for is_freed in (False, True):
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
            try:
                result = bench.run(case, is_freed)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
            count += 1
            wrong += "WRONG" in result
            print(f"{case.name}, {'freed again' if is_freed else 'full'}: {result}", flush=True)
    print(f"{count} cases, {count - wrong} as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="working folder, which is kept (default: a temporary folder)")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this word in their name")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(run_bench(folder, options.only))
