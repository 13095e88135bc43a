"""Public data, templates and weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import SHARED, needs_shared

pytestmark = needs_shared
DATA = SHARED / "data"
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    from stories import save_stories

    return save_stories(tmp_path / "stories260K")


def nll(model, tokenizer, text: str) -> float:
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])[:, :500]
    with torch.no_grad():
        return F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item()


def test_a_trained_model_is_fine_tuned_and_still_opens_in_plain_transformers(
    run, stories: Path, tmp_path: Path
) -> None:
    story = (DATA / "tinystories-sample" / "tinystories.txt").read_text(encoding="utf-8")
    before = AutoModelForCausalLM.from_pretrained(stories)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    assert nll(before, tokenizer, story) < 1.7  # 1.51 by another implementation; uniform is 6.24
    output = tmp_path / "run"
    code, out, err = run("train", "--model", stories, "--data", DATA / "fastchat" / "dummy_conversation.json", "--output", output,
                         "--data.max_seq_len", 512, "--optim.lr", 1e-3, "--train.max_steps", 40, "--data.eval_split", 0.1)  # fmt: skip
    assert code == 0, err
    assert "alpaca, because the model has none of its own; replies end with </s>" in out
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    after = AutoModelForCausalLM.from_pretrained(output / "model")
    assert not torch.equal(after.model.norm.weight, before.model.norm.weight)
    text = (output / "model" / "chat_template.jinja").read_text()
    prompt = AutoTokenizer.from_pretrained(output / "model").apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "### Instruction:\nWho are you?\n\n### Response:\n", text


def documented_outcomes() -> dict[str, tuple[str, ...]]:
    """docs/data.md: file -> rows used, rows refused, why."""
    table = (DOCS / "data.md").read_text(encoding="utf-8").split("## Public files")[1]
    cells = (line.strip().strip("|").split(" | ") for line in table.splitlines() if line.startswith("| `"))
    return {name.strip(" `"): tuple(cell.strip() for cell in rest) for name, *rest in cells}


def test_the_table_in_the_docs_names_every_file() -> None:
    files = {str(p.relative_to(DATA)) for p in DATA.rglob("*") if p.is_file() and "LICENSE" not in p.name}
    assert set(documented_outcomes()) == files


FAST_FILES = [
    "fastchat/dummy_conversation.json", "emollm/data.json", "llamafactory/alpaca_en_demo.json", "llamafactory/v1_sft_demo.jsonl",
    "llamafactory/glaive_toolcall_en_demo.json", "llamafactory/identity.json", "gpteacher/toolformer-similarity-0.6-dataset.json",
    "huatuo/liver_cancer.json", "medicalgpt/medical_sft_1K_format.jsonl", "t0-prompt-completion/qasc_qa_with_combined_facts_1.jsonl",
    "llamafactory/alpaca_zh_demo.json", "llamafactory/c4_demo.jsonl", "chinese-poetry/ci.song.1000.json", "tinyshakespeare/input.txt", "gsm8k/train.jsonl", "human-eval/HumanEval.jsonl.gz", "oasst/en_100_tree.jsonl",
    "llamafactory/dpo_en_demo.json", "llamafactory/kto_en_demo.json", "llamafactory/mllm_demo.json", "kdconv/film_dev.json",
    "bfcl/BFCL_v4_simple_python.json", "bfcl/possible_answer_simple_python.json", "chinese-poetry/lunyu.json", "self-instruct/seed_tasks.jsonl",
    "self-instruct/user_oriented_instructions.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("name", FAST_FILES)
def test_files_come_out_as_the_docs_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    from data_table import load_table_encoder, outcome_of

    encoder = load_table_encoder(SHARED / "tokenizers" / "minimind")
    used, refused, why = outcome_of(DATA / name, encoder)
    assert (used, refused, why.replace("|", "\\|")) == documented_outcomes()[name]


@pytest.mark.parametrize(
    ("name", "mapping"),
    [
        ("gsm8k/train.jsonl", "--data.fields.prompt question --data.fields.completion answer"),
        (
            "human-eval/HumanEval.jsonl.gz",
            "--data.fields.prompt prompt --data.fields.completion canonical_solution --data.ignore_columns "
            "entry_point test",
        ),
        (
            "llamafactory/dpo_en_demo.json",
            "--data.format prompt_completion --data.fields.prompt conversations --data.fields.completion chosen "
            "--data.ignore_columns rejected",
        ),
        ("llamafactory/kto_en_demo.json", "--data.fields.label label"),
        (
            "chinese-poetry/lunyu.json",
            "--data.format text --data.fields.text paragraphs --data.ignore_columns chapter",
        ),
        (
            "chinese-poetry/ci.song.1000.json",
            "--data.format text --data.fields.text paragraphs --data.ignore_columns rhythmic",
        ),
        (
            "self-instruct/seed_tasks.jsonl",
            "--data.format alpaca --data.fields.input instances.0.input --data.fields.output instances.0.output "
            "--data.ignore_columns name is_classification",
        ),
    ],
)
def test_the_mapping_that_a_refusal_names_trains_the_file(
    run, model_folder: Path, tmp_path: Path, name: str, mapping: str
) -> None:
    command = (
        "train",
        "--model",
        model_folder,
        "--data",
        DATA / name,
        "--output",
        tmp_path / "run",
        "--train.max_steps",
        1,
        "--data.limit",
        40,
    )
    code, _, err = run(*command)
    assert code == 1
    assert mapping in err
    assert "Keys found" in err or "keys " in err
    code, out, err = run(*command, "--data.max_seq_len", 8192, "--data.max_refused", 0.5, *mapping.split())
    assert code == 0, err
    unread = re.findall(r"column (\S+) is not read", out)
    assert all(column.startswith("instances.") for column in unread), out
    if "kto" in name:
        ledger = json.loads((tmp_path / "run" / "data_ledger.json").read_text())["train"]
        rows = json.loads((DATA / name).read_text())[:40]
        assert ledger["used"] == sum(row["label"] for row in rows)
        refused = [n for numbers in ledger["files"][str(DATA / name)]["refused"].values() for n in numbers]
        assert refused == [n for n, row in enumerate(rows, 1) if not row["label"]]
