"""The file of train.deepspeed: keys that are used, set by the run, or refused. DeepSpeed is not needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.config.deepspeed_file import find_refused, read_deepspeed, wants_deepspeed
from tunesmith.config.schema import RunConfig
from tunesmith.errors import ConfigError

# as the tools ship them: every value that a run decides is "auto"
AUTO_FILE = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "steps_per_print": 1e5,
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3, "overlap_comm": False, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_param_persistence_threshold": "auto", "stage3_gather_16bit_weights_on_model_save": True,
        "offload_optimizer": {"device": "none", "pin_memory": True}, "offload_param": {"device": "cpu"},
    },
}  # fmt: skip


def config_of(path: Path, content: object, **optim: object) -> RunConfig:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    train = {"output_dir": "o", "parallel": "deepspeed", "deepspeed": str(path)}
    return RunConfig.model_validate({"model": {"path": "m"}, "data": {"train": ["d"]}, "train": train, "optim": optim})


def problems_of(path: Path, content: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(config_of(path, content), "fp32")
    assert caught.value.code == "deepspeed-file"
    assert find_refused(str(path)) != ""
    return caught.value.problems


def test_auto_is_accepted_everywhere_and_needs_no_note(tmp_path: Path) -> None:
    file = read_deepspeed(config_of(tmp_path / "ds.json", AUTO_FILE), "bf16")
    assert (file.stage, file.notes) == (3, [])
    assert "reduce_bucket_size" not in file.zero  # DeepSpeed's own default
    assert file.zero["offload_param"] == {"device": "cpu"}
    assert "offload_optimizer" not in file.zero
    assert "auto" not in json.dumps(file.zero)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_is_enough(tmp_path: Path, stage: int) -> None:
    assert read_deepspeed(config_of(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}}), "fp32").notes == []


@pytest.mark.parametrize(
    ("content", "named", "ours"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu", "train.micro_batch_tokens"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", "train.grad_accum_steps"),
        ({"gradient_clipping": 0.5}, "gradient_clipping", "optim.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "bf16", "train.precision"),
        ({"fp16": {"enabled": True}}, "fp16", "train.precision"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, "optimizer.params.lr", "optim.lr"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "optim.name"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10}}}, "scheduler", "optim.schedule"),
        ({"activation_checkpointing": {"partition_activations": True}}, "activation_check", "gradient_checkpointing"),
        ({"prescale_gradients": True}, "prescale_gradients", "summed"),
        ({"communication_data_type": "bf16"}, "communication_data_type", "fp32"),
        ({"wandb": {"enabled": True}}, "wandb", "train.trackers"),
    ],
)
def test_what_the_run_sets_itself_is_named(tmp_path: Path, content: dict[str, object], named: str, ours: str) -> None:
    config = config_of(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}} | content, lr=1e-4)
    [note] = read_deepspeed(config, "fp32").notes
    assert named in note
    assert ours in note


def test_equal_settings_need_no_note(tmp_path: Path) -> None:
    content = {
        "zero_optimization": {"stage": 1}, "gradient_clipping": 1.0, "bf16": {"enabled": True},
        "fp16": {"enabled": False}, "communication_data_type": "fp32", "wandb": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.0}},
    }  # fmt: skip
    config = config_of(tmp_path / "ds.json", content, lr=1e-4, betas=[0.9, 0.95], weight_decay=0.0, max_grad_norm=1.0)
    assert read_deepspeed(config, "bf16").notes == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/n"}}}, "NVMe"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param: needs stage 3"),
        ({"zero_optimization": {"stage": 0}}, "ddp"),
        ({}, "stage"),
        ({"zero_optimization": {"stage": True}}, "stage"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}}, "reduce_bucket_size"),
        ({"zero_optimization": {"stage": 2, "overlapp_comm": True}}, "did you mean overlap_comm"),
        ({"zero_optimization": [2]}, "zero_optimization"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization"),
        ({"zero_optimization": {"stage": 2}, "pipeline": {"stages": 2}}, "pipeline"),
        ({"zero_optimization": {"stage": 2}, "compression_training": {"x": {"enabled": True}}}, "compression"),
        ({"zero_optimization": {"stage": 2}, "autotuning": {"enabled": True}}, "autotuning"),
        ({"zero_optimization": {"stage": 2}, "curriculum_learning": {"enabled": True}}, "curriculum"),
        ({"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}}, "tensor"),
        ({"zero_optimization": {"stage": 2}, "elasticity": {"enabled": True}}, "elastic"),
        ([], "object"),
        ("{", "JSON"),
        ('{"bf16": {}, "bf16": {}}', "twice"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, content: object, named: str) -> None:
    assert any(named in problem for problem in problems_of(tmp_path / "ds.json", content))


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 4, "zenflow": {"a": 1}}, "pipeline": {"stages": 2}, "typo": 1}
    assert len(problems_of(tmp_path / "ds.json", content)) == 4


def test_switched_off_features_are_not_refused(tmp_path: Path) -> None:
    content = {
        "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False},
        "autotuning": {"enabled": False}, "compression_training": {}, "sparse_gradients": False, "autotp_size": 1,
    }  # fmt: skip
    assert read_deepspeed(config_of(tmp_path / "ds.json", content), "fp32").notes == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path / "ds.json", {})
    (tmp_path / "ds.json").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        read_deepspeed(config, "fp32")
    assert find_refused(str(tmp_path / "ds.json")) == ""


def test_deepspeed_needs_its_file_and_the_file_means_deepspeed() -> None:
    base = {"model": {"path": "m"}, "data": {"train": ["d"]}}
    with pytest.raises(ValueError, match=r"train\.deepspeed"):
        RunConfig.model_validate({**base, "train": {"output_dir": "o", "parallel": "deepspeed"}})
    for parallel, wanted in (("auto", True), ("deepspeed", True), ("ddp", False), ("none", False)):
        train = {"output_dir": "o", "parallel": parallel, "deepspeed": "ds.json"}
        assert wants_deepspeed(RunConfig.model_validate({**base, "train": train}).train) == wanted


def test_deepspeed_needs_a_launcher(fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    error = fails(
        "train", "--model", "m", "--data", "d", "--output", tmp_path / "o", "--train.deepspeed", tmp_path / "ds.json"
    )
    assert error.code == "parallel-does-not-fit"
    assert "torchrun" in str(error)


@pytest.mark.parametrize(
    ("theirs", "kept"),
    [
        ({"deepspeed": "examples/deepspeed/ds_z3_config.json", "stage": "sft", "finetuning_type": "full"}, True),
        ({"base_model": "m", "sequence_len": 512, "deepspeed": "deepspeed_configs/zero2.json"}, True),
        ({"base_model": "m", "sequence_len": 512, "deepspeed": None}, False),
    ],
)
def test_convert_config_keeps_the_file(theirs: dict[str, object], kept: bool) -> None:
    from tunesmith.foreign.convert import convert

    converted = convert({"model_name_or_path": "m", "dataset": "d", **theirs} if "stage" in theirs else theirs)
    assert converted.ours.get("train.deepspeed") == (theirs["deepspeed"] if kept else None)
    assert any("torchrun" in note for note in converted.notes) == kept


def test_convert_config_says_what_would_be_refused(tmp_path: Path) -> None:
    from tunesmith.foreign.convert import convert

    (tmp_path / "z0.json").write_text('{"zero_optimization": {"stage": 0}}')
    converted = convert({"base_model": "m", "sequence_len": 512, "deepspeed": "z0.json"}, tmp_path)
    assert any("train.parallel ddp" in note for note in converted.notes)
