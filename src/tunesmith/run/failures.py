"""Convert failures of a run to errors that name the last good checkpoint and the command to continue."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tunesmith.config.schema import RunConfig
from tunesmith.distributed.launch import find_launch
from tunesmith.distributed.processes import ToldError
from tunesmith.errors import InterruptedRun, RunError, TunesmithError
from tunesmith.files import NO_ROOM, is_out_of_memory, lacking_memory, system_error
from tunesmith.runfolder import RunFolder, started_stages, whole_run
from tunesmith.training.checkpoint import list_checkpoints, newest_valid
from tunesmith.training.progress import Progress


@contextmanager
def explained_failures(run: RunFolder, config: RunConfig, capacity: int, progress: Progress) -> Iterator[None]:
    """Convert failures to errors that name the last good checkpoint and the command to continue.

    Args:
        capacity: tokens of one forward.
        progress: of the run; read when an error occurs.
    """

    def where() -> str:
        return tell_where(progress)

    try:
        yield
    except KeyboardInterrupt:
        if not run.record.exists():
            raise
        raise InterruptedRun(tell_interrupted(run, progress), code="run-interrupted") from None
    except InterruptedRun as stopped:
        raise InterruptedRun(f"{stopped} {how_to_continue(run, is_urgent=True)}", code=stopped.code) from None
    except ToldError as error:
        raise error.with_advice(how_to_continue(run)) from None
    except RunError as error:
        raise RunError(f"{error} {how_to_continue(run)}", code=error.code) from None
    except TunesmithError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            text = f"{lacking_memory(error)} is out of memory {where()}. {explain_memory(config, capacity)}"
            raise RunError(f"{text} {how_to_continue(run)}", code="out-of-memory") from error
        reason = system_error(error)
        if reason is None:
            raise
        raise explain_system(reason, run, where()) from error


def tell_where(progress: Progress) -> str:
    return f"at step {progress.step}" if progress.step else "before step 1"


def tell_interrupted(run: RunFolder, progress: Progress) -> str:
    """For a run that ends at once, in the middle of a step."""
    return f"interrupted {tell_where(progress)}. {how_to_continue(run, is_urgent=True)}"


def explain_system(error: OSError, run: RunFolder, where: str) -> RunError:
    """The error for a failed system call: the reason, the file, and when."""
    file = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else run.path
    advice = how_to_continue(run)
    if error.errno in NO_ROOM:
        return RunError(f"{run.path}: the disk is full {where}. Free space there. {advice}", code="disk-full")
    return RunError(f"{file}: {error.strerror or error}, {where}. {advice}", code="system-error")


def how_to_continue(run: RunFolder, is_urgent: bool = False) -> str:
    """The newest good checkpoint and the command.

    Args:
        is_urgent: do not read the checkpoint's files, which may take minutes; the run verified them when it wrote them.
    """
    if not run.record.exists():  # of a stage: those before it are kept
        has_others = whole_run(run.path) != run.path and started_stages(run.path.parent)
        return f"Continue with: tunesmith resume {whole_run(run.path)}" if has_others else "No files were kept."
    last = next(reversed(list_checkpoints(run)[0]), None) if is_urgent else newest_valid(run)[0]
    state = f"Last good checkpoint: {last.folder}." if last else "No checkpoint yet: resume starts at step 0."
    launch = find_launch()
    how = "Continue with" if launch is None or launch.size == 1 else "Continue with, under the same launcher"
    return f"{state} {how}: tunesmith resume {whole_run(run.path)}"


def explain_memory(config: RunConfig, capacity: int) -> str:
    """What to lower and by how much; half the tokens per forward with twice the accumulation is the same step."""
    train = config.train
    half, longest = capacity // 2, config.data.max_seq_len or capacity
    advice = []
    if half >= longest:
        advice.append(
            f"set train.micro_batch_tokens {half} and train.grad_accum_steps {train.grad_accum_steps * 2} (same step, "
            "half the activations)"
        )
    else:
        advice.append(f"set data.max_seq_len {longest // 2} and train.micro_batch_tokens {half}")
    if not train.gradient_checkpointing:
        advice.append("set train.gradient_checkpointing true")
    if train.precision != "bf16_pure":
        advice.append("set train.precision bf16_pure (half the weights and optimizer state)")
    return f"In this order: {'; '.join(advice)}."
