"""The Python API: the same functions as the command, without output and without changes to global state."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

import tunesmith
from conftest import chat_row, write_jsonl

SMALL: dict[str, Any] = {"micro_batch_tokens": 128, "max_steps": 4, "save_steps": 2}
ROWS = [chat_row(f"What is the answer {i}?", f"The answer is {i} and you.") for i in range(40)]


def train(model_folder: Path, data: Any, output: Path, **more: Any) -> tunesmith.Run:
    sections: dict[str, Any] = {"train": SMALL, "optim": {"lr": 1e-3}} | more
    return tunesmith.train(model=str(model_folder), data=data, output=output, **sections)


def weights(run: tunesmith.Run) -> bytes:
    return (run.model_dir / "model.safetensors").read_bytes()


@pytest.fixture
def quiet(capsys: pytest.CaptureFixture[str]) -> Any:
    yield
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_train_returns_a_run(model_folder: Path, chats: Path, tmp_path: Path, quiet: None) -> None:
    records: list[dict[str, Any]] = []
    run = train(model_folder, str(chats), tmp_path / "run", on_log=records.append)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert run.metrics == records
    assert run.model_dir == tmp_path / "run" / "model"
    assert run.ledger["train"]["files"][str(chats)]["used"] == 40
    assert run.config.train.max_steps == 4
    assert run.is_finished
    assert "loss" in run._repr_html_()


def test_the_api_and_the_command_train_the_same_weights(
    run: Any, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    one = train(model_folder, chats, tmp_path / "api")
    code, _, err = run("train", "--model", model_folder, "--data", chats, "--output", tmp_path / "command",
                       "--optim.lr", 1e-3, "--train.micro_batch_tokens", 128, "--train.max_steps", 4,
                       "--train.save_steps", 2)  # fmt: skip
    assert code == 0, err
    assert weights(one) == (tmp_path / "command" / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "api" / "report.html").is_file()  # as with the command


def test_rows_in_memory_train_as_the_same_rows_in_a_file(
    model_folder: Path, chats: Path, tmp_path: Path, quiet: None
) -> None:
    from_file = train(model_folder, chats, tmp_path / "file")
    from_rows = train(model_folder, ROWS, tmp_path / "rows")
    from_set = train(model_folder, datasets.Dataset.from_list(ROWS), tmp_path / "set")
    assert weights(from_file) == weights(from_rows) == weights(from_set)


def test_rows_in_memory_are_accounted_for_and_hashed(model_folder: Path, tmp_path: Path) -> None:
    run = (
        train(model_folder, [*ROWS, {"messages": []}], tmp_path / "run", data_options=None)
        if False
        else train(model_folder, {"train": [*ROWS, {"messages": []}], "max_refused": 0.5}, tmp_path / "run")
    )
    (entry,) = run.ledger["train"]["files"].values()
    assert (entry["rows"], entry["used"]) == (41, 40)
    (name,) = run.ledger["train"]["files"]
    assert Path(name).is_file()  # so that `preview --row` finds the row
    assert json.loads(Path(name).read_text(encoding="utf-8").splitlines()[0]) == ROWS[0]
    longer = run.resume(max_steps=6)
    assert [record["step"] for record in longer.metrics] == [1, 2, 3, 4, 5, 6]
    with Path(name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(tunesmith.TunesmithError, match="data"):
        run.resume(max_steps=8)


def test_a_killed_run_of_rows_in_memory_resumes_to_the_same_weights(model_folder: Path, tmp_path: Path) -> None:
    whole = train(model_folder, ROWS, tmp_path / "whole")

    class StopError(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise StopError

    with pytest.raises(StopError):
        train(model_folder, ROWS, tmp_path / "killed", on_log=stop)
    assert weights(tunesmith.resume(tmp_path / "killed")) == weights(whole)


def test_a_run_file_and_sections_over_it(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {model_folder}}}\ndata: {{train: {chats}}}\n"
                    "train: {micro_batch_tokens: 128, max_steps: 2}\n")  # fmt: skip
    run = tunesmith.train(file, output=tmp_path / "run", train={"max_steps": 3})
    assert run.config.train.max_steps == 3
    assert run.metrics[-1]["step"] == 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"optim": {"learning_rate": 1e-3}}, "optim.lr"),
        ({"optimizer": {"lr": 1e-3}}, "optim"),
        ({"train": {"max_step": 3}}, "train.max_steps"),
        ({"optim": {"lr": "fast"}}, "optim.lr"),
    ],
)
def test_a_wrong_key_is_the_same_error_as_on_the_command_line(
    model_folder: Path, chats: Path, tmp_path: Path, arguments: dict[str, Any], word: str
) -> None:
    with pytest.raises(tunesmith.ConfigError, match=word):
        tunesmith.train(model=str(model_folder), data=chats, output=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_errors_are_the_commands_classes(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(tunesmith.DataError):
        train(model_folder, tmp_path / "nothing.jsonl", tmp_path / "run")
    with pytest.raises(tunesmith.ModelError):
        tunesmith.load(tmp_path / "nothing")
    with pytest.raises(tunesmith.DataError):
        train(model_folder, [], tmp_path / "run")
    with pytest.raises(tunesmith.DataError, match=r"data\[1\]"):
        train(model_folder, [ROWS[0], {"messages": object()}], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_preview_and_check(model_folder: Path, chats: Path, quiet: None) -> None:
    preview = tunesmith.preview(model=model_folder, data=chats, rows=3)
    assert len(preview) == 3
    assert "<mark>" in preview._repr_html_()
    assert [row.status for row in tunesmith.preview(model=model_folder, data=ROWS[:2])] == ["used", "used"]
    found = tunesmith.check(model=model_folder, data=ROWS, eval_data=ROWS[:1])
    assert found.num_errors == 1  # a row of eval is also in train
    assert '<section class="error">' in found._repr_html_()
    assert found.to_json()["errors"] == 1


def test_merge(model_folder: Path, chats: Path, tmp_path: Path, quiet: None) -> None:
    run = train(model_folder, chats, tmp_path / "lora", lora={"kind": "lora", "rank": 4})
    assert run.model_dir == tmp_path / "lora" / "adapter"
    merged = tunesmith.merge(run, output=tmp_path / "merged")
    assert merged == tmp_path / "merged"
    assert (merged / "model.safetensors").is_file()
    one = tunesmith.load(run).reply("Who?", temperature=0)
    assert tunesmith.load(merged).reply("Who?", temperature=0) == one


def test_a_loaded_model_replies_streams_and_batches(
    model_folder: Path, chats: Path, tmp_path: Path, quiet: None
) -> None:
    run = train(model_folder, chats, tmp_path / "run", train=SMALL | {"max_steps": 60}, optim={"lr": 1e-2})
    chat = tunesmith.load(run)
    messages = [{"role": "user", "content": "What is the answer 3?"}]
    reply = chat.reply("What is the answer 3?", temperature=0, max_new_tokens=20)
    assert reply
    assert chat.reply(messages, temperature=0, max_new_tokens=20) == reply
    assert "".join(chat.stream(messages, temperature=0, max_new_tokens=20)) == reply
    others = [messages, [{"role": "user", "content": "Who are you, and why is this a longer question?"}]]
    assert chat.batch(others, temperature=0, max_new_tokens=20)[0] == reply
    assert chat.batch([], temperature=0) == []
    drawn = chat.reply(messages, temperature=1.0, seed=3, max_new_tokens=20)
    assert chat.reply(messages, temperature=1.0, seed=3, max_new_tokens=20) == drawn


def test_nothing_global_is_left_changed(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    state = (os.getcwd(), dict(os.environ), sys.stdout, sys.stderr, torch.get_num_threads(),
             torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype())  # fmt: skip
    random = torch.get_rng_state()
    run = train(model_folder, chats, tmp_path / "run", train=SMALL | {"deterministic": True})
    run.resume(max_steps=6)
    tunesmith.load(run).reply("Hi", max_new_tokens=4)
    assert state == (os.getcwd(), dict(os.environ), sys.stdout, sys.stderr, torch.get_num_threads(),
                     torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype())  # fmt: skip
    assert torch.equal(random, torch.get_rng_state())


def test_import_is_quick_and_heavy_libraries_wait() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import tunesmith; took = time.perf_counter() - start;"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'datasets'} & set(sys.modules);"
        "print(heavy or took)"
    )
    took = min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
               for _ in range(3))  # fmt: skip
    assert took < 0.2


def test_public_names() -> None:
    assert sorted(tunesmith.__all__) == [
        "Answers", "CheckResult", "ConfigError", "DataError", "Evaluation", "FoundLr", "InterruptedRun", "Model", "ModelError", "Preview", "Push", "Run", "RunError",
        "Source", "TunesmithError", "UsageError", "__version__", "check", "evaluate", "export", "find_lr", "generate", "load",
        "merge", "preview", "push", "resume", "train",
    ]  # fmt: skip
    assert all(getattr(tunesmith, name) is not None for name in tunesmith.__all__)
    assert set(tunesmith.__all__) <= set(dir(tunesmith))
    with pytest.raises(AttributeError):
        tunesmith.nothing  # noqa: B018


def test_the_package_is_typed() -> None:
    assert (Path(tunesmith.__file__).parent / "py.typed").is_file()


def test_data_given_twice_is_refused(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "more.jsonl", ROWS)
    with pytest.raises(tunesmith.DataError) as error:
        train(model_folder, [chats, ROWS[0]], tmp_path / "run")  # names and rows mixed
    assert error.value.code == "row-no-dict"
    assert file.is_file()


def test_a_moved_run_has_its_rows_in_its_own_folder(model_folder: Path, tmp_path: Path) -> None:
    train(model_folder, ROWS, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    train(model_folder, ROWS[:20], tmp_path / "run")  # other rows in the same place
    assert tunesmith.resume(tmp_path / "moved", max_steps=6).metrics[-1]["step"] == 6
    rows = tmp_path / "moved" / "rows" / "train.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").replace("answer 3?", "answer 4?"), encoding="utf-8")
    with pytest.raises(tunesmith.TunesmithError, match="changed"):
        tunesmith.resume(tmp_path / "moved", max_steps=8)


def test_paths_and_values_of_every_kind(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    import numpy as np

    sections: dict[str, Any] = {"model": {"path": model_folder}, "data": {"train": chats}, "train": SMALL}
    run = tunesmith.train(**sections, output=str(tmp_path / "run"))
    os.chdir(os.getcwd())
    assert run.path.is_absolute()
    rows = [{"messages": np.array(ROWS[0]["messages"], dtype=object), "id": np.int64(3)}]
    assert tunesmith.preview(model=model_folder, data=rows)[0].status == "used"

    def endless() -> Any:
        while True:
            yield ROWS[0]

    assert len(tunesmith.preview(model=model_folder, data=endless(), rows=2)) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run.resume(allow="data"),
        lambda run: run.resume(allow=["dta"]),
        lambda run: run.resume(max_steps=9, train={"max_steps": 8}),
        lambda run: run.resume(data=ROWS),
        lambda run: tunesmith.preview(run.path / "config.yaml", rows=0),
        lambda run: tunesmith.merge(output=run.path / "merged"),
        lambda run: tunesmith.merge(run, run, output=run.path / "merged", method="ties", density=2),
        lambda run: tunesmith.merge(run, run, output=run.path / "merged", method="tie"),
        lambda run: tunesmith.merge(run, run, output=run.path / "merged", method="linear", weights=[1, float("nan")]),
        lambda run: tunesmith.merge(run, run, output=run.path / "merged", method="dare_ties", seed=-1),
        lambda run: tunesmith.load(""),
        lambda run: tunesmith.load(run).reply("Hi", temperature=-1),
        lambda run: tunesmith.load(run).reply("Hi", max_new_tokens=2.5),
        lambda run: tunesmith.load(run).batch("Hi"),
        lambda run: tunesmith.load(run).reply({"role": "user", "content": "Hi"}),
        lambda run: tunesmith.Run(run.path / "typo"),
    ],
)
def test_wrong_arguments_are_told(
    call: Any, model_folder: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "told"
    run = tunesmith.Run(folder) if folder.is_dir() else train(model_folder, chats, folder)
    with pytest.raises(tunesmith.TunesmithError) as error:
        call(run)
    assert error.value.code


@pytest.mark.parametrize("error", [OSError(28, "no space in the caller's file"), MemoryError("mine"), ValueError("x")])
def test_an_error_of_on_log_reaches_the_caller(
    error: Exception, model_folder: Path, chats: Path, tmp_path: Path
) -> None:
    """It is not taken for a full disk or a lack of memory of the run, which resumes to the same weights."""

    def on_log(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise error

    with pytest.raises(type(error)) as caught:
        train(model_folder, chats, tmp_path / "run", on_log=on_log)
    assert caught.value is error
    whole = train(model_folder, chats, tmp_path / "whole")
    assert weights(tunesmith.resume(tmp_path / "run")) == weights(whole)


def test_a_finished_run_releases_its_model(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    """Without waiting for the garbage collector: on a GPU, the next run needs the memory."""

    def count_models() -> int:
        with warnings.catch_warnings(action="ignore"):
            return sum(type(found).__name__ == "SupervisedLM" for found in gc.get_objects())

    gc.collect()
    gc.disable()
    before = count_models()  # held by the tracebacks of errors that other tests have kept
    try:
        train(model_folder, chats, tmp_path / "run")
        assert count_models() == before
    finally:
        gc.enable()


def test_a_data_frame_trains_as_its_rows(model_folder: Path, tmp_path: Path) -> None:
    import pandas as pd

    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(40)]
    one = train(model_folder, pd.DataFrame(rows), tmp_path / "frame")
    assert weights(one) == weights(train(model_folder, rows, tmp_path / "rows"))


def test_a_missing_argument_is_named_as_python_names_it(model_folder: Path, chats: Path) -> None:
    with pytest.raises(tunesmith.ConfigError) as error:
        tunesmith.train(model=model_folder, data=chats)
    assert "output=" in error.value.problems[0]
    assert "--" not in error.value.problems[0]


def test_resume_does_not_evaluate_on_what_is_trained(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    run = train(model_folder, chats, tmp_path / "run")
    tokens = (run.path / "tokens" / "tokens-00000.bin").read_bytes()
    with pytest.raises(tunesmith.TunesmithError) as error:
        run.resume(max_steps=6, data={"train": str(chats), "eval": str(chats)}, allow=["data"])
    assert "data.eval" in str(error.value)
    assert (run.path / "tokens" / "tokens-00000.bin").read_bytes() == tokens


def test_runs_in_threads_train_as_alone(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    """Dropout and new adapters draw from the random generators of the process, which two runs would share."""
    sections = {"lora": {"kind": "lora", "rank": 2, "dropout": 0.3}, "train": SMALL | {"log_steps": 1}}
    verbosity, random = transformers.logging.get_verbosity(), torch.get_rng_state()
    met = threading.Barrier(2)

    def run_in_thread(name: str) -> None:
        met.wait()
        train(model_folder, chats, tmp_path / name, **sections)

    threads = [threading.Thread(target=run_in_thread, args=[name]) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert transformers.logging.get_verbosity() == verbosity
    assert torch.equal(torch.get_rng_state(), random)
    train(model_folder, chats, tmp_path / "alone", **sections)
    one, two, alone = (
        (tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("one", "two", "alone")
    )
    assert one == two == alone


def test_a_run_leaves_the_signals_of_the_process_as_they_were(model_folder: Path, chats: Path, tmp_path: Path) -> None:
    """The caller's event loop waits for its own signals at its own end of a pair of sockets; a run may end badly."""

    class StopError(Exception):
        pass

    def on_log(record: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        if record["step"] == 2:
            raise StopError

    def find_state() -> Any:
        gc.collect()  # frames of an error that was raised
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        return handlers, wakeup, len(os.listdir("/proc/self/fd")), set(threading.enumerate())

    train(model_folder, chats, tmp_path / "first")  # libraries open what they keep
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)
    handler, wakeup = signal.signal(signal.SIGUSR1, lambda *_: None), signal.set_wakeup_fd(mouth.fileno())
    try:
        before = find_state()
        with pytest.raises(StopError):
            train(model_folder, chats, tmp_path / "run", on_log=on_log, train=SMALL | {"log_steps": 1})
        assert find_state() == before
        tunesmith.resume(tmp_path / "run")
        assert find_state() == before
        assert ears.recv(10) == bytes([signal.SIGUSR1] * 2)
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGUSR1, handler)
        ears.close()
        mouth.close()


def test_on_log_may_change_the_folder(
    model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    done = train(model_folder, chats, Path("run"), on_log=lambda _: os.chdir(tmp_path / "other"))
    assert done.path == tmp_path / "run"
    assert (done.path / "report.html").is_file()
    os.chdir(tmp_path)
    done = tunesmith.resume("run", max_steps=6, on_log=lambda _: os.chdir(tmp_path / "other"))
    assert done.path == tmp_path / "run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_saved_is_honoured_afterwards(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A caller who loops over runs must not start the next one."""
    from tunesmith.run import finish

    save = finish.save_model

    def save_slowly(*given: Any) -> None:
        os.kill(os.getpid(), number)
        save(*given)

    monkeypatch.setattr(finish, "save_model", save_slowly)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(tunesmith.InterruptedRun) as caught:
        train(model_folder, ROWS, tmp_path / "run")
    assert caught.value.code == "interrupted-finished"
    assert before == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    run = tunesmith.Run(tmp_path / "run")
    assert run.is_finished
    assert "finished" in run.report().read_text(encoding="utf-8")
    monkeypatch.undo()
    assert weights(run) == weights(train(model_folder, ROWS, tmp_path / "undisturbed"))
    monkeypatch.setattr(finish, "save_model", save_slowly)
    with pytest.raises(tunesmith.InterruptedRun) as caught:
        run.resume(max_steps=6)
    assert caught.value.code == "interrupted-finished"
    assert (run.metrics[-1]["step"], run.is_finished) == (6, True)


def test_refused_rows_in_memory_are_named_as_the_caller_has_them(model_folder: Path, tmp_path: Path) -> None:
    """The files they are kept in are gone when an error is read."""
    bad = [*ROWS[:17], {"messages": []}, *ROWS[17:]]
    given: dict[str, Any] = {"model": str(model_folder), "train": SMALL}
    twice = [*ROWS[:5], ROWS[2]]
    for data, options, code in (
        (bad, {}, "too-many-refused"),
        ([bad[17], *ROWS], {}, "too-many-refused"),
        ([{"unknown": 1}, *ROWS], {}, "format-unknown"),
        (ROWS, {"max_seq_len": 8, "overlong": "error"}, ""),
        (ROWS, {"max_seq_len": 24}, "too-many-cut-replies"),
    ):
        section = {"train": data, **options}
        for call, more in (
            (tunesmith.train, {"output": tmp_path / "run"}),
            (tunesmith.train, {"output": tmp_path / "run", "eval_data": data}),
            (tunesmith.find_lr, {}),
        ):
            with pytest.raises(tunesmith.DataError) as caught:
                call(data=section, **given, **more)
            text = str(caught.value)
            assert not code or caught.value.code == code
            assert re.search(r"data\[\d+\]", text), text
            assert str(tmp_path) not in text
            assert "jsonl" not in text
            assert "data[17]" in text or data is not bad
    with pytest.raises(tunesmith.DataError, match=r"eval_data\[17\]"):
        tunesmith.train(data=ROWS, eval_data=bad, output=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
    with pytest.raises(tunesmith.DataError, match=r"data\[2\]"):
        tunesmith.train(data=[*ROWS[:2], 3], output=tmp_path / "run", **given)
    assert "data[17]" in str(tunesmith.preview(model=str(model_folder), data=bad, only="refused"))
    found = tunesmith.check(model=str(model_folder), data=bad, eval_data=[bad[17], *ROWS])
    named = [row for finding in found.findings for row in finding.rows]
    assert "data[17]" in named
    assert "eval_data[1] = data[0]" in named
    assert "eval_data[1] = data[0]" in found.to_html()
    twins = tunesmith.check(model=str(model_folder), data=twice)
    assert any("data[5] = data[2]" in finding.rows for finding in twins.findings)
    assert list(found.to_json()["data"]["files"]["data"]["refused"].values()) == [[17]]
