"""The same rows, order, weights and hyper-parameters through TRL's SFTTrainer; compares the loss of every step.

Only the sampler is replaced, so that TRL sees the rows of each of our steps; tokenisation, masks, padding, loss,
optimizer and loop are TRL's own.

Usage: theirs.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

LIMIT = 1e-4


def run(folder: Path) -> float:
    ours = json.loads((folder / "ours.json").read_text())
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    losses: list[float] = []

    class Trainer(trl.SFTTrainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_sampler=ours["steps"], collate_fn=self.data_collator)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"), max_steps=len(ours["steps"]), learning_rate=1e-3, lr_scheduler_type="cosine",
        warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, max_length=256, packing=False, bf16=False,
        gradient_checkpointing=False, completion_only_loss=True, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, seed=5, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    differences = [abs(a - b) for a, b in zip(ours["losses"], losses, strict=True)]
    print(f"TRL {trl.__version__}, {len(losses)} steps: ours {ours['losses'][0]:.6f} -> {ours['losses'][-1]:.6f}, "
          f"theirs {losses[0]:.6f} -> {losses[-1]:.6f}, largest difference {max(differences):.2e}")  # fmt: skip
    return max(differences)


if __name__ == "__main__":
    worst = run(Path(sys.argv[1]))
    raise SystemExit(0 if worst <= LIMIT else f"largest difference {worst:.2e} is above {LIMIT:.0e}")
