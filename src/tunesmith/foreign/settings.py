"""Convert settings that several tools have: optimizer, schedule, precision, adapter, trackers, lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunesmith.foreign.draft import Draft, is_number, is_on, number

Turn = Callable[[Draft, str, Any], None]
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
              "cosine_with_min_lr": "cosine"}  # fmt: skip
_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_apex_fused": "adamw",
    "adamw": "adamw", "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw", "paged_adamw_32bit": "paged_adamw", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
_OFFLOADED = ("offload", "unsloth", "legacy")  # ways of gradient checkpointing
_TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio")


def turn_batch(draft: Draft, key: str, value: Any) -> None:
    rows = number(value)
    if not is_number(rows) or rows < 1:
        draft.lose(key, value, "not a number of rows")
    else:
        draft.rows = int(rows)


def turn_schedule(draft: Draft, key: str, value: Any) -> None:
    name = str(value)
    draft.ours["optim.schedule"] = _SCHEDULES.get(name, "cosine")
    if name not in _SCHEDULES:
        draft.lose(key, value, "cosine instead; optim.schedule has cosine, linear, constant and minimind")
    if name == "constant":
        draft.ours["optim.warmup_ratio"] = 0.0


def turn_schedule_options(draft: Draft, key: str, value: Any) -> None:
    """min_lr_rate is a share of lr, min_lr a learning rate."""
    options = value if isinstance(value, dict) else {"": value}
    for name, below in options.items():
        lr = number(draft.theirs.get("learning_rate"))
        if name == "min_lr_rate" and is_number(number(below)):
            draft.ours["optim.min_lr_ratio"] = number(below)
        elif name == "min_lr" and is_number(number(below)) and is_number(lr) and lr:
            draft.ours["optim.min_lr_ratio"] = number(below) / lr
        else:
            draft.lose(f"{key}.{name}".rstrip("."), below, "optim.schedule has no such option")


def turn_optimizer(draft: Draft, key: str, value: Any) -> None:
    name = str(value)
    ours = _OPTIMIZERS.get(name)
    if name == "adamw_torch_4bit":
        ours = "adamw_8bit"
        draft.note(key, "4 bits there; here the state of AdamW has 8")
    if ours is None:
        draft.lose(key, value, "adamw instead; optim.name has adamw and its 8-bit and paged forms")
    draft.ours["optim.name"] = ours or "adamw"


def turn_half(name: str) -> Turn:
    def turn(draft: Draft, key: str, value: Any) -> None:
        if value == "auto":
            draft.ours.setdefault("train.precision", "auto")
        elif is_on(value):
            if draft.ours.get("train.precision") == name:
                draft.note(key, f"another key says {name} too")
            draft.ours["train.precision"] = name

    return turn


def turn_dtype(draft: Draft, key: str, value: Any) -> None:
    name = str(value).removeprefix("torch.")
    if name in ("float32", "fp32"):
        draft.ours["train.precision"] = "fp32"
    else:
        draft.note(key, f"{name}: how the weights are loaded; train.precision decides what is computed")


def turn_beta(index: int) -> Turn:
    def turn(draft: Draft, key: str, value: Any) -> None:
        if not is_number(number(value)):
            draft.lose(key, value, "not a number")
            return
        betas = draft.ours.setdefault("optim.betas", [0.9, 0.999])
        betas[index] = number(value)

    return turn


def turn_trackers(draft: Draft, key: str, value: Any) -> None:
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    known = [name for name in names if name in _TRACKERS]
    draft.ours["train.trackers"] = list(dict.fromkeys([*draft.ours.get("train.trackers", []), *known]))
    for name in names:
        if name not in (*_TRACKERS, "none"):
            draft.lose(key, name, f"trackers are {', '.join(_TRACKERS)}")


def turn_tracker(name: str) -> Turn:
    def turn(draft: Draft, key: str, value: Any) -> None:
        if is_on(value):
            turn_trackers(draft, key, name)

    return turn


def turn_kind(name: str) -> Turn:
    def turn(draft: Draft, key: str, value: Any) -> None:
        if is_on(value):
            draft.ours["lora.kind"] = name

    return turn


def turn_start(draft: Draft, key: str, value: Any) -> None:
    """How an adapter's first matrices are drawn."""
    name = str(value).lower()
    if name.startswith("pissa"):
        draft.ours["lora.kind"] = "pissa"
    elif name == "olora":
        draft.ours["lora.kind"] = "olora"
    elif name not in ("true", "gaussian"):
        draft.lose(key, value, "lora.kind has lora, rslora, dora, pissa and olora")


def turn_adapter(draft: Draft, key: str, value: Any) -> None:
    if not is_on(value):
        return
    draft.ours.setdefault("lora.kind", "lora")
    name = str(value).lower()
    if name == "qlora":
        draft.ours.setdefault("lora.quantize", "nf4")
    elif name not in ("lora", "true"):
        draft.lose(key, value, "lora instead; lora.kind has lora, rslora, dora, pissa and olora")


def turn_bits(draft: Draft, key: str, value: Any) -> None:
    quantize = {4: "nf4", 8: "int8"}.get(number(value)) if is_number(number(value)) else None
    if quantize:
        draft.ours["lora.quantize"] = quantize
    else:
        draft.lose(key, value, "lora.quantize has nf4 (4 bits) and int8")


def turn_load(bits: int) -> Turn:
    def turn(draft: Draft, key: str, value: Any) -> None:
        if is_on(value):
            turn_bits(draft, key, bits)

    return turn


def turn_quantizer(draft: Draft, key: str, value: Any) -> None:
    """BitsAndBytesConfig's options."""
    for name, below in (value if isinstance(value, dict) else {"": value}).items():
        if name in ("bnb_4bit_use_double_quant", "double_quantization"):
            draft.ours["lora.double_quant"] = is_on(below)
        elif name in ("load_in_4bit", "load_in_8bit"):
            turn_load(4 if "4" in name else 8)(draft, f"{key}.{name}", below)
        elif name == "quantization_bit":
            turn_bits(draft, f"{key}.{name}", below)
        elif name != "name":
            draft.note(f"{key}.{name}", "bitsandbytes' own value is kept")


def turn_targets(draft: Draft, key: str, value: Any) -> None:
    if isinstance(value, str) and any(mark in value for mark in "\\[(|*+^$"):
        if is_on(draft.theirs.get("lora_target_linear")):
            draft.note(key, f"{value}; all-linear (lora_target_linear) is trained")
            return
        # the name of the text part in a model that also reads pictures; loaded alone, its modules lack it
        pattern = value.replace("language_model.model.layers", "(language_model.)?(model.)?(language_model.)?layers")
        pattern = pattern.replace("language_model.layers", "(language_model.)?layers") if pattern == value else pattern
        if pattern != value:
            draft.note(key, "matches the layers of the text model alone too")
        draft.ours["lora.target_modules"] = [pattern]
        return
    names = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, list) else []
    names = [str(name).strip() for name in names if str(name).strip()]
    if names in (["all"], ["all-linear"]):
        names = ["all-linear"]
    if names and is_on(draft.theirs.get("lora_target_linear")):
        draft.note(key, f"{', '.join(names)}; all-linear (lora_target_linear) is trained")
    elif names:
        draft.ours["lora.target_modules"] = names
    else:
        draft.lose(key, value, "not a name, or a list of names, of modules")


def turn_all_linear(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.ours["lora.target_modules"] = ["all-linear"]


def turn_train_on_prompt(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.ours["data.train_on"] = "all"


def turn_last_only(draft: Draft, key: str, value: Any) -> None:
    if is_on(value):
        draft.ours["data.train_on"] = "last_assistant"


def turn_checkpointing(draft: Draft, key: str, value: Any) -> None:
    draft.ours["train.gradient_checkpointing"] = is_on(value)
    if str(value) in _OFFLOADED:
        draft.note(key, f"{value} moves activations to the CPU there; here they are recomputed")


def turn_no_checkpointing(draft: Draft, key: str, value: Any) -> None:
    draft.ours["train.gradient_checkpointing"] = not is_on(value)


def turn_steps(draft: Draft, key: str, value: Any) -> None:
    """-1 and 0 mean no limit."""
    steps = number(value)
    if not is_number(steps) or steps != int(steps) or steps < -1:
        draft.lose(key, value, "not a number of steps")
    elif steps > 0:
        draft.ours["train.max_steps"] = int(steps)


def turn_warmup(draft: Draft, key: str, value: Any) -> None:
    """Below 1, it is a share of the steps."""
    steps = number(value)
    if not is_number(steps):
        draft.lose(key, value, "not a number")
    elif 0 < steps < 1:
        draft.ours["optim.warmup_ratio"] = steps
    else:
        draft.ours["optim.warmup_steps"] = int(steps)


def turn_template(draft: Draft, key: str, value: Any) -> None:
    """A template's text, a file, or the name of one that the tool knows."""
    text = str(value)
    if "{%" in text or "{{" in text:
        draft.templates[draft.template_file] = text
        draft.ours["data.chat_template"] = draft.template_file
    elif text in ("chatml", "alpaca") or text.endswith(".jinja"):
        draft.ours["data.chat_template"] = text
    elif text.startswith("tokenizer_default") or text == "jinja":
        draft.note(key, "the model's own chat template is used")
    else:
        draft.note(key, f"the model's own chat template is used; for a model without one, set data.chat_template to "
                        f"a .jinja file of {text}")  # fmt: skip


def turn_special_tokens(draft: Draft, key: str, value: Any) -> None:
    """A tokenizer has its special tokens; those that it lacks are added."""
    listed = value if isinstance(value, list) else str(value).split(",")
    tokens = value if isinstance(value, dict) else {str(at): token for at, token in enumerate(listed)}
    added = []
    for name, token in tokens.items():
        if name in ("pad_token", "unk_token"):
            draft.note(f"{key}.{name}", "nothing is padded" if name == "pad_token" else "the tokenizer's own is kept")
        else:
            added += [str(item) for item in (token if isinstance(token, list) else [token]) if item]
    if added:
        known = draft.ours.get("model.add_tokens", [])
        draft.ours["model.add_tokens"] = list(dict.fromkeys([*known, *added]))
        draft.note(key, "tokens that the tokenizer has already are not added again")


def turn_overlong(draft: Draft, key: str, value: Any) -> None:
    ours = {"drop": "drop", "truncate": "truncate", "keep_start": "truncate", "raise": "error"}.get(str(value))
    if ours:
        draft.ours["data.overlong"] = ours
    else:
        draft.lose(key, value, "data.overlong has truncate, drop, split and error")


def turn_share(draft: Draft, key: str, value: Any) -> None:
    """Held-out rows; from 1 on it is a number of rows."""
    share = number(value)
    if is_number(share) and 0 <= share < 1:
        draft.ours["data.eval_split"] = share
    else:
        draft.lose(key, value, "a number of rows; data.eval_split is a share of them")


TURNS: dict[str, Turn] = {
    "per_device_train_batch_size": turn_batch, "micro_batch_size": turn_batch, "lr_scheduler_type": turn_schedule,
    "lr_scheduler": turn_schedule, "lr_scheduler_kwargs": turn_schedule_options, "bf16": turn_half("bf16"),
    "bfloat16": turn_half("bf16"), "pure_bf16": turn_half("bf16_pure"), "fp16": turn_half("fp16"),
    "float16": turn_half("fp16"), "float32": turn_half("fp32"), "torch_dtype": turn_dtype, "dtype": turn_dtype,
    "adam_beta1": turn_beta(0), "adam_beta2": turn_beta(1), "report_to": turn_trackers,
    "use_wandb": turn_tracker("wandb"), "use_swanlab": turn_tracker("swanlab"),
    "use_trackio": turn_tracker("trackio"), "use_tensorboard": turn_tracker("tensorboard"), "use_peft": turn_adapter,
    "adapter": turn_adapter, "use_rslora": turn_kind("rslora"), "use_dora": turn_kind("dora"),
    "peft_use_rslora": turn_kind("rslora"), "peft_use_dora": turn_kind("dora"), "pissa_init": turn_kind("pissa"),
    "init_lora_weights": turn_start, "peft_init_lora_weights": turn_start, "quantization_bit": turn_bits,
    "load_in_4bit": turn_load(4), "load_in_8bit": turn_load(8), "bnb_config_kwargs": turn_quantizer,
    "quantization_config": turn_quantizer, "quant_config": turn_quantizer, "lora_target": turn_targets,
    "lora_target_modules": turn_targets, "lora_target_linear": turn_all_linear, "target_modules": turn_targets,
    "train_on_prompt": turn_train_on_prompt, "train_on_inputs": turn_train_on_prompt, "mask_history": turn_last_only,
    "optim": turn_optimizer, "optimizer": turn_optimizer, "gradient_checkpointing": turn_checkpointing,
    "activation_checkpointing": turn_checkpointing, "enable_activation_checkpointing": turn_checkpointing,
    "disable_gradient_checkpointing": turn_no_checkpointing, "max_steps": turn_steps, "warmup_steps": turn_warmup,
    "chat_template": turn_template, "chat_template_jinja": turn_template, "special_tokens": turn_special_tokens,
    "tokens": turn_special_tokens, "add_tokens": turn_special_tokens, "add_special_tokens": turn_special_tokens,
    "excess_length_strategy": turn_overlong, "val_size": turn_share, "val_set_size": turn_share,
}  # fmt: skip
SWITCHES = (  # keys that are on or off
    "bf16", "bfloat16", "pure_bf16", "fp16", "float16", "float32", "use_wandb", "use_swanlab", "use_trackio",
    "use_tensorboard", "use_peft", "use_rslora", "use_dora", "peft_use_rslora", "peft_use_dora", "pissa_init",
    "load_in_4bit", "load_in_8bit", "lora_target_linear", "train_on_prompt", "train_on_inputs", "mask_history",
    "gradient_checkpointing", "activation_checkpointing", "enable_activation_checkpointing",
    "disable_gradient_checkpointing",
)  # fmt: skip
_SWITCHED = ("true", "false", "yes", "no", "on", "off", "none", "0", "1", "auto", "full", *_OFFLOADED)


def is_switch(value: Any) -> bool:
    """Whether it says on or off, in one of the ways of these tools."""
    return str(value).lower() in _SWITCHED
