"""lr-find: the search over learning rates, and trials that are real runs of the model and the data at hand."""

from __future__ import annotations

import hashlib
import math
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from conftest import chat_row, raises, write_jsonl
from tunesmith.lr_find import format_lr
from tunesmith.training.trials import LARGEST, SMALLEST, Trial, lowest, search_lr

SMALL = {"micro_batch_tokens": 128, "max_steps": 2}


def curve(best: float, diverges: float = math.inf) -> Callable[[float], float]:
    """A loss that is lowest at `best` and infinite from `diverges` on."""
    return lambda lr: math.inf if lr >= diverges else 2 + math.log10(lr / best) ** 2


@pytest.mark.parametrize("best", [3e-7, 1e-5, 2.5e-5, 4e-4, 3e-3, 0.1, 0.5])
@pytest.mark.parametrize("first", [1e-12, 2e-5, 2e-4, 1e-2, 1e9])
def test_the_search_finds_the_minimum_from_anywhere(first: float, best: float) -> None:
    trials = search_lr(curve(best), first)
    assert lowest(trials) == pytest.approx(best, rel=1e-6)
    off = abs(math.log10(best / min(max(first, SMALLEST), LARGEST)))
    assert len(trials) <= 7 + off
    assert len({trial.lr for trial in trials}) == len(trials)


@pytest.mark.parametrize("first", [1e-6, 2e-4, 0.5, 10.0])
def test_the_search_goes_around_what_diverges(first: float) -> None:
    trials = search_lr(curve(1e-3, diverges=2.9e-3), first)
    assert 4e-4 < lowest(trials) < 2.5e-3


def test_losses_above_that_before_training_count_as_diverged() -> None:
    """Where training destroys the model, a higher rate may end lower by chance."""

    def measure(lr: float) -> float:
        return curve(1e-3)(lr) if lr < 1e-2 else 9 - lr / 10

    assert lowest(search_lr(measure, 1.0, before=6.0)) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_loss_that_only_falls_ends_at_a_limit(sign: int) -> None:
    trials = search_lr(lambda lr: sign * math.log(lr), 1e-3)
    assert all(SMALLEST <= trial.lr <= LARGEST for trial in trials)
    assert lowest(trials) in [trial.lr for trial in trials]


def test_the_parabola_moves_by_half_a_step_at_most() -> None:
    trials = [Trial(1e-3, 5.0), Trial(math.sqrt(10) * 1e-3, 4.0), Trial(1e-2, 4.0)]
    assert 3.2e-3 < lowest(trials) <= 1e-2 * 10**-0.25 + 1e-12
    trials[2] = Trial(1e-2, math.inf)
    assert lowest(trials) == trials[1].lr


@pytest.mark.parametrize(("lr", "shown"), [(2e-5, "2e-5"), (1.26e-3, "1.3e-3"), (1.0, "1e0"), (0.099999, "1e-1")])
def test_rates_are_short(lr: float, shown: str) -> None:
    assert format_lr(lr) == shown


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    rows = [chat_row(f"What is the answer {i}?", f"The answer is {i} and you.") for i in range(100, 106)]
    return write_jsonl(tmp_path / "held_out.jsonl", rows)


@pytest.mark.parametrize("lora", [{}, {"kind": "lora", "rank": 4, "dropout": 0.1}])
def test_a_trial_is_a_run_of_its_length(
    model_folder: Path, chats: Path, held_out: Path, tmp_path: Path, temporary: Path, lora: dict[str, Any]
) -> None:
    before = hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest()
    state = torch.get_rng_state()
    same: dict[str, Any] = {"model": model_folder, "data": chats, "eval_data": held_out, "train": SMALL, "lora": lora}
    found = tunesmith.find_lr(**same)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.num_steps, found.run_steps) == (2, 2)
    assert list(temporary.iterdir()) == []
    assert hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest() == before
    best = min(found.trials, key=lambda trial: trial.loss)
    run = tunesmith.train(output=tmp_path / "run", optim={"lr": best.lr}, **same)
    evals = [record["eval_loss"] for record in run.metrics if "eval_loss" in record]
    assert evals == [found.first_loss, best.loss]  # and so the trials before it left nothing in the weights
    assert best.lr / 1.8 < found.lr < best.lr * 1.8


def test_the_command_prints_a_table_and_what_to_use(
    run: Any, model_folder: Path, chats: Path, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    code, out, err = run("lr-find", "--model", model_folder, "--data", chats, "--train.max_steps", 2,
                         "--train.micro_batch_tokens", 128, "--optim.lr", 1e-3)  # fmt: skip
    assert code == 0, err
    assert "40 rows of 1 file" in out
    assert "4 of 40 samples held out" in out
    assert "before  " in out
    assert "  lowest" in out
    lr = float(out.split("--optim.lr ")[1].split()[0])
    assert float(out.split("lr: ")[-1]) == lr
    assert sorted(tmp_path.rglob("*")) == files


def test_it_takes_the_run_file_of_train_and_rows(model_folder: Path, tmp_path: Path, temporary: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {model_folder}}}\ntrain: {{output_dir: {tmp_path / 'RUN'}, max_steps: 2, trackers: [wandb],\n"
        "  micro_batch_tokens: 128}\n"
    )
    rows = [chat_row(f"What is {i}?", f"The answer is {i}.") for i in range(20)]
    found = tunesmith.find_lr(file, data=rows)
    assert "lowest" in str(found)
    assert "optim.lr" in found._repr_html_()
    assert not (tmp_path / "RUN").exists()
    assert list(temporary.iterdir()) == []


def test_a_rate_that_does_not_help_is_not_suggested(model_folder: Path, chats: Path, temporary: Path) -> None:
    with raises(tunesmith.RunError, "no-lr-found"):  # AdamW divides by eps: no update moves a weight
        tunesmith.find_lr(model=model_folder, data=chats, train=SMALL, optim={"lr": 1e-7, "eps": 1e30})
    assert list(temporary.iterdir()) == []


def test_ctrl_c_leaves_nothing(
    run: Any, model_folder: Path, chats: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tunesmith.training.trials as trials

    def interrupted(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trials, "train_step", interrupted)
    code, _, err = run("lr-find", "--model", model_folder, "--data", chats, "--train.micro_batch_tokens", 128)
    assert code == 3, err
    assert list(temporary.iterdir()) == []


def test_a_missing_file_is_named_as_by_train(run: Any, model_folder: Path, temporary: Path) -> None:
    code, _, err = run("lr-find", "--model", model_folder, "--data", "gone.jsonl")
    assert code == 1
    assert "gone.jsonl" in err
    code, _, err = run("lr-find", "--model", model_folder)
    assert code == 1
    assert "data.train: missing" in err
