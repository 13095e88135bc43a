"""Convert config keys of TRL and transformers, LLaMA-Factory and Axolotl to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# their key -> our key, same value
SAME = {
    "model_name_or_path": "model.path", "base_model": "model.path", "tokenizer_name_or_path": "model.tokenizer",
    "model_revision": "model.revision", "trust_remote_code": "model.trust_remote_code",
    "dataset_name": "data.train", "dataset": "data.train", "eval_dataset": "data.eval",
    "max_length": "data.max_seq_len", "max_seq_length": "data.max_seq_len", "cutoff_len": "data.max_seq_len",
    "sequence_len": "data.max_seq_len", "val_size": "data.eval_split", "val_set_size": "data.eval_split",
    "max_samples": "data.limit", "chat_template_path": "data.chat_template", "dataset_text_field": "data.fields.text",
    "learning_rate": "optim.lr", "warmup_ratio": "optim.warmup_ratio", "warmup_steps": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay", "max_grad_norm": "optim.max_grad_norm", "adam_epsilon": "optim.eps",
    "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "max_steps": "train.max_steps",
    "gradient_accumulation_steps": "train.grad_accum_steps", "gradient_checkpointing": "train.gradient_checkpointing",
    "torch_compile": "train.compile", "seed": "train.seed", "logging_steps": "train.log_steps",
    "eval_steps": "train.eval_steps", "save_steps": "train.save_steps", "save_total_limit": "train.keep_checkpoints",
    "output_dir": "train.output_dir", "early_stopping_patience": "train.early_stop_patience",
    "lora_r": "lora.rank", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout",
    "lora_modules_to_save": "lora.modules_to_save", "additional_target": "lora.modules_to_save",
    "loraplus_lr_ratio": "lora.lr_ratio",
}  # fmt: skip

# keys without a counterpart -> what tunesmith does instead
ALWAYS = {
    "packing": "every pack is full and no document sees another, always",
    "sample_packing": "every pack is full and no document sees another, always",
    "neat_packing": "every pack is full and no document sees another, always",
    "pad_to_sequence_len": "nothing is padded",
    "completion_only_loss": "only replies are trained, unless --data.train_on all",
    "assistant_only_loss": "only replies are trained, unless --data.train_on all",
    "flash_attn": "attention is chosen and checked at the start of every run",
    "flash_attention": "attention is chosen and checked at the start of every run",
    "attn_implementation": "attention is chosen and checked at the start of every run",
    "use_liger_kernel": "the head is applied at trained positions only, always",
    "liger_kernel": "the head is applied at trained positions only, always",
    "template": "the model's own chat template is used; another one: data.chat_template",
    "stage": "tunesmith trains sft and, on raw text, pt",
    "do_train": "the command is tunesmith train",
    "plot_loss": "RUN/report.html has the curves",
    "evaluation_strategy": "train.eval_steps N evaluates every N steps, and at the end always",
    "eval_strategy": "train.eval_steps N evaluates every N steps, and at the end always",
    "save_strategy": "train.save_steps and train.save_minutes",
    "resume_from_checkpoint": "tunesmith resume RUN",
    "overwrite_output_dir": "a run never overwrites another",
    "push_to_hub": "hf upload RUN/model",
    "remove_unused_columns": "unused columns are ignored",
    "dataset_num_proc": "the tokenizer uses all cores",
    "preprocessing_num_workers": "the tokenizer uses all cores",
    "ddp_timeout": "one process trains",
    "save_only_model": "every checkpoint can be resumed",
}

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio")
Tree = dict[str, Any]


def explain_key(key: str) -> str:
    """What to use instead of a key of another tool; "" for an unknown key."""
    name = key.rsplit(".", 1)[-1]
    if name in SAME:
        return f"here it is called {SAME[name]}"
    if name in _TURNED:
        return f"here it is {_TURNED_WORDS[name]}"
    return ALWAYS.get(name, "")


def convert(theirs: Mapping[str, Any]) -> tuple[Tree, list[str], list[str]]:
    """Convert a flat config of TRL, LLaMA-Factory or Axolotl: (our dotted keys, notes, keys without a counterpart)."""
    ours: Tree = {}
    notes: list[str] = []
    lost: list[str] = []
    for key, value in theirs.items():
        if value is None or value == "":
            continue
        if key in SAME:
            ours[SAME[key]] = _plain(value)
        elif key in _TURNED:
            try:
                _TURNED[key](value, theirs, ours, notes)
            except (ValueError, TypeError):
                lost.append(f"{key}: {value}")
        elif key in ALWAYS:
            notes.append(f"{key}: left out; {ALWAYS[key]}")
        else:
            lost.append(f"{key}: {value}")
    for key in ("data.train", "data.eval"):
        if isinstance(ours.get(key), str):
            ours[key] = [part.strip() for part in ours[key].split(",")]
    if _trains_all_weights(theirs):
        dropped = [key for key in ours if key.startswith("lora.")]
        notes += [f"{key}: left out; the file trains all weights" for key in dropped]
        ours = {key: value for key, value in ours.items() if key not in dropped}
    elif any(key.startswith("lora.") for key in ours):
        ours.setdefault("lora.kind", "lora")
    share = ours.get("data.eval_split", 0)
    if not isinstance(share, (int, float)) or share >= 1:
        lost.append(f"data.eval_split: {ours.pop('data.eval_split')} rows; here it is a share of the rows")
    return ours, notes, lost


def _trains_all_weights(theirs: Mapping[str, Any]) -> bool:
    """Whether the file trains all weights, even if it has other keys of an adapter."""
    is_off = [name in theirs and not theirs[name] for name in ("adapter", "use_peft")]
    return theirs.get("finetuning_type") == "full" or any(is_off)


def nest(dotted: Mapping[str, Any]) -> Tree:
    """{"train.seed": 0} -> {"train": {"seed": 0}}, sections in the order of the docs."""
    tree: Tree = {section: {} for section in ("model", "data", "optim", "lora", "train")}
    for key, value in dotted.items():
        below = tree
        *parents, last = key.split(".")
        for name in parents:
            below = below.setdefault(name, {})
        below[last] = value
    return {section: keys for section, keys in tree.items() if keys}


def _plain(value: Any) -> Any:
    """A number that YAML reads as text (1e-4)."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _length(theirs: Mapping[str, Any]) -> int:
    names = ("max_length", "max_seq_length", "cutoff_len", "sequence_len")
    return next((int(theirs[name]) for name in names if theirs.get(name)), 2048)


def _batch(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    ours["train.micro_batch_tokens"] = int(value) * _length(theirs)
    notes.append(f"train.micro_batch_tokens: {value} rows of {_length(theirs)} tokens, packed without padding")


def _schedule(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    ours["optim.schedule"] = _SCHEDULES.get(str(value), "cosine")
    if str(value) not in _SCHEDULES:
        notes.append(f"optim.schedule: {value} is not known here; cosine instead")


def _half(name: str) -> Callable[..., None]:
    def turn(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
        if value in (True, "true", "auto"):
            ours["train.precision"] = "auto" if value == "auto" else name

    return turn


def _betas(index: int) -> Callable[..., None]:
    def turn(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
        betas = ours.setdefault("optim.betas", [0.9, 0.999])
        betas[index] = float(value)

    return turn


def _trackers(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    names = [name for name in (value if isinstance(value, list) else [value]) if name in _TRACKERS]
    if names:
        ours["train.trackers"] = names


def _kind(name: str) -> Callable[..., None]:
    def turn(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
        if value:
            ours["lora.kind"] = name

    return turn


def _adapter(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    if value in ("lora", "qlora", True):
        ours.setdefault("lora.kind", "lora")
    if value == "qlora":
        ours["lora.quantize"] = "nf4"


def _bits(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    quantize = {4: "nf4", 8: "int8", "4": "nf4", "8": "int8"}.get(value)
    if quantize:
        ours["lora.quantize"] = quantize


def _loads(bits: int) -> Callable[..., None]:
    def turn(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
        if value:
            _bits(bits, theirs, ours, notes)

    return turn


def _targets(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    names = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, list) else []
    names = [name.strip() for name in names if name.strip()]
    is_all = value is True or names in (["all"], ["all-linear"])
    ours["lora.target_modules"] = ["all-linear"] if is_all else names


def _trains_prompt(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    if value:
        ours["data.train_on"] = "all"


def _last_only(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    if value:
        ours["data.train_on"] = "last_assistant"


def _optimizer(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    name = (
        str(value)
        .removesuffix("_torch_fused")
        .removesuffix("_torch")
        .replace("_bnb_8bit", "_8bit")
        .replace("_32bit", "")
    )
    if name not in ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"):
        notes.append(f"optim.name: {value} is not known here; adamw instead")
    elif name != "adamw":
        ours["optim.name"] = name


def _datasets(part: str) -> Callable[..., None]:
    def turn(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
        entries = value if isinstance(value, list) else [value]
        ours[part] = [str(entry.get("path")) if isinstance(entry, dict) else str(entry) for entry in entries]
        if any(isinstance(entry, dict) and entry.get("type") for entry in entries):
            notes.append(f"{part}: the format of the rows is detected from their keys; tunesmith preview shows it")

    return turn


def _dtype(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    if str(value) == "float32":
        ours["train.precision"] = "fp32"


def _tuning(value: Any, theirs: Mapping[str, Any], ours: Tree, notes: list[str]) -> None:
    _adapter(value, theirs, ours, notes)
    if value not in ("lora", "full"):
        notes.append(f"finetuning_type: {value} is not known here; all weights are trained")


_TURNED: dict[str, Callable[..., None]] = {
    "per_device_train_batch_size": _batch, "micro_batch_size": _batch, "lr_scheduler_type": _schedule,
    "lr_scheduler": _schedule, "bf16": _half("bf16"), "fp16": _half("fp16"), "adam_beta1": _betas(0),
    "adam_beta2": _betas(1), "report_to": _trackers, "use_peft": _adapter, "adapter": _adapter,
    "finetuning_type": _tuning, "use_rslora": _kind("rslora"), "use_dora": _kind("dora"), "pissa_init": _kind("pissa"),
    "peft_use_rslora": _kind("rslora"), "peft_use_dora": _kind("dora"), "quantization_bit": _bits,
    "load_in_4bit": _loads(4), "load_in_8bit": _loads(8), "lora_target": _targets, "lora_target_modules": _targets,
    "lora_target_linear": _targets, "train_on_prompt": _trains_prompt, "train_on_inputs": _trains_prompt,
    "mask_history": _last_only, "optim": _optimizer, "optimizer": _optimizer, "datasets": _datasets("data.train"),
    "test_datasets": _datasets("data.eval"), "torch_dtype": _dtype, "dtype": _dtype,
}  # fmt: skip
_TURNED_WORDS = {
    "per_device_train_batch_size": "train.micro_batch_tokens, the tokens of one packed forward",
    "micro_batch_size": "train.micro_batch_tokens, the tokens of one packed forward",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "bf16": "train.precision bf16",
    "fp16": "train.precision fp16",
    "adam_beta1": "optim.betas, two numbers",
    "adam_beta2": "optim.betas, two numbers",
    "report_to": "train.trackers",
    "use_peft": "lora.kind lora",
    "adapter": "lora.kind lora",
    "finetuning_type": "lora.kind lora, or none",
    "use_rslora": "lora.kind rslora",
    "use_dora": "lora.kind dora",
    "pissa_init": "lora.kind pissa",
    "peft_use_rslora": "lora.kind rslora",
    "peft_use_dora": "lora.kind dora",
    "quantization_bit": "lora.quantize nf4 or int8",
    "load_in_4bit": "lora.quantize nf4",
    "load_in_8bit": "lora.quantize int8",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules all-linear",
    "train_on_prompt": "data.train_on all",
    "train_on_inputs": "data.train_on all",
    "mask_history": "data.train_on last_assistant",
    "optim": "a section; optim.name adamw",
    "optimizer": "optim.name",
    "datasets": "data.train",
    "test_datasets": "data.eval",
    "torch_dtype": "train.precision",
    "dtype": "train.precision",
}
