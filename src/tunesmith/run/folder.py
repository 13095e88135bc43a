"""The output folder of a new run: free to use, and with room on its disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from tunesmith.config.schema import RunConfig, interval_steps
from tunesmith.display import format_bytes
from tunesmith.errors import TunesmithError
from tunesmith.model.loss import SupervisedLM
from tunesmith.runfolder import RunFolder
from tunesmith.staging import is_partial, remove_abandoned
from tunesmith.training.checkpoint import estimate_bytes
from tunesmith.training.loop import DEFAULT_SAVE_STEPS


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
    if any(is_partial(path, output.name) for path in output.iterdir()):
        return f"{name}: another process prepares a run there. Wait for it, or give --output a new folder."
    what = "contains another run" if run.config.exists() else "is not empty"
    return f"{name}: {what}. Give --output a new folder, or remove this one."


def require_room(folder: Path, lm: SupervisedLM, config: RunConfig, total_steps: int) -> str:
    """How much will be written, for the summary.

    Raises:
        TunesmithError: the disk has no space for one checkpoint and the model.
    """
    one, weights = estimate_bytes(lm)
    free = shutil.disk_usage(folder).free
    train = config.train
    if free < one + weights:
        raise TunesmithError(
            f"{train.output_dir}: a checkpoint and the model take about {format_bytes(one + weights)}, and "
            f"{format_bytes(free)} are free there. Free space, or give --output a folder on another disk.",
            code="disk-too-small",
        )
    line = f"checkpoints of about {format_bytes(one)} each, {train.keep_checkpoints} kept"
    every = interval_steps(train.save_steps or DEFAULT_SAVE_STEPS, total_steps)
    count = min(train.keep_checkpoints + 1, -(-total_steps // every))
    needed = one * (count + bool(train.eval_steps)) + weights
    if free < needed:
        line += (
            f"; {format_bytes(free)} are free, less than the {format_bytes(needed)} that the run may need: "
            "lower train.keep_checkpoints"
        )
    return line
