"""Runs on a mix: resumed to the same weights, each source's loss at no cost to the others, everything named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from conftest import WORDS, chat_row, killed_after, raises, tiny_config, write_jsonl
from test_pack import make_store
from test_resume import records, weights
from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import RunConfig
from tunesmith.config.sources import name_sources
from tunesmith.data.dataset import find_data
from tunesmith.data.feed import Batches
from tunesmith.errors import ConfigError, DataError
from tunesmith.model.loss import SupervisedLM, supervised_loss
from tunesmith.plans.mix import Mix
from tunesmith.sources.read import find_sources, read_rows
from tunesmith.training.metrics import _numbers

Run = Callable[..., tuple[int, str, str]]
FAST = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--optim.lr", 3e-3, "--train.grad_accum_steps", 2,
        "--train.save_steps", 2, "--train.log_steps", 3, "--train.keep_checkpoints", 20)  # fmt: skip


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    words = WORDS.split()
    paths = {
        "chats": write_jsonl(
            tmp_path / "chats.jsonl",
            (chat_row(f"question {i}?", " ".join(words[i % 20 : i % 20 + 9])) for i in range(60)),
        ),
        "poems": write_jsonl(tmp_path / "poems.jsonl", ({"text": " ".join(words[i % 25 :][:14])} for i in range(90))),
        "facts": write_jsonl(
            tmp_path / "facts.jsonl", (chat_row(f"fact {i}?", "yes. " * (i % 7 + 1)) for i in range(40))
        ),
    }
    return {name: str(path) for name, path in paths.items()}


def write_mix(folder: Path, sources: dict[str, str], **amounts: Any) -> Path:
    """A run file with these sources; an amount is a number (a weight) or the keys of the source."""
    train = [
        {"path": sources[name]} | (amount if isinstance(amount, dict) else {"weight": amount})
        for name, amount in amounts.items()
    ]
    path = folder / "run.yaml"
    path.write_text(json.dumps({"data": {"train": train}}), encoding="utf-8")
    return path


@pytest.fixture
def straight(run: Run, model_folder: Path, sources: dict[str, str], tmp_path: Path) -> Path:
    """A run of 14 steps, more than two passes over the mix, with all its checkpoints."""
    yaml = write_mix(tmp_path, sources, chats=0.5, poems=0.3, facts=0.2)
    folder = tmp_path / "straight"
    code, _, err = run("train", yaml, "--model", model_folder, "--output", folder, *FAST, "--train.max_steps", 14)
    assert code == 0, err
    return folder


def test_a_mix_resumed_anywhere_has_the_same_weights(run: Run, straight: Path, tmp_path: Path) -> None:
    """In the first pass and in a later one, with the tokens and losses of each source."""
    for step in (2, 8, 12):
        part = killed_after(straight, step, tmp_path / f"from-{step}")
        code, _, err = run("resume", part)
        assert code == 0, err
        assert weights(part) == weights(straight)
        assert records(part) == records(straight)


def test_a_mix_is_named_everywhere(straight: Path) -> None:
    last = records(straight)[-1]
    assert set(last["source_loss"]) == {"chats", "poems", "facts"}
    assert sum(last["source_tokens"].values()) == last["tokens"]
    asked = {"chats": 0.5, "poems": 0.3, "facts": 0.2}
    for name, share in asked.items():
        assert last["source_tokens"][name] / last["tokens"] == pytest.approx(share, abs=0.05)
    ledger = json.loads((straight / "data_ledger.json").read_text())
    assert {source["name"]: source["share"] for source in ledger["mix"]} == asked
    assert max(source["passes_per_epoch"] for source in ledger["mix"]) == 1
    assert [source["rows"] for source in ledger["mix"]] == [60, 90, 40]
    page = (straight / "report.html").read_text()
    assert "loss of each source" in page
    assert all(f'<td class="file">{name}</td>' in page for name in asked)


def test_the_loss_is_the_mean_of_the_losses_of_its_sources(straight: Path) -> None:
    """Weighted by their trained tokens, which are not all tokens of a chat; so it lies between them."""
    for record in records(straight):
        losses = record["source_loss"].values()
        assert min(losses) <= record["loss"] <= max(losses)


def test_source_losses_do_not_change_the_loss_or_a_gradient(tmp_path: Path) -> None:
    """Bit for bit, and they add up to it. With all logits at once, and in recomputed chunks."""
    store = make_store(tmp_path, [9, 3, 21, 14, 17, 6, 30, 8])
    mix = Mix(("a", "b", "c"), torch.tensor([0, 1, 1, 0, 1, 0, 1, 0]).numpy().astype("int16"))
    packs = [torch.tensor([0, 2, 5]).numpy(), torch.tensor([1, 3, 4, 6, 7]).numpy()]
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    from conftest import set_up_attention

    model = AutoModelForCausalLM.from_config(tiny_config("qwen3")).train()
    isolation = set_up_attention(model, 64, 128)
    lm = SupervisedLM(model, isolation.is_isolated, "decoder")
    for chunk_bytes in (2**28, 4 * 400 * 7):
        found = []
        for batches in (Batches(store, packs), Batches(store, packs, mix=mix)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("tunesmith.model.head.CHUNK_BYTES", chunk_bytes)
                sums = [supervised_loss(lm, batch) for batch in batches]
            model.zero_grad()
            torch.stack([one.loss for one in sums]).sum().backward()
            found.append((sums, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        (plain, grads), (mixed, others) = found
        assert [one.source_losses for one in plain] == [None, None]
        for one, other in zip(plain, mixed, strict=True):
            assert torch.equal(one.loss, other.loss)
            assert other.source_losses is not None
            assert other.source_losses.sum().item() == pytest.approx(one.loss.item(), rel=1e-6)
            assert other.source_losses[2] == 0
        assert all(torch.equal(one, other) for one, other in zip(grads, others, strict=True))
        only = supervised_loss(lm, next(iter(Batches(store, [torch.tensor([0]).numpy()]))))
        alone = supervised_loss(lm, next(iter(Batches(store, [torch.tensor([0, 2]).numpy()], mix=mix))))
        assert alone.source_losses is not None
        assert alone.source_losses[0].item() == pytest.approx(only.loss.item(), rel=1e-5)


def test_names_and_mappings_of_names_are_the_same_run(
    run: Run, model_folder: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    """A mapping without an amount changes no step: it names the source, whose loss is logged."""
    flags = (*FAST, "--model", model_folder, "--train.max_steps", 4)
    code, _, err = run("train", "--data", *sources.values(), "--output", tmp_path / "plain", *flags)
    assert code == 0, err
    yaml = write_mix(tmp_path, sources, chats={}, poems={"name": "verse"}, facts={"limit": 1000})
    code, out, err = run("train", yaml, "--output", tmp_path / "named", *flags)
    assert code == 0, err
    assert weights(tmp_path / "plain") == weights(tmp_path / "named")
    assert "source_loss" not in records(tmp_path / "plain")[-1]
    assert set(records(tmp_path / "named")[-1]["source_loss"]) <= {"chats", "verse", "facts"}
    assert "mix" not in json.loads((tmp_path / "plain" / "data_ledger.json").read_text())
    assert "verse" in out


def test_changed_amounts_are_refused_on_resume_and_moved_files_are_not(
    run: Run, straight: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    part = killed_after(straight, 4, tmp_path / "part")
    config = (part / "config.yaml").read_text()
    (part / "config.yaml").write_text(config.replace("weight: 0.5", "weight: 0.6"))
    code, _, err = run("resume", part)
    assert code == 1
    assert "--allow data" in err
    (part / "config.yaml").write_text(config)
    moved = []
    for name, path in sources.items():
        moved.append(shutil.move(path, tmp_path / f"moved-{name}.jsonl"))
    code, _, err = run("resume", part, "--data", *moved, "--allow", "data")
    assert code == 0, err
    assert weights(part) == weights(straight)
    assert "weight: 0.5" in (part / "config.yaml").read_text()


def test_limits_and_epochs_of_sources(run: Run, model_folder: Path, sources: dict[str, str], tmp_path: Path) -> None:
    yaml = write_mix(
        tmp_path, sources, chats={"epochs": 2, "limit": 10}, poems={"epochs": 0.5}, facts={"limit": 7, "name": "f"}
    )
    code, out, err = run("train", yaml, "--model", model_folder, "--output", tmp_path / "run", *FAST)
    assert code == 0, err
    mix = {source["name"]: source for source in json.loads((tmp_path / "run" / "data_ledger.json").read_text())["mix"]}
    assert [mix[name]["rows"] for name in ("chats", "poems", "f")] == [10, 90, 7]
    assert [mix[name]["passes_per_epoch"] for name in ("chats", "poems", "f")] == [2, 0.5, 1]
    last = records(tmp_path / "run")[-1]
    assert last["source_tokens"]["chats"] == 2 * mix["chats"]["tokens"]
    assert last["source_tokens"]["f"] == mix["f"]["tokens"]
    assert "2.00 passes" in out


def test_limits_count_the_rows_of_a_source(sources: dict[str, str], tmp_path: Path) -> None:
    """Over all files of a pattern, and nothing else is read less."""
    (tmp_path / "set").mkdir()
    for number in range(3):
        write_jsonl(tmp_path / "set" / f"{number}.jsonl", ({"text": f"{number} {i}"} for i in range(4)))
    train = [{"path": str(tmp_path / "set"), "limit": 6}, sources["chats"], {"path": sources["poems"], "limit": 1}]
    config = resolve_config(RunConfig, None, {}, arguments={"model": {"path": "m"}, "data": {"train": train}, "train": {"output_dir": "o"}})  # fmt: skip
    rows = list(read_rows(find_sources(config.data.train)))
    assert [row.value["text"] for row in rows[:6]] == ["0 0", "0 1", "0 2", "0 3", "1 0", "1 1"]
    assert len(rows) == 6 + 60 + 1


BASE: dict[str, Any] = {"model": {"path": "m"}, "train": {"output_dir": "o"}}


@pytest.mark.parametrize(
    ("train", "facts"),
    [
        ([{"path": "a", "wieght": 1}], ["source 1", "wieght", "weight"]),
        ([{"path": "a", "ratio": 1}], ["ratio", "did you mean weight"]),
        ([{"weight": 1}, {"path": "b", "weight": 1}], ["source 1", "path", "missing"]),
        ([{"path": "a", "weight": 0}, {"path": "b", "weight": -1}], ["source 1: weight", "source 2: weight"]),
        ([{"path": "a", "weight": True}], ["weight", "number"]),
        ([{"path": "a", "weight": float("nan")}], ["weight"]),
        ([{"path": "a", "weight": 1, "epochs": 1}], ["weight and epochs"]),
        ([{"path": "a", "weight": 1}, "b"], ["source 2", "no weight"]),
        ([{"path": "a", "weight": 1}, {"path": "b", "epochs": 2}], ["source 2", "no weight"]),
        ([{"path": "a", "name": "x"}, {"path": "b", "name": "x"}], ["two sources are named 'x'"]),
        ([{"path": "a", "name": "x\ny"}], ["source 1: name"]),
        ([{"path": "a", "limit": 0}], ["limit"]),
        ([{"path": "a", "limit": 1.5}], ["limit"]),
        ([{"path": ""}], ["path"]),
        ([3], ["text"]),
        ([["a"]], ["text"]),
        ([{"path": "a", "fields": {"prompt": "q"}}], ["fields", "all sources"]),
    ],
)
def test_wrong_sources_are_explained(train: list[Any], facts: list[str]) -> None:
    with raises(ConfigError, "config", "data.train", *facts):
        resolve_config(RunConfig, None, {}, arguments=BASE | {"data": {"train": train}})


def test_names_of_sources() -> None:
    train = ["a/chats.jsonl.gz", {"path": "b/chats.jsonl"}, {"path": "own/name:train"}, {"path": "x/*.json"},
             {"path": "c.txt", "name": "books"}]  # fmt: skip
    config = resolve_config(RunConfig, None, {}, arguments=BASE | {"data": {"train": train}})
    assert name_sources(config.data.train) == [
        "a/chats.jsonl.gz",
        "b/chats.jsonl",
        "own/name:train",
        "x/*.json",
        "books",
    ]
    assert len(set(name_sources(["a", "a", "a"]))) == 3


def test_sources_are_told_from_rows(model_folder: Path, sources: dict[str, str], tmp_path: Path) -> None:
    """In Python a dict is a row, and never silently a source."""
    chats, poems = sources["chats"], Path(sources["poems"])
    data = [tunesmith.Source(chats, weight=2, name="talk"), tunesmith.Source(poems, weight=1)]
    run = tunesmith.train(
        model=model_folder, data=data, output=tmp_path / "run", train={"max_steps": 2, "log_steps": 1},
        optim={"lr": 1e-3},
    )  # fmt: skip
    assert set(run.metrics[-1]["source_loss"]) <= {"talk", "poems"}
    assert [source["name"] for source in run.ledger["mix"]] == ["talk", "poems"]
    given = {"model": model_folder, "output": tmp_path / "no"}
    with raises(DataError, "source-as-row", "tunesmith.Source"):
        tunesmith.train(data=[{"path": chats, "weight": 1}], **given)
    with raises(DataError, "rows-beside-sources", "tunesmith.Source"):
        tunesmith.train(data=[tunesmith.Source(chats), chat_row("a", "b")], **given)
    with raises(ConfigError, "config", "source 1: weight"):
        tunesmith.train(data=[tunesmith.Source(chats, weight=-1)], **given)
    rows = [chat_row(f"{i}", "yes") | {"path": "x", "weight": 1} for i in range(3)]
    preview = tunesmith.preview(model=model_folder, data=rows)
    assert len(list(preview)) == 3


def test_what_cannot_be_mixed(run: Run, model_folder: Path, sources: dict[str, str], tmp_path: Path) -> None:
    flags = ("--model", model_folder, "--output", tmp_path / "run", *FAST)
    twice = write_mix(tmp_path, sources | {"again": sources["chats"]}, chats=1, again=1)
    code, _, err = run("train", twice, *flags)
    assert code == 1
    assert "twice" in err
    code, _, err = run("train", write_mix(tmp_path, sources, chats=1, poems=1), "--data.limit", 20, *flags)
    assert code == 1
    assert "poems has no rows to train on" in err
    code, _, err = run("train", "--data", f"{sources['chats']}:weight=0.3", *flags)
    assert code == 1
    assert "YAML" in err


def test_trackers_get_flat_numbers() -> None:
    record = {"step": 1, "loss": 2.0, "source_loss": {"a": 1.0, "b": 3.0}, "rows": ["x"], "time": 5.0}
    assert _numbers(record) == {"loss": 2.0, "source_loss/a": 1.0, "source_loss/b": 3.0}


def test_a_source_of_a_folder_owns_its_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [{"text": "x"}])
    config = resolve_config(RunConfig, None, {}, arguments=BASE | {"data": {"train": [{"path": str(tmp_path)}]}})
    found = find_data(config.data).train
    assert [len(found.row_files(part)) for part in found.parts] == [2]


@pytest.mark.parametrize("extra", [(), ("--data.system_prompts", "Be brief.")], ids=["same-store", "labelled-anew"])
def test_rows_held_out_of_a_mix_are_evaluated_by_source(
    run: Run, model_folder: Path, sources: dict[str, str], tmp_path: Path, extra: tuple[str, ...]
) -> None:
    yaml = write_mix(tmp_path, sources, chats=0.5, poems=0.5)
    flags = (*FAST, "--train.max_steps", 3, "--data.eval_split", 0.2, *extra)
    code, _, err = run("train", yaml, "--model", model_folder, "--output", tmp_path / "run", *flags)
    assert code == 0, err
    last = records(tmp_path / "run")[-1]
    assert set(last["eval_source_loss"]) == {"chats", "poems"}
    low, high = sorted(last["eval_source_loss"].values())
    assert low <= last["eval_loss"] <= high
    assert "evaluation loss of each source" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.skipif("TUNESMITH_LONG" not in os.environ, reason="set TUNESMITH_LONG=1: starts torchrun twice")
def test_a_mix_is_the_same_run_in_several_processes(
    run: Run, straight: Path, model_folder: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    """Losses and tokens of each source, from the start and after a resume in the middle."""
    folder, whole = tmp_path / "two", records(straight)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tunesmith"]

    def launched(*words: object) -> None:
        done = subprocess.run([*launch, *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(records(folder)) == len(whole)
        for one, other in zip(whole, records(folder), strict=True):
            assert one["source_tokens"] == other["source_tokens"]
            assert other["source_loss"] == pytest.approx(one["source_loss"], abs=1e-4)
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)

    yaml = write_mix(tmp_path, sources, chats=0.5, poems=0.3, facts=0.2)
    launched("train", yaml, "--model", model_folder, "--output", folder, *FAST, "--train.max_steps", 14)
    killed = killed_after(folder, 8, tmp_path / "killed")
    folder = killed
    launched("resume", killed)
