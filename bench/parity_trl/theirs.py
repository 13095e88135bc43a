"""Train the same rows, order, weights and hyperparameters with TRL's SFTTrainer; compare the loss of every step.

Only the sampler is replaced, so that TRL sees the rows of each of our steps; tokenization, masks, padding, loss,
optimizer and loop are TRL's own.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

LIMIT = 1e-4


def train(folder: Path, ours: dict[str, Any]) -> list[float]:
    """TRL's loss of each of our steps."""
    import torch
    import trl
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
        output_dir=str(folder / "trl"), max_steps=len(ours["steps"]), lr_scheduler_type="cosine", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=1.0, packing=False, bf16=False, gradient_checkpointing=False,
        completion_only_loss=True, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, **ours["settings"],
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    return losses


def write_golden(path: Path, ours: dict[str, Any], losses: list[float]) -> None:
    """Write one mode's losses to the golden file, with the versions that produced them."""
    import tokenizers
    import torch
    import transformers
    import trl

    golden = json.loads(path.read_text()) if path.exists() else {"modes": {}}
    golden["made_with"] = {"command": "bench/parity_trl/run.sh --write-golden", "python": platform.python_version(),
                           "trl": trl.__version__, "transformers": transformers.__version__,
                           "tokenizers": tokenizers.__version__, "torch": torch.__version__,
                           "seeds": "ROWS_SEED, WEIGHTS_SEED and TRAIN_SEED of bench/parity_trl/inputs.py"}  # fmt: skip
    golden["modes"][ours["mode"]] = {"sha256": ours["sha256"], "losses": losses}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of ours.py")
    parser.add_argument("--write-golden", type=Path, metavar="FILE", help="write TRL's losses to this JSON file")
    options = parser.parse_args()
    ours = json.loads((options.folder / "ours.json").read_text())
    losses = train(options.folder, ours)
    worst = max(abs(a - b) for a, b in zip(ours["losses"], losses, strict=True))
    print(f"TRL, {len(losses)} steps: ours {ours['losses'][0]:.6f} -> {ours['losses'][-1]:.6f}, "
          f"theirs {losses[0]:.6f} -> {losses[-1]:.6f}, largest difference {worst:.2e}")  # fmt: skip
    if worst > LIMIT:
        raise SystemExit(f"largest difference {worst:.2e} is above {LIMIT:.0e}")
    if options.write_golden:
        write_golden(options.write_golden, ours, losses)


if __name__ == "__main__":
    main()
