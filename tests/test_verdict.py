"""The verdict on a run: what real runs that went well or badly are told, and silence where nothing is wrong.

tests/golden/verdicts.json holds what real runs logged; bench/verdict_runs.py made it, and its flags are kept there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.report.records import RunRecords
from tunesmith.report.replies import SampleReplies, SampleReply, repeats_itself
from tunesmith.report.trend import change_of, largest_rise, noise_of
from tunesmith.report.verdict import Verdict, judge
from tunesmith.runfolder import RunFolder

GOLDEN = json.loads((Path(__file__).parent / "golden" / "verdicts.json").read_text(encoding="utf-8"))
LEDGER = {"train": {"files": {"data": {"rows": 9, "used": 9, "refused": {}, "truncated": [], "notes": {}}}, "tokens": 900}, "eval": None}  # fmt: skip
CONFIG = {"model.path": "base", "data.train": ["data"], "train.output_dir": "run"}


def judge_golden(name: str, folder: Path) -> Verdict:
    saved = GOLDEN[name]
    columns = saved["records"]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    records = [{name: value for name, value in row.items() if value is not None} for row in rows]
    config = resolve_config(RunConfig, None, {}, arguments=saved["config"])
    finish(folder)
    replies = [SampleReply("", row["reply"], "", row["has_stopped"], row["wanted_share"]) for row in saved["replies"]]
    return judge(RunRecords(RunFolder(folder), config, records, [], saved["ledger"], {}), SampleReplies("", replies))


def finish(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").touch()


def codes(verdict: Verdict) -> list[str]:
    return [finding.code for finding in verdict.findings]


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("good") or name == "resumed"])
def test_nothing_is_found_in_a_good_run(name: str, tmp_path: Path) -> None:
    verdict = judge_golden(name, tmp_path)
    assert verdict.findings == []
    assert len(verdict.lines()) == 1
    assert "fell from" in verdict.summary


@pytest.mark.parametrize(
    ("name", "found", "changes"),
    [
        ("lr_100_times_too_high", ["loss-jumped", "replies-do-not-stop"], {"optim.lr": 0.01}),
        ("lr_100_times_too_low", ["loss-did-not-fall"], {"optim.lr": 1e-4}),
        ("lora_lr_too_low", ["loss-did-not-fall"], {"optim.lr": 2e-3}),
        ("text_lr_too_high", ["loss-stuck"], {"optim.lr": 0.01}),
        ("ten_epochs_evaluated", ["overfitting"], {"train.epochs": 2.5}),
        ("ten_epochs_evaluated_at_the_end", ["eval-far-behind"], {"train.eval_steps": 2}),
        ("ten_epochs_without_eval", ["no-eval"], {"data.eval_split": 0.1}),
        ("stopped_early", ["overfitting"], {"train.epochs": 1.5}),
        ("truncated", ["replies-cut"], {"data.overlong": "split"}),
        ("one_step", ["few-steps", "replies-do-not-stop"], {"train.max_steps": 200}),
        ("six_steps", ["few-steps"], {"train.grad_accum_steps": 2}),
        (
            "thirty_steps_from_scratch",
            ["few-steps", "loss-did-not-fall", "replies-do-not-stop"],
            {"train.max_steps": 300},
        ),
    ],
)
def test_what_went_wrong_is_found_with_its_key(
    name: str, found: list[str], changes: dict[str, Any], tmp_path: Path
) -> None:
    verdict = judge_golden(name, tmp_path)
    assert codes(verdict) == found, verdict
    assert changes.items() <= verdict.findings[0].changes.items()
    for key in changes:
        assert f"--{key} " in verdict.findings[0].advice


def test_every_key_of_an_advice_exists(tmp_path: Path) -> None:
    from tunesmith.config.runfile import leaf_fields

    known = set(leaf_fields(RunConfig))
    for index, name in enumerate(GOLDEN):
        (tmp_path / str(index)).mkdir()
        for finding in judge_golden(name, tmp_path / str(index)).findings:
            assert set(finding.changes) <= known
            resolve_config(RunConfig, None, CONFIG | {"data.train": ["a"]} | flags_of(finding.changes))


def flags_of(changes: dict[str, Any]) -> dict[str, Any]:
    needed = {"data.eval_split": 0.1} if "train.eval_steps" in changes else {}
    return needed | changes


def made(
    losses: Sequence[float], tmp_path: Path, evals: dict[int, float] | None = None, epochs: float = 1.0, **flags: Any
) -> Verdict:
    """The verdict on made-up curves, one record a step."""
    records: list[dict[str, Any]] = [
        {"step": step, "epoch": epochs * step / len(losses), "loss": loss} for step, loss in enumerate(losses, start=1)
    ]
    if evals:
        records = [{"step": 0, "epoch": 0.0}, *records]
        for step, loss in evals.items():
            records[step]["eval_loss"] = loss
    config = resolve_config(RunConfig, None, CONFIG | {key.replace("__", "."): value for key, value in flags.items()})
    return judge(RunRecords(RunFolder(tmp_path), config, records, [], LEDGER, {}), SampleReplies(""))


def curve(shape: Callable[[float], float], steps: int = 400, noise: float = 0.1, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [shape(step / steps) + rng.gauss(0.0, noise) for step in range(steps)]


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize(
    ("start", "end"), [(2.1, 1.2), (1.0, 0.9), (0.6, 0.55), (9.0, 3.0), (1.4, 0.05)], ids=lambda value: str(value)
)
def test_noise_is_no_finding(start: float, end: float, noise: float, seed: int, tmp_path: Path) -> None:
    """Runs that fall as good ones do, with batches as noisy as real ones, and evaluations with a little of it."""
    noise *= start / 2

    def shape(at: float) -> float:
        return end + (start - end) * 2.0 ** (-8 * at)

    rng = random.Random(seed)
    evals = {step: shape(step / 400) * 1.05 + rng.gauss(0.0, 0.002 * end) for step in range(0, 401, 50)}
    for given in (None, evals, {0: evals[0], 400: evals[400]}):
        assert made(curve(shape, noise=noise, seed=seed), tmp_path, given).findings == []


def test_a_single_bad_batch_is_no_jump(tmp_path: Path) -> None:
    losses = curve(lambda at: 1.0 + 2.0 ** (-8 * at))
    losses[200] = losses[300] = 40.0
    assert made(losses, tmp_path).findings == []


def test_a_jump_that_stays_a_while_is_found(tmp_path: Path) -> None:
    losses = curve(lambda at: 1.0 + 2.0 ** (-8 * at))
    losses[200:240] = [loss + 2.0 for loss in losses[200:240]]
    verdict = made(losses, tmp_path, optim__lr=1e-4)
    assert codes(verdict) == ["loss-jumped"]
    assert verdict.findings[0].changes == {"optim.lr": 1e-5}


def test_a_loss_that_rises_is_found(tmp_path: Path) -> None:
    verdict = made(curve(lambda at: 2.0 + 3.0 * at), tmp_path, optim__lr=1e-3)
    assert (codes(verdict), verdict.findings[0].changes) == (["loss-rose"], {"optim.lr": 1e-4})


def test_flat_held_out_rows_are_no_overfitting(tmp_path: Path) -> None:
    """From the best evaluation on, eval_loss moves by less than the trained loss's own noise."""
    evals = {0: 2.0, 100: 1.5, 200: 1.495, 300: 1.498, 400: 1.5}
    assert made(curve(lambda at: 1.4 + 0.6 * 2.0 ** (-8 * at)), tmp_path, evals).findings == []


def test_held_out_rows_that_get_worse_are_found(tmp_path: Path) -> None:
    losses = curve(lambda at: 0.5 + 1.5 * 2.0 ** (-6 * at))
    verdict = made(losses, tmp_path, {0: 2.0, 400: 2.4}, epochs=4)
    assert codes(verdict) == ["eval-worse-than-before"]
    assert "--train.eval_steps" in verdict.findings[0].advice


def test_a_model_that_knows_the_data_is_not_blamed(tmp_path: Path) -> None:
    assert made(curve(lambda at: 0.12, noise=0.01), tmp_path).findings == []


def test_steps_left_out_are_told(tmp_path: Path) -> None:
    records = [{"step": step, "epoch": 1.0, "loss": 2.0 / step} for step in range(1, 100)]
    records[50] = {"step": 51, "epoch": 1.0, "skipped": 1}
    config = resolve_config(RunConfig, None, CONFIG)
    verdict = judge(RunRecords(RunFolder(tmp_path), config, records, [], LEDGER, {}), SampleReplies(""))
    assert codes(verdict) == ["steps-not-finite"]


@pytest.mark.parametrize("records", [[], [{"step": 0, "eval_loss": 2.0}], [{"step": 1, "loss": 2.0}], [{"step": 3, "skipped": 3}],
                                     [{"step": 0, "eval_loss": 0.0}, {"step": 1, "loss": 0.0, "eval_loss": 0.0}]])  # fmt: skip
def test_few_records_are_judged(records: list[dict[str, Any]], tmp_path: Path) -> None:
    config = resolve_config(RunConfig, None, CONFIG)
    verdict = judge(RunRecords(RunFolder(tmp_path), config, records, [], LEDGER, {}), SampleReplies(""))
    assert verdict.summary
    assert set(codes(verdict)) <= {"few-steps", "steps-not-finite"}


def test_endless_replies() -> None:
    assert repeats_itself("He said: the the the the the the the the the the ")
    assert repeats_itself("\n" * 40)
    assert not repeats_itself("It is a long sentence that has no end of its own and yet repeats nothing at all, so")
    assert not repeats_itself("")
    assert SampleReply("", "no end of it", "", False, 0.4).is_endless
    assert not SampleReply("", "no end of it", "", False, 0.9).is_endless
    assert not SampleReply("", "la la la la la la la la la la ", "", True, 0.4).is_endless
    assert not SampleReply("", "la la la la la la la la la la ", "", False, None).is_endless  # raw text


def test_noise_is_measured_whatever_the_slope() -> None:
    ys = curve(lambda at: 100.0 * at, noise=2.0)
    assert noise_of(ys) == pytest.approx(2.0, rel=0.2)
    assert change_of(ys).has_risen
    assert not largest_rise(list(reversed(ys)), ys[-1]).is_clear


def test_a_real_run_ends_with_its_verdict(run: Any, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    """At a learning rate that teaches nothing."""
    output = tmp_path / "run"
    code, out, err = run("train", "--model", model_folder, "--data", chats, "--output", output, "--data.max_seq_len", 64,
                         "--train.micro_batch_tokens", 128, "--optim.lr", 1e-7, "--train.max_steps", 60,
                         "--data.eval_split", 0.2)  # fmt: skip
    assert code == 0, err
    lines = out.splitlines()
    [at] = [index for index, line in enumerate(lines) if line.startswith("verdict: eval_loss ")]
    assert lines[at + 1].startswith("- The eval_loss hardly fell (")
    assert lines[at + 1].endswith(" Try --optim.lr 1e-5.")
    assert "The eval_loss hardly fell (" in (output / "report.html").read_text(encoding="utf-8")


def test_two_points_are_no_trend_unless_they_differ_much() -> None:
    """The noise of so few is not known: two steps on different rows once read as a learning rate that is too high."""
    from tunesmith.report.trend import change_of

    assert not change_of([8.055, 8.285]).has_risen
    assert not change_of([8.285, 8.055]).has_fallen
    assert change_of([8.0, 12.0]).has_risen
