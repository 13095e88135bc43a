"""`tunesmith push` against a server that answers as the hub does, through the real huggingface_hub client."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import tunesmith
from conftest import save_folder, tiny_config, write_jsonl
from hub_server import Handler, HubServer, running_hub
from tunesmith.cli import main
from tunesmith.publish.bundle import find_bundle
from tunesmith.publish.private import without_paths

long = pytest.mark.skipif(not os.environ.get("TUNESMITH_LONG"), reason="takes seconds each; TUNESMITH_LONG=1 runs it")
Run = Callable[..., tuple[int, str, str]]
TOKEN = "hf_ThisMustNeverBeSeenAnywhere"
SECRET = "the patient has a broken leg"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with running_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        given = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        for name, value in {**given, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.add_account(TOKEN, "me", ("club",))
        yield server


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A finished run with refused rows that hold something private, in a folder whose name is nobody's business."""
    folder = tmp_path_factory.mktemp("private-project")
    base = save_folder(folder / "base", tiny_config("llama", vocab_size=len(tokenizer)), tokenizer)
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(40)
    ]
    rows.append({"messages": [{"role": SECRET, "content": "?"}, {"role": "assistant", "content": "!"}]})
    (folder / "clients").mkdir()
    data = write_jsonl(folder / "clients" / "chats.jsonl", rows)
    words = (
        "--data.max_refused",
        "0.5",
        "--train.max_steps",
        "2",
        "--data.max_seq_len",
        "64",
        "--data.eval_split",
        "0.1",
    )
    assert (
        main([str(word) for word in ("train", "--model", base, "--data", data, "--output", folder / "mine", *words)])
        == 0
    )
    assert main([str(word) for word in ("train", "--model", base, "--data", data, "--output", folder / "lora", *words,
                                        "--lora.kind", "lora")]) == 0  # fmt: skip
    return folder


def test_a_dry_run_shows_everything_and_does_nothing(run: Run, hub: HubServer, trained: Path) -> None:
    code, out, err = run("push", trained / "mine", "me/mine")
    assert (code, err) == (0, "")
    assert "me/mine (will be created)" in out
    assert "visibility private" in out
    assert "licence    unknown" in out
    for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert re.search(rf"\b{re.escape(name)}  +\d+ (KiB|B)", out), name
    assert "## Training data" in out
    assert "dry run: nothing was uploaded" in out
    assert not hub.repos
    assert all(request.startswith("GET ") or "validate-yaml" in request for request in hub.requests)
    assert TOKEN not in out


def test_what_was_pushed_is_downloaded_as_the_same_model(
    run: Run, hub: HubServer, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, out, err = run("push", trained / "mine", "me/mine", "--license", "mit", "--yes")
    assert (code, err) == (0, "")
    repo = hub.repos["me/mine"]
    assert repo.is_private
    assert len(repo.commits) == 2  # the first is the hub's own
    folder = trained / "mine" / "model"
    assert set(repo.files) - {".gitattributes"} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert (repo.files[path.name] == path.read_bytes()) == (path.name != "README.md")
    card = repo.files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert 'folder = "me/mine"' in card
    assert "tunesmith chat me/mine" in card
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    got = huggingface_hub.snapshot_download("me/mine", cache_dir=tmp_path)
    ids = torch.arange(5, 25)[None]
    logits = [AutoModelForCausalLM.from_pretrained(where)(input_ids=ids).logits for where in (got, folder)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert "pushed" in out
    before = len(repo.commits)
    code, out, _ = run("push", trained / "mine", "me/mine", "--license", "mit", "--yes")
    assert (code, len(repo.commits)) == (0, before)
    assert "nothing to push" in out


def test_nothing_private_leaves(run: Run, hub: HubServer, trained: Path) -> None:
    """No row, no text of a refusal that quotes one, no folder of this machine, and no file that was not written by us."""
    model = trained / "mine" / "model"
    (model / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (model / "optimizer.pt").write_bytes(b"state")
    (model / "notes.txt").write_text(SECRET)
    try:
        code, out, err = run("push", trained / "mine", "me/all", "--include", "config", "metrics", "report", "--yes")
    finally:
        for name in (".env", "optimizer.pt", "notes.txt"):
            (model / name).unlink()
    assert (code, err) == (0, "")
    assert "left out   .env, notes.txt, optimizer.pt" in out
    files = hub.repos["me/all"].files
    assert {"config.yaml", "metrics.jsonl", "report.html"} < set(files)
    assert not {".env", "optimizer.pt", "notes.txt", "checkpoints", "tokens", "run.json", "data_ledger.json"} & set(
        files
    )
    for name, content in files.items():
        for secret in (SECRET, TOKEN, str(trained), "private-project", "clients", os.path.expanduser("~/")):
            assert secret.encode() not in content, (name, secret)
    card = files["README.md"].decode()
    assert "chats.jsonl" in card
    assert "1 unknown-role" in card
    assert "| 41 | 40 | 1 |" in card
    assert "it is " not in card
    assert "it is " not in files["report.html"].decode()


def test_sample_replies_are_published_with_a_flag_only(run: Run, hub: HubServer, trained: Path) -> None:
    code, out, err = run("push", trained / "mine", "me/replies", "--include", "replies", "report")
    assert (code, err) == (0, "")
    assert "## Sample replies" in out
    assert "which quote the data" in out


def test_an_adapter_needs_a_base_that_others_can_open(run: Run, hub: HubServer, trained: Path) -> None:
    code, _, err = run("push", trained / "lora", "me/lora", "--yes")
    assert code == 1
    assert "--base owner/name" in err
    assert not hub.repos
    code, _, err = run("push", trained / "lora", "me/lora", "--base", "me/base", "--yes")
    assert code == 1  # there is no such repository
    code, _, err = run("push", trained / "base", "me/base", "--license", "gemma", "--yes")
    assert (code, err) == (0, "")
    code, _, err = run("push", trained / "lora", "me/lora", "--base", "me/base", "--yes")
    assert (code, err) == (0, "")
    files = hub.repos["me/lora"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert "config.json" not in files
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"], front["library_name"]) == ("me/base", "gemma", "peft")
    assert "AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)" in card
    assert "trained from me/base" in card
    assert str(trained).encode() not in b"".join(files.values())
    weights = hub.repos["me/base"].files["model.safetensors"]
    hub.repos["me/base"].files["model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    code, _, err = run("push", trained / "lora", "me/lora", "--base", "me/base", "--replace", "--yes")
    assert code == 1
    assert "is not the base" in err


def test_the_adapter_from_the_hub_opens_with_its_base(
    run: Run, hub: HubServer, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its card's line for further training, on what was downloaded."""
    assert run("push", trained / "base", "me/base", "--yes")[0] == 0
    assert run("push", trained / "lora", "me/lora", "--base", "me/base", "--yes")[0] == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    got = huggingface_hub.snapshot_download("me/lora", cache_dir=tmp_path)
    ids = torch.arange(5, 25)[None]
    wanted = tunesmith.load(trained / "lora").speaker.model(input_ids=ids).logits
    found = tunesmith.load(got).speaker.model(input_ids=ids).logits
    torch.testing.assert_close(found, wanted)


def push_code(name: Path | str, repository: str, **options: Any) -> str:
    """The code of the error."""
    with pytest.raises(tunesmith.TunesmithError) as caught:
        tunesmith.push(name, repository, **options)
    assert TOKEN not in str(caught.value)
    assert "secret-of" not in str(caught.value)
    assert TOKEN not in str(caught.value.__context__ or "")
    return caught.value.code


@pytest.mark.parametrize(
    "name",
    ["mine", "/mine", "me/", "me/a/b", "me/a--b", "me/.a", "me/a.", "-me/a", "me/a b", "me/ü", "me/a.git", "me/a..b",
     "https://huggingface.co/me/a", "me/" + 97 * "a", "me/a\n"],
)  # fmt: skip
def test_a_malformed_name_is_refused_before_anything(hub: HubServer, name: str) -> None:
    assert push_code("nothing", name) == "repository-name"
    assert not hub.requests


def test_errors_of_the_account(hub: HubServer, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = trained / "mine"
    hub.add_account("hf_reads", "me", role="read")
    assert push_code(mine, "others/mine", yes=True) == "hub-owner"
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    assert push_code(mine, "me/mine", yes=True) == "hub-token-reads-only"
    for wrong in ("hf_wrong", "hf_w\u00f6rong"):
        monkeypatch.setenv("HF_TOKEN", wrong)
        assert push_code(mine, "me/mine", yes=True) == "hub-token"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    assert push_code(mine, "me/mine", yes=True) == "hub-not-logged-in"
    plan = tunesmith.push(mine, "me/mine")  # a dry run needs no login
    assert plan.commit is None
    assert "model.safetensors" in plan.files
    assert not hub.repos


@pytest.mark.parametrize(
    ("step", "fault", "wanted"),
    [
        ("create", 403, "hub-no-permission"),
        ("create", 402, "hub-no-permission"),
        ("create", "drop", "hub-unreachable"),
        ("preupload", 403, "hub-no-permission"),
        ("batch", 403, "hub-no-permission"),
        ("put", 403, "hub-no-permission"),
        ("commit", 500, "hub-failed"),
        ("commit", 429, "hub-busy"),
        ("commit", 400, "hub-refused"),
        ("commit", "drop", "hub-unreachable"),
        ("info", 500, "hub-failed"),
        ("whoami", 503, "hub-failed"),
    ],
)
def test_a_push_that_fails_leaves_the_repository_as_it_was(
    hub: HubServer, trained: Path, step: str, fault: int | str, wanted: str
) -> None:
    before = None
    if step != "create":
        before = dict(hub.add_repo("me/mine").files)
    hub.faults[step] = fault
    assert push_code(trained / "mine", "me/mine", yes=True) == wanted
    if before is None:
        assert "me/mine" not in hub.repos
        return
    assert hub.repos["me/mine"].files == before
    assert len(hub.repos["me/mine"].commits) == 1
    hub.faults.clear()
    hub.requests.clear()
    assert tunesmith.push(trained / "mine", "me/mine", yes=True).commit == hub.repos["me/mine"].head
    if step == "commit":  # what was uploaded before is not uploaded again
        assert not [request for request in hub.requests if request.startswith("PUT")]


def test_no_traceback_shows_the_token(run: Run, hub: HubServer, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server here quotes the token in its errors, and the addresses of uploads are signed."""
    monkeypatch.setenv("TUNESMITH_DEBUG", "1")
    for step in ("whoami", "create", "batch", "put", "commit"):
        hub.repos.clear()
        hub.faults = {step: 403}
        code, out, err = run("push", trained / "mine", "me/mine", "--yes")
        assert code != 0
        assert TOKEN not in out + err
        assert "secret-of" not in out + err


def test_a_lost_answer_to_the_commit_is_found_out(hub: HubServer, trained: Path) -> None:
    hub.faults["answer"] = "drop"
    done = tunesmith.push(trained / "mine", "me/mine", yes=True)
    assert done.commit == hub.repos["me/mine"].head


def test_a_large_file_goes_in_parts(hub: HubServer, trained: Path) -> None:
    hub.chunk_bytes = 20_000
    tunesmith.push(trained / "mine", "me/mine", yes=True)
    wanted = (trained / "mine" / "model" / "model.safetensors").read_bytes()
    assert hub.repos["me/mine"].files["model.safetensors"] == wanted


@pytest.mark.parametrize("how", ["damaged", "ignored"])
def test_what_the_hub_holds_is_compared(hub: HubServer, trained: Path, how: str) -> None:
    getattr(hub, how).add("model.safetensors")
    assert push_code(trained / "mine", "me/mine", yes=True) == "push-differs"


def test_a_repository_with_other_content_is_replaced_only_if_asked(run: Run, hub: HubServer, trained: Path) -> None:
    other = {"README.md": b"mine", "model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}",
             "paper.pdf": b"kept"}  # fmt: skip
    repo = hub.add_repo("club/model", files=other)
    code, out, _ = run("push", trained / "mine", "club/model")
    assert code == 0
    assert re.search(r"README.md .* changed\n", out)
    assert re.search(r"model-00001-of-00002.safetensors .* removed\n", out)
    assert re.search(r"model.safetensors .* new\n", out)
    assert "kept there .gitattributes, paper.pdf" in out
    assert "--replace --yes" in out
    assert push_code(trained / "mine", "club/model", yes=True) == "repository-differs"
    assert len(repo.commits) == 1
    tunesmith.push(trained / "mine", "club/model", yes=True, replace=True)
    assert "paper.pdf" in repo.files
    assert "model-00001-of-00002.safetensors" not in repo.files
    assert "model.safetensors.index.json" not in repo.files


def test_visibility_is_never_changed(hub: HubServer, trained: Path) -> None:
    hub.add_repo("me/public", is_private=False)
    hub.add_repo("me/private")
    assert push_code(trained / "mine", "me/public", yes=True) == "repository-public"
    assert push_code(trained / "mine", "me/private", yes=True, public=True) == "repository-private"
    assert not tunesmith.push(trained / "mine", "me/public", yes=True, public=True).is_private
    assert tunesmith.push(trained / "mine", "me/private", yes=True).is_private
    hub.makes_public = True  # as an organisation's settings may
    assert push_code(trained / "mine", "club/new", yes=True) == "repository-visibility"
    assert set(hub.repos["club/new"].files) == {".gitattributes"}


def test_a_repository_that_changes_meanwhile_is_left_as_it_is(
    hub: HubServer, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.add_repo("me/mine")
    hub.faults["commit"] = 412
    assert push_code(trained / "mine", "me/mine", yes=True) == "repository-changed"
    assert len(repo.commits) == 1


def test_a_licence_that_the_hub_does_not_know(hub: HubServer, trained: Path) -> None:
    assert push_code(trained / "mine", "me/mine", license="my-own-licence") == "hub-card"
    assert push_code(trained / "mine", "me/mine", yes=True, license="my-own-licence") == "hub-card"
    assert not hub.repos
    assert push_code(trained / "mine", "me/mine", yes=True, license="My own!") == "licence-id"


def test_an_unreachable_hub(hub: HubServer, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push_code(trained / "mine", "me/mine", yes=True) == "hub-unreachable"
    assert tunesmith.push(trained / "mine", "me/mine").commit is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert push_code(trained / "mine", "me/mine", yes=True) == "hub-unreachable"


def test_damaged_folders_are_refused(hub: HubServer, trained: Path, tmp_path: Path, tokenizer: Any) -> None:
    assert push_code(tmp_path / "none", "me/mine") == "model-not-found"
    assert push_code(tmp_path, "me/mine") == "not-a-model-folder"
    folder = save_folder(tmp_path / "model", tiny_config("llama", vocab_size=len(tokenizer)), tokenizer)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert push_code(folder, "me/mine") == "weights-unreadable"
    (folder / "model.safetensors").write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")  # NaN
    assert push_code(folder, "me/mine") == "weights-not-finite"
    (folder / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert push_code(folder, "me/mine") == "weights-missing"
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/somebody/models/secret"}))
    plan = tunesmith.push(folder, "me/mine", yes=True)
    assert plan.commit
    assert b"somebody" not in hub.repos["me/mine"].files["config.json"]
    assert push_code(folder, "me/mine", include=["config"]) == "not-a-run"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert push_code(folder, "me/mine") == "no-safetensors"


def test_the_card_keeps_what_a_person_wrote(hub: HubServer, trained: Path) -> None:
    file = trained / "mine" / "model" / "README.md"
    before = file.read_text(encoding="utf-8")
    try:
        own = before.replace("## Training\n", "## About\n\nIt knows numbers.\n\n## Training\n").replace(
            "tags:", "language: en\ntags:"
        )
        file.write_text(own, encoding="utf-8")
        card = tunesmith.push(trained / "mine", "me/mine").card
        assert "It knows numbers." in card
        assert "language: en" in card
        assert card.count("## Licence") == 1
        file.unlink()
        card = tunesmith.push(trained / "mine", "me/mine").card
        assert "## Training data" in card
        assert "| training loss |" in card
    finally:
        file.write_text(before, encoding="utf-8")


@long
def test_push_in_a_process_of_its_own_asks_on_a_terminal(hub: HubServer, trained: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN as a user sets them; the answer is typed."""
    import pty

    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "tunesmith", "push", str(trained / "mine"), "me/asked"]
    child = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while b"push? [y/N]" not in shown:
        shown += os.read(ours, 4096)
    assert not hub.repos
    os.write(ours, b"y\n")
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the end of a terminal
        pass
    assert child.wait() == 0
    os.close(ours)
    assert "me/asked" in hub.repos
    assert TOKEN.encode() not in shown


@long
def test_ctrl_c_while_uploading_leaves_the_repository_as_it_was(hub: HubServer, trained: Path) -> None:
    repo = hub.add_repo("me/mine")
    hub.faults["put"] = "hang"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-m", "tunesmith", "push", str(trained / "mine"), "me/mine", "--yes"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while not any(request.startswith("PUT") for request in hub.requests):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 3
    assert "all of it or nothing" in err
    assert len(repo.commits) == 1
    hub.faults.clear()
    assert tunesmith.push(trained / "mine", "me/mine", yes=True).commit == repo.head


@long
def test_scores_of_evaluate_are_in_the_card(run: Run, hub: HubServer, trained: Path) -> None:
    code, _, err = run("evaluate", trained / "mine", "--base", "--replies", "none")
    assert code == 0, err
    card = tunesmith.push(trained / "mine", "me/mine").card
    section = card.partition("## Evaluation\n")[2].partition("\n## ")[0]
    assert "rows of chats.jsonl" in section
    assert re.search(r"\| loss \| \d\.\d{4} \[\d\.\d{4}, \d\.\d{4}\] \| \d\.\d{4} \[", section)
    result = trained / "mine" / "evaluate" / "evaluate.json"
    os.utime(result, (1, 1))
    plan = tunesmith.push(trained / "mine", "me/mine")
    assert "## Evaluation" not in plan.card
    assert any("older than the weights" in remark for remark in plan.remarks)


@pytest.mark.parametrize(
    "card",
    ["", "no metadata", "---\nlicense: [mit]\n---\nx", "---\n- a\n---\nx", "---\nlicense: mit", "---\na: &a [*a]\n---\n",
     "---\r\nlicense: mit\r\n---\r\nx", "\ufeff---\nlicense: mit\n---\nx", "---\n\x00: 1\n---\nx", "---\n---\nx",
     "---\n1: x\nno: y\n2020-01-01: z\n---\nx", "---\nlicense: !!bool x\n---\nx", "---\nlicense: !!int ''\n---\nx",
     "---\nlicense: !!timestamp x\n---\nx"],
)  # fmt: skip
def test_any_card_in_the_folder_is_completed(hub: HubServer, trained: Path, card: str) -> None:
    file = trained / "mine" / "model" / "README.md"
    before = file.read_bytes()
    try:
        file.write_text(card, encoding="utf-8", newline="")
        made = tunesmith.push(trained / "mine", "me/mine", license="mit").card
    finally:
        file.write_bytes(before)
    front = yaml.safe_load(made.split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert "## Training data" in made
    assert "## Licence" in made


def test_a_merged_model_tells_its_base_and_its_training(
    run: Run, hub: HubServer, trained: Path, tmp_path: Path
) -> None:
    code, _, err = run("merge", trained / "lora", "--output", tmp_path / "whole")
    assert code == 0, err
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    assert "a local model (base) with the adapter lora merged in" in card
    assert "| chats.jsonl | 41 | 40 | 1 |" in card
    assert "| training loss |" in card
    assert str(trained) not in card
    pushed = tunesmith.push(tmp_path / "whole", "me/whole", base="me/base", license="mit", yes=True)
    front = yaml.safe_load(pushed.card.split("---\n")[1])
    assert (front["base_model"], front["license"]) == ("me/base", "mit")
    assert hub.repos["me/whole"].files["README.md"].decode() == pushed.card


def test_relative_names_lose_their_folders_too(tmp_path: Path) -> None:
    """Also where the run was started in another folder, as its record says."""
    (tmp_path / "clients" / "acme").mkdir(parents=True)
    names = {"clients/acme": "acme", "clients/gone.jsonl": "gone.jsonl", "Qwen/Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B",
             "../x/y": "y", "C:\\work\\a.jsonl": "a.jsonl", "/no_think": "/no_think", "0.5": "0.5"}  # fmt: skip
    assert without_paths({"data": {"train": list(names)}}, tmp_path) == {"data": {"train": list(names.values())}}


@pytest.mark.parametrize(
    "account",
    [[], None, "me", {"name": None}, {"name": 5}, {"name": "me", "auth": "x"}, {"name": "me", "orgs": 5},
     {"name": "me", "auth": {"accessToken": "read"}}, {"name": "me", "auth": [1], "orgs": ["club", {}, {"name": 1}]},
     {"name": f"{TOKEN}\n\x1b[2J", "orgs": [{"name": f"a{TOKEN}"}]}],
)  # fmt: skip
def test_any_answer_about_the_account_is_read(run: Run, hub: HubServer, trained: Path, account: Any) -> None:
    hub.accounts[TOKEN] = account
    code, out, err = run("push", trained / "mine", "me/mine")
    assert code in (0, 1, 4)
    assert "unexpected" not in err
    assert TOKEN not in out + err
    assert err.count("\n") <= 1


def test_a_dry_run_sends_the_metadata_of_the_card_alone(
    run: Run, hub: HubServer, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[bytes] = []
    validate = Handler._validate

    def keep(self: Handler) -> None:
        bodies.append(self.body)
        validate(self)

    monkeypatch.setattr(Handler, "_validate", keep)
    code, out, _ = run("push", trained / "mine", "me/mine", "--include", "replies")
    assert (code, "## Sample replies" in out) == (0, True)
    (content,) = (json.loads(body)["content"] for body in bodies)
    assert yaml.safe_load(content.split("---\n")[1])["library_name"] == "transformers"
    assert content.endswith("\n---\n")


def test_a_card_that_is_refused_shows_no_token(hub: HubServer, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Handler) -> None:
        self._send(400, {"errors": [{"message": f"you sent {self.headers['authorization']}"}], "warnings": []})

    monkeypatch.setattr(Handler, "_validate", refuse)
    assert push_code(trained / "mine", "me/mine", license="mit") == "hub-card"


def test_names_of_files_cannot_pretend_to_be_other_lines(run: Run, hub: HubServer, trained: Path) -> None:
    hub.add_repo("me/odd", files={"a\nvisibility private": b"", "\x1b[2Jx.txt": b""})
    odd = trained / "mine" / "model" / "a\nvisibility private"
    odd.touch()
    try:
        code, out, _ = run("push", trained / "mine", "me/odd")
    finally:
        odd.unlink()
    assert code == 0
    assert out.count("\nvisibility private") == 1
    assert "\x1b" not in out


def test_every_folder_that_a_library_kept_stays_here(hub: HubServer, trained: Path, tmp_path: Path) -> None:
    """Of configs within configs and of tokenizers too; relative folders too; hub ids are kept."""
    model = shutil.copytree(trained / "mine" / "model", tmp_path / "model")
    kept = {"_name_or_path": "owner/name", "tokenizer_file": "tokenizer.json"}
    private = {"_name_or_path": "/srv/private/base", "special_tokens_map_file": "C:\\private\\a.json"}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((model / name).read_text())
        below = {"a": private, "b": kept | {"name_or_path": "runs/private/base"}}
        (model / name).write_text(json.dumps(content | {"more": below} | private))
    tunesmith.push(model, "me/mine", yes=True)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = hub.repos["me/mine"].files[name]
        assert b"private" not in content
        assert json.loads(content)["more"] == {"a": {}, "b": kept}


def test_python_modules_that_a_model_needs_go_along(trained: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained / "mine" / "model", tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json"):
        mapped = {"AutoX": f"{name[:3]}.X", "AutoY": ["many.Y", None], "AutoZ": "owner/name--remote.Z"}
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | {"auto_map": mapped}))
    (model / "con.py").write_text("from .helper import a\nfrom .missing import b\nfrom torch import nn\n")
    (model / "helper.py").write_text("try:\n    from .con import X\nexcept ImportError:\n    from .deep import *\n")
    for name in ("tok.py", "many.py", "deep.py", "secret.py"):
        (model / name).touch()
    bundle = find_bundle(str(model))
    found = {file.name for file in bundle.files if file.name.endswith(".py")}
    assert found == {"con.py", "helper.py", "deep.py", "tok.py", "many.py"}
    assert "secret.py" in bundle.left_out


def test_a_link_to_another_folder_is_shown(hub: HubServer, trained: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained / "mine" / "model", tmp_path / "model")
    (tmp_path / "blobs").mkdir()
    for name, folder in (("chat_template.jinja", tmp_path), ("config.json", tmp_path / "blobs")):
        (model / name).rename(folder / "elsewhere")
        (model / name).symlink_to(folder / "elsewhere")
    remarks = tunesmith.push(model, "me/mine").remarks
    assert [remark for remark in remarks if "link" in remark] == [
        f"chat_template.jinja is a link to {tmp_path / 'elsewhere'}"
    ]


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_relative_base_is_no_hub_id_elsewhere(
    hub: HubServer, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    base = tmp_path / "work" / "my" / "base"
    shutil.copytree(trained / "base", base)
    (base / "README.md").write_text("---\nlicense: gemma\n---\n")
    data = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": f"{n}?", "completion": f"it is {n}"} for n in range(9)])
    monkeypatch.chdir(tmp_path / "work")
    words = ("--data", str(data), "--train.max_steps", "1", "--data.max_seq_len", "64")
    for kind in ("none", "lora"):
        assert main(["train", "--model", "my/base", "--output", kind, *words, "--lora.kind", kind]) == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    if is_gone:
        shutil.rmtree(base)
    plan = tunesmith.push(tmp_path / "work" / "none", "me/mine")
    front = yaml.safe_load(plan.card.split("---\n")[1])
    assert "base_model" not in front
    assert front["license"] == "gemma"
    assert push_code(tmp_path / "work" / "lora", "me/lora") == "base-not-on-hub"
    assert not [request for request in hub.requests if "my/base" in request]
