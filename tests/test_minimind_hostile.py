"""MiniMind's files as naive and hostile users give them: odd tensors, odd names, mistyped names, full disks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import minimind_reference as reference
import tunesmith
from minimind_reference import make_state, sizes_of
from test_minimind import (
    IDS,
    Fails,
    Run,
    assert_close,
    logits_of,
    open_file,
    save,
    tokenizer_folder,
    train_words,
    vocabulary,
)
from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.minimind import opened
from tunesmith.model.source import find_model

__all__ = ["tokenizer_folder"]
NORM = "model.layers.0.input_layernorm.weight"


def test_one_number_of_heads_gives_the_other(tokenizer_folder: Path, tmp_path: Path) -> None:
    sizes = replace(sizes_of("2025", False, vocab=vocabulary(tokenizer_folder)), heads=4, kv_heads=1)
    state, ids = make_state(sizes), IDS % sizes.vocab
    path = save(tmp_path / "m.pth", state)
    for given in ({"num_attention_heads": 4}, {"num_key_value_heads": 1}):
        assert_close(
            logits_of(open_file(path, tokenizer_folder, **given), ids), reference.logits(state, sizes, ids), ""
        )
    remark = find_model(str(path), {"num_attention_heads": 4}).remark
    assert "num_attention_heads" not in remark
    assert "num_key_value_heads" not in remark


def test_heads_that_the_file_says_cannot_be_others(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pth", make_state(sizes_of("minimind-3", False)))
    find_model(str(path), {"num_attention_heads": 8})
    for given in ({"num_attention_heads": 4}, {"num_attention_heads": 4, "num_key_value_heads": 2}):
        with pytest.raises(ConfigError, match="num_attention_heads"):
            find_model(str(path), given)


ODD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "sparse": lambda state: state.update({NORM: state[NORM].to_sparse()}),
    "without values": lambda state: state.update({NORM: torch.empty(32, device="meta")}),
    "many digits": lambda state: state.update({f"model.layers.{'1' * 5000}.x": torch.ones(1)}),
    "the same name twice": lambda state: state.update({f"module.{NORM}": torch.zeros(32)}),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_refused(tmp_path: Path, kind: str) -> None:
    state: dict[str, Any] = dict(make_state(sizes_of("2025", False)))
    ODD[kind](state)
    path = save(tmp_path / "m.pth", state)
    with pytest.raises(TunesmithError, match=str(path)):
        find_model(str(path))


def test_one_tensor_under_several_names(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Layers that share weights, and a tensor that repeats one value."""
    sizes = sizes_of("2025", False, vocab=vocabulary(tokenizer_folder))
    state, ids = make_state(sizes), IDS % sizes.vocab
    for name in [name for name in state if ".1." in name]:
        state[name] = state[name.replace(".1.", ".0.")]
    state["model.norm.weight"] = torch.ones(1).expand(32)
    model = open_file(save(tmp_path / "m.pth", state), tokenizer_folder)
    assert_close(logits_of(model, ids), reference.logits(state, sizes, ids), "")


@pytest.mark.parametrize("name", ["ful_sft_32.pth", "out/ful_sft_32.pth"])
def test_a_mistyped_file_is_no_hub_model(
    fails: Fails, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "full_sft_32.pth", make_state(sizes_of("2025", False)))
    words = ("--tokenizer", tokenizer_folder)
    for command in (("chat", name, "--prompt", "x"), ("export", name, "--format", "hf", "--output", "o")):
        error = fails(*command, *words)
        assert error.code == "model-not-found"
        assert ("full_sft_32.pth" in str(error)) == ("/" not in name)


@pytest.mark.parametrize("weight", ["../evil", "a/b", "/tmp/x", "x" * 300, "a\x1b[2Jb", "..", "a\0b"])
def test_a_weight_name_stays_in_the_folder(fails: Fails, tokenizer_folder: Path, tmp_path: Path, weight: str) -> None:
    path = save(tmp_path / "m.pth", make_state(sizes_of("2025", False, vocab=vocabulary(tokenizer_folder))))
    words = ("export", path, "--tokenizer", tokenizer_folder, "--format", "minimind", "--weight", weight)
    error = fails(*words, "--output", tmp_path / "o" / "p")
    assert error.exit_code == 2
    assert "--weight" in str(error)
    assert not list(tmp_path.rglob("*evil*"))


def test_a_model_of_zeros_goes_back(run: Run, tokenizer_folder: Path, tmp_path: Path) -> None:
    state = make_state(sizes_of("2025", False, vocab=vocabulary(tokenizer_folder)))
    path = save(tmp_path / "m.pth", {name: torch.zeros_like(tensor) for name, tensor in state.items()})
    words = ("--tokenizer", tokenizer_folder, "--format", "minimind", "--output", tmp_path / "o")
    code, out, err = run("export", path, *words)
    assert code == 0, err
    assert "nan" not in out


def lora(generation: str, hidden: int = 32, rank: int = 4) -> dict[str, torch.Tensor]:
    module = "layers.0.attention.wq" if generation == "2024" else "model.layers.0.self_attn.q_proj"
    return {f"{module}.lora.A.weight": torch.ones(rank, hidden), f"{module}.lora.B.weight": torch.ones(hidden, rank)}


def test_lora_files_that_fit_nothing(run: Run, fails: Fails, tokenizer_folder: Path, tmp_path: Path) -> None:
    words = ("--tokenizer", tokenizer_folder, "--format", "hf", "--output", tmp_path / "o")
    for generation in ("2024", "2025"):
        base = save(tmp_path / "base.pth", make_state(sizes_of(generation, False, vocab=vocabulary(tokenizer_folder))))

        def code(state: dict[str, torch.Tensor], base: Path = base) -> str:
            file = save(tmp_path / "lora.pth", state)
            error = fails("export", file, "--base", base, *words)
            assert str(file) in str(error)
            return error.code

        assert code(lora(generation, hidden=36)) == "adapter-does-not-fit"
        assert code(lora(generation, rank=0)) == "pth-not-lora"
        broken = lora(generation)
        next(iter(broken.values()))[0, 0] = torch.nan
        assert code(broken) == "pth-not-finite"
    file = save(tmp_path / "lora.pth", lora("2025"))
    assert run("export", file, "--base", base, *words)[0] == 0
    assert fails("export", file, "--base", tmp_path / "o", *words[:-1], tmp_path / "p").code == "base-is-adapter"
    assert not (tmp_path / "p").exists()


def test_a_full_disk(
    fails: Fails,
    tokenizer_folder: Path,
    tmp_path: Path,
    make_disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = save(tmp_path / "m.pth", make_state(sizes_of("2025", False, vocab=vocabulary(tokenizer_folder), layers=8)))
    disk = make_disk("100k")
    for kind in ("minimind", "hf"):
        words = ("export", path, "--tokenizer", tokenizer_folder, "--format", kind, "--output", disk / kind)
        assert fails(*words).code == "disk-full"
        assert not list(disk.iterdir())
    other = save(tmp_path / "n.pth", make_state(sizes_of("2025", False, vocab=vocabulary(tokenizer_folder), layers=8)))
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    assert fails("chat", other, "--tokenizer", tokenizer_folder, "--prompt", "x").code == "no-temporary-room"
    assert not list(disk.iterdir())


def test_only_abandoned_folders_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder for temporary files is everybody's: what only has the name is left alone, and does not block."""
    old = time.time() - 3600
    for name in ("abandoned", "used"):
        (tmp_path / f"tunesmith-pth-{name}").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (tmp_path / "tunesmith-pth-link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "tunesmith-pth-pipe")
    for path in tmp_path.iterdir():
        os.utime(path, (old, old))
    with opened.locked(tmp_path / "tunesmith-pth-used"):
        opened._remove_abandoned(tmp_path)
    names = {path.name.removeprefix("tunesmith-pth-") for path in tmp_path.iterdir()}
    assert names == {"used", "elsewhere", "link", "pipe"}
    assert (tmp_path / "elsewhere" / "file").is_file()
    # a file system without locks: nobody knows whether a folder is in use
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(38, "no locks")))
    opened._remove_abandoned(tmp_path)
    assert (tmp_path / "tunesmith-pth-used").is_dir()


def test_a_base_that_moved_is_opened_as_in_training(
    run: Run, fails: Fails, tokenizer_folder: Path, chats: Path, tmp_path: Path
) -> None:
    """Also where model.config said what the file does not; messages name the file, not a temporary folder."""
    sizes = replace(sizes_of("2025", False, vocab=vocabulary(tokenizer_folder)), heads=4, kv_heads=1)
    base, moved = save(tmp_path / "p.pth", make_state(sizes)), tmp_path / "moved.pth"
    words = ("--model.config.num_attention_heads", 4, "--lora.kind", "lora")
    code, _, err = run(*train_words(base, tokenizer_folder, chats, tmp_path / "run"), *words)
    assert code == 0, err
    base.rename(moved)
    merge = ("merge", tmp_path / "run", "--base", moved, "--output", tmp_path / "merged")
    code, out, err = run(*merge)
    assert code == 0, err
    assert str(moved) in out
    assert "tunesmith-pth-" not in out
    assert '"num_attention_heads": 4' in (tmp_path / "merged" / "config.json").read_text()
    for other in (replace(sizes, vocab=sizes.vocab), sizes_of("minimind-3", True, vocab=sizes.vocab, hidden=64)):
        save(moved, make_state(other, seed=1))
        error = fails(*merge[:-1], tmp_path / "other")
        assert error.code == "base-changed"
        assert str(moved) in str(error)
        assert "tunesmith-pth-" not in str(error)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_rank_above_the_size_of_a_layer(
    run: Run, fails: Fails, tokenizer_folder: Path, chats: Path, tmp_path: Path, kind: str
) -> None:
    """These kinds take their matrices from the weights; a run with fewer rows than that could not be saved."""
    path = save(tmp_path / "p.pth", make_state(sizes_of("2025", False, vocab=vocabulary(tokenizer_folder))))
    words = (*train_words(path, tokenizer_folder, chats, tmp_path / "run"), "--lora.kind", kind, "--lora.rank")
    error = fails(*words, 16)
    assert isinstance(error, ConfigError)
    assert "k_proj" in str(error)
    assert not (tmp_path / "run").exists()
    if kind == "pissa":
        code, _, err = run(*words, 8)
        assert code == 0, err


def test_a_fork_leaves_the_folder_to_its_maker(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pth", make_state(sizes_of("2025", False)))
    folder = Path(find_model(str(path)).name)
    opened._remove(folder, maker=os.getpid() + 1)
    assert folder.is_dir()
    assert find_model(str(path)).name == str(folder)


def test_several_shared_experts_go_back(run: Run, fails: Fails, tokenizer_folder: Path, tmp_path: Path) -> None:
    sizes = sizes_of("2025", True, vocab=vocabulary(tokenizer_folder), shared=3)
    state = make_state(sizes, dtype=torch.float16)
    path = save(tmp_path / "m.pth", state)
    words = ("export", path, "--tokenizer", tokenizer_folder, "--format", "minimind", "--generation")
    code, out, err = run(*words, "2025", "--output", tmp_path / "o")
    assert code == 0, err
    assert "n_shared_experts=3" in out
    again = torch.load(tmp_path / "o" / "full_sft_32_moe.pth", weights_only=True)
    assert set(again) == set(state)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert fails(*words, "2024", "--output", tmp_path / "p").code == "wrong-generation"


def test_wrong_values_are_told(fails: Fails, tokenizer_folder: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "m.pth", make_state(sizes_of("2025", False, vocab=vocabulary(tokenizer_folder))))
    for config in ({1: 2}, {"rope_theta": 10**400}, {"rope_theta": [1]}, {"num_attention_heads": True}):
        with pytest.raises(ConfigError):
            tunesmith.load(path, tokenizer=tokenizer_folder, config=config)  # type: ignore[arg-type]
    for command in (("chat", path, "--prompt", "x"), ("export", path, "--format", "hf", "--output", tmp_path / "o")):
        error = fails(*command, "--tokenizer", tokenizer_folder, "--model.config.rope_theta", 10**400)
        assert isinstance(error, ConfigError)
    with pytest.raises(TunesmithError):
        tunesmith.export("", format="hf", output=tmp_path / "o")
    words: Any = {"tokenizer": tokenizer_folder, "format": "minimind", "output": tmp_path / "o"}
    tunesmith.export(path, **words, generation=2025, weight=5)  # type: ignore[arg-type]
    assert (tmp_path / "o" / "5_32.pth").is_file()
