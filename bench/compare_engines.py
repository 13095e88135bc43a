"""One engine of compare.py in a process of its own: trains a task and makes one step each time it is told to.

    python bench/compare_engines.py ENGINE TASK.json

Each engine runs its own real loop. After a step it prints a line of JSON and waits for a line on standard input: `go`
for the next step, anything else ends the process. So the steps of several engines can alternate, and each has its own
memory and its own settings. The seconds of a step are those between `go` and the end of the step.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from compare_inputs import Task

BEGAN = float(os.environ.get("COMPARE_BEGAN", time.time()))


def memory_mb(key: str) -> float:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1000
    return 0.0


class Turns:
    """The line to compare.py.

    Args:
        imports_s: what importing torch and transformers took.
    """

    def __init__(self, imports_s: float, output: Any) -> None:
        self._output, self._imports_s = output, imports_s
        self._base_mb, self._at, self._number = memory_mb("VmRSS"), 0.0, 0

    def end_step(self, tokens: int, targets: int, **more: Any) -> None:
        """Report a step; returns when the next one is wanted."""
        now = time.perf_counter()
        self._number += 1
        self.say(
            step=self._number, seconds=now - self._at if self._at else None, since_start_s=time.time() - BEGAN,
            imports_s=self._imports_s, tokens=tokens, targets=targets, peak_mb=memory_mb("VmHWM") - self._base_mb,
            imports_mb=self._base_mb, **more,
        )  # fmt: skip
        self.wait()

    def wait(self) -> None:
        if sys.stdin.readline().strip() != "go":
            self.leave()
        self._at = time.perf_counter()

    def say(self, **values: Any) -> None:
        print(json.dumps(values), file=self._output, flush=True)

    def leave(self) -> NoReturn:
        self._output.flush()
        os._exit(0)  # without the end of the run, which saves the model


def train_ours(task: Task, turns: Callable[[], Turns], compiles: bool = False, precision: str = "fp32") -> None:
    """`tunesmith train`, with a reporter that waits after each step."""
    from tunesmith.config.schema import RunConfig
    from tunesmith.data.store import open_store
    from tunesmith.run.console import Silent
    from tunesmith.run.start import run_training

    _import_model(task)
    line = turns()
    output = Path(task.folder) / f"run-{task.name}"

    class Steps(Silent):
        def __init__(self) -> None:
            super().__init__(owns_process=True)
            self._tokens = self._targets = 0
            self._more: dict[str, Any] = {}

        def begin(self, total_steps: int, first_step: int, total_epochs: float | None) -> None:
            store = open_store(output / "tokens")
            lengths = store.lengths[:].astype("float64")
            self._more = {
                "data": [len(store), int(lengths.sum()), int(store.num_targets[:].sum())],
                "square": float((lengths**2).sum() / lengths.sum()),
            }

        def step(self, record: dict[str, Any], remark: str) -> None:
            if "loss" not in record:
                return
            tokens, targets = record["tokens"] - self._tokens, record["supervised_tokens"] - self._targets
            self._tokens, self._targets = record["tokens"], record["supervised_tokens"]
            line.end_step(tokens, targets, loss=record["loss"], **self._more)
            self._more = {}

    sections: dict[str, Any] = {
        "model": {"path": task.model},
        "data": {"train": [task.rows], "max_seq_len": task.max_seq_len, "workers": task.workers or "auto"},
        "optim": {"lr": task.lr, "schedule": "constant", "warmup_ratio": 0.0},
        "train": {"output_dir": str(output), "max_steps": task.steps, "micro_batch_tokens": task.tokens,
                  "precision": precision, "log_steps": 1, "seed": task.seed, "compile": compiles},
    }  # fmt: skip
    if task.method == "lora":
        sections["lora"] = {"kind": "lora", "rank": task.lora_rank}
    run_training(RunConfig(**sections), Steps())


def train_trl(task: Task, turns: Callable[[], Turns], packing: bool) -> None:
    """TRL's SFTTrainer with its defaults, but fp32, and no gradient checkpointing."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peft_config = None
    if task.method == "lora":
        from peft import LoraConfig

        rank = task.lora_rank
        peft_config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    _import_model(task)
    line = turns()
    arguments = trl.SFTConfig(
        packing=packing, max_length=task.max_seq_len if not packing else task.tokens, gradient_checkpointing=False,
        per_device_train_batch_size=1 if packing else task.padded_rows, dataset_num_proc=task.workers,
        **_arguments(task),
    )  # fmt: skip
    trainer = _stepping(trl.SFTTrainer, line)(
        model=AutoModelForCausalLM.from_pretrained(task.model, dtype="float32"),
        args=arguments,
        train_dataset=Dataset.from_list(_read(task)),
        processing_class=AutoTokenizer.from_pretrained(task.model),
        peft_config=peft_config,
    )
    _run(trainer, line)


def train_plain(task: Task, turns: Callable[[], Turns]) -> None:
    """transformers' Trainer: rows encoded and labelled here, padded by its collator, the model's own loss."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    _import_model(task)
    line = turns()
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    rows = []
    for row in _read(task):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=False)
        whole = whole[: task.max_seq_len]
        rows.append(
            {
                "input_ids": whole,
                "attention_mask": [1] * len(whole),
                "labels": [-100] * len(prompt) + whole[len(prompt) :],
            }
        )
    rows = [row for row in rows if len(row["labels"]) == len(row["input_ids"])]
    trainer = _stepping(Trainer, line)(
        model=AutoModelForCausalLM.from_pretrained(task.model, dtype="float32"),
        args=TrainingArguments(per_device_train_batch_size=task.padded_rows, **_arguments(task)),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    _run(trainer, line)


def _arguments(task: Task) -> dict[str, Any]:
    return {
        "output_dir": str(Path(task.folder) / f"out-{task.name}"), "max_steps": task.steps, "learning_rate": task.lr,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "bf16": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "seed": task.seed,
    }  # fmt: skip


def _stepping(base: Any, line: Turns) -> Any:
    """The trainer, counting the tokens of each step."""

    class Stepping(base):
        counted = (0, 0)

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            mask, labels = inputs.get("attention_mask"), inputs["labels"]
            tokens = int(mask.sum()) if mask is not None and mask.dim() == 2 else inputs["input_ids"].numel()
            self.counted = (tokens, int((labels[..., 1:] != -100).sum()))
            return super().training_step(model, inputs, *rest, **more)

    return Stepping


def _run(trainer: Any, line: Turns) -> None:
    from transformers import PrinterCallback, TrainerCallback

    dataset = trainer.train_dataset
    rows = [dataset[n] for n in range(len(dataset))]
    labels = "completion_mask" if "completion_mask" in rows[0] else "labels"
    counted = sum(sum(1 for one in row[labels] if one not in (0, -100)) for row in rows)
    data: dict[str, Any] = {"data": [len(rows), sum(len(row["input_ids"]) for row in rows), counted]}
    del rows

    class Turn(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            line.end_step(*trainer.counted, **data)
            data.clear()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Turn())
    trainer.train()


MINIMIND_LENGTH = 768  # to which its trainer pads each row: the default of its flag --max_seq_len


def train_minimind(task: Task, turns: Callable[[], Turns]) -> None:
    """MiniMind's train_full_sft.py as it is, observed through torch's hooks for optimizers and modules."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import AutoConfig, AutoTokenizer

    pad = AutoTokenizer.from_pretrained(task.model).pad_token_id
    config = AutoConfig.from_pretrained(task.model)
    rows = Path(task.folder) / f"conversations-{task.name}.jsonl"
    rows.write_text(
        "".join(json.dumps({"conversations": row["prompt"] + row["completion"]}) + "\n" for row in _read(task)),
        encoding="utf-8",
    )
    line = turns()
    counted = [0, 0]

    def count(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        counted[:] = [int((args[0] != pad).sum()), int((labels[..., 1:] != -100).sum()) if labels is not None else 0]

    def find_model(module: torch.nn.Module, _: Any) -> None:
        if type(module).__name__.startswith("MiniMind"):
            handle.remove()
            module.register_forward_pre_hook(count, with_kwargs=True)

    handle = register_module_forward_pre_hook(
        find_model
    )  # the first module that is called; its first step counts nothing
    register_optimizer_step_post_hook(lambda *_: line.end_step(*counted, data=None))
    script = Path(task.checkout) / "trainer" / "train_full_sft.py"
    flags = {
        "--epochs": 1000, "--batch_size": task.padded_rows, "--learning_rate": task.lr, "--device": "cpu",
        "--num_workers": 0, "--log_interval": 1, "--save_interval": 10**9, "--hidden_size": config.hidden_size,
        "--num_hidden_layers": config.num_hidden_layers, "--max_seq_len": min(task.max_seq_len, MINIMIND_LENGTH),
        "--data_path": rows, "--from_weight": "pretrain",
    }  # fmt: skip
    sys.argv = [str(script), *(str(word) for pair in flags.items() for word in pair)]
    os.chdir(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def measure_limit(task: Task, turns: Callable[[], Turns]) -> None:
    """The rate of this machine on the matrix products of the task, one answer for each `go`."""
    from compare_limit import Limit

    line = turns()
    limit = Limit(task)
    line.say(step=1, **limit.describe())
    while True:
        line.wait()
        line.say(flops_per_s=limit.measure())


def prepare_ours(task: Task, turns: Callable[[], Turns]) -> None:
    import datetime

    from transformers import AutoTokenizer

    from tunesmith.config.data_keys import DataSection
    from tunesmith.data.dataset import find_data, refuse_shared_files
    from tunesmith.model.tokenizer import build_encoder
    from tunesmith.preparation.write import write_dataset
    from tunesmith.run.console import Silent
    from tunesmith.runfolder import RunFolder

    line = turns()
    encoder = build_encoder(AutoTokenizer.from_pretrained(task.model), None, {}, datetime.datetime(2026, 1, 2))
    line.say(step=1)
    number = 0
    while True:
        number += 1
        line.wait()
        began = time.perf_counter()
        data = DataSection(train=[task.rows], cache=False, workers=task.workers or "auto")
        sources = find_data(data)
        refuse_shared_files(sources)
        run = RunFolder(Path(task.folder) / f"prepared-{task.name}-{number}")
        run.path.mkdir()
        dataset = write_dataset(data, sources, encoder, task.max_seq_len, 0, run, Silent())
        line.say(seconds=time.perf_counter() - began, rows=dataset.ledger.rows, tokens=dataset.ledger.tokens)


def prepare_trl(task: Task, turns: Callable[[], Turns]) -> None:
    """TRL's tokenization of a dataset in memory, without packing; reading the file is left out."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    line = turns()
    dataset = datasets.Dataset.from_list(_read(task))
    found: dict[str, float] = {}

    class Timed(trl.SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            found["seconds"] = time.perf_counter() - began
            return prepared

    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    arguments = trl.SFTConfig(
        max_length=task.max_seq_len, dataset_num_proc=task.workers, gradient_checkpointing=False, **_arguments(task)
    )
    line.say(step=1)
    while True:
        line.wait()
        Timed(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
        line.say(seconds=found["seconds"], rows=len(dataset))


def _read(task: Task) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(task.rows).read_text(encoding="utf-8").splitlines()]


def _import_model(task: Task) -> None:
    """The model's module, which would else be imported while it is loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(task.model))]
    if task.method == "lora":
        import peft  # noqa: F401


ENGINES: dict[str, Callable[[Task, Callable[[], Turns]], None]] = {
    "ours": train_ours,
    "ours-auto": lambda task, turns: train_ours(task, turns, precision="auto"),
    "ours-compiled": lambda task, turns: train_ours(task, turns, compiles=True),
    "trl-packed": lambda task, turns: train_trl(task, turns, packing=True),
    "trl-padded": lambda task, turns: train_trl(task, turns, packing=False),
    "trainer": train_plain,
    "minimind": train_minimind,
    "limit": measure_limit,
    "prepare-ours": prepare_ours,
    "prepare-trl": prepare_trl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("task", help="a file written by compare.py")
    args = parser.parse_args()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints goes to the log
    import torch  # noqa: F401
    import transformers  # noqa: F401

    imports_s = time.time() - BEGAN
    ENGINES[args.engine](Task.read(args.task), lambda: Turns(imports_s, output))


if __name__ == "__main__":
    main()
