"""Convert failures of a run to errors that name the last good checkpoint and the command to continue."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.config.schema import RunConfig
from tunesmith.display import format_bytes
from tunesmith.distributed.launch import find_launch
from tunesmith.distributed.load import empty_model
from tunesmith.distributed.processes import ToldError
from tunesmith.errors import InterruptedRun, RunError, TunesmithError
from tunesmith.files import NO_ROOM, is_out_of_memory, lacking_memory, system_error
from tunesmith.monitor.fitting import find_settings
from tunesmith.monitor.memory import ERROR, MemoryPlan
from tunesmith.monitor.room import find_room
from tunesmith.run.assemble import ReadyRun, weights_dtype
from tunesmith.run.session import Session
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


_MUCH = 0.2  # of the estimate; less than that above what is free, a run is warned of, not refused
_SURE = 0.95  # of sizes that are counted


def require_weights_memory(session: Session) -> None:
    """Check before the data are prepared that what training keeps all the time fits: weights, gradients and averages.

    Raises:
        TunesmithError: it does not.
    """
    config, room = session.config, find_room(session.device)
    if session.parallel == "deepspeed" or session.world.size > 1 or session.device.type not in ("cpu", "cuda"):
        return
    if session.model.kind == "local":
        files = Path(session.model.name).glob("*")
        size = sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".bin"))
        if 0 < 8 * size < room.free:  # from half precision to fp32, four times
            return
    try:
        model = empty_model(config.model, session.model_config, None)
    except Exception:  # code of other people, which may need real weights; loading will tell
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    width, copies = float(weights_dtype(session).itemsize), 1.0
    if config.lora.quantize != "none":
        width = 1.0 if config.lora.quantize == "int8" else 0.5
    elif not session.is_adapter:
        is_paged, is_8bit = "paged" in config.optim.name, "8bit" in config.optim.name
        copies = 2.0 + (0.0 if is_paged else 2.0 / width if is_8bit else 2.0)
    needed = copies * width * parameters
    if needed * _SURE <= room.free + room.swap:
        return
    parts = "weights" if session.is_adapter else "weights, gradients and optimizer state"
    ways = []
    if not session.is_adapter and width * parameters < room.free and session.model.kind != "preset":
        ways.append("lora.kind lora")
    if not session.is_adapter and width == 4 and needed / 2 < room.free:
        ways.append("train.precision bf16_pure")
    if session.is_adapter and config.lora.quantize == "none" and parameters / 2 < room.free:
        ways.append("lora.quantize nf4")
    raise TunesmithError(
        f"{config.model.path}: its {parts} take {format_bytes(needed)} ({parameters:,} parameters), and {room.what} "
        f"{format_bytes(room.free)} free. {_advise(ways)}",
        code="memory-too-small",
    )


def require_memory(ready: ReadyRun, plan: MemoryPlan | str, is_strict: bool = True) -> list[tuple[str, str]]:
    """A warning where memory is tight; else nothing.

    A run is refused only where it needs far more than is free with all swap, whatever the allocator does: what the
    estimate may be wrong by never stops a run that fits.

    Args:
        is_strict: else there is only a warning.

    Raises:
        TunesmithError: the run needs more than is free, by far.
    """
    if isinstance(plan, str):
        return []
    session, need, room = ready.session, plan.need(), find_room(ready.session.device)
    here = float(os.environ.get("LOCAL_WORLD_SIZE", session.world.size)) if session.device.type == "cpu" else 1.0
    coming = here * (need.total - need.taken)
    if coming * (1 + ERROR) <= room.free:
        return []
    asked = f"about {format_bytes(coming)} more than it has taken already"
    if here > 1:
        asked = f"about {format_bytes(coming)} more in its {here:.0f} processes on this machine"
    reason = f"the run needs {asked}, and {room.what} {format_bytes(room.free)} free"
    kind, is_full = session.model.kind, session.precision.name == "fp32"
    most, packs = session.lengths.max_seq_len, session.config.train.grad_accum_steps
    ways = find_settings(plan, room.free / here, most, packs, not session.is_adapter and kind != "preset", is_full)
    least = here * (need.least - _MUCH * need.total - need.taken)
    if session.config.optim.name.startswith("paged"):
        least -= here * need.averages
    if not is_strict or least <= room.free + room.swap:
        return [("warning", f"{reason}: it may run out of memory"), ("", _advise(ways))]
    raise TunesmithError(
        f"{session.config.model.path}: {reason} ({need.describe()}). {_advise(ways)}", code="memory-too-small"
    )


def _advise(ways: list[str]) -> str:
    if not ways:
        return "No setting makes it fit: take a smaller model, or a machine with more memory."
    first, *others = ways
    return f"Set {first}{''.join(f'; or {way}' for way in others)}: {'each of these fits' if others else 'this fits'}."


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
