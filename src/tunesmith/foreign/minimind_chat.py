"""Convert MiniMind's scripts that talk to a model to `tunesmith chat` and `tunesmith serve`."""

from __future__ import annotations

import posixpath
import shlex
from typing import Any

from tunesmith.display import one_line
from tunesmith.errors import ConfigError
from tunesmith.foreign.draft import Draft
from tunesmith.foreign.minimind_command import Command, Paths

_MODES = ("pretrain", "full_sft", "rlhf", "reason")  # names of weights by --model_mode
_LATER_MODES = {"eval_model.py": ("grpo",), "eval_llm.py": ("ppo_actor", "grpo")}
_PORTS = {"serve_openai_api.py": 8998, "web_demo.py": 8501}  # of their servers
_SIZES = ("dim", "hidden_size", "n_layers", "num_hidden_layers", "use_moe")
_OF_WEIGHTS = ("out_dir", "save_dir", "weight", "model_mode", "lora_name", "lora_weight", *_SIZES)


def chat_lines(draft: Draft, command: Command, paths: Paths) -> list[str]:
    """The command that talks to the model; before it, one that makes an adapter of a LoRA file."""
    values = command.values
    device = str(values.get("device", ""))
    number = device.partition(":")[2] if device.startswith("cuda:") else ""
    opened, adapter = _model(draft, command, paths), _adapter(draft, command, paths)
    first = []
    if adapter:
        weights, tokenizer, *template = opened[0], opened[2], *opened[3:]
        made = ["--base", weights, "--tokenizer", tokenizer, "--format", "hf", "--output", adapter.removesuffix(".pth")]
        first, opened = ["tunesmith", "export", adapter, *made], [adapter.removesuffix(".pth"), *template]
    port = _PORTS.get(command.script)
    words = ["tunesmith", "serve" if port else "chat", *opened]
    if "temperature" in values:
        words += ["--temperature", f"{values['temperature']:g}"]
    if "top_p" in values:
        words += _top_p(draft, values["top_p"])
    if port is None and "max_seq_len" in values:
        words += ["--max-new-tokens", str(values["max_seq_len"])]
    if "max_new_tokens" in values:
        words += ["--max-new-tokens", str(values["max_new_tokens"])]
    _tell_flags(draft, command)
    if port is not None:
        if command.script == "serve_openai_api.py":
            words += ["--name", "minimind"]  # as their clients call it
        words += ["--port", str(port)]
        draft.note("host", "theirs answers other machines too; this one answers only its own, unless --host says so")
    before = "CUDA_VISIBLE_DEVICES= " if device == "cpu" else ""
    if number not in ("", "0"):
        before = f"CUDA_VISIBLE_DEVICES={shlex.quote(number)} "
    return [one_line(before + shlex.join(line)) for line in (first, words) if line]


def _top_p(draft: Draft, top_p: Any) -> list[str]:
    """Their scripts give top_p in every call."""
    if 0 < top_p <= 1:
        return ["--top-p", f"{top_p:g}"]
    draft.lose("--top_p", top_p, "must be above 0 and at most 1")
    return []


def _model(draft: Draft, command: Command, paths: Paths) -> list[str]:
    """The model, the tokenizer of weights of their own form, and the template where it is none."""
    values = command.values
    if command.script == "web_demo.py":
        draft.note("model", "the one that is chosen on their page")
        return [paths.local("../minimind-3" if command.generation.is_3 else "../MiniMind2")]
    folder = _folder(draft, command)
    if folder is not None:
        for flag in [one for one in _OF_WEIGHTS if one in command.given]:
            draft.leave_out(f"--{flag}", "the folder has one model, with its config")
        return [paths.local(folder)]
    out, above = str(values.get("save_dir", values.get("out_dir", "out"))), "../" if command.folder else ""
    name = _weights(command)
    words = [f"{paths.local(f'{above}{out}/{command.weights_name(name)}')}.pth"]
    tokenizer = str(values.get("load_from", f"{above}{command.generation.tokenizer}"))
    words += ["--tokenizer", paths.local(tokenizer)]
    for flag in [one for one in ("n_layers", "num_hidden_layers") if one in command.given]:
        draft.leave_out(f"--{flag} {command.given[flag]}", "the number of layers is read from the weights")
    if "pretrain" in name:
        words += ["--chat-template", "none"]
        draft.note("chat-template", "none: weights of pre-training continue a text, there too")
    return words


def _adapter(draft: Draft, command: Command, paths: Paths) -> str:
    """Path of a LoRA file; "" without one."""
    values = command.values
    lora = str(values.get("lora_weight", values.get("lora_name", "None")))
    if lora == "None" or _is_folder(command):
        return ""
    is_plain = command.script == "eval_llm.py" and command.generation.is_3
    is_plain = is_plain or (command.script == "serve_openai_api.py" and "lora_name" in values)
    out, above = str(values.get("save_dir", values.get("out_dir"))), "../" if command.folder else ""
    folder = f"{above}{out}" if is_plain else f"{above}{out}/lora"
    draft.note("lora", "export makes an adapter of their file, once; one that tunesmith has trained needs no export")
    return paths.local(f"{folder}/{lora}_{command.sizes[0]}.pth")


def _is_folder(command: Command) -> bool:
    """Whether the model is a folder of transformers, not weights of their own form."""
    values = command.values
    return values.get("load", 0) != 0 or not _means_weights(str(values.get("load_from", "model")))


def _means_weights(named: str) -> bool:
    """Whether --load_from means weights of their own form: model, ../model, ./model/."""
    return posixpath.normpath(named.replace("\\", "/")).replace("../", "") == "model"


def _folder(draft: Draft, command: Command) -> str | None:
    """The model folder, where it is not weights of their own form."""
    values = command.values
    if values.get("load", 0) != 0:
        draft.note("load", f"{values['load']}: the folder that is written in their script")
        return "../MiniMind2" if command.folder else "./MiniMind2"
    named = str(values.get("load_from", "model")).replace("\\", "/")
    if _means_weights(named):
        return None
    if "model" in named:
        weights = command.weights_name(str(values["weight"]))
        why = f"their script opens {values['save_dir']}/{weights}.pth instead, as for any path with 'model' in it"
        draft.note("load_from", f"{one_line(named)} is opened as a model folder here; {why}")
    return named


def _weights(command: Command) -> str:
    """Name of the weights without size.

    Raises:
        ConfigError: their script has no weights of this number.
    """
    values = command.values
    if "model_mode" not in values:
        return str(values.get("weight", "pretrain" if command.script == "0-eval_pretrain.py" else "full_sft"))
    names = (*_MODES, *_LATER_MODES.get(command.script, ()))
    mode = values["model_mode"]
    if not 0 <= mode < len(names):
        listed = ", ".join(f"{at} {name}" for at, name in enumerate(names))
        raise ConfigError(command.script, [f"--model_mode: {mode} is none of {listed}"], code="script-flags")
    return names[mode]


def _tell_flags(draft: Draft, command: Command) -> None:
    given, values = command.given, command.values
    for flag, why in (("stream", "replies are always streamed"), ("show_speed", "the speed is not shown")):
        if flag in given:
            draft.leave_out(f"--{flag} {given[flag]}", why)
    if "device" in given:
        why = "a GPU is used where there is one; CUDA_VISIBLE_DEVICES chooses another or none"
        draft.leave_out(f"--device {one_line(str(given['device']))}", why)
    if "max_seq_len" in given and command.script == "serve_openai_api.py":
        draft.leave_out(f"--max_seq_len {given['max_seq_len']}", "the model's own context counts")
    if values.get("inference_rope_scaling"):
        draft.lose("--inference_rope_scaling", True, "positions are those that the model was trained with")
    if values.get("open_thinking"):
        draft.lose("--open_thinking", values["open_thinking"], "chat sets no variables of the template")
    for flag in ("history_cnt", "historys"):
        if flag in values:
            kept = f"the last {values[flag]} turns are remembered" if values[flag] else "each question stands alone"
            draft.note(flag, f"{kept} there; here the chat remembers all, and /reset forgets")
