"""User errors: exit code 1 or 2, one clear message, no traceback, no partial output."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import chat_row, save_folder, tiny_config, write_jsonl
from tunesmith.config.data_keys import FieldsSection
from tunesmith.config.schema import ModelSection
from tunesmith.errors import TunesmithError
from tunesmith.model.load import check_vocabulary, load_config, load_model
from tunesmith.model.presets import PRESETS, build_preset_config
from tunesmith.rows.conversation import RowRefused
from tunesmith.rows.formats import parse_row
from tunesmith.sources.read import find_sources, read_rows


class Case:
    """Runs `train` in a folder and checks what it leaves there."""

    def __init__(self, run, fails, model: Path, data: Path, tmp_path: Path) -> None:
        self.run, self.end_with_error = run, fails
        self.model, self.data, self.output = model, data, tmp_path / "out" / "run"

    def fails_as(self, code: str, *facts: str, flags: tuple[object, ...] = ()) -> str:
        """Expect `train` to end with this error code and exit code 1, and to leave no files; returns the message."""
        error = self.end_with_error("train", "--model", self.model, "--data", self.data, "--output", self.output,
                                    "--data.max_seq_len", 64, *flags)  # fmt: skip
        assert (error.code, error.exit_code) == (code, 1), error
        for fact in facts:
            assert fact in str(error), error
        assert not self.output.exists()
        assert not self.output.parent.exists() or not list(self.output.parent.iterdir())
        return str(error)

    def fails(self, *words: str, flags: tuple[object, ...] = (), code: int = 1) -> str:
        got, out, err = self.run("train", "--model", self.model, "--data", self.data, "--output", self.output,
                                 "--data.max_seq_len", 64, *flags)  # fmt: skip
        assert got == code, (out, err)
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        for word in words:
            assert word in err, err
        assert not self.output.exists()
        assert not self.output.parent.exists() or not list(self.output.parent.iterdir())
        return err


@pytest.fixture
def case(run, fails, model_folder: Path, chats: Path, tmp_path: Path) -> Case:
    return Case(run, fails, model_folder, chats, tmp_path)


def test_missing_file(case: Case) -> None:
    case.data = case.data.with_name("chat.jsonl")
    case.fails_as("file-not-found", "chat.jsonl", "chats.jsonl?")
    case.fails("chat.jsonl")


def test_empty_file(case: Case) -> None:
    case.data.write_text("")
    case.fails_as("file-empty", "chats.jsonl")


def test_broken_json_at_line_17(case: Case) -> None:
    lines = case.data.read_text().splitlines()
    lines[16] = lines[16][:-3]
    case.data.write_text("\n".join(lines))
    case.fails_as("broken-json", "chats.jsonl:17")


def test_a_key_given_twice(case: Case) -> None:
    lines = case.data.read_text().splitlines()
    lines[2] = '{"messages": [], ' + lines[2][1:]
    case.data.write_text("\n".join(lines))
    case.fails_as("duplicate-key", "chats.jsonl:3:", "'messages'", "column 18")


def test_encodings(case: Case) -> None:
    write_jsonl(case.data, [chat_row("Q", "A")])
    text = case.data.read_text() + json.dumps(chat_row("你好，世界", "春眠不觉晓"), ensure_ascii=False)
    case.data.write_bytes(text.encode("gbk"))
    case.fails_as("wrong-encoding", "chats.jsonl", "UTF-8", "byte 0xc4 in line 2",
                  "--data.encoding gb18030 or --data.encoding cp1252")  # fmt: skip
    case.fails("data.encoding: ", "'gb1803' is not the name of a text encoding; did you mean gb18030",
               flags=("--data.encoding", "gb1803"))  # fmt: skip
    case.fails("data.max_row_mb: ", flags=("--data.max_row_mb", 0))


def test_wrong_keys(case: Case) -> None:
    write_jsonl(case.data, [{"frage": "a", "antwort": "b"}])
    case.fails_as("format-unknown", "chats.jsonl:1: ", "frage, antwort",
                  "--data.fields.prompt frage --data.fields.completion antwort")  # fmt: skip


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        (chat_row("Q", ""), "turn 1 (assistant) "),
        ({"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}, "turn 0: unknown role 'wizard'"),
        (chat_row("you and me " * 99, "A"), "data.max_seq_len 64"),
    ],
)  # fmt: skip
def test_bad_rows(case: Case, row: object, fact: str) -> None:
    rows = [json.loads(line) for line in case.data.read_text().splitlines()]
    write_jsonl(case.data, [*rows, row])
    case.fails_as("too-many-refused", "1 of 41 rows (2.4%)", "data.max_refused", "1.0%", "chats.jsonl:41: ", fact)


def test_no_usable_row(case: Case) -> None:
    write_jsonl(case.data, [chat_row("Q", "I am {{name}}")])
    case.fails_as("no-usable-rows", "{{name}}")


def test_model_folder_that_does_not_exist(case: Case) -> None:
    case.model = case.model.with_name("modle")
    case.fails_as("model-not-found", "modle", "/model?")


def test_model_folder_without_config(case: Case) -> None:
    (case.model / "config.json").unlink()
    case.fails_as("not-a-model-folder", "config.json", "model.safetensors")


def test_model_folder_without_weights(case: Case) -> None:
    (case.model / "model.safetensors").unlink()
    case.fails_as("model-not-loadable", "weights")


def test_weights_cut_short(case: Case) -> None:
    path = case.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    case.fails_as("model-not-loadable", "weights")


def test_weights_of_another_model(case: Case) -> None:
    config = json.loads((case.model / "config.json").read_text())
    (case.model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    case.fails_as("weights-missing", "model.layers.2")


def test_model_folder_without_tokenizer(case: Case) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (case.model / name).unlink()
    case.fails_as("tokenizer-unusable", "tokenizer")


def test_tokenizer_of_another_model(case: Case, tokenizer, tmp_path: Path) -> None:
    save_folder(tmp_path / "small", tiny_config("qwen3", vocab_size=300), tokenizer)
    case.model = tmp_path / "small"
    case.fails_as("tokenizer-does-not-match", "embedding has 300 rows")


def test_unknown_preset_and_preset_without_tokenizer(case: Case) -> None:
    case.model = Path("new:tinny")
    case.fails_as("tokenizer-missing", "--tokenizer")
    case.fails_as("unknown-preset", "new:tinny", "new:tiny?", flags=("--tokenizer", case.data.parent / "model"))
    case.model = Path("new:tiny")
    case.fails_as("unknown-preset-key", "model.config.hidden_sise", "qwen3", "hidden_size?",
               flags=("--tokenizer", case.data.parent / "model", "--model.config.hidden_sise", 8))  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "reason"),  # from transformers, passed on
    [
        ("hidden_size", "abc", "expected int, got str"),
        ("num_attention_heads", "0", "must be a multiple of num_key_value_heads (2)"),
        ("num_attention_heads", "3", "must be a multiple of num_key_value_heads (2)"),
        ("num_key_value_heads", "3", "num_attention_heads (4) must be a multiple"),
        ("hidden_act", "zzz", "KeyError: 'zzz'"),
        ("rope_parameters.rope_type", "yarn", "Missing required keys"),
        ("layer_types", "[a,b]", "entries must be in ('full_attention'"),
        ("intermediate_size", "-4", "negative dimension"),
        ("to_dict", "3", "qwen3"),
        ("vocab_size", "300", "400"),
        ("model_type", "qwen2", "choose a preset by its type"),
    ],
)
def test_preset_overrides_that_give_no_model(case: Case, key: str, value: str, reason: str) -> None:
    flags = ("--tokenizer", case.model, f"--model.config.{key}", value)
    case.model = Path("new:tiny")
    case.fails(f"model.config.{key.split('.')[0]}", reason, flags=flags)


def test_preset_overrides_that_give_a_model(tokenizer) -> None:
    for preset in PRESETS:
        config = build_preset_config(preset, {"num_hidden_layers": 1, "vocab_size": 512}, tokenizer)
        assert (config.num_hidden_layers, config.vocab_size) == (1, 512)


def test_weights_of_other_shapes(case: Case) -> None:
    config = json.loads((case.model / "config.json").read_text())
    (case.model / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    case.fails_as("wrong-shapes", "6 tensors", "model.layers.0.mlp.down_proj.weight is [32, 64]", "[32, 96]")


@pytest.mark.parametrize("dropout", [-1, 1.5, 1])
def test_a_dropout_that_is_none(case: Case, dropout: float) -> None:
    config = json.loads((case.model / "config.json").read_text())
    (case.model / "config.json").write_text(json.dumps({**config, "attention_dropout": dropout}))
    case.fails_as("bad-config-value", f"attention_dropout {dropout}")


def test_a_config_that_transformers_rejects_is_told_in_full(case: Case) -> None:
    config = json.loads((case.model / "config.json").read_text())
    (case.model / "config.json").write_text(json.dumps(config | {"layer_types": ["a", "b"]}))
    case.fails_as("model-not-loadable", "The `layer_types` entries must be in")


@pytest.mark.parametrize("part", [{"text_config": {"vocab_size": 9}}, {"decoder": {}}, {"text_config": [1]}])
def test_a_config_with_parts_of_another_kind_of_model(case: Case, part: dict[str, Any]) -> None:
    config = json.loads((case.model / "config.json").read_text())
    (case.model / "config.json").write_text(json.dumps(config | part))
    case.fails_as("model-not-loadable", "text_config", "qwen3")


def test_every_value_of_a_config_is_used_or_refused(case: Case, tokenizer: Any) -> None:
    """Values of other types and sizes give a model or an error with a code, never another exception."""
    config = json.loads((case.model / "config.json").read_text())
    section = ModelSection(path=str(case.model))
    outcomes: Counter[str] = Counter()
    for key in config:
        for value in (None, {}, {"a": 1}, [], ["x"], "x", -1, 0, True, 2.5, 10**30):
            if key == "num_hidden_layers" and value == 10**30:
                continue  # would be built, one by one
            (case.model / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                model = load_model(section, load_config(section, tokenizer), torch.float32, seed=0)
                check_vocabulary(model, tokenizer)
                outcomes["loaded"] += 1
            except TunesmithError:
                outcomes["refused"] += 1
    assert outcomes["loaded"] > 20
    assert outcomes["refused"] > 20


def test_a_damaged_tokenizer_is_told_with_the_kind_of_error(case: Case) -> None:
    (case.model / "tokenizer.json").write_text("{}")
    case.fails_as("model-not-loadable", "KeyError: 'added_tokens'")


def test_code_in_a_model_folder_is_not_run(case: Case) -> None:
    config = json.loads((case.model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (case.model / "config.json").write_text(json.dumps(config))
    (case.model / "mine.py").write_text("open('/tmp/tunesmith-was-run', 'w')\n")
    case.fails_as("model-needs-code", "--model.trust_remote_code true")
    assert not Path("/tmp/tunesmith-was-run").exists()


def test_output_in_use(case: Case, fails) -> None:
    case.output.mkdir(parents=True)
    kept = case.output / "thesis.txt"
    kept.write_text("mine")
    error = fails("train", "--model", case.model, "--data", case.data, "--output", case.output)
    assert error.code == "output-taken"
    assert kept.read_text() == "mine"
    assert [p.name for p in case.output.parent.iterdir()] == ["run"]


def test_output_that_cannot_be_made(case: Case) -> None:
    case.output = Path("/proc/tunesmith/run")
    case.fails_as("output-not-creatable", "/proc/tunesmith/run")


def test_positions_that_the_model_never_learned(case: Case, tokenizer, tmp_path: Path) -> None:
    case.model = save_folder(tmp_path / "gpt2", tiny_config("gpt2"), tokenizer)
    case.fails_as("max-seq-len-too-long", "256", "300", flags=("--data.max_seq_len", 300))


def test_templates(case: Case, tmp_path: Path) -> None:
    case.fails_as("template-not-found", "nope.jinja", flags=("--data.chat_template", "nope.jinja"))
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}")
    case.fails_as("template-syntax", "bad.jinja, line 1", flags=("--data.chat_template", tmp_path / "bad.jinja"))
    (tmp_path / "endless.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    case.fails_as("no-stop-token", flags=("--data.chat_template", tmp_path / "endless.jinja"))


def test_fp16_on_a_cpu_and_missing_tracker(case: Case) -> None:
    case.fails_as("precision-needs-gpu", "fp16", "fp32", "bf16", flags=("--train.precision", "fp16"))
    if importlib.util.find_spec("wandb") is None:
        case.fails("wandb is not installed: pip install 'tunesmith[wandb]'", flags=("--train.trackers", "wandb"))


def test_too_few_rows_to_hold_out(case: Case) -> None:
    write_jsonl(case.data, [chat_row("Q", "A")])
    case.fails_as("too-few-to-split", "data.eval_split", flags=("--data.eval_split", 0.5))


def test_eval_file_missing_is_seen_before_anything_is_prepared(case: Case) -> None:
    case.fails_as("file-not-found", "nope.jsonl", flags=("--eval-data", case.data.with_name("nope.jsonl")))


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers like the hub does for gated and missing repositories."""

    def do_GET(self) -> None:
        is_gated = "gated" in self.path
        self.send_response(403 if is_gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if is_gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


_HUB_CASES = (
    ("acme/gated-model", None, "acme/gated-model: its config or tokenizer cannot be loaded: the model is gated"),
    ("acme/absent-model", None, "no such hub model, or it is private"),
    (None, "acme/gated-data", "acme/gated-data: is a gated data set"),
    (None, "acme/absent-data", "acme/absent-data: not a local file or folder"),
)
_OFFLINE_CASES = (
    ("acme/some-model", None, "it is not a local folder, and the hub cannot be reached"),
    (None, "acme/some-data", "acme/some-data: not a local file or folder"),
)
_EACH = """
import contextlib, io, json, sys
from tunesmith.cli import main
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.mark.parametrize(("cases", "offline"), [(_HUB_CASES, "0"), (_OFFLINE_CASES, "1")], ids=["online", "offline"])
def test_hub_ids_that_cannot_be_had(case: Case, hub: str, tmp_path: Path, cases: Any, offline: str) -> None:
    """In a process of their own: the hub's address is read from the environment once."""
    commands = [
        ["train", "--model", model or str(case.model), "--data", data or str(case.data), "--output", str(case.output)]
        for model, data, _ in cases
    ]
    env = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_secret",
    }
    result = subprocess.run(
        [sys.executable, "-c", _EACH], input=json.dumps(commands), env=env, capture_output=True, text=True,
        timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "hf_secret" not in result.stdout + result.stderr
    ends = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(ends) == len(cases)
    for (code, _, err), (_, _, words) in zip(ends, cases, strict=True):
        assert code == 1, err
        assert words in err
        assert err.count("error: ") == 1
        assert "Traceback" not in err
    assert not case.output.exists()


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_pickle_among_the_weights_is_never_run(fails, model_folder: Path, chats: Path, tmp_path: Path) -> None:
    import torch

    (model_folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(str(tmp_path / "harm"))}, model_folder / "pytorch_model.bin")
    error = fails("train", "--model", model_folder, "--data", chats, "--output", tmp_path / "run")
    assert (error.code, error.exit_code) == ("model-not-loadable", 1)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("value", [1, 1e5, True, None, "text", [1], [], -0.0, 10**30])
def test_a_row_that_is_no_object_is_called_what_json_calls_it(tmp_path: Path, value: object) -> None:
    """No class of Python or of ours (a float keeps its spelling in a class of its own) is named."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b"}, value]), encoding="utf-8")
    row = list(read_rows(find_sources([str(path)])))[1].value
    with pytest.raises(RowRefused) as caught:
        parse_row(row, "alpaca", FieldsSection())
    words = str(caught.value).partition("found ")[2].partition(".")[0]
    assert words in ("a number", "true or false", "null", "text", "a list")
