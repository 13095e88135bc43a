"""Prepare random data sets in every way there is, and compare the results byte for byte.

Usage: prepare_fuzz.py [--seed N] [--count N] [--shared FOLDER]

Each case is a data set of varied real rows in several formats (bad, long, empty and odd rows among them) with random
keys. It is prepared in one process, by several workers, from the cache, by two commands at once, in a process that is
killed again and again at random moments, and after one byte or the end of a file in the cache was damaged. Token store,
index and ledger must be equal. Anything else prints WRONG and gives exit code 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = """
import json, pickle, sys
from pathlib import Path
from tunesmith.config.data_keys import DataSection
from tunesmith.data import store
from tunesmith.data.dataset import find_data
from tunesmith.files import spell_sealed
from tunesmith.preparation import chunks, journal, write
from tunesmith.runfolder import RunFolder
from tunesmith.sources import textfile

portable, folder, keys = sys.argv[1:]
chunks.CHUNK_ROWS, chunks.CHUNK_CHARACTERS, store.SHARD_TOKENS, textfile.HEAD = 7, 2000, 3000, 1000
journal.COMMIT_S = 0.0

class Notes(write.Unwatched):
    def note(self, text):
        print(text, file=sys.stderr, flush=True)

data = DataSection(**json.loads(keys))
encoder = pickle.loads(Path(portable).read_bytes()).build()
print("ready", flush=True)
made = write.write_dataset(data, find_data(data), encoder, 64, 0, RunFolder(Path(folder)), Notes())
Path(folder, "ledger.json").write_text("".join(spell_sealed(made.ledger_json(encoder, encoder.defaults.date))))
print("done", flush=True)
"""
TURNS = ("user", "assistant")
TEXTS = ("", " ", "\n", "\ud800", "\x00", "\u202e", "<|im_end|>", "<|endoftext|>", "</think>", "<think>a</think>", "\r\n",
         "é" * 30, "你好" * 40, "😀" * 30, "a" * 4000, "\u2028", "{{ x }}", "\ufeff")  # fmt: skip


def real_rows(shared: Path | None, rng: random.Random) -> list[Any]:
    """Rows of the shared files, a few of each; made-up chats without them."""
    found: list[Any] = []
    for path in sorted((shared / "data").rglob("*.json*")) if shared else []:
        if path.suffix in (".json", ".jsonl") and path.stat().st_size < 3_000_000:
            text = path.read_text(encoding="utf-8", errors="replace")
            try:
                rows = json.loads(text)
            except ValueError:
                rows = [
                    json.loads(line) for line in text.splitlines()[:50] if line.startswith("{") and line.endswith("}")
                ]
            if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
                found += rng.sample(rows, min(8, len(rows)))
    made = [{"messages": [{"role": TURNS[turn % 2], "content": f"turn {turn} of {n}"} for turn in range(2 + n % 5)]}
            for n in range(40)]  # fmt: skip
    return found + made


def vary(row: Any, rng: random.Random) -> Any:
    """The row, sometimes with one value replaced, a key added or doubled, or in another kind of value."""
    kind = rng.randrange(12)
    if kind == 0 and isinstance(row, dict) and row:
        return {**row, rng.choice(list(row)): rng.choice((None, 1, "", [], {}, True, 1.50, rng.choice(TEXTS)))}
    if kind == 1:
        return rng.choice(
            ({}, [], None, 3, "text", {"text": rng.choice(TEXTS)}, {"zebra": 1}, {"\ud800": 1}, {"messages": []})
        )
    if kind == 2 and isinstance(row, dict) and isinstance(row.get("messages"), list) and row["messages"]:
        turns = [dict(turn) if isinstance(turn, dict) else turn for turn in row["messages"]]
        if isinstance(turns[-1], dict):
            turns[-1]["content"] = rng.choice(TEXTS)
        return {**row, "messages": turns}
    if kind == 3 and isinstance(row, dict):
        return {**row, rng.choice(("id", "zebra", "system", "\u200b")): rng.choice(TEXTS)}
    return row


def write_file(path: Path, rows: list[Any], rng: random.Random) -> None:
    """In one of the containers that the name says."""
    if path.name.endswith(".txt"):
        path.write_text("\n".join(json.dumps(row) for row in rows) or "x")
        return
    if path.name.endswith(".json"):
        text = json.dumps(rows, indent=rng.choice((None, 1)), ensure_ascii=True)
    else:
        lines = [json.dumps(row, ensure_ascii=True) for row in rows]
        text = rng.choice(("\n", "\r\n", "\n\n", "\n \t\n")).join(lines) + rng.choice(("", "\n", "\n\n"))
    data = rng.choice((b"", b"\xef\xbb\xbf")) + text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


def make_case(folder: Path, pool: list[Any], rng: random.Random) -> dict[str, Any]:
    """Write the files of a case; returns keys of `data`."""
    names = []
    for number in range(rng.randrange(1, 5)):
        name = f"{number}{rng.choice(('.jsonl', '.json', '.txt', '.jsonl.gz', '.json.gz'))}"
        rows = [vary(row, rng) for row in rng.choices(pool, k=rng.randrange(1, 60))]
        first = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
        write_file(folder / name, [first, *rows], rng)
        names.append(str(folder / name))
    keys: dict[str, Any] = {"max_refused": 1.0, "max_cut_replies": 1.0, "max_row_mb": rng.choice((0.002, 0.01, 16.0))}
    choices: dict[str, tuple[Any, ...]] = {
        "overlong": ("truncate", "drop", "split"), "history": ("auto", "unroll", "last_turn"),
        "train_on": ("assistant", "last_assistant", "all"), "eval_split": (0.0, 0.2), "limit": (None, 3, 40),
        "control_text": ("plain", "refuse", "allow"), "system_prompts": ([], ["Be kind."]),
        "ignore_columns": ([], ["zebra", "id"]),
    }  # fmt: skip
    for key, values in choices.items():
        keys[key] = rng.choice(values)
    train: list[Any] = names
    if rng.random() < 0.3:
        train = [{"path": name, "limit": rng.choice((1, 10, 1000)), "epochs": 1.5} for name in names]
    return {"train": train, **keys}


class Case:
    """One data set, and the commands that prepare it."""

    def __init__(self, folder: Path, keys: dict[str, Any], rng: random.Random) -> None:
        self.folder, self.keys, self.rng = folder, keys, rng
        self.cache, self.number = folder / "cache", 0

    def start(self, **keys: Any) -> tuple[subprocess.Popen[str], Path]:
        self.number += 1
        output = self.folder / f"out{self.number}"
        output.mkdir()
        words = [sys.executable, "-c", CHILD, str(self.folder.parent / "encoder"), str(output)]
        environment = {**os.environ, "TUNESMITH_CACHE": str(self.cache)}
        child = subprocess.Popen([*words, json.dumps({**self.keys, **keys})], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True, env=environment)  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        return child, output

    def finish(self, started: tuple[subprocess.Popen[str], Path]) -> tuple[Any, str]:
        """What was written, or the error; and the notes."""
        child, output = started
        _, errors = child.communicate()
        if child.returncode:
            last = errors.strip().splitlines()[-1].replace(output.name, "OUT") if errors.strip() else ""
            return last, errors
        files = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
        return files, errors

    def prepare(self, **keys: Any) -> tuple[Any, str]:
        return self.finish(self.start(**keys))

    def kill_and_continue(self, whole_s: float, **keys: Any) -> tuple[Any, str]:
        """Kill at random moments until it happens to end."""
        for _ in range(6):
            child, output = self.start(cache=True, **keys)
            time.sleep(self.rng.random() * whole_s)
            if child.poll() is not None:
                return self.finish((child, output))
            child.send_signal(signal.SIGKILL)
            child.communicate()
        return self.prepare(cache=True, **keys)

    def damage(self) -> str:
        """Damage one file of the cache; returns its name."""
        files = sorted(path for path in self.cache.rglob("*") if path.is_file() and path.suffix != ".lock")
        if not files:
            return ""
        path = self.rng.choice(files)
        content = bytearray(path.read_bytes())
        kind = self.rng.choice(("cut", "flip", "remove", "empty", "grow"))
        if not content and kind in ("cut", "flip"):
            kind = "grow"
        times = path.stat()
        if kind == "remove":
            path.unlink()
            return f"{kind} {path.name}"
        if kind == "flip":
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        path.write_bytes({"cut": content[: self.rng.randrange(len(content) or 1)], "flip": content, "empty": b"",
                          "grow": content + b"x"}[kind])  # fmt: skip
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return f"{kind} {path.name}"

    def run(self) -> list[str]:
        """What is wrong."""
        wrong: list[str] = []
        begin = time.monotonic()
        plain, said = self.prepare(cache=False, workers=0)
        whole_s = time.monotonic() - begin
        if isinstance(plain, str) and "Error" not in plain.partition(":")[0]:
            wrong.append(f"no error of ours: {said}")
        if "Traceback" in said and "tunesmith.errors" not in said.strip().splitlines()[-1]:
            wrong.append(f"a traceback: {said}")

        def compare(way: str, found: tuple[Any, str]) -> None:
            if found[0] != plain:
                if isinstance(plain, dict) and isinstance(found[0], dict):
                    names = sorted(n for n in {*plain, *found[0]} if plain.get(n) != found[0].get(n))
                    wrong.append(f"{way}: {names} differ; {found[1]}")
                else:
                    wrong.append(f"{way}: {str(plain)[:300]!r} but {str(found[0])[:300]!r} {found[1][-1500:]}")

        compare("workers", self.prepare(cache=False, workers=self.rng.choice((2, 3, 4))))
        compare("killed", self.kill_and_continue(whole_s * 0.7, workers=self.rng.choice((0, 2))))
        compare("from the cache", self.prepare(cache=True, workers=0))
        for _ in range(2):
            what = self.damage()
            compare(f"damaged ({what})", self.prepare(cache=True, workers=0))
            compare(f"after the damage ({what})", self.prepare(cache=True, workers=0))
        if isinstance(plain, dict):
            shutil.rmtree(self.cache, ignore_errors=True)
        pair = [self.start(cache=True, workers=workers) for workers in (0, 2)]
        for number, started in enumerate(pair):
            compare(f"two at once, {number}", self.finish(started))
        return wrong


def make_encoder(folder: Path) -> None:
    import datetime

    from tunesmith.encode.portable import PortableEncoder
    from tunesmith.model.bpe import train_tokenizer
    from tunesmith.model.tokenizer import build_encoder

    tokenizer = train_tokenizer(["the quick brown fox says hello, 你好 user assistant system\n"] * 20, vocab_size=400)
    encoder = build_encoder(tokenizer, None, {}, datetime.datetime(2026, 1, 2))
    (folder / "encoder").write_bytes(pickle.dumps(PortableEncoder.of(encoder)))


def run_cases(folder: Path, seed: int, count: int, shared: Path | None) -> list[str]:
    """Everything that is wrong, with the seed of its case."""
    make_encoder(folder)
    pool = real_rows(shared, random.Random(0))
    wrong = []
    for number in range(seed, seed + count):
        rng = random.Random(number)
        own = folder / f"case{number}"
        own.mkdir()
        keys = make_case(own, pool, rng)
        found = Case(own, keys, rng).run()
        wrong += [f"seed {number}: WRONG: {text}\n  {keys}" for text in found]
        for text in wrong[len(wrong) - len(found) :]:
            print(text, flush=True)
        if not found:
            shutil.rmtree(own)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--shared", type=Path, help="folder with data/")
    parser.add_argument("--folder", type=Path, help="for the files of cases that are wrong")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        wrong = run_cases(folder, args.seed, args.count, args.shared)
    print(f"{args.count} cases, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
