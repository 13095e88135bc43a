"""Tell which tool a config is for, and whether it is one for training that tunesmith does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.foreign.draft import is_on

AXOLOTL, LLAMA_FACTORY, TRL = "axolotl", "llama-factory", "trl"
_AXOLOTL_KEYS = ("base_model", "sequence_len", "num_epochs", "pretraining_dataset", "test_datasets")
_LLAMA_FACTORY_KEYS = ("stage", "finetuning_type", "cutoff_len", "template", "train_dataset", "infer_backend",
                       "export_dir", "lora_target", "dataset_dir")  # fmt: skip
_TRL_KEYS = ("model_name_or_path", "dataset_name", "dataset_mixture", "dataset_mixer", "per_device_train_batch_size",
             "num_train_epochs", "learning_rate")  # fmt: skip
_PREFERENCE_KEYS = ("beta", "max_prompt_length", "rl_beta", "orpo_alpha", "cpo_alpha", "pref_beta", "pref_loss",
                    "desirable_weight", "undesirable_weight")  # fmt: skip
_REINFORCED_KEYS = ("num_generations", "max_completion_length", "reward_funcs", "reward_weights", "ebft")
_PICTURE_KEYS = ("processor_type", "image_max_pixels", "video_max_pixels", "audio_sampling_rate", "image_size",
                 "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_mm_modules", "media_dir")  # fmt: skip
_STAGES = {"dpo": "preference training (dpo)", "kto": "preference training (kto)", "rm": "training of a reward model",
           "ppo": "reinforcement learning (ppo)"}  # fmt: skip
_REINFORCED = ("grpo", "gdpo", "ppo", "rloo", "reinforce", "ebft")


def find_tool(theirs: Mapping[str, Any]) -> str:
    """The tool whose keys a file has; "" where it has none."""
    for tool, keys in ((AXOLOTL, _AXOLOTL_KEYS), (LLAMA_FACTORY, _LLAMA_FACTORY_KEYS), (TRL, _TRL_KEYS)):
        if any(key in theirs for key in keys):
            return tool
    return ""


def find_method(theirs: Mapping[str, Any]) -> str:
    """What a file is for: "sft" or "pretraining", which tunesmith does; else in words, for a refusal."""
    launcher = next((key for key in ("compute_environment", "distributed_type") if key in theirs), None)
    if launcher:
        return "launch settings of accelerate"
    if "base_model" not in theirs and "provider" in theirs:
        return "settings of a cloud machine"
    return (
        _without_training(theirs)
        or _other_method(theirs)
        or _other_data(theirs)
        or ("pretraining" if theirs.get("pretraining_dataset") or theirs.get("stage") == "pt" else "sft")
    )


def _without_training(theirs: Mapping[str, Any]) -> str:
    peft = theirs.get("peft_config")
    if theirs.get("export_dir") or (isinstance(peft, dict) and peft.get("export_dir")):
        return "a merge or an export"
    is_training = any(is_on(theirs.get(key)) for key in ("do_train", "train_dataset", "dataset", "datasets"))
    if theirs.get("infer_backend") and not is_training:
        return "inference"
    return "a prediction on held-out data" if is_on(theirs.get("do_predict")) and not is_training else ""


def _other_method(theirs: Mapping[str, Any]) -> str:
    rl, stage = str(theirs.get("rl") or "").lower(), str(theirs.get("stage") or "").lower()
    if rl in _REINFORCED or any(theirs.get(key) for key in _REINFORCED_KEYS):
        return f"reinforcement learning{f' ({rl})' if rl else ''}"
    if rl:
        return f"preference training ({rl})"
    if stage in _STAGES:
        return _STAGES[stage]
    if is_on(theirs.get("reward_model")) or is_on(theirs.get("process_reward_model")):
        return "training of a reward model"
    if any(key in theirs for key in _PREFERENCE_KEYS) or theirs.get("loss_type") in ("sigmoid", "apo_zero", "ipo"):
        return "preference training"
    if "dpo" in str(theirs.get("train_dataset") or ""):
        return "preference training (dpo)"
    return ""


def _other_data(theirs: Mapping[str, Any]) -> str:
    if "diffusion" in theirs or "diffusion" in str(theirs.get("plugins")):
        return "training of a text diffusion model"
    if "SequenceClassification" in str(theirs.get("model_type")) or theirs.get("num_labels"):
        return "training of a classifier"
    is_raw = is_on(theirs.get("skip_prepare_dataset")) and theirs.get("remove_unused_columns") is False
    is_multimodal = any(theirs.get(key) for key in _PICTURE_KEYS) or "multimodal" in str(theirs.get("train_dataset"))
    return "training on pictures, sound or video" if is_raw or is_multimodal else ""
