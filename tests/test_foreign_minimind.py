"""MiniMind's command lines become run files: every flag of every generation is converted or named."""

from __future__ import annotations

import contextlib
import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import chat_row, raises, write_jsonl
from tunesmith.config.choices import MINIMIND_GENERATIONS
from tunesmith.config.schema import RunConfig
from tunesmith.errors import ConfigError, TunesmithError, UsageError
from tunesmith.foreign.convert import Converted
from tunesmith.foreign.minimind import convert_command, preset_of
from tunesmith.foreign.minimind_command import find_script, read_command
from tunesmith.foreign.minimind_flags import BITS, ELSEWHERE, GENERATIONS, OTHERS, SCRIPTS, SWITCHES

# names and defaults of the scripts' own parsers at the dates in minimind_flags.py, and all names that one ever had
GOLDEN = json.loads((Path(__file__).parent / "golden" / "minimind_flags.json").read_text(encoding="utf-8"))
EACH = [(name, generation) for name, script in SCRIPTS.items() for generation in script.flags]


@pytest.mark.parametrize(("name", "generation"), EACH)
def test_the_flags_are_those_of_their_parsers(name: str, generation: str) -> None:
    known = SCRIPTS[name].flags[generation]
    theirs = GOLDEN["by_generation"].get(name, {}).get(generation, {})
    # of scripts without a parser there is nothing to compare; --inference_rope_scaling came last in 2025-04
    assert {flag: (type(value), value) for flag, value in known.items()} == {
        flag: (type(value), value) for flag, value in theirs.items()
    }


def test_every_flag_that_a_script_ever_had_is_known() -> None:
    assert set(GOLDEN["ever"]) == {name for name, script in SCRIPTS.items() if any(script.flags.values())}
    for name, flags in GOLDEN["ever"].items():
        assert set(flags.split()) == {flag for known in SCRIPTS[name].flags.values() for flag in known}, name


def test_generations_can_be_chosen() -> None:
    assert MINIMIND_GENERATIONS[: len(GENERATIONS)] == tuple(GENERATIONS)


def other_value(flag: str, default: Any) -> str:
    """Another value than the default, as a word."""
    if flag in BITS and not isinstance(default, bool):
        return str(1 - default)
    if flag == "load":
        return "0" if default else "1"
    if flag == "model_mode":
        return "2"
    named = {"dtype": "float16", "device": "cpu", "from_weight": "other", "load_from": "some/folder"}
    if flag in named:
        return named[flag]
    return "other" if isinstance(default, str) else str(default * 2 + 1)


def body(converted: Converted) -> tuple[str, list[str], str]:
    """All that is said, without the command of theirs that heads a run file."""
    lines = converted.text.splitlines()
    remarks = [remark for remark in converted.remarks() if not remark.startswith("note: generation:")]
    return "\n".join(line for line in lines if not line.startswith("# MiniMind")), remarks, converted.command


@pytest.mark.parametrize(("name", "generation"), EACH)
def test_no_flag_disappears(name: str, generation: str) -> None:
    """With a flag at another value, the run file, a remark or the command is another; all of them are valid."""
    whole = convert_command(["python", name], generation)
    assert whole.problems == []
    if whole.text:
        RunConfig.model_validate(yaml.safe_load(whole.text))
    for flag, default in SCRIPTS[name].flags[generation].items():
        value = [] if flag in SWITCHES else [other_value(flag, default)]
        changed = convert_command(["python", name, f"--{flag}", *value], generation)
        assert body(changed) != body(whole), flag
        assert changed.problems == [], flag


MIND_3 = ["train_pretrain.py", "train_full_sft.py", "train_lora.py", "train_distillation.py", "eval_llm.py"]


def test_no_flag_disappears_beside_others() -> None:
    """Of a command with every flag, each one's absence shows."""
    for name in MIND_3:
        flags = SCRIPTS[name].flags["minimind-3"]
        words = {f: [f"--{f}"] if f in SWITCHES else [f"--{f}", other_value(f, d)] for f, d in flags.items()}
        if name == "eval_llm.py":
            words["load_from"] = ["--load_from", "model"]  # a folder has its own sizes and weights
        whole = convert_command([name, *(word for given in words.values() for word in given)], "minimind-3")
        for left_out in words:
            less = [word for flag, given in words.items() if flag != left_out for word in given]
            is_other = body(convert_command([name, *less], "minimind-3")) != body(whole)
            assert is_other or left_out == "load_from", (name, left_out)  # which is at its default


WALK_THROUGHS: dict[str, dict[str, Any]] = {
    "python train_full_sft.py --batch_size 64 --dim 512 --n_layers 8 --max_seq_len 512 --out_dir out --data_path "
    "./dataset/sft_mini_512.jsonl": {
        "model.path": "out/pretrain_512.pth", "model.tokenizer": "model/minimind_tokenizer",
        "data.train": ["dataset/sft_mini_512.jsonl"], "data.max_seq_len": 512, "train.micro_batch_tokens": 64 * 512,
        "optim.lr": 5e-5, "optim.schedule": "minimind", "optim.warmup_ratio": 0.0, "optim.weight_decay": 0.01,
        "optim.max_grad_norm": 1.0, "train.epochs": 1.0, "train.grad_accum_steps": 1, "train.precision": "auto",
        "train.seed": 1337, "train.output_dir": "out/full_sft_512",
    },
    "python trainer/train_full_sft.py --epochs 2 --batch_size 16 --learning_rate 1e-6 --from_weight pretrain "
    "--data_path ../dataset/sft_mini_512.jsonl": {
        "model.path": "out/pretrain_512.pth", "model.tokenizer": "model", "data.train": ["dataset/sft_mini_512.jsonl"],
        "data.max_seq_len": 340, "data.empty_think_share": 0.05, "train.micro_batch_tokens": 16 * 340, "optim.lr": 1e-6, "optim.schedule": "cosine",
        "optim.min_lr_ratio": 0.1, "optim.warmup_ratio": 0.0, "optim.weight_decay": 0.01, "optim.max_grad_norm": 1.0,
        "train.epochs": 2.0, "train.grad_accum_steps": 1, "train.precision": "auto", "train.seed": 42,
        "train.output_dir": "out/full_sft_512",
    },
    "python trainer/train_full_sft.py --from_weight full_sft --epochs 1": {
        "model.path": "out/full_sft_768.pth", "model.tokenizer": "model", "data.train": ["dataset/sft_t2t_mini.jsonl"],
        "data.max_seq_len": 768, "data.empty_think_share": 0.2, "train.micro_batch_tokens": 16 * 768, "optim.lr": 1e-5, "optim.schedule": "cosine",
        "optim.min_lr_ratio": 0.1, "optim.warmup_ratio": 0.0, "optim.weight_decay": 0.01, "optim.max_grad_norm": 1.0,
        "train.epochs": 1.0, "train.grad_accum_steps": 1, "train.precision": "auto", "train.seed": 42,
        "train.output_dir": "out/full_sft_768",
    },
}  # fmt: skip
WALKED_TO_CHAT = {
    "python eval_model.py --model_mode 0 --dim 512 --n_layers 8 --out_dir out --load 0":
        "tunesmith chat out/pretrain_512.pth --tokenizer model/minimind_tokenizer --chat-template none "
        "--temperature 0.85 --top-p 0.85 --max-new-tokens 8192",
    "python eval_llm.py --weight full_sft":
        "tunesmith chat out/full_sft_768.pth --tokenizer model --temperature 0.85 --top-p 0.95 --max-new-tokens 8192",
    "streamlit run web_demo.py": "tunesmith serve ../minimind-3 --port 8501",
    "python serve_openai_api.py": "tunesmith serve ../out/full_sft_768.pth --tokenizer ../model --name minimind --port 8998",
}  # fmt: skip


@pytest.mark.parametrize("command", WALK_THROUGHS)
def test_commands_of_the_walk_throughs(run, command: str) -> None:
    code, out, err = run("convert-config", "--from", "minimind", "--", *shlex.split(command))
    assert code == 0, err
    wanted = WALK_THROUGHS[command]
    assert convert_command([command]).ours == wanted
    assert yaml.safe_load(out)["train"]["output_dir"] == wanted["train.output_dir"]
    assert out.splitlines()[0].endswith(command)
    assert out.splitlines()[1] == "# tunesmith train run.yaml"
    assert "note: generation: " in err


@pytest.mark.parametrize("command", WALKED_TO_CHAT)
def test_scripts_that_talk_to_a_model_become_chat(run, command: str) -> None:
    code, out, err = run("convert-config", "--from", "minimind", "--", *shlex.split(command))
    assert (code, out) == (0, WALKED_TO_CHAT[command] + "\n"), err
    with raises(ConfigError, "no-run-file", "--output"):
        convert_command([command], output=Path("run.yaml"))


def test_resuming_is_another_command() -> None:
    converted = convert_command(["python trainer/train_full_sft.py --from_resume 1"])
    assert converted.command == "tunesmith train run.yaml"
    assert "# to continue: tunesmith resume out/full_sft_768\n" in converted.text
    assert any("from_resume" in note for note in converted.notes)


def test_pre_training_begins_with_a_preset() -> None:
    def begin(command: str) -> tuple[str, dict[str, Any]]:
        ours = convert_command([command]).ours
        fields = {key[13:]: value for key, value in ours.items() if key.startswith("model.config.")}
        return str(ours["model.path"]), fields

    assert begin("python train_pretrain.py --dim 512 --n_layers 8") == ("new:minimind-26m", {})
    assert begin("python train_pretrain.py --dim 768 --n_layers 16") == ("new:minimind-104m", {})
    assert begin("python train_pretrain.py --hidden_size 768") == ("new:minimind-64m", {})
    small = {"hidden_size": 64, "head_dim": 8, "intermediate_size": 256, "num_hidden_layers": 2}
    assert begin("python train_pretrain.py --hidden_size 64 --num_hidden_layers 2") == ("new:minimind-64m", small)
    old = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    assert begin("python train_pretrain.py --dim 64 --n_layers 2") == ("new:minimind-26m", old)
    first = {"num_attention_heads": 16, "num_key_value_heads": 8,
             "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
    assert begin("python 1-pretrain.py") == ("new:minimind-26m", first)
    assert begin("python train_pretrain.py --from_weight pretrain --hidden_size 512") == ("../out/pretrain_512.pth", {})


def test_presets_are_those_of_the_package() -> None:
    from tunesmith.model.presets import PRESETS

    for one in GENERATIONS.values():
        for hidden, layers in ((512, 8), (768, 8), (768, 16), (640, 8), (64, 2)):
            for is_moe in (False, True):
                name, changed = preset_of(one, hidden, layers, is_moe)
                values = PRESETS[name] | changed
                assert (values["hidden_size"], values["num_hidden_layers"]) == (hidden, layers)
                width = values["intermediate_size"]
                assert width == (-(-hidden * 3.14159265 // 64) if one.is_3 else -(-int(hidden * 8 / 3) // 64)) * 64
                assert not is_moe or values["moe_intermediate_size"] == width


def test_an_adapter_is_theirs() -> None:
    for command, rank, base in (
        ("python train_lora.py --hidden_size 512 --lora_name mine", 16, "../out/full_sft_512.pth"),
        ("python train_lora.py --dim 512", 16, "out/rlhf_512.pth"),
        ("python train_lora.py --hidden_size 512 --ddp", 8, "../out/full_sft_512.pth"),
    ):
        ours = convert_command([command]).ours
        assert (ours["lora.kind"], ours["lora.rank"], ours["lora.alpha"]) == ("lora", rank, rank)
        assert (ours["lora.target_modules"], ours["model.path"]) == (["q_proj", "o_proj"], base)
    assert convert_command(["python train_lora.py --lora_name mine"]).ours["train.output_dir"] == "../out/mine_768"


def test_what_distillation_loses_is_named() -> None:
    words = (
        "python train_distillation.py --alpha 0.3 --temperature 2 --from_teacher_weight big --student_hidden_size 512"
    )
    converted = convert_command([words])
    assert converted.ours["model.path"] == "../out/full_sft_512.pth"
    assert [line.split(":")[0] for line in converted.lost] == ["--alpha", "--temperature", "--from_teacher_weight"]
    assert any("0.3 x that of the labels + 0.7 x" in line for line in converted.differences)
    reason = convert_command(["python train_reason.py"])
    assert reason.ours["model.path"] == "../out/dpo_512.pth"
    assert any("weigh 10" in line for line in reason.differences)


def differing(command: str) -> list[str]:
    return [line.partition(":")[0] for line in convert_command([command]).differences]


def test_differences_are_those_that_apply() -> None:
    every = ["batches", "weight decay"]
    assert differing("python train_full_sft.py") == [
        *every, "control tokens", "labels", "system prompts"
    ]  # fmt: skip
    assert differing("python train_pretrain.py") == [
        "batches", "loss", "end of an epoch", "weight decay", "long texts", "control tokens"
    ]  # fmt: skip
    old = differing("python train_pretrain.py --hidden_size 512 --ddp")
    assert {"learning rate", "precision", "order of rows", "texts"} <= set(old)
    assert "precision" not in differing("python train_pretrain.py --hidden_size 512 --ddp --device cpu")
    assert "loss" in differing("torchrun --nproc_per_node 2 train_full_sft.py")
    assert "weight decay" not in differing("python 3-full_sft.py")


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("torchrun --nproc_per_node 2 train_pretrain.py", 2),
        ("torchrun --standalone --nproc-per-node=4 --nnodes 2 trainer/train_pretrain.py --epochs 1", 8),
        ("deepspeed --master_port 29500 --num_gpus=2 train_full_sft.py --batch_size 4", 2),
        ("CUDA_VISIBLE_DEVICES=0 nohup python -u train_lora.py --epochs 1 > log.txt 2>&1 &", 1),
        ("python -m torch.distributed.launch --nproc_per_node=2 --use_env train_full_sft.py", 2),
        ("accelerate launch --num_processes 2 train_full_sft.py", 2),
        ("torchrun --nproc_per_node gpu train_full_sft.py", None),
        ("python -m trainer.train_full_sft --epochs 1", 1),
        ("uv run python3 ./train_full_sft.py", 1),
        ("!python train_full_sft.py --epochs 1 | tee log", 1),
        ("python train_full_sft.py \\\n  --epochs 1 \\\n  --batch_size 2", 1),
    ],
)  # fmt: skip
def test_launchers_are_read(command: str, processes: int | None) -> None:
    assert find_script([command]).processes == processes
    converted = convert_command([command])
    script = read_command([command]).script
    steps = SCRIPTS[script].flags["minimind-3"]["accumulation_steps"]
    assert converted.ours["train.grad_accum_steps"] == steps * (processes or 1)
    if ">" not in command and "|" not in command:
        assert converted.ours == convert_command(shlex.split(command.replace("\\\n", " "))).ours


def test_flags_may_be_written_in_every_way_that_argparse_reads() -> None:
    plain = convert_command(["python train_full_sft.py --epochs 3 --data_path 'my data/x.jsonl'"])
    for words in (
        ["python", "train_full_sft.py", "--epochs=3", "--data_path=my data/x.jsonl"],
        ["python", "train_full_sft.py", "--epochs", "1", "--epo", "3", "--data_p", "my data/x.jsonl"],
        ['python "train_full_sft.py" --epochs=3 --data_path "my data/x.jsonl"'],
    ):
        assert convert_command(words).ours == plain.ours
    moe = convert_command(["python train_full_sft.py --dim 512 --use_moe False"])  # type=bool: any text is true
    assert moe.ours["model.path"] == "out/pretrain_512_moe.pth"
    assert any(note.startswith("use_moe") for note in moe.notes)


@pytest.mark.parametrize(
    ("words", "generation", "router"),
    [
        ("--hidden_size 768 --use_moe 1", "minimind-3", ("layers", 5e-4)),
        ("--hidden_size 768 --use_moe 1", "2026-01", ("sequences", 0.01)),
        ("--dim 512 --use_moe True", "2025-02", ("sequences", 0.1)),
        ("--hidden_size 768", "minimind-3", (None, None)),
    ],
)
def test_the_router_loss_is_that_of_the_generation(words: str, generation: str, router: tuple[Any, Any]) -> None:
    ours = convert_command([f"python train_pretrain.py {words}"], generation).ours
    assert (ours.get("train.router_loss"), ours.get("model.config.router_aux_loss_coef")) == router


def test_the_generation_is_the_newest_with_all_flags() -> None:
    def chosen(command: str, generation: str | None = None) -> str:
        return read_command([command], generation).generation.name

    assert chosen("python train_full_sft.py") == "minimind-3"
    assert chosen("python train_full_sft.py --dim 512") == "2025-02"
    assert chosen("python train_full_sft.py --out_dir out --hidden_size 512") == "2025-04"
    assert chosen("python train_full_sft.py --data_path ../dataset/sft_512.jsonl") == "2026-01"
    assert chosen("python train_full_sft.py --data_path mine.jsonl") == "minimind-3"
    assert chosen("python train_reason.py") == "2026-01"
    assert chosen("python train_full_sft.py", "2025") == "2025-10"
    assert chosen("python train_full_sft.py --ddp", "2025") == "2025-04"
    assert chosen("python train_full_sft.py --data_path ../dataset/sft_512.jsonl", "minimind-3") == "minimind-3"
    with raises(ConfigError, "script-flags", "--save_dir", "2025-10"):
        chosen("python train_full_sft.py --dim 512 --n_layers 8 --save_dir x")
    with raises(ConfigError, "script-flags", "2026-01"):
        chosen("python train_reason.py", "2025")
    with raises(ConfigError, "script-flags", "--dim", "2025-02", "--hidden_size"):
        chosen("python train_full_sft.py --dim 512", "minimind-3")


def test_paths_are_those_of_the_folder_of_the_command(tmp_path: Path) -> None:
    repository = tmp_path / "minimind"
    (repository / "trainer").mkdir(parents=True)
    (repository / "trainer" / "train_full_sft.py").touch()

    def data(command: str, here: Path) -> tuple[str, str]:
        ours = convert_command([command], here=here).ours
        return ours["data.train"][0], ours["model.path"]

    inside = ("../dataset/sft_t2t_mini.jsonl", "../out/pretrain_768.pth")
    above = ("dataset/sft_t2t_mini.jsonl", "out/pretrain_768.pth")
    assert data("python train_full_sft.py", repository / "trainer") == inside
    assert data("python train_full_sft.py", repository) == above
    assert data("python trainer/train_full_sft.py", repository) == above
    assert data("cd trainer && python train_full_sft.py", repository) == above
    assert data("cd minimind/trainer; python train_full_sft.py", tmp_path) == tuple(f"minimind/{one}" for one in above)
    assert data(r"python trainer\train_full_sft.py", repository) == above
    assert data("python trainer/train_full_sft.py --data_path /data/x.jsonl", repository)[0] == "/data/x.jsonl"
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "x.jsonl").touch()  # where the script would find it, too
    given = "python trainer/train_full_sft.py --data_path ../dataset/x.jsonl"
    assert data(given, repository)[0] == "../dataset/x.jsonl"


def test_weights_and_adapters_of_a_chat() -> None:
    def line(command: str) -> str:
        return convert_command([command]).command.removeprefix("tunesmith chat ").partition(" --temp")[0]

    assert convert_command(["python eval_llm.py --lora_weight lora_medical --temperature 1"]).command == (
        "tunesmith export out/lora_medical_768.pth --base out/full_sft_768.pth --tokenizer model --format hf --output "
        "out/lora_medical_768\ntunesmith chat out/lora_medical_768 --temperature 1 --top-p 0.95 --max-new-tokens 8192"
    )
    old = "python eval_model.py --dim 768 --n_layers 16 --lora_name lora_identity --model_mode 2"
    assert line(old).startswith("tunesmith export out/lora/lora_identity_768.pth --base out/rlhf_768.pth")
    assert line("python eval_model.py --load 1") == "MiniMind2"
    assert line("python eval_llm.py --load_from ./minimind-3") == "minimind-3"
    assert line("python eval_llm.py --load_from ./model/") == "out/full_sft_768.pth --tokenizer model"
    trap = convert_command(["python eval_llm.py --load_from runs/mine/model"])
    assert trap.command.startswith("tunesmith chat runs/mine/model --temperature")
    assert any("out/full_sft_768.pth instead" in note for note in trap.notes)
    with raises(ConfigError, "script-flags", "--model_mode", "9"):
        line("python eval_model.py --model_mode 9")
    assert convert_command(["python eval_llm.py --device cpu"]).command.startswith("CUDA_VISIBLE_DEVICES= tunesmith")
    assert [at.split(":")[0] for at in convert_command(["python eval_llm.py --top_p 1.5 --open_thinking 1"]).lost] == [
        "--top_p", "--open_thinking"
    ]  # fmt: skip
    assert " --top-p 0.9 " in convert_command(["python eval_llm.py --top_p 0.9"]).command


@pytest.mark.parametrize("name", [*OTHERS, *ELSEWHERE])
def test_scripts_for_something_else_are_refused_as_that(name: str) -> None:
    with raises(ConfigError, "other-method" if name in OTHERS else "other-script", {**OTHERS, **ELSEWHERE}[name]):
        convert_command([f"python trainer/{name} --epochs 1 --unknown"])


@pytest.mark.parametrize(
    ("words", "kind", "code", "fact"),
    [
        ([], UsageError, "no-command", "after --"),
        (["python"], UsageError, "no-script", "python"),
        (["python", "--epochs", "1"], UsageError, "no-script", "--epochs"),
        (["python 'train.py"], UsageError, "no-script", "quot"),
        (["python", "train_ful_sft.py"], ConfigError, "unknown-script", "train_full_sft.py"),
        (["python", "mine.py"], ConfigError, "unknown-script", "train_lora.py"),
        (["python", "train_full_sft.py", "--batchsize", "1"], ConfigError, "script-flags", "--batch_size"),
        (["python", "train_full_sft.py", "--use", "1"], ConfigError, "script-flags", "--use_compile"),
        (["python", "train_full_sft.py", "--save", "x"], ConfigError, "script-flags", "--save"),
        (["python", "train_full_sft.py", "--output", "x"], ConfigError, "script-flags", "before --"),
        (["python", "train_full_sft.py", "--zzzzzzzzzz", "x"], ConfigError, "script-flags", "--accumulation_steps"),
        (["python", "train_full_sft.py", "--epochs"], ConfigError, "script-flags", "--epochs: needs"),
        (["python", "train_full_sft.py", "--epochs", "--dim"], ConfigError, "script-flags", "--epochs: needs"),
        (["python", "train_full_sft.py", "--data_path", ""], ConfigError, "script-flags", "--data_path: is empty"),
        (["python", "train_full_sft.py", "--save_dir= "], ConfigError, "script-flags", "--save_dir: is empty"),
        (["python", "train_full_sft.py", "--epochs", "2.5"], ConfigError, "script-flags", "whole number"),
        (["python", "train_full_sft.py", "--learning_rate", "fast"], ConfigError, "script-flags", "number"),
        (["python", "train_full_sft.py", "--learning_rate", "nan"], ConfigError, "script-flags", "number"),
        (["python", "train_full_sft.py", "--use_moe", "2"], ConfigError, "script-flags", "0 or 1"),
        (["python", "train_full_sft.py", "--use_wandb=1"], ConfigError, "script-flags", "--use_wandb"),
        (["python", "train_full_sft.py", "stray"], ConfigError, "script-flags", "stray"),
        (["python", "web_demo.py", "--port", "1"], ConfigError, "script-flags", "no flags"),
    ],
)  # fmt: skip
def test_wrong_commands_are_answered(words: list[str], kind: type[Exception], code: str, fact: str) -> None:
    with raises(kind, code, fact):
        convert_command(words)


def test_all_problems_of_a_command_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        convert_command(["python train_full_sft.py --batchsize 1 --lr 1 stray"])
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError) as caught:
        convert_command(["python train_full_sft.py --epochs x --batch_size y"])
    assert len(caught.value.problems) == 2


ODD = ["", "-", "--", "---", "-1", "--=", "--epochs=", "1e400", "nan", "\x00", "a\nb", "&&", ";", "cd", "..", ">", "|", "-m",
       "=", "--\u202e", "'", '"', "9" * 400, "--nproc_per_node", "train_lora.py", "trainer\\train_pretrain.py", "x.py",
       "$(rm)", "--dim", "--save", "--from_weight", "--device", "cuda:x", "~/x", "C:\\x"]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_damaged_commands_are_converted_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        name = rng.choice(list(SCRIPTS))
        flags = rng.choice(list(SCRIPTS[name].flags.values()))
        words = ["python", name]
        for flag in rng.sample(sorted(flags), min(len(flags), rng.randrange(5))):
            words += [f"--{flag}", rng.choice([*ODD, "1", "0.5", "x"])]
        for _ in range(rng.randrange(4)):
            words.insert(rng.randrange(len(words) + 1), rng.choice(ODD))
        for given in (words, [" ".join(words)]):
            with contextlib.suppress(TunesmithError):
                converted = convert_command(given, rng.choice([None, *MINIMIND_GENERATIONS]))
                assert all(isinstance(line, str) for line in converted.remarks())
                assert not converted.text or yaml.safe_load(converted.text)["train"]


def test_values_that_no_run_can_have_are_named() -> None:
    converted = convert_command(["python train_full_sft.py --epochs 0 --batch_size -1 --accumulation_steps 0"])
    assert {problem.split(":")[0] for problem in converted.problems} == {
        "train.epochs", "train.micro_batch_tokens", "train.grad_accum_steps"
    }  # fmt: skip


def test_text_of_a_command_is_shown_in_one_line() -> None:
    text = convert_command(["python", "train_full_sft.py", "--data_path", "a\nb\x1b[31m: {x}"]).text
    assert yaml.safe_load(text)["data"]["train"] == ["a\nb\x1b[31m: {x}"]
    assert "\x1b" not in text
    assert text.splitlines()[1].startswith("# tunesmith train")


def test_the_command_line_tells_what_is_missing(fails) -> None:
    assert fails("convert-config", "--from", "minimind", "python", "train_full_sft.py").code == "no-command"
    assert fails("convert-config", "--from", "minimind", "--").code == "no-command"
    assert fails("convert-config", "--", "python", "train_full_sft.py").code == "flag-missing"
    assert fails("convert-config").code == "flag-missing"
    assert fails("convert-config", "x.yaml", "--generation", "2024").code == "flag-conflict"
    assert fails("convert-config", "x.yaml", "--from", "minimind", "--", "python", "x.py").code == "flag-conflict"


def test_converted_commands_train(run, tmp_path: Path, monkeypatch, tokenizer) -> None:
    """From the preset to a .pth of MiniMind and on to SFT, of tiny sizes, as a person would: convert, then train."""
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "model/minimind_tokenizer"):
        tokenizer.save_pretrained(tmp_path / folder)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"The answer is {i} and you."} for i in range(40)])
    rows = [{"conversations": chat_row(f"What is {i}?", f"It is {i}.")["messages"]} for i in range(40)]
    write_jsonl(tmp_path / "chats.jsonl", rows)

    def train(command: str) -> None:
        words = [*command.split(), "--batch_size", "2", "--max_seq_len", "64", "--device", "cpu"]
        code, out, err = run("convert-config", "--from", "minimind", "--output", "run.yaml", "--", *words)
        assert code == 0, err
        assert out.splitlines()[-1] == "train it: CUDA_VISIBLE_DEVICES= tunesmith train run.yaml"
        code, _, err = run("train", "run.yaml", "--train.max_steps", "2")
        assert code == 0, err

    train("python train_pretrain.py --dim 64 --n_layers 2 --accumulation_steps 2 --data_path texts.jsonl")
    form = ["--format", "minimind", "--weight", "pretrain", "--generation", "2025"]
    code, _, err = run("export", "out/pretrain_64", *form, "--output", "there")
    assert code == 0, err
    (tmp_path / "there" / "pretrain_64.pth").rename(tmp_path / "out" / "pretrain_64.pth")
    train("python trainer/train_full_sft.py --hidden_size 64 --data_path chats.jsonl")
    train(
        "python trainer/train_lora.py --hidden_size 64 --from_weight pretrain --lora_name mine --data_path chats.jsonl"
    )
    assert (tmp_path / "out" / "full_sft_64" / "model").is_dir()
    assert (tmp_path / "out" / "mine_64" / "adapter").is_dir()
