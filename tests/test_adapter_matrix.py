"""Every kind of adapter on every kind of base: either trained and usable everywhere, or refused before step 1.

A combination that trains must resume exactly, merge with a passed proof, open in plain peft and in chat, and start
further runs, each time with the logits and the eval loss of training.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import chat_row, save_folder, tiny_config, write_jsonl
from test_adapters import logits_of
from tunesmith.config.runfile import resolve_config
from tunesmith.config.schema import ModelSection, RunConfig
from tunesmith.errors import TunesmithError
from tunesmith.generation.speaker import load_speaker
from tunesmith.run.resume import run_resume
from tunesmith.run.start import run_training
from tunesmith.use.merge import run_merge

KINDS: dict[str, dict[str, str]] = {
    **{kind: {"lora.kind": kind} for kind in ("lora", "rslora", "dora", "pissa", "olora")},
    **{kind: {"lora.kind": "lora", "lora.quantize": kind} for kind in ("nf4", "int8")},
}
NAMES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gpt2")
FORMS = (
    "plain",
    "save both",
    "save head",
    "save embedding",
    "target head",
    "target embedding",
    "target both",
    "tokens",
)
MIXED = (
    "tokens, save both",
    "tokens, save head",
    "tokens, target head",
    "tokens, target embedding",
    "save head, target embedding",
    "save embedding, target head",
    "biases",
)


@dataclass(frozen=True)
class Cell:
    kind: str
    name: str
    is_tied: bool
    form: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}-{'tied' if self.is_tied else 'untied'}-{self.form}".replace(" ", "_")

    def flags(self) -> dict[str, Any]:
        embedding, linear = ("wte", "c_attn") if self.name == "gpt2" else ("embed_tokens", "q_proj")
        whole: list[str] = []
        low: list[str] = []
        for part in self.form.split(", "):
            verb, _, what = part.partition(" ")
            modules = {"both": [embedding, "lm_head"], "head": ["lm_head"], "embedding": [embedding]}.get(what, [])
            whole += modules if verb == "save" else []
            low += modules if verb == "target" else []
        flags: dict[str, Any] = dict(KINDS[self.kind])
        flags |= {"lora.modules_to_save": whole} if whole else {}
        flags |= {"lora.target_modules": [linear, *low]} if low else {}
        flags |= {"lora.bias": "all"} if self.form == "biases" else {}
        return flags | ({"model.add_tokens": ["<note>", "</note>"]} if self.has_tokens else {})

    @property
    def has_tokens(self) -> bool:
        return self.form.startswith("tokens")

    @property
    def is_refused(self) -> bool:
        """Whether peft could train it, but would reopen it as a different model or not at all."""
        low = self.form.partition("target ")[2]
        if self.kind in ("pissa", "olora") and (
            self.name == "gpt2" or "save" in self.form or self.has_tokens or self.form == "biases"
        ):
            return True
        if self.kind in ("pissa", "olora", "dora") and (low in ("embedding", "both") or (low and self.is_tied)):
            return True
        return bool(low) and (self.has_tokens or ("save" in self.form and self.is_tied))


def all_cells() -> Iterator[Cell]:
    for kind in KINDS:
        for name in NAMES:
            for is_tied in (False, True):
                for form in (*FORMS, *(MIXED if kind in ("lora", "dora") else ())):
                    yield Cell(kind, name, is_tied, form)


def evals_of(run: Path) -> list[float]:
    """eval_loss of a run at each evaluation, starting with step 0."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["eval_loss"] for record in records if "eval_loss" in record]


def open_in_peft(base: Path, adapter: Path) -> Any:
    """Open the adapter without tunesmith; added tokens need more embedding rows first, as in peft's documentation."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = json.loads((adapter / "adapter_config.json").read_text())
    rows = [max(ids) + 1 for ids in (config["trainable_token_indices"] or {}).values()]
    rows += [len(t) for key, t in load_file(adapter / "adapter_model.safetensors").items()
             if key.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))]  # fmt: skip
    if max(rows, default=0) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(rows), mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter)


def train(**flags: Any) -> tuple[int, str]:
    """(exit code, error) of a run without report and replies, which would take longer than everything else here."""
    dotted = {name.replace("__", "."): value for name, value in flags.items()}
    try:
        run_training(resolve_config(RunConfig, None, dotted))
    except TunesmithError as error:
        return error.exit_code, str(error)
    return 0, ""


def build_base(cell: Cell, tokenizer: Any, folder: Path) -> Path:
    sizes: dict[str, int] = {}
    if cell.kind == "nf4":  # bitsandbytes works on blocks of 64
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        sizes = {"n_embd": 64} if cell.name == "gpt2" else sizes
        sizes |= {"moe_intermediate_size": 64} if cell.name == "qwen3_moe" else {}
    config = tiny_config(cell.name, initializer_range=0.1, eos_token_id=0, tie_word_embeddings=cell.is_tied, **sizes)
    return save_folder(folder, config, tokenizer)


def killed_at_step_1(trained: Path, to: Path) -> Path:
    shutil.copytree(trained, to, ignore=shutil.ignore_patterns("adapter", "step-000002", "step-000003"))
    return to


def check_cell(tokenizer: Any, folder: Path, cell: Cell) -> str:
    """ "" if everything agrees, else the reason for a refusal before step 1; anything in between fails the test."""
    folder.mkdir()
    base, trained = build_base(cell, tokenizer, folder / "base"), folder / "run"
    rows = [chat_row(f"What is {i}?", f"<note>{i}</note> is it.") for i in range(12)]
    data, held_out = write_jsonl(folder / "d.jsonl", rows[:8]), write_jsonl(folder / "e.jsonl", rows[8:])
    common = {"data.train": [str(data)], "data.eval": [str(held_out)], "data.max_seq_len": 64}
    common |= {"data.control_text": "allow"} if cell.has_tokens else {}
    code, err = train(**common, **cell.flags(), model__path=str(base), train__output_dir=str(trained), lora__rank=4,
                      optim__lr=1e-2, train__max_steps=3, train__save_steps=1, train__keep_checkpoints=9)  # fmt: skip
    if code == 1 and not trained.exists():
        return err
    assert code == 0, err
    part = killed_at_step_1(trained, folder / "part")
    run_resume(str(part), {})
    adapters = [path / "adapter" for path in (trained, part)]
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in adapters]
    assert weights[0] == weights[1], "resumed otherwise"
    wanted = logits_of(open_in_peft(base, adapters[0]))
    assert wanted.isfinite().all()

    def compare(model: Any, what: str) -> None:
        difference = (logits_of(model) - wanted).abs().max()
        assert difference < 1e-5 * wanted.abs().max(), f"{what} differs by {difference:.1e}"

    compare(load_speaker(ModelSection(path=str(trained))).model, "chat")
    run_merge([str(trained)], str(folder / "merged"))
    compare(AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32), "merged")
    for name, path, more in (("full", trained, {"optim.lr": 1e-12}), ("on", folder / "merged", {"lora.kind": "lora"})):
        code, err = train(**common, **more, model__path=str(path), train__output_dir=str(folder / name),
                          train__max_steps=1)  # fmt: skip
        assert code == 0, err
    compare(AutoModelForCausalLM.from_pretrained(folder / "full" / "model", dtype=torch.float32), "trained further")
    losses = evals_of(trained)[-1], evals_of(folder / "full")[0], evals_of(folder / "on")[0]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5), f"eval loss {losses}"
    if cell.kind not in ("nf4", "int8"):  # they were trained on a quantized base
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), f"eval loss {losses}"
    shutil.rmtree(folder, ignore_errors=True)
    return ""


ALWAYS = (
    Cell("lora", "llama", True, "target head"),  # a merge into one must not change the other
    Cell("lora", "qwen3", True, "target embedding"),
    Cell("lora", "gpt2", True, "save both"),
    Cell("lora", "gpt2", True, "save embedding"),
    Cell("lora", "qwen2", True, "tokens"),
    Cell("rslora", "qwen3_moe", False, "plain"),
    Cell("rslora", "gpt2", False, "target both"),
    Cell("dora", "llama", False, "target head"),
    Cell("olora", "qwen2", True, "plain"),
    Cell("nf4", "llama", False, "tokens, save head"),
    Cell("dora", "gpt2", True, "target head"),  # refused, as are the following
    Cell("pissa", "llama", True, "target head"),
    Cell("dora", "qwen3", False, "target embedding"),
    Cell("lora", "llama", False, "tokens, target head"),
    Cell("lora", "llama", True, "save embedding, target head"),
)
CELLS = list(all_cells()) if os.environ.get("TUNESMITH_LONG") else list(ALWAYS)


@pytest.mark.filterwarnings("ignore")  # peft warns about tied layers
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell_works_everywhere_or_is_refused_before_step_1(tokenizer: Any, tmp_path: Path, cell: Cell) -> None:
    if cell.kind in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    refused = check_cell(tokenizer, tmp_path / "cell", cell)
    table = os.environ.get("TUNESMITH_MATRIX")  # a file to collect the table in
    if table:
        with Path(table).open("a") as file:
            file.write(json.dumps({"cell": str(cell), "refused": refused}) + "\n")
    assert bool(refused) == cell.is_refused, refused
    assert not refused or refused.startswith("lora: 1 problem")
