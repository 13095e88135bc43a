"""Trackers get the numbers of metrics.jsonl and continue under the same run id on resume; nothing is sent anywhere.

wandb, swanlab and trackio are optional: if a package is not installed, its test is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
FAST = ["--data.max_seq_len", "64", "--train.micro_batch_tokens", "128", "--train.log_steps", "1"]


def tunesmith(home: Path, *words: object) -> str:
    """The command in a separate process: these packages leave threads, services and hooks behind."""
    environment = {
        **os.environ,
        **OFFLINE,
        "HOME": str(home),
        "TRACKIO_DIR": str(home / "trackio"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tunesmith", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gets no more of this run" not in done.stdout
    return done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def stored(value: float, data: bytes) -> bool:
    """Whether a number is in a tracker's file, as JSON or as 4 or 8 bytes."""
    return any(
        form in data for form in (json.dumps(value).encode(), struct.pack("<d", value), struct.pack("<f", value))
    )


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_tracker_gets_every_number_and_goes_on_with_its_run(
    name: str, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'tunesmith[{name}]'")
    home, output = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    words = ["--model", model_folder, "--data", chats, "--output", output, "--train.trackers", name]
    tunesmith(home, "train", *words, *FAST, "--train.max_steps", 3)
    tunesmith(home, "resume", output, "--train.max_steps", 5, "--allow", "schedule")
    records = metrics(output)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    files = sorted((output / name).rglob(f"*.{name}"))
    data = b"".join(path.read_bytes() for path in files)
    for record in records:
        for key in ("loss", "grad_norm", "lr"):
            assert key.encode() in data
            assert stored(record[key], data), f"{key} of step {record['step']}"
    # offline, each start writes a file; the service joins them by the id
    run_id = json.loads((output / "run.json").read_text(encoding="utf-8"))["id"]
    assert [run_id in path.name for path in files] == [True, True]


def test_trackio_keeps_one_run_with_each_step_once(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed: pip install 'tunesmith[trackio]'")
    import sqlite3

    output = tmp_path / "mine"
    words = ["--model", model_folder, "--data", chats, "--output", output, "--train.trackers", "trackio"]
    tunesmith(tmp_path, "train", *words, *FAST, "--train.max_steps", 2)
    tunesmith(tmp_path, "resume", output, "--train.max_steps", 4, "--allow", "schedule")
    with sqlite3.connect(tmp_path / "trackio" / "tunesmith.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step) for name, step, _ in rows] == [("mine", step) for step in (1, 2, 3, 4)]
    for record, (_, _, numbers) in zip(metrics(output), rows, strict=True):
        assert json.loads(numbers)["loss"] == record["loss"]


def test_tensorboard_shows_each_step_once_after_a_resume(
    run: Any, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    words = ["--model", model_folder, "--data", chats, "--output", output, "--train.trackers", "tensorboard", *FAST]
    code, _, err = run("train", *words, "--train.max_steps", 4, "--train.save_steps", 2)
    assert code == 0, err
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoints" / "step-000004")
    assert run("resume", output)[0] == 0
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert len(list((output / "tensorboard").iterdir())) == 2
    for key in ("loss", "lr", "grad_norm"):
        found = events.Scalars(key)
        assert [event.step for event in found] == [1, 2, 3, 4]
        assert [event.value for event in found] == pytest.approx([record[key] for record in metrics(output)], rel=1e-6)
