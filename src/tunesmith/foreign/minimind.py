"""Convert a command line of MiniMind to a run file, or to a command that talks to the model."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from tunesmith.config.plainyaml import dump
from tunesmith.display import one_line
from tunesmith.errors import ConfigError
from tunesmith.foreign.convert import Converted, find_problems, nest
from tunesmith.foreign.draft import Draft, Tree
from tunesmith.foreign.minimind_chat import chat_lines
from tunesmith.foreign.minimind_command import Command, Paths, read_command
from tunesmith.foreign.minimind_differences import list_differences
from tunesmith.foreign.minimind_flags import Generation

_NAMES = {"pretrain": "pretrain", "sft": "full_sft", "reason": "reason", "distillation": "full_dist"}
_BASES = {"pretrain": "none", "sft": "pretrain", "reason": "rlhf", "distillation": "full_sft", "lora": "full_sft"}
_UNUSED = {
    "num_workers": "rows are encoded once, before the first step",
    "ddp": "one process trains here",
    "local_rank": "one process trains here",
    "wandb_project": "the project is tunesmith, with the name of the RUN folder",
}
_TEACHER = ("alpha", "temperature", "from_teacher_weight", "teacher_hidden_size", "teacher_num_layers",
            "teacher_use_moe")  # fmt: skip


def convert_command(
    words: Sequence[str], generation: str | None = None, output: Path | None = None, here: Path = Path()
) -> Converted:
    """Args:
        words: the command, as words or as one text.
        generation: of MINIMIND_GENERATIONS; otherwise the newest that has all flags.
        output: the run file to be written.
        here: folder in which the command would be given.

    Raises:
        UsageError: there is no command.
        ConfigError: it cannot be converted.
    """
    command = read_command(words, generation, here)
    draft, paths = Draft("minimind", command.given, here), Paths(command, here)
    _tell_command(draft, command)
    if command.kind == "chat":
        text, lines = "", chat_lines(draft, command, paths)
        if output is not None:
            problem = f"becomes a command, not a run file; leave out --output: {'; '.join(lines)}"
            raise ConfigError(command.script, [problem], code="no-run-file")
    else:
        for convert in (_set_model, _set_data):
            convert(draft, command, paths)
        for turn in (_set_batch, _set_optimizer, _set_adapter, _set_precision, _set_rest):
            turn(draft, command)
        lines = _train_lines(draft, command, str(output or "run.yaml"))
        heads = [f"MiniMind {command.generation.name}: {command.text}", *lines]
        text = "".join(f"# {head}\n" for head in heads) + dump(nest(draft.ours))
    if paths.moved:
        moved = ", ".join(f"{before} is {after}" for before, after in paths.moved.items())
        place = command.folder if command.is_above else command.launch.folder
        draft.note("paths", f"{moved}, as their script is run in {place}/ and tunesmith in this folder")
    methods = {"chat": "chat", "pretrain": "pretraining"}
    return Converted(
        tool=draft.tool, method=methods.get(command.kind, "sft"), ours=draft.ours, notes=draft.notes,
        left_out=draft.left_out, lost=draft.lost, problems=find_problems(draft) if text else [], templates={},
        text=text, command=lines[-1] if text else "\n".join(lines), differences=list_differences(command),
    )  # fmt: skip


def _tell_command(draft: Draft, command: Command) -> None:
    """Its generation, its launcher, and flags without a meaning here."""
    one, older = command.generation, command.older
    have = "have" if older[1:] else "has"
    others = f"; {', '.join(older)} {have} them too: --generation" if older else ""
    draft.note("generation", f"{one.name} ({one.dates}), {command.why}{others}")
    launcher = [word for word in command.launch.words if word not in ("python", "python3", "-u")]
    if launcher:
        draft.leave_out(one_line(shlex.join(launcher)), "one process trains here")
    if command.launch.processes is None:
        draft.note("processes", "the launcher chooses their number; multiply train.grad_accum_steps by it")
    for flag in command.given:
        if flag in _UNUSED:
            draft.leave_out(f"--{flag}", _UNUSED[flag])
    if isinstance(command.values.get("use_moe"), bool) and "use_moe" in command.given:
        why = "any value turns experts on there, also False and 0 (type=bool); leave the flag out for a dense model"
        draft.note("use_moe", why)


def _set_model(draft: Draft, command: Command, paths: Paths) -> None:
    values, one, ours = command.values, command.generation, draft.ours
    out = str(values.get("save_dir", values.get("out_dir")))
    name = str(values.get("save_weight", values.get("lora_name", _NAMES.get(command.kind, "lora_sft"))))
    folder = f"{out}/lora" if command.kind == "lora" and one.name in ("2025-02", "2025-04") else out
    ours["train.output_dir"] = paths.local(f"{folder}/{command.weights_name(name)}")
    base = str(values.get("from_weight", values.get("from_student_weight", _base_of(command))))
    tokenizer = paths.local(f"../{one.tokenizer}" if one.folder else one.tokenizer)
    if one.name == "2024" and command.kind == "lora":
        ours["model.path"], ours["model.trust_remote_code"] = "minimind-v1-small", True
        draft.note("model.path", "the folder that their script opens, with Python code of its own")
    elif base == "none":
        preset, overrides = preset_of(one, *command.sizes, command.is_moe)
        ours |= {"model.path": f"new:{preset}", "model.tokenizer": tokenizer}
        ours.update({f"model.config.{key}": value for key, value in overrides.items()})
        if command.kind != "pretrain":
            draft.note("from_weight", "none: training begins with random weights")
    else:
        is_fixed = one.name in ("2024", "2025-02")  # the folder is written in their code
        place = "out" if is_fixed else "../out" if "save_dir" in values else out
        weights = paths.local(f"{place}/{command.weights_name(base)}")
        ours |= {"model.path": f"{weights}.pth", "model.tokenizer": tokenizer}
        where = f"; their script reads from {place} wherever it saves" if place not in (out, f"./{out}") else ""
        note = f"their name of the file{where}. Weights trained by tunesmith are in a RUN folder: model.path {weights}"
        draft.note("model.path", note)
        for flag in sorted({one.layers, "student_num_layers"} & set(command.given)):
            draft.leave_out(f"--{flag} {command.given[flag]}", "the number of layers is read from the weights")


def _base_of(command: Command) -> str:
    """Name of the weights that a script without a flag for them begins with."""
    return "rlhf" if command.kind == "lora" and command.generation.name == "2025-02" else _BASES[command.kind]


def preset_of(one: Generation, hidden: int, layers: int, is_moe: bool) -> tuple[str, Tree]:
    """The preset of a generation, and the fields that differ from it. Their other sizes follow from the hidden size."""
    if one.is_3:
        width = math.ceil(hidden * math.pi / 64) * 64
        name, usual = "minimind-3-moe" if is_moe else "minimind-64m", (768, 8)
        sizes: Tree = {"hidden_size": hidden, "head_dim": hidden // 8, "intermediate_size": width}
        sizes |= {"moe_intermediate_size": width} if is_moe else {}
    else:
        width = -(-int(hidden * 8 / 3) // 64) * 64
        name, usual = ("minimind-moe", (640, 8)) if is_moe else ("minimind-26m", (512, 8))
        if (hidden, layers, is_moe) == (768, 16, False):
            name, usual = "minimind-104m", (768, 16)
        sizes = {"hidden_size": hidden, "intermediate_size": width}
        sizes |= {"moe_intermediate_size": width, "shared_expert_intermediate_size": width} if is_moe else {}
    changed = sizes if hidden != usual[0] else {}
    if layers != usual[1]:
        changed = changed | {"num_hidden_layers": layers}
    if one.name == "2024":
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        changed = changed | {"num_attention_heads": 16, "num_key_value_heads": 8, "rope_parameters": rope}
    return name, changed


def _set_data(draft: Draft, command: Command, paths: Paths) -> None:
    ours = draft.ours
    ours["data.train"] = [paths.local(str(command.values.get("data_path", "./dataset/sft_data_single.csv")))]
    ours["data.max_seq_len"] = command.values.get("max_seq_len", 512)
    if command.kind == "pretrain":
        ours["data.format"] = "text"
    elif command.generation.name == "2024":
        ours |= {"data.fields.prompt": "q", "data.fields.completion": "a", "data.fields.history": "history"}
        ours["data.train_on"] = "last_assistant"
    elif command.generation.name in ("2026-01", "minimind-3"):
        ours["data.empty_think_share"] = 0.2 if command.generation.is_3 else 0.05
    if "data_path" not in command.values:
        draft.note("data.train", "written in their script")


def _set_batch(draft: Draft, command: Command) -> None:
    values, ours = command.values, draft.ours
    steps, processes = values["accumulation_steps"], command.launch.processes or 1
    ours["train.epochs"] = float(values["epochs"])
    ours["train.micro_batch_tokens"] = values["batch_size"] * ours["data.max_seq_len"]
    ours["train.grad_accum_steps"] = steps * processes
    if processes > 1:
        draft.note("train.grad_accum_steps", f"{steps} x {processes} processes, for as many rows a step")
    for flag, key in (("log_interval", "train.log_steps"), ("save_interval", "train.save_steps")):
        if flag in command.given:
            ours[key] = max(1, round(values[flag] / steps)) if steps > 0 else values[flag]
            if steps > 1:
                draft.note(key, f"--{flag} {values[flag]} counts batches, of which {steps} make a step")


def _set_optimizer(draft: Draft, command: Command) -> None:
    values, one, ours = command.values, command.generation, draft.ours
    ours |= {"optim.lr": values["learning_rate"], "optim.schedule": one.schedule, "optim.warmup_ratio": 0.0}
    if one.schedule == "cosine":
        ours["optim.min_lr_ratio"] = 0.1
    batches = values.get("warmup_iters", 0)
    if one.name == "2024" and batches > 0:
        del ours["optim.warmup_ratio"]
        ours["optim.warmup_steps"] = max(1, round(batches / max(1, values["accumulation_steps"])))
    elif "warmup_iters" in command.given:
        draft.leave_out(f"--warmup_iters {batches}", "their schedule does not read it")
    ours["optim.max_grad_norm"] = values["grad_clip"]
    if one.decay:
        ours["optim.weight_decay"] = one.decay
    ours["train.seed"] = one.seed
    if command.is_moe:
        kind, ours["model.config.router_aux_loss_coef"] = one.router
        ours |= {"train.router_loss": kind} if one.router[1] else {}


def _set_adapter(draft: Draft, command: Command) -> None:
    if command.kind != "lora":
        return
    rank = command.generation.rank
    draft.ours |= {"lora.kind": "lora", "lora.rank": rank, "lora.alpha": float(rank)}
    if command.generation.name != "2024":
        draft.ours["lora.target_modules"] = ["q_proj", "o_proj"]
        which = "on layers with a square weight, q_proj and o_proj"
        draft.note("lora", f"rank {rank} {which}, without a scale (alpha = rank), as there")


def _set_precision(draft: Draft, command: Command) -> None:
    values, ours = command.values, draft.ours
    dtype, device = str(values["dtype"]), str(values["device"])
    if "device" in command.given:
        why = "a GPU is used where there is one; CUDA_VISIBLE_DEVICES chooses another or none"
        draft.leave_out(f"--device {one_line(device)}", why)
    if device == "cpu":
        ours["train.precision"] = "fp32"
        if "dtype" in command.given:
            draft.leave_out(f"--dtype {one_line(dtype)}", "a CPU computes in fp32, there too")
    elif dtype == "bfloat16":
        ours["train.precision"] = "auto"
        draft.note("train.precision", "auto: bf16 on a GPU or CPU that has it, else fp32; they use fp32 on every CPU")
    else:
        ours["train.precision"] = "fp16"
        other = "" if dtype == "float16" else f"{one_line(dtype)} counts as float16 there; "
        draft.note("train.precision", f"{other}fp16 needs a GPU; on a CPU set fp32, which is what they use there")


def _set_rest(draft: Draft, command: Command) -> None:
    values, one, ours = command.values, command.generation, draft.ours
    if values["use_wandb"]:
        ours["train.trackers"] = [one.tracker]
        since = "; SwanLab since 2025-10-21" if one.name == "2025-04" else ""
        draft.note("use_wandb", f"{'SwanLab' if one.tracker == 'swanlab' else 'Weights & Biases'} there{since}")
    if values.get("use_compile") and command.kind == "lora":
        draft.leave_out("--use_compile", "their script turns it off for LoRA")
    elif values.get("use_compile"):
        ours["train.compile"] = True
    for flag in _TEACHER if command.kind == "distillation" else ():
        if flag in command.given:
            draft.lose(f"--{flag}", command.given[flag], "there is no teacher")


def _train_lines(draft: Draft, command: Command, file: str) -> list[str]:
    """What trains the run file; the last line is the command for a new run."""
    device = str(command.values["device"])
    number = device.partition(":")[2] if device.startswith("cuda:") else ""
    shown = "" if device == "cpu" else number if number not in ("", "0") else None
    before = f"CUDA_VISIBLE_DEVICES={shlex.quote(shown) if shown else ''} " if shown is not None else ""
    lines = [f"{before}tunesmith train {shlex.quote(file)}"]
    if command.values.get("from_resume"):
        run = str(draft.ours["train.output_dir"])
        resume = f"{before}tunesmith resume {shlex.quote(run)}"
        draft.note("from_resume", f"`{resume}` continues an interrupted run of tunesmith; it cannot read _resume.pth")
        lines.insert(0, f"to continue: {resume}")
    return [one_line(line) for line in lines]
