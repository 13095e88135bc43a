"""MiniMind's scripts and their flags, by generation, as far as tunesmith does what they do.

A generation is the last state of its scripts in the public repository before the next one: 2024 of 2025-01, 2025-02 of
2025-04-09, 2025-04 of 2025-10-15, 2025-10 of 2025-12-01, 2026-01 of 2026-03-23, minimind-3 of 2026-08-21.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Flags = dict[str, Any]  # name of a flag -> its default, whose type is the flag's
Kind = Literal["pretrain", "sft", "lora", "distillation", "reason", "chat"]


@dataclass(frozen=True, slots=True)
class Generation:
    """What the scripts of one generation do that no flag says.

    Attributes:
    dates: when its scripts were the newest.
    hidden, layers: names of the flags for the two sizes; "" where they are fixed in the code.
    folder: where its training scripts are, and are run; "" is the repository's own.
    tokenizer: folder of the tokenizer in the repository.
    seed: of its scripts.
    schedule: optim.schedule that fits; minimind begins at 1.1 times the learning rate.
    decay: weight decay of its optimizer.
    rank: of its LoRA.
    router: (train.router_loss, router_aux_loss_coef). In 2024 it was computed and not added to the loss.
    tracker: what --use_wandb logs to.
    is_dtype_used: its autocast takes --dtype; otherwise it computes in float16 and scales the loss.
    is_shuffled: one process draws the order of the rows.
    has_marks: its pre-training puts BOS and EOS around a text.
    roles_by_place: turns are user and assistant in turn, whatever their role is.
    """

    name: str
    dates: str
    hidden: str
    layers: str
    folder: str
    tokenizer: str
    seed: int
    schedule: str
    decay: float
    rank: int
    router: tuple[str, float]
    tracker: str
    is_dtype_used: bool
    is_shuffled: bool
    has_marks: bool
    roles_by_place: bool

    @property
    def is_3(self) -> bool:
        return self.name == "minimind-3"


_NEW = ("hidden_size", "num_hidden_layers", "trainer", "model")
GENERATIONS: dict[str, Generation] = {
    one.name: one
    for one in (  # the newest first
        Generation("minimind-3", "since 2026-03-24", *_NEW, 42, "cosine", 0.01, 16, ("layers", 5e-4), "swanlab",
                   True, True, True, False),
        Generation("2026-01", "2025-12-09 to 2026-03-23", *_NEW, 42, "cosine", 0.01, 8, ("sequences", 0.01), "swanlab",
                   True, True, True, False),
        Generation("2025-10", "2025-10-26 to 2025-12-08", *_NEW, 42, "minimind", 0.01, 8, ("sequences", 0.1), "swanlab",
                   True, True, False, False),
        Generation("2025-04", "2025-04-26 to 2025-10-25", *_NEW, 1337, "minimind", 0.01, 8, ("sequences", 0.1), "wandb",
                   False, False, False, True),
        Generation("2025-02", "2025-02-09 to 2025-04-25", "dim", "n_layers", "", "model/minimind_tokenizer", 1337,
                   "minimind", 0.01, 16, ("sequences", 0.1), "wandb", False, False, True, True),
        Generation("2024", "2024-08-28 to 2025-02-08", "", "", "", "model/minimind_tokenizer", 1337,
                   "cosine", 0.0, 8, ("sequences", 0.0), "wandb", False, True, True, False),
    )
}  # fmt: skip

SWITCHES = frozenset({"use_wandb", "ddp", "inference_rope_scaling"})  # take no value
BITS = frozenset({"use_moe", "from_resume", "use_compile", "student_use_moe", "teacher_use_moe"})  # 0 or 1, if numbers


@dataclass(frozen=True, slots=True)
class Script:
    """A script of theirs: what it is for, and its flags in each generation that has it."""

    kind: Kind
    flags: MappingProxyType[str, Flags]


def _script(kind: Kind, **flags: Flags) -> Script:
    """Names of generations have underscores here: g2025_04, minimind_3."""
    named = {name.removeprefix("g").replace("_", "-"): values for name, values in flags.items()}
    return Script(kind, MappingProxyType({name: named[name] for name in GENERATIONS if name in named}))


_OLD: Flags = {
    "out_dir": "out", "device": "", "dtype": "bfloat16", "use_wandb": False, "num_workers": 1, "ddp": False,
    "accumulation_steps": 1, "grad_clip": 1.0, "warmup_iters": 0, "log_interval": 100, "local_rank": -1,
}  # fmt: skip
_2024: Flags = {**_OLD, "save_interval": 1000}
_2025_02: Flags = {**_OLD, "save_interval": 100, "dim": 512, "n_layers": 8, "max_seq_len": 512, "use_moe": False}
_2025_04: Flags = {
    **_OLD, "out_dir": "../out", "save_interval": 100, "hidden_size": 512, "num_hidden_layers": 8, "max_seq_len": 512,
    "use_moe": False,
}  # fmt: skip
_2025_10: Flags = {
    "save_dir": "../out", "device": "", "dtype": "bfloat16", "num_workers": 1, "accumulation_steps": 1,
    "grad_clip": 1.0, "log_interval": 100, "save_interval": 100, "hidden_size": 512, "num_hidden_layers": 8,
    "max_seq_len": 512, "use_moe": 0, "from_resume": 0, "use_wandb": False,
}  # fmt: skip
_2026_01: Flags = {**_2025_10, "num_workers": 8, "save_interval": 1000, "max_seq_len": 340, "use_compile": 0}
_MINIMIND_3: Flags = {**_2026_01, "hidden_size": 768}


def _numbers(epochs: int, batch_size: int, learning_rate: float, project: str) -> Flags:
    return {
        "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "wandb_project": project,
    }  # fmt: skip


def _less(flags: Flags, *names: str) -> Flags:
    return {name: value for name, value in flags.items() if name not in names}


_SFT_PROJECT = "MiniMind-Full-SFT"
_PRETRAIN = _numbers(1, 32, 5e-4, "MiniMind-Pretrain") | {"accumulation_steps": 8}
_PRETRAIN_NEW = _PRETRAIN | {"save_weight": "pretrain", "from_weight": "none"}
_SFT_NEW = {"save_weight": "full_sft", "from_weight": "pretrain"}
_LORA_NEW = {"from_weight": "full_sft", "log_interval": 10}
_REASON = _numbers(1, 8, 1e-6, "MiniMind-Reasoning")
_REASON_OLD = _REASON | {"wandb_project": _SFT_PROJECT, "log_interval": 1, "save_interval": 50, "max_seq_len": 1024}
_REASON_NEW = _REASON | {"save_weight": "reason", "from_weight": "dpo", "data_path": "../dataset/r1_mix_1024.jsonl"}
_DISTILLATION = _numbers(6, 32, 5e-6, "MiniMind-Distillation")
_DISTILLATION_OLD = _DISTILLATION | {"wandb_project": _SFT_PROJECT}
_DISTILLATION_NEW = _DISTILLATION | {
    "save_weight": "full_dist", "data_path": "../dataset/sft_mini_512.jsonl", "student_hidden_size": 512,
    "student_num_layers": 8, "teacher_hidden_size": 768, "teacher_num_layers": 16, "from_student_weight": "full_sft",
    "from_teacher_weight": "full_sft", "alpha": 0.5, "temperature": 1.5, "save_interval": 100,
}  # fmt: skip
_SIZES_NEW = ("hidden_size", "num_hidden_layers")
_REASON_2026_01 = {**_2026_01, **_REASON_NEW, "save_interval": 100, "max_seq_len": 720}

_EVAL: Flags = {
    "lora_name": "None", "out_dir": "out", "temperature": 0.85, "top_p": 0.85, "device": "", "max_seq_len": 8192,
    "use_moe": False, "history_cnt": 0, "load": 0, "model_mode": 1,
}  # fmt: skip
_EVAL_2025_02: Flags = {**_EVAL, "dim": 512, "n_layers": 8, "stream": True}
_EVAL_2025_04: Flags = {**_EVAL, "hidden_size": 512, "num_hidden_layers": 8, "inference_rope_scaling": False}
_EVAL_2025_10: Flags = {
    "load_from": "model", "save_dir": "out", "weight": "full_sft", "lora_weight": "None", "hidden_size": 512,
    "num_hidden_layers": 8, "use_moe": 0, "inference_rope_scaling": False, "max_new_tokens": 8192, "temperature": 0.85,
    "top_p": 0.85, "historys": 0, "device": "",
}  # fmt: skip
_EVAL_2026_01: Flags = {**_EVAL_2025_10, "show_speed": 1}
_SERVE: Flags = {
    "out_dir": "out", "lora_name": "None", "max_seq_len": 8192, "use_moe": False, "load": 0, "model_mode": 1,
}  # fmt: skip
_SERVE_NEW: Flags = {
    "load_from": "../model", "save_dir": "out", "weight": "full_sft", "lora_weight": "None", "hidden_size": 512,
    "num_hidden_layers": 8, "max_seq_len": 8192, "use_moe": 0, "inference_rope_scaling": False, "device": "",
}  # fmt: skip

SCRIPTS: dict[str, Script] = {
    "1-pretrain.py": _script("pretrain", g2024={
        **_2024, **_numbers(20, 64, 2e-4, "MiniMind-Pretrain"), "accumulation_steps": 8,
        "data_path": "./dataset/pretrain_data.csv",
    }),
    "3-full_sft.py": _script("sft", g2024={**_2024, **_numbers(19, 32, 1e-4, _SFT_PROJECT)}),
    "4-lora_sft.py": _script("lora", g2024={
        **_less(_2024, "ddp", "local_rank"), **_numbers(20, 32, 1e-4, "MiniMind-LoRA"), "warmup_iters": 1000,
    }),
    "train_pretrain.py": _script(
        "pretrain",
        g2025_02={**_2025_02, **_PRETRAIN, "data_path": "./dataset/pretrain_hq.jsonl"},
        g2025_04={**_2025_04, **_PRETRAIN, "data_path": "../dataset/pretrain_hq.jsonl"},
        g2025_10={**_2025_10, **_PRETRAIN_NEW, "data_path": "../dataset/pretrain_hq.jsonl"},
        g2026_01={**_2026_01, **_PRETRAIN_NEW, "data_path": "../dataset/pretrain_hq.jsonl"},
        minimind_3={**_MINIMIND_3, **_PRETRAIN_NEW, "epochs": 2, "data_path": "../dataset/pretrain_t2t_mini.jsonl"},
    ),
    "train_full_sft.py": _script(
        "sft",
        g2025_02={**_2025_02, **_numbers(1, 32, 5e-5, _SFT_PROJECT), "data_path": "./dataset/sft_mini_512.jsonl"},
        g2025_04={**_2025_04, **_numbers(2, 16, 5e-7, _SFT_PROJECT), "data_path": "../dataset/sft_mini_512.jsonl"},
        g2025_10={**_2025_10, **_SFT_NEW, **_numbers(2, 16, 5e-7, _SFT_PROJECT),
                  "data_path": "../dataset/sft_mini_512.jsonl"},
        g2026_01={**_2026_01, **_SFT_NEW, **_numbers(2, 16, 1e-6, _SFT_PROJECT),
                  "data_path": "../dataset/sft_mini_512.jsonl"},
        minimind_3={**_MINIMIND_3, **_SFT_NEW, **_numbers(2, 16, 1e-5, _SFT_PROJECT), "max_seq_len": 768,
                    "data_path": "../dataset/sft_t2t_mini.jsonl"},
    ),
    "train_lora.py": _script(
        "lora",
        g2025_02={**_2025_02, **_numbers(50, 16, 5e-5, "MiniMind-LoRA-SFT"), "save_interval": 1,
                  "lora_name": "lora_identity", "data_path": "./dataset/lora_identity.jsonl"},
        g2025_04={**_2025_04, **_numbers(10, 32, 1e-4, "MiniMind-LoRA-SFT"), "lora_name": "lora_medical",
                  "data_path": "../dataset/lora_medical.jsonl"},
        g2025_10={**_2025_10, **_LORA_NEW, **_numbers(50, 32, 1e-4, "MiniMind-LoRA"), "save_interval": 1,
                  "save_dir": "../out/lora", "lora_name": "lora_identity",
                  "data_path": "../dataset/lora_identity.jsonl"},
        g2026_01={**_2026_01, **_LORA_NEW, **_numbers(50, 32, 1e-4, "MiniMind-LoRA"), "save_dir": "../out/lora",
                  "lora_name": "lora_identity", "data_path": "../dataset/lora_identity.jsonl"},
        minimind_3={**_MINIMIND_3, **_LORA_NEW, **_numbers(10, 32, 1e-4, "MiniMind-LoRA"),
                    "lora_name": "lora_medical", "data_path": "../dataset/lora_medical.jsonl"},
    ),
    "train_distillation.py": _script(
        "distillation",
        g2025_02={**_less(_2025_02, "dim", "n_layers", "max_seq_len", "use_moe"), **_DISTILLATION_OLD,
                  "data_path": "./dataset/sft_data.jsonl"},
        g2025_04={**_less(_2025_04, *_SIZES_NEW, "use_moe"), **_DISTILLATION_OLD,
                  "data_path": "../dataset/sft_xxx.jsonl"},
        g2025_10={**_less(_2025_10, *_SIZES_NEW), **_DISTILLATION_NEW},
        g2026_01={**_less(_2026_01, *_SIZES_NEW), **_DISTILLATION_NEW},
        minimind_3={**_less(_MINIMIND_3, *_SIZES_NEW, "use_moe"), **_DISTILLATION_NEW, "student_hidden_size": 768,
                    "teacher_num_layers": 8, "student_use_moe": 0, "teacher_use_moe": 1,
                    "data_path": "../dataset/sft_t2t_mini.jsonl"},
    ),
    "train_distill_reason.py": _script(
        "reason",
        g2025_02={**_2025_02, **_REASON_OLD, "data_path": "./dataset/r1_mix_1024.jsonl"},
        g2025_04={**_2025_04, **_REASON_OLD, "data_path": "../dataset/r1_mix_1024.jsonl"},
        g2025_10={**_2025_10, **_REASON_NEW, "max_seq_len": 1024},
        g2026_01=_less(_REASON_2026_01, "use_compile"),
    ),
    "train_reason.py": _script("reason", g2026_01=_REASON_2026_01),
    "0-eval_pretrain.py": _script("chat", g2024={}),
    "2-eval.py": _script("chat", g2024={}),
    "2-eval_chat.py": _script("chat", g2024={}),
    "eval_model.py": _script("chat", g2025_02=_EVAL_2025_02, g2025_04=_EVAL_2025_04),
    "eval_llm.py": _script(
        "chat",
        g2025_04={**_EVAL_2025_04, "load": 1, "model_mode": 5},
        g2025_10=_EVAL_2025_10,
        g2026_01=_EVAL_2026_01,
        minimind_3={**_EVAL_2026_01, "hidden_size": 768, "top_p": 0.95, "open_thinking": 0},
    ),
    "serve_openai_api.py": _script(
        "chat",
        g2025_02={**_SERVE, "dim": 512, "n_layers": 8},
        g2025_04={**_SERVE, "hidden_size": 768, "num_hidden_layers": 16},
        g2025_10=_SERVE_NEW,
        g2026_01=_SERVE_NEW,
        minimind_3={**_SERVE_NEW, "hidden_size": 768},
    ),
    "web_demo.py": _script("chat", g2025_02={}, g2025_04={}, g2025_10={}, g2026_01={}, minimind_3={}),
}  # fmt: skip

FOLDERS = {"serve_openai_api.py": "scripts", "web_demo.py": "scripts"}
"""Folders of scripts that talk to a model; the others are in the repository's own."""

OTHERS: dict[str, str] = {
    "5-dpo_train.py": "preference training (dpo)", "train_dpo.py": "preference training (dpo)",
    "train_ppo.py": "reinforcement learning (ppo)", "train_grpo.py": "reinforcement learning (grpo)",
    "train_spo.py": "reinforcement learning (spo)", "train_agent.py": "reinforcement learning (agents)",
    "rollout_engine.py": "reinforcement learning",
}  # fmt: skip
"""Scripts for what tunesmith does not do, and what that is."""
ELSEWHERE: dict[str, str] = {
    "train_tokenizer.py": "use `tunesmith tokenizer --data D --vocab-size 6400 --output DIR`",
    "convert_model.py": "it converts weights; name the .pth itself as the model",
    "export_model.py": "it converts weights; name the .pth itself as the model",
    "data_process.py": "it prepares data; tunesmith reads the data itself (docs/data.md)",
    "eval_toolcall.py": "it tests tool calls; `tunesmith chat` talks to the model, without tools",
    "eval_ceval.py": "it is a benchmark; `tunesmith chat` talks to the model",
    "chat_api.py": "it is a client of a server; `tunesmith chat` talks to the model itself",
    "chat_openai_api.py": "it is a client of a server; `tunesmith chat` talks to the model itself",
    "my_openai_api.py": "it is a server of 2024 without flags; `tunesmith chat` talks to the model",
    "fast_inference.py": "it is a page of 2024 without flags; `tunesmith chat` talks to the model",
    "fast_infenence.py": "it is a page of 2024 without flags; `tunesmith chat` talks to the model",
}  # fmt: skip
"""Scripts that have no run file, and what to do instead."""

DATA_FILES: dict[str, tuple[str, ...]] = {
    "minimind-3": ("pretrain_t2t.jsonl", "pretrain_t2t_mini.jsonl", "sft_t2t.jsonl", "sft_t2t_mini.jsonl"),
    "2026-01": ("pretrain_hq.jsonl", "sft_mini_512.jsonl", "sft_512.jsonl", "sft_1024.jsonl", "sft_2048.jsonl",
                "r1_mix_1024.jsonl"),
    "2024": ("pretrain_data.csv", "pretrain_data.bin", "sft_data_single.csv", "sft_data_multi.csv"),
}  # fmt: skip
"""Published data sets that came with one generation, and the newest generation that uses them."""
