"""GGUF files that must not be called proven, and surroundings in which an export must work all the same."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from conftest import build_model, save_folder, tiny_config
from tunesmith.errors import TunesmithError
from tunesmith.exports import gguf as exporter
from tunesmith.gguf import reader
from tunesmith.gguf.architecture import describe_model
from tunesmith.gguf.modelfile import TurnTexts, write_modelfile
from tunesmith.gguf.proof import _compare_logits
from tunesmith.gguf.rope import describe_rope
from tunesmith.gguf.seal import find_seal

pytest.importorskip("gguf")
needs_reader = pytest.mark.skipif(exporter.reader_version() is None, reason="xllamacpp is not installed")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., TunesmithError]


@pytest.fixture
def folder(tmp_path: Path, plain_tokenizer: Any) -> Path:
    return save_folder(tmp_path / "model", tiny_config("qwen3"), plain_tokenizer)


def export(run: Run, folder: Path, output: Path, *words: object) -> str:
    code, out, err = run("export", folder, "--format", "gguf", "--output", output, *words)
    assert code == 0, err + out
    return out + err


def test_whether_a_file_was_proven_is_sealed(
    folder: Path, tmp_path: Path, run: Run, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "reader_version", lambda: None)
    file = tmp_path / "m.gguf"
    export(run, folder, file)
    seal = find_seal(file)
    assert seal is not None
    data = bytearray(file.read_bytes())
    data[seal.proven_at] = 1
    file.write_bytes(data)
    assert fails("export", file, "--verify").code == "gguf-changed"


@needs_reader
def test_a_file_whose_logits_were_not_compared_is_not_proven(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "available_memory", lambda: 0)
    said = export(run, folder, tmp_path / "m.gguf")
    assert "NOT PROVEN" in said
    assert "proven     by" not in said
    seal = find_seal(tmp_path / "m.gguf")
    assert seal is not None
    assert not seal.is_proven


@needs_reader
def test_an_added_token_that_takes_spaces_is_noticed(tmp_path: Path, plain_tokenizer: Any, fails: Fails) -> None:
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, normalized=False, special=True)])
    folder = save_folder(tmp_path / "model", tiny_config("qwen3", vocab_size=len(tokenizer)), tokenizer)
    assert fails("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf").code == "tokens-differ"


@needs_reader
def test_proxies_and_files_of_the_current_folder_do_not_reach_the_reader(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xllamacpp.py").write_text("raise SystemExit(3)")
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    assert "NOT PROVEN" not in export(run, folder, tmp_path / "m.gguf")


@needs_reader
def test_a_reader_that_does_not_work_is_told_from_a_bad_file(
    folder: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "xllamacpp.py").write_text("raise ImportError('libgomp.so.1: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken") + os.pathsep + os.environ.get("PYTHONPATH", ""))
    error = fails("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf")
    assert error.code == "reader-broken"
    assert "libgomp.so.1" in str(error)
    assert "pip uninstall xllamacpp" in str(error)


@needs_reader
def test_a_short_context_and_peaked_logits(tmp_path: Path, plain_tokenizer: Any, run: Run) -> None:
    """Chats longer than the context are rendered only; probabilities too small for fp32 are not compared."""
    config = tiny_config("qwen3", max_position_embeddings=64, tie_word_embeddings=False)
    model = build_model(config)
    with torch.no_grad():
        model.lm_head.weight *= 500
    model.save_pretrained(tmp_path / "model")
    plain_tokenizer.save_pretrained(tmp_path / "model")
    assert "NOT PROVEN" not in export(run, tmp_path / "model", tmp_path / "m.gguf")


@needs_reader
@pytest.mark.parametrize("window", [600, 550])
def test_a_window_longer_than_the_chats_is_compared(
    window: int, tmp_path: Path, plain_tokenizer: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose window is another than the model's is not kept."""
    config = tiny_config("gemma3", sliding_window=600, max_position_embeddings=1024)
    folder = save_folder(tmp_path / "model", config, plain_tokenizer)

    def describe(*words: Any, **more: Any) -> Any:
        form = describe_model(*words, **more)
        return dataclasses.replace(form, metadata={**form.metadata, "attention.sliding_window": window})

    monkeypatch.setattr(exporter, "describe_model", describe)
    code, out, err = run("export", folder, "--format", "gguf", "--type", "f32", "--output", tmp_path / "m.gguf")
    assert code == (0 if window == 600 else 4), out + err
    assert "NOT PROVEN" not in out + err
    assert ("log-probabilities differ" in err) == (window != 600)


@pytest.mark.parametrize(("given", "number"), [("1", 1), ("1000", None), ("0", None), ("", None), ("4,2", None)])
def test_the_reader_has_the_threads_of_the_process(given: str, number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert reader._num_threads() == (number or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("signs", [False, True])
def test_a_reader_that_stalls_is_ended(signs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_STALLED_S", 2)
    log = tmp_path / "log.txt"
    script = "for i in 1 2 3 4; do echo answered; sleep 1; done" if signs else "sleep 60"
    with log.open("wb") as out:
        code = reader._wait(subprocess.Popen(["sh", "-c", script], stdout=out), log)
    assert code == 0 if signs else "no answer" in str(code)


def test_a_modelfile_keeps_any_text() -> None:
    """Its strings have no escapes, and Ollama leaves out what is not printable; Go's strings have escapes."""
    text = write_modelfile("a b.gguf", None, "", ['a"b', "back\\slash", "<|im_end|>", "\n"], 64)
    for line in ('stop """a"b"""', 'stop "back\\slash"', 'stop "<|im_end|>"', 'stop "\n"'):
        assert f"PARAMETER {line}\n" in text
    turns = TurnTexts("", {"user": ('"""\u200b\xa0', "\n")}, "")
    assert '{{ "\\"\\"\\"\\U0000200b\\U000000a0" }}{{ .Content }}{{ "\\n" }}' in turns.to_go()


def test_a_folder_that_is_not_there_is_not_blamed_on_the_output(
    folder: Path, tmp_path: Path, run: Run, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(*_: Any, **__: Any) -> None:
        os.stat(folder / "gone.safetensors")

    monkeypatch.setattr(exporter, "load_model", vanish)
    code, out, err = run("export", folder, "--format", "gguf", "--output", tmp_path / "m.gguf")
    assert code != 0
    assert "gone.safetensors" in err
    assert "m.gguf" not in err
    assert "Traceback" not in out + err
    assert fails("export", folder, "--format", "gguf", "--output", tmp_path / "a\nb.gguf").code == "output-not-usable"


def test_a_yarn_factor_that_is_not_given_is_the_ratio_of_contexts() -> None:
    found = describe_rope({"rope_type": "yarn", "rope_theta": 1e4, "factor": None,
                           "original_max_position_embeddings": 32}, 8, 128)  # fmt: skip
    assert found.metadata["rope.scaling.factor"] == 4


def test_logits_that_are_not_numbers_are_a_difference() -> None:
    answers = reader._parse('{"ids": [], "rendered": [], "stopping": [], "next_tokens": [[{"1": -0.5, "2": null}]]}')
    with pytest.raises(TunesmithError) as caught:
        _compare_logits(build_model(tiny_config("qwen3")), [[5, 6]], [[2]], answers, "q8_0")
    assert caught.value.code == "exported-logits-differ"
