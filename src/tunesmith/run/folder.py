"""The output folder of a new run: free to use, and with room on its disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tunesmith.adapters.adapter import adapter_tensors, changes_base
from tunesmith.config.train_keys import interval_steps
from tunesmith.display import format_bytes
from tunesmith.errors import TunesmithError
from tunesmith.files import is_no_room
from tunesmith.model.save import write_trained
from tunesmith.run.assemble import ReadyRun
from tunesmith.runfolder import RunFolder, has_stages
from tunesmith.staging import is_partial, remove_abandoned
from tunesmith.training.loop import DEFAULT_SAVE_STEPS

# bitsandbytes' AdamW: parameters below this many numbers keep 32-bit averages; numbers of a block; bytes of a table
_SMALLEST_8BIT, _BLOCK, _TABLE = 4096, 256, 1024
_ENTRY = 80  # bytes of a tensor's entry in a file, beside its name
_STATES = 40_000  # bytes of random.safetensors, state.json and the manifest


def resolve_output(name: str) -> Path:
    """The RUN folder's real path; it must not exist yet or be empty.

    Raises:
        TunesmithError: it is in use, or cannot be a folder.
    """
    try:
        output = Path(name).expanduser().resolve()
        if output.is_dir():
            remove_abandoned(output, output.name)
            if any(output.iterdir()):
                raise TunesmithError(_explain_taken(name, output), code="output-taken")
        elif output.exists():
            raise TunesmithError(f"{name}: is not a folder. Give --output a new folder.", code="output-not-folder")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~user without a home folder; ValueError: NUL
        reason = getattr(error, "strerror", None) or error
        raise TunesmithError(f"{name[:80]}: cannot be used as --output: {reason}", code="output-not-usable") from None
    return output


def _explain_taken(name: str, output: Path) -> str:
    run = RunFolder(output)
    if run.is_run and not run.has_model:
        return (
            f"{name}: contains an unfinished run. Continue it: tunesmith resume {name}. Or give --output a new folder."
        )
    if has_stages(output):
        return (
            f"{name}: contains a run with stages. Continue it: tunesmith resume {name}. Or give --output a new folder."
        )
    if any(is_partial(path, output.name) for path in output.iterdir()):
        return f"{name}: another process prepares a run there. Wait for it, or give --output a new folder."
    what = "contains another run" if run.config.exists() else "is not empty"
    return f"{name}: {what}. Give --output a new folder, or remove this one."


def require_room(folder: Path, ready: ReadyRun) -> str:
    """How much will be written, for the summary.

    Args:
        folder: on the disk of the run.

    Raises:
        TunesmithError: the disk has no space for one checkpoint and the model.
    """
    train, total_steps = ready.session.config.train, ready.feed.total_steps
    free = shutil.disk_usage(folder).free
    try:
        size = measure(ready, folder)
    except Exception as error:
        if not is_no_room(error):
            raise
        raise TunesmithError(
            f"{train.output_dir}: {format_bytes(free)} are free there, less than the tokenizer takes. Free space, "
            "or give --output a folder on another disk.",
            code="disk-too-small",
        ) from None
    least = size.checkpoint + size.model
    if free < least:
        raise TunesmithError(
            f"{train.output_dir}: a checkpoint and the model take about {format_bytes(least)}, and "
            f"{format_bytes(free)} are free there. Free space, or give --output a folder on another disk.",
            code="disk-too-small",
        )
    line = f"checkpoints of about {format_bytes(size.checkpoint)} each, {train.keep_checkpoints} kept"
    every = interval_steps(train.save_steps or DEFAULT_SAVE_STEPS, total_steps)
    count = min(train.keep_checkpoints + 1, -(-total_steps // every))
    needed = size.checkpoint * (count + bool(train.eval_steps)) + size.model
    if free < needed:
        line += (
            f"; {format_bytes(free)} are free, less than the {format_bytes(needed)} that the run may need: "
            "lower train.keep_checkpoints"
        )
    return line


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of one checkpoint, and of the finished model or adapter."""

    checkpoint: int
    model: int


def measure(ready: ReadyRun, folder: Path) -> Sizes:
    """Sizes of what will be written: weights and optimizer are computed, all other files are written once, on trial.

    Args:
        folder: where the trial is made, and removed again.
    """
    lm, config = ready.lm, ready.session.config
    trained = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}
    weights = count_bytes(lm.model.state_dict() if lm.adapter is None else adapter_tensors(lm.adapter))
    averages = sum(count_average_bytes(parameter, config.optim.name) for parameter in trained.values())
    entries = sum(3 * (len(name) + _ENTRY) for name in trained)  # two averages and a count
    others = measure_others(ready, folder)
    # PiSSA and OLoRA are saved as a LoRA of twice the rank
    model = weights * 2 if changes_base(config.lora) else weights
    return Sizes(others + weights + averages + entries + _STATES, others + model)


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of a file of tensors, where those that share memory are written once."""
    places = {(tensor.data_ptr(), tensor.shape, tensor.stride()): name for name, tensor in tensors.items()}
    return sum(tensors[name].numel() * tensors[name].element_size() + len(name) + _ENTRY for name in places.values())


def count_average_bytes(parameter: Tensor, optimizer: str) -> int:
    """AdamW's two averages of a parameter; with 8 bits, of larger ones, a scale for each block and two tables."""
    if "8bit" in optimizer and parameter.numel() >= _SMALLEST_8BIT:
        return 2 * (parameter.numel() + 4 * -(-parameter.numel() // _BLOCK) + _TABLE)
    width = parameter.element_size() if optimizer == "adamw" else 4
    return 2 * parameter.numel() * width


def measure_others(ready: ReadyRun, folder: Path) -> int:
    """Bytes of tokenizer, template, configs and copied code, as they lie beside the weights."""
    lm, session = ready.lm, ready.session
    with tempfile.TemporaryDirectory(dir=folder, prefix=".size.") as name:
        write_trained(lm.model, lm.adapter, session.encoder, Path(name), weights={})
        return sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file())
