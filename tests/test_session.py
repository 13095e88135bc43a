"""A run as one object: names in a config are resolved once, and files of a run are read back as typed records."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.errors import TunesmithError
from tunesmith.files import sealed
from tunesmith.model.source import find_model
from tunesmith.preparation.replace import finish_replacing, replace_dataset
from tunesmith.run.console import Silent
from tunesmith.run.records import Fingerprint, RunRecord, read_record
from tunesmith.run.resume import run_resume
from tunesmith.run.start import run_training
from tunesmith.runfolder import RunFolder
from tunesmith.sources.read import find_sources
from tunesmith.training.progress import Progress, TrainState, Window


def count_calls(monkeypatch: pytest.MonkeyPatch, function: Any) -> Counter[str]:
    """Count calls of a function by argument, from any module; the function still works."""
    calls: Counter[str] = Counter()

    def counted(*args: Any) -> Any:
        calls[str(args[0])] += 1
        return function(*args)

    for name, module in list(sys.modules.items()):
        if name.startswith("tunesmith.") and getattr(module, function.__name__, None) is function:
            monkeypatch.setattr(module, function.__name__, counted)
    return calls


@pytest.mark.parametrize("flags", [{}, {"lora.kind": "lora", "lora.rank": 2}])
def test_names_are_looked_up_once(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    held_out = write_jsonl(tmp_path / "eval.jsonl", [json.loads(chats.read_text().splitlines()[0])])
    config = resolve_config(RunConfig, None, {
        "model.path": str(model_folder), "data.train": [str(chats)], "data.eval": [str(held_out)],
        "train.output_dir": str(tmp_path / "run"), "train.max_steps": 1, "data.max_seq_len": 64, **flags,
    })  # fmt: skip
    models, sources = count_calls(monkeypatch, find_model), count_calls(monkeypatch, find_sources)
    run_training(config, Silent())
    assert models == {str(model_folder): 1}
    assert sources == {str([str(chats)]): 1, str([str(held_out)]): 1}
    models.clear(), sources.clear()
    run_resume(str(tmp_path / "run"), {"train.max_steps": 2, "optim.schedule": "constant"}, ["schedule"], Silent())
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    assert models == {str(model_folder): 1} | ({} if flags else {str(checkpoint): 1})
    assert sources == {str([str(chats)]): 1, str([str(held_out)]): 1}


def test_a_silent_run_prints_nothing(
    model_folder: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = resolve_config(RunConfig, None, {
        "model.path": str(model_folder), "data.train": [str(chats)], "train.output_dir": str(tmp_path / "run"),
        "train.max_steps": 1, "data.max_seq_len": 64,
    })  # fmt: skip
    assert run_training(config, Silent()) == tmp_path / "run" / "model"
    assert capfd.readouterr().out == ""


FINGERPRINT = {
    "data": {"train": [{"path": "/d", "size": 1, "mtime_ns": 2, "sha256": "a"}], "eval": [{"hub": ["a/b", None, "x"]}]},
    "template": "t", "tokenizer": "k", "model": "m", "weights": {"org/name": None}, "config": {"train": {"seed": 0}},
    "threads": 2, "processes": 2, "precision": "bf16", "has_copies": True, "shares_prefixes": True, "versions": {"torch": "2.6.0", "peft": None}, "store": {"tokens": {"tokens.bin": "b"}},
}  # fmt: skip
RECORD = {"id": "x", "date": "2026-01-02T03:04:05", "cwd": "/somewhere", "guard": FINGERPRINT}


def test_records_are_read_and_written_as_before(tmp_path: Path) -> None:
    """Records have the JSON of earlier versions, key by key."""
    folder = RunFolder(tmp_path)
    for extra in ({}, {"adapter_init": {"a.safetensors": "h"}, "finished_at_step": 0, "extended_from_step": 4}):
        folder.record.write_text(sealed(RECORD | extra))
        record = RunRecord.from_json(read_record(folder.record), folder.record)
        assert record.to_json() == RECORD | extra
        record.write(folder.record)
        assert read_record(folder.record) == RECORD | extra
    assert "finished_at_step" not in record.updated(finished_at_step=None).to_json()
    newer = ("weights", "processes", "precision", "has_copies", "shares_prefixes")
    older = Fingerprint.from_json({k: v for k, v in FINGERPRINT.items() if k not in newer}, tmp_path)
    assert (older.weights, older.processes, older.precision) == ({}, 1, None)
    assert not older.has_copies
    assert not older.shares_prefixes


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r.pop("id"), "id"),
        (lambda r: r.pop("guard"), "guard"),
        (lambda r: r["guard"].pop("threads"), "guard.threads"),
        (lambda r: r["guard"].update(threads="many"), "guard.threads"),
        (lambda r: r.update(date="yesterday"), "date"),
    ],
)
def test_a_record_that_is_damaged_names_the_field(tmp_path: Path, change: Any, named: str) -> None:
    content = json.loads(json.dumps(RECORD))
    change(content)
    with pytest.raises(TunesmithError) as error:
        RunRecord.from_json(content, tmp_path / "run.json")
    assert str(tmp_path / "run.json") in str(error.value)
    assert f"{named}" in str(error.value)


def test_a_checkpoints_state_is_what_it_was() -> None:
    progress = Progress(step=3, epoch=0.5, place=[0, 6], best_step=2, best_eval_loss=1.5, grad_norms=[1.0, 2.0])
    window = Window(loss_sum=2.0, targets=10, tokens=20, steps=1, before_s=4.0)
    state = TrainState(progress, 9, window, {"scale": 2.0}, {"python": [3, [1], None]})
    saved = json.loads(json.dumps(state.to_json()))
    assert {"step", "place", "total_steps", "window", "scaler", "random", "grad_norms"} <= saved.keys()
    again = TrainState.from_json(saved)
    assert again.progress == progress
    assert (again.total_steps, again.scaler, again.random) == (9, state.scaler, state.random)
    assert 4.0 <= again.window.seconds() < 5.0
    saved.pop("window")
    with pytest.raises(KeyError, match="window"):
        TrainState.from_json(saved)


def write_data(folder: RunFolder, name: str, has_eval: bool) -> None:
    for store in [folder.tokens, *([folder.eval_tokens] if has_eval else [])]:
        store.mkdir(parents=True)
        (store / "tokens.bin").write_text(name)
    folder.ledger.write_text(json.dumps({"train": name, "eval": name if has_eval else None}))


def read_data(folder: RunFolder) -> tuple[str, str | None, Any]:
    has_eval = (folder.eval_tokens / "tokens.bin").exists()
    return (
        (folder.tokens / "tokens.bin").read_text(),
        (folder.eval_tokens / "tokens.bin").read_text() if has_eval else None,
        json.loads(folder.ledger.read_text()),
    )


class KilledError(Exception):
    """Raised instead of SIGKILL."""


class Killer:
    """Raises before the n-th change of the file system."""

    def __init__(self) -> None:
        self.left = -1
        sys.addaudithook(self._hear)  # cannot be removed; does nothing with a negative count

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.left >= 0 and event in ("os.rename", "os.rmdir", "os.remove", "shutil.rmtree"):
            self.left -= 1
            if self.left < 0:
                raise KilledError


@pytest.mark.parametrize("has_eval", [(True, True), (True, False), (False, True)])
def test_a_data_set_is_replaced_whole_or_not_at_all(tmp_path: Path, has_eval: tuple[bool, bool]) -> None:
    """Killed before each change in the folder: after the repair, stores and ledger belong together."""
    killer, outcomes, is_killed, number = Killer(), set(), True, 0
    while is_killed:
        number += 1
        folder = RunFolder(tmp_path / str(number))
        staging = RunFolder(folder.path / ".tokens.0.partial")
        write_data(folder, "old", has_eval[0])
        write_data(staging, "new", has_eval[1])
        before = read_data(folder)
        killer.left = number - 1
        try:
            replace_dataset(folder, staging)
            is_killed = False
        except KilledError:
            pass
        finally:
            killer.left = -1
        finish_replacing(folder)
        wanted = ("new", "new" if has_eval[1] else None, {"train": "new", "eval": "new" if has_eval[1] else None})
        assert read_data(folder) in (before, wanted)
        outcomes.add(read_data(folder)[0])
    assert outcomes == {"old", "new"}
    assert number > 5
