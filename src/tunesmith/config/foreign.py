"""Names that transformers, TRL, peft, LLaMA-Factory, Axolotl and MiniMind use, and what they are called here."""

from __future__ import annotations

from tunesmith.config.foreign_reasons import HARMLESS_KEYS, MISSING_KEYS
from tunesmith.config.suggest import suggest_words

# their key -> our key, same value
SAME = {
    "model_name_or_path": "model.path", "base_model": "model.path", "from_weight": "model.path",
    "tokenizer_name_or_path": "model.tokenizer", "tokenizer_path": "model.tokenizer",
    "model_revision": "model.revision", "revision_of_model": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "add_tokens": "model.add_tokens", "add_special_tokens": "model.add_tokens",
    "dataset_name": "data.train", "dataset": "data.train", "train_dataset": "data.train", "data_path": "data.train",
    "pretraining_dataset": "data.train", "eval_dataset": "data.eval",
    "max_length": "data.max_seq_len", "max_seq_length": "data.max_seq_len", "cutoff_len": "data.max_seq_len",
    "sequence_len": "data.max_seq_len", "val_size": "data.eval_split", "val_set_size": "data.eval_split",
    "test_split_size": "data.eval_split", "max_samples": "data.limit", "chat_template_path": "data.chat_template",
    "chat_template_jinja": "data.chat_template", "dataset_text_field": "data.fields.text",
    "chat_template_kwargs": "data.template_kwargs", "learning_rate": "optim.lr", "warmup_ratio": "optim.warmup_ratio",
    "warmup_steps": "optim.warmup_steps", "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm", "grad_clip": "optim.max_grad_norm", "adam_epsilon": "optim.eps",
    "adam_eps": "optim.eps", "cosine_min_lr_ratio": "optim.min_lr_ratio",
    "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "max_steps": "train.max_steps",
    "gradient_accumulation_steps": "train.grad_accum_steps", "accumulation_steps": "train.grad_accum_steps",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing", "torch_compile": "train.compile",
    "use_compile": "train.compile", "full_determinism": "train.deterministic", "seed": "train.seed",
    "logging_steps": "train.log_steps", "log_interval": "train.log_steps", "eval_steps": "train.eval_steps",
    "save_steps": "train.save_steps", "save_interval": "train.save_steps",
    "save_total_limit": "train.keep_checkpoints", "output_dir": "train.output_dir", "save_dir": "train.output_dir",
    "early_stopping_patience": "train.early_stop_patience", "early_stopping_steps": "train.early_stop_patience",
    "r": "lora.rank", "lora_r": "lora.rank", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout", "lora_modules_to_save": "lora.modules_to_save",
    "additional_target": "lora.modules_to_save", "lora_target_parameters": "lora.target_parameters",
    "add_system_ratio": "data.system_prompt_share", "empty_think_ratio": "data.empty_think_share",
    "loraplus_lr_ratio": "lora.lr_ratio", "use_bnb_nested_quant": "lora.double_quant",
    "double_quantization": "lora.double_quant",
}  # fmt: skip

# their key -> our key and how it differs
OTHERWISE = {
    "per_device_train_batch_size": "train.micro_batch_tokens, the tokens of one packed forward",
    "micro_batch_size": "train.micro_batch_tokens, the tokens of one packed forward",
    "batch_size": "train.micro_batch_tokens, the tokens of one packed forward",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_kwargs": "optim.min_lr_ratio",
    "bf16": "train.precision bf16",
    "bfloat16": "train.precision bf16",
    "pure_bf16": "train.precision bf16_pure",
    "fp16": "train.precision fp16",
    "float16": "train.precision fp16",
    "float32": "train.precision fp32",
    "torch_dtype": "train.precision",
    "dtype": "train.precision",
    "adam_beta1": "optim.betas, two numbers",
    "adam_beta2": "optim.betas, two numbers",
    "report_to": "train.trackers",
    "use_wandb": "train.trackers wandb",
    "use_swanlab": "train.trackers swanlab",
    "use_trackio": "train.trackers trackio",
    "use_tensorboard": "train.trackers tensorboard",
    "use_peft": "lora.kind lora",
    "adapter": "lora.kind lora",
    "peft": "the section lora",
    "peft_config": "the section lora",
    "lora_config": "the section lora",
    "finetuning_type": "lora.kind lora, or none",
    "use_rslora": "lora.kind rslora",
    "use_dora": "lora.kind dora",
    "pissa_init": "lora.kind pissa",
    "init_lora_weights": "lora.kind pissa or olora; lora otherwise",
    "peft_init_lora_weights": "lora.kind pissa or olora; lora otherwise",
    "peft_use_rslora": "lora.kind rslora",
    "peft_use_dora": "lora.kind dora",
    "quantization_bit": "lora.quantize nf4 or int8",
    "quantization_config": "lora.quantize nf4 or int8",
    "quant_config": "lora.quantize nf4 or int8",
    "bnb_config_kwargs": "lora.quantize and lora.double_quant",
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
    "dataset_mixture": "data.train",
    "dataset_mixer": "data.train",
    "dataset_config": "data.train owner/name:CONFIG:SPLIT",
    "dataset_train_split": "data.train owner/name:SPLIT",
    "dataset_test_split": "data.eval owner/name:SPLIT",
    "dataset_splits": "data.train owner/name:SPLIT",
    "test_datasets": "data.eval",
    "dataset_dir": "data.train FOLDER:NAME, for a folder with dataset_info.json",
    "dataset_kwargs": "data.fields and data.chat_template",
    "formatting_func": "data.fields.prompt and data.fields.completion name the columns; data.chat_template the text",
    "data_collator": "train.micro_batch_tokens; batches are packed, and labels proven",
    "response_template": "data.train_on assistant, the default",
    "excess_length_strategy": "data.overlong truncate or drop",
    "truncation_mode": "data.overlong truncate, which cuts the end",
    "default_system": "data.system_prompts, for rows without a system turn",
    "default_system_message": "data.system_prompts, for rows without a system turn",
    "enable_thinking": "data.template_kwargs.enable_thinking",
    "preserve_thinking": "data.template_kwargs, as the template calls it",
    "chat_template": "data.chat_template, a .jinja file, chatml, alpaca or none",
    "tokens": "model.add_tokens",
    "special_tokens": "model.add_tokens, for tokens that the tokenizer does not have",
    "split_special_tokens": "data.control_text plain, the default",
    "saves_per_epoch": "train.save_steps, where 0.25 is a quarter of all steps",
    "evals_per_epoch": "train.eval_steps, where 0.25 is a quarter of all steps",
    "disable_gradient_checkpointing": "train.gradient_checkpointing false",
    "train_from_scratch": "model.path new:PRESET",
    "bnb_4bit_use_double_quant": "lora.double_quant",
    "dim": "model.config.hidden_size, for a new:PRESET model",
    "hidden_size": "model.config.hidden_size, for a new:PRESET model",
    "n_layers": "model.config.num_hidden_layers, for a new:PRESET model",
    "n_heads": "model.config.num_attention_heads, for a new:PRESET model",
    "n_kv_heads": "model.config.num_key_value_heads, for a new:PRESET model",
    "num_hidden_layers": "model.config.num_hidden_layers, for a new:PRESET model",
    "vocab_size": "tunesmith tokenizer --vocab-size, which makes the tokenizer",
    "use_moe": "model.path new:minimind-3-moe",
    "lora_name": "train.output_dir, which names the run",
    "torchrun": "tunesmith train, in one process",
}  # fmt: skip


def explain_key(key: str) -> str:
    """What to use instead of a key of another tool; "" for an unknown key."""
    name = key.rpartition(".")[2]
    if name in SAME:
        return f"here it is called {SAME[name]}"
    if name in OTHERWISE:
        return f"here it is {OTHERWISE[name]}"
    if name in HARMLESS_KEYS:
        return HARMLESS_KEYS[name]
    return f"has no counterpart: {MISSING_KEYS[name]}" if name in MISSING_KEYS else ""


def explain_typo(key: str) -> tuple[str, str]:
    """The name of another tool that a mistyped key is nearest to, and its hint; ("", "") where none is near."""
    found = suggest_words(key.rpartition(".")[2], (*SAME, *OTHERWISE))
    return (found[0], explain_key(found[0])) if found else ("", "")
