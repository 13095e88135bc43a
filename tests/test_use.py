"""chat and preview use the same encoder as training."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from conftest import SHARED, chat_row, needs_shared, write_jsonl
from tunesmith.errors import ModelError
from tunesmith.generation.decode import PieceDecoder
from tunesmith.generation.replies import reply_to, stream_reply
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speaker import load_speaker
from tunesmith.rows.conversation import Message


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A run that has memorized two answers."""
    from conftest import save_folder, tiny_config
    from tunesmith.cli import main

    folder = tmp_path_factory.mktemp("use")
    model = save_folder(folder / "model", tiny_config("qwen3", initializer_range=0.02), tokenizer)
    rows = [
        chat_row("Who are you?", "I am a small model. 你好🙂"),
        chat_row("And the fox?", "jumps over the lazy dog"),
    ] * 40
    data = write_jsonl(folder / "d.jsonl", rows)
    code = main(["train", "--model", str(model), "--data", str(data), "--output", str(folder / "run"), "--optim.lr", "1e-2",
                 "--data.max_seq_len", "64", "--train.micro_batch_tokens", "128", "--train.epochs", "4"])  # fmt: skip
    assert code == 0
    return folder / "run"


def test_chat_answers_once_and_exits(run, trained: Path) -> None:
    assert run("chat", trained, "--prompt", "Who are you?", "--temperature", 0) == (
        0,
        "I am a small model. 你好🙂\n",
        "",
    )
    assert run("chat", trained / "model", "--prompt", "And the fox?") == (0, "jumps over the lazy dog\n", "")


def test_chat_keeps_history_and_knows_its_commands(trained: Path) -> None:
    lines = "Who are you?\n/system Be brief.\n/reset\n/what\nAnd the fox?\n\n/exit\nnever read\n"
    result = subprocess.run(
        [sys.executable, "-m", "tunesmith", "chat", str(trained)],
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "I am a small model. 你好🙂" in result.stdout
    assert "(system prompt set)" in result.stdout
    assert "(forgotten)" in result.stdout
    assert "unknown command /what" in result.stdout
    assert result.stderr == ""


def test_history_is_encoded_as_in_training(trained: Path) -> None:
    from tunesmith.config.schema import ModelSection
    from tunesmith.use.chat import Chat

    speaker = load_speaker(ModelSection(path=str(trained)))
    chat = Chat(speaker, Sampling(temperature=0), "Be brief.")
    reply = chat.answer("Who are you?")
    assert [m.role for m in chat.messages] == ["system", "user", "assistant"]
    turns = [
        Message("system", "Be brief."),
        Message("user", "Who are you?"),
        Message("assistant", reply),
        Message("user", "more"),
    ]
    assert speaker.encoder.encode_prompt([*chat.messages, turns[-1]]) == speaker.encoder.encode_prompt(turns)
    chat.reset()
    assert [m.content for m in chat.messages] == ["Be brief."]
    chat.reset(None)
    assert chat.messages == []


def test_pieces_never_show_half_a_character(trained: Path) -> None:
    from tunesmith.config.schema import ModelSection

    speaker = load_speaker(ModelSection(path=str(trained)))
    decoder = PieceDecoder(speaker.encoder)
    ids = speaker.encoder.encode_texts(["a🙂 龘!"])[0].ids
    pieces = [*(decoder.push(i) for i in ids), decoder.finish()]
    assert "".join(pieces) == "a🙂 龘!"
    assert "\ufffd" not in "".join(pieces)
    assert len([p for p in pieces if p]) < len(ids)


def test_sampling_is_seeded(trained: Path) -> None:
    from tunesmith.config.schema import ModelSection

    speaker = load_speaker(ModelSection(path=str(trained)))
    prompt = speaker.encoder.encode_prompt([Message("user", "you")])
    draws = [reply_to(speaker, [prompt], Sampling(20, temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert "".join(stream_reply(speaker, prompt, Sampling(20, temperature=3.0, seed=1))) == draws[0][0].text


@pytest.mark.parametrize("ids", ["x", [[1]], [1, "x"]])
def test_stop_ids_that_are_none(trained: Path, ids: object) -> None:
    from tunesmith.config.schema import ModelSection

    speaker = load_speaker(ModelSection(path=str(trained)))
    speaker.model.generation_config.eos_token_id = ids
    with pytest.raises(ModelError) as error:
        reply_to(speaker, [[5]], Sampling(2))
    assert error.value.code == "generation-config"


def test_replies_to_many_prompts_are_those_to_each(trained: Path) -> None:
    from tunesmith.config.schema import ModelSection

    speaker = load_speaker(ModelSection(path=str(trained)))
    asked = ["Who are you?", "And the fox?", "you " * 30, "And the fox?"]
    prompts = [speaker.encoder.encode_prompt([Message("user", text)]) for text in asked]
    sampling = Sampling(20, temperature=0)
    together = reply_to(speaker, prompts, sampling)
    assert [(reply.text, reply.has_stopped) for reply in together[:2]] == [
        ("I am a small model. 你好🙂", True),
        ("jumps over the lazy dog", True),
    ]
    assert together == [reply_to(speaker, [prompt], sampling)[0] for prompt in prompts]
    assert not reply_to(speaker, prompts[:1], Sampling(2, 0))[0].has_stopped


@pytest.mark.parametrize(
    ("name", "code"),
    [("nothing-here/", "model-not-found"), ("tests", "not-a-model-folder")],
)
def test_chat_with_what_is_no_model(fails, name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    error = fails("chat", name, "--prompt", "x")
    assert (error.code, error.exit_code) == (code, 1)


def test_chat_with_an_unfinished_run_names_its_checkpoint(fails, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-000010").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    error = fails("chat", tmp_path / "run", "--prompt", "x")
    assert (error.code, error.exit_code) == ("run-not-finished", 1)
    assert "step-000010" in str(error)


def test_preview_json_is_what_training_stores(run, trained: Path) -> None:
    data = trained.parent / "d.jsonl"
    code, out, _ = run("preview", "--model", trained, "--data", data, "--rows", 2, "--json", "--data.max_seq_len", 64)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(r["row"], r["status"], r["how"], r["reason"]) for r in rows] == [
        (1, "used", "as_rendered", None),
        (2, "used", "as_rendered", None),
    ]
    from tunesmith.data.store import open_store

    store = open_store(trained / "tokens")
    for index, row in enumerate(rows):
        (sample,) = row["samples"]
        assert sample["input_ids"] == store[index].input_ids.tolist()
        assert sample["loss_mask"] == store[index].loss_mask.tolist()


def test_preview_in_the_terminal_and_as_a_page(run, trained: Path, tmp_path: Path) -> None:
    rows = [chat_row("<b>bold</b>?", "<script>alert(1)</script> 你好"), chat_row("Q", ""), {"text": "raw"}]
    data = write_jsonl(tmp_path / "x.jsonl", rows)
    code, out, _ = run("preview", "--model", trained, "--data", data)
    assert code == 0
    assert "⟦<script>alert(1)</script> 你好<|im_end|>⟧" in out
    assert "refused: turn 1 (assistant) is empty" in out
    assert f"{data.name}:3  used (text)" in out
    page = tmp_path / "page.html"
    code, out, _ = run("preview", "--model", trained, "--data", data, "--html", page)
    assert code == 0
    text = page.read_text(encoding="utf-8")
    assert "<mark>&lt;script&gt;alert(1)&lt;/script&gt; 你好&lt;|im_end|&gt;</mark>" in text
    assert "<script>" not in text


def test_preview_reads_a_run_file_with_all_sections(run, trained: Path) -> None:
    code, out, err = run("preview", trained / "config.yaml", "--rows", 1)
    assert code == 0, err
    assert "I am a small model." in out


@needs_shared
def test_preview_colours_only_the_assistant_on_real_chats(run, trained: Path) -> None:
    data = SHARED / "data" / "fastchat" / "dummy_conversation.json"
    code, out, err = run(
        "preview", "--model", trained, "--tokenizer", SHARED / "tokenizers" / "minimind", "--data", data, "--rows", 1
    )
    assert code == 0, err
    marked = [part.split("⟧")[0] for part in out.split("⟦")[1:]]
    turns = json.loads(data.read_text())[0]["conversations"]
    assert marked[:-1] == [
        turn["value"] + "<|im_end|>" for turn in turns if turn["from"] == "gpt"
    ]  # the last is the legend


def test_chat_with_a_run_that_was_trained_without_a_template(run, model_folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "fox:\n", "completion": "jumps over the dog"}] * 80)
    code, out, err = run("train", "--model", model_folder, "--data", data, "--output", tmp_path / "run", "--data.chat_template", "none",
                         "--data.max_seq_len", 64, "--train.micro_batch_tokens", 128, "--optim.lr", 1e-2, "--train.epochs", 4)  # fmt: skip
    assert code == 0, err
    assert "none: prompt + completion + <|im_end|>" in out
    assert not (tmp_path / "run" / "model" / "chat_template.jinja").exists()
    assert run("chat", tmp_path / "run", "--prompt", "fox:\n", "--temperature", 0)[1] == "jumps over the dog\n"


def test_chat_without_a_template_finds_that_in_checkpoints_and_says_what_it_uses_elsewhere(
    run, tokenizer, tmp_path: Path
) -> None:
    import copy
    import shutil

    from conftest import save_folder, tiny_config
    from tunesmith.config.schema import ModelSection

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    checkpoint = save_folder(tmp_path / "run" / "checkpoints" / "step-000010", tiny_config("qwen3"), bare)
    (tmp_path / "run" / "config.yaml").write_text("data: {chat_template: none, max_seq_len: 600}\n")
    (tmp_path / "run" / "data_ledger.json").write_text("{}")
    speaker = load_speaker(ModelSection(path=str(checkpoint)))
    assert speaker.encoder.template is None
    assert speaker.context == 600  # trained beyond the model's own 512
    words = ("--prompt", "fox", "--max-new-tokens", 1)
    assert run("chat", checkpoint, *words)[2] == ""
    shutil.copytree(checkpoint, tmp_path / "copied")
    code, _, err = run("chat", tmp_path / "copied", *words)
    assert code == 0
    assert "brings no chat template, so the built-in alpaca one is used" in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def short_sighted(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A GPT-2 with 64 positions."""
    from conftest import save_folder, tiny_config

    return save_folder(tmp_path_factory.mktemp("gpt2") / "m", tiny_config("gpt2", n_positions=64), tokenizer)


def test_chat_stops_where_the_context_is_full(run, fails, short_sighted: Path) -> None:
    code, out, err = run("chat", short_sighted, "--prompt", "Hi", "--max-new-tokens", 100, "--temperature", 0)
    assert (code, err) == (0, "")
    assert out
    error = fails("chat", short_sighted, "--prompt", "龘" * 64)
    assert (error.code, error.exit_code) == ("context-full", 1)
    assert " 64" in str(error)
    assert "/reset" not in str(error)


def test_chat_goes_on_after_a_message_that_does_not_fit(short_sighted: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tunesmith", "chat", str(short_sighted), "--max-new-tokens", "100"],
        input=("龘" * 64 + "\n/reset\nHi\n").encode(),
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert result.stderr.decode().count("so no reply fits") == 1
    assert "/reset" not in result.stderr.decode()  # there is no history to forget yet
    assert "(forgotten)" in result.stdout.decode()


def test_chat_with_random_weights_and_with_an_empty_system_prompt(run, fails, trained: Path) -> None:
    error = fails("chat", "new:tiny", "--prompt", "x")
    assert (error.code, error.exit_code) == ("random-weights", 1)
    assert "new:tiny" in str(error)
    assert run("chat", trained, "--prompt", "Who are you?", "--system", "", "--temperature", 0)[0] == 0


def test_preview_asks_for_its_page_before_the_work(run, trained: Path, tmp_path: Path) -> None:
    for name, words in (("nope/x.html", "there is no folder"), (".", "is a folder; give the name of a file")):
        code, out, err = run("preview", "--model", "m", "--data", "d", "--html", tmp_path / name)
        assert (code, out) == (2, "")
        assert words in err


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_preview_and_chat_where_the_terminal_has_no_unicode(trained: Path, tmp_path: Path, flags: list[str]) -> None:
    import os

    data = write_jsonl(
        tmp_path / "x.jsonl", [chat_row("é?", "你好🙂"), {"messages": [{"role": "é🙂", "content": "x"}]}]
    )
    words = ["preview", "--model", str(trained), "--data", str(data), *flags]
    env = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    result = subprocess.run([sys.executable, "-m", "tunesmith", *words], env=env, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    text = result.stdout.decode("ascii")
    if flags:
        assert [json.loads(line)["row"] for line in text.splitlines()] == [1, 2]
    else:
        assert r"\u4f60\u597d\U0001f642" in text


def test_a_model_is_freed_without_the_garbage_collector_after_its_replies(trained: Path) -> None:
    """Its weights are mapped from files, which would stay open."""
    from tunesmith.config.schema import ModelSection

    gc.collect()
    gc.disable()
    try:
        speaker = load_speaker(ModelSection(path=str(trained)))
        model = weakref.ref(speaker.model)
        reply_to(speaker, [[5, 6, 7]], Sampling(3, temperature=0))
        del speaker
        assert model() is None
    finally:
        gc.enable()


def test_python_ends_quietly_with_an_unfinished_stream(trained: Path) -> None:
    script = f"import tunesmith\nstream = tunesmith.load({str(trained)!r}).stream('What is 1?')\nnext(stream)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
