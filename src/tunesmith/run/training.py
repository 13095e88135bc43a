"""Build the training loop and run it to its end, from step 0 or from a checkpoint."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from tunesmith.config.runfile import dump_yaml
from tunesmith.config.train_keys import parse_steps
from tunesmith.distributed.blocks import compile_now
from tunesmith.distributed.channel import LEFT, Failure, do_nothing
from tunesmith.distributed.choose import build_spread
from tunesmith.distributed.processes import Processes
from tunesmith.distributed.spread import Spread
from tunesmith.files import spell_sealed, write_text_atomic
from tunesmith.generation.held_out import HeldOutQuestions
from tunesmith.monitor.allocator import freed_memory_kept
from tunesmith.monitor.pace import Pace
from tunesmith.monitor.profile import Profile
from tunesmith.monitor.usage import DeviceStopwatch
from tunesmith.monitor.watchdog import Peer, Watchdog
from tunesmith.run.assemble import ReadyRun
from tunesmith.run.failures import how_to_continue, tell_interrupted
from tunesmith.run.records import RunRecord
from tunesmith.runfolder import RunFolder
from tunesmith.training.checkpoint import Checkpoint, restore_optimizer
from tunesmith.training.interrupt import StopRequest
from tunesmith.training.loop import Trainer
from tunesmith.training.metrics import MetricsFile, Tracker, start_trackers, tracker_hints
from tunesmith.training.optim import build_optimizer
from tunesmith.training.precision import Precision
from tunesmith.training.progress import Progress, TrainState, Window
from tunesmith.training.randomness import restore_random_states, seed_all
from tunesmith.training.saver import Saver
from tunesmith.training.step import can_read_late

_LAUNCHER_S = 30  # after a signal, torchrun kills its processes
_KILLED = (
    f" If torchrun itself got the signal, it kills its processes after {_LAUNCHER_S} s: resume then continues from the "
    "last checkpoint."
)


def write_run_files(folder: RunFolder, ready: ReadyRun, record: RunRecord) -> None:
    """Write data_ledger.json, config.yaml, and run.json, which makes the folder a resumable run."""
    session = ready.session
    ledger = ready.dataset.ledger_json(session.encoder, session.date) | {"share_prefix": ready.sharing.to_json()}
    write_text_atomic(folder.ledger, spell_sealed(ledger))
    write_text_atomic(folder.config, dump_yaml(session.config))
    record.write(folder.record)


def build_trainer(
    ready: ReadyRun,
    record: RunRecord,
    stop: StopRequest,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    state: TrainState | None = None,
) -> Trainer:
    """The loop with its optimizer, saver, metrics and trackers; the model is spread over the processes here.

    Args:
        progress: new, or that of `state`.
        checkpoint, state: to continue from.
    """
    session, lm = ready.session, ready.lm
    config, folder = session.config, session.folder
    questions = choose_questions(ready)
    spread, precision = spread_model(ready)
    if config.train.compile and lm.router is None:
        compile_model(ready, spread, precision)
    optimizer = spread.attach(lm, build_optimizer(lm.model, config.optim, config.lora.lr_ratio))
    scaler = precision.scaler(session.device)
    steps = config.train.profile_steps
    names, last_step = list(config.train.trackers), state.step if state else None
    trackers: list[Tracker] = []
    if session.world.is_main:
        trackers = start_trackers(names, folder, config.model_dump(mode="json"), record.id, last_step)
    saver = Saver(
        folder, lm, session.encoder, record.guard.to_json(), config.train.keep_checkpoints, session.world,
        ready.form.in_shards,
    )  # fmt: skip
    seed_all(config.train.seed)
    if checkpoint and state:
        restore_optimizer(lm.model, optimizer, checkpoint.open_optimizer(), spread)
        scaler.load_state_dict(dict(state.scaler))
        restore_random_states(checkpoint.load_random(), state.random)
    return Trainer(
        config=config,
        feed=ready.feed,
        lm=lm,
        optimizer=optimizer,
        scaler=scaler,
        precision=precision,
        world=session.world,
        spread=spread,
        saver=saver,
        trackers=trackers,
        stop=stop,
        on_log=session.reporter.step,
        questions=questions,
        replies=MetricsFile(folder.eval_replies, last_step) if questions and session.world.is_main else None,
        on_doing=session.reporter.doing,
        progress=progress,
        window=state.window if state else Window(),
        saved_step=state.step if state else None,
        pace=Pace(DeviceStopwatch() if session.world.size > 1 and session.device.type == "cuda" else None),
        profile=Profile(parse_steps(steps), folder.profile, session.world.rank) if steps else None,
        reads_late=can_read_late(session.device, optimizer, scaler),
    )


def spread_model(ready: ReadyRun) -> tuple[Spread, Precision]:
    """Spread the model over the processes; returns how, and the precision of a forward from now on."""
    session, precision = ready.session, ready.session.precision
    spread = build_spread(
        session.parallel, session.world, session.device, precision.compute, session.config, session.reporter.note
    )
    spread.prepare(ready.lm)
    return spread, replace(precision, compute=None) if spread.name == "fsdp" else precision  # fsdp casts by itself


def compile_model(ready: ReadyRun, spread: Spread, precision: Precision) -> None:
    """Compile the model's blocks now rather than in the first step, on a batch that depends on the config alone."""
    session, lengths = ready.session, ready.session.lengths
    session.reporter.stage("compiling the model's blocks (torch.compile), which may take a minute")
    longest = min(lengths.max_seq_len, lengths.capacity)
    number = lengths.capacity // longest if ready.lm.is_packed else 1
    lens = [longest] * (number - 1) + [longest - (number * longest + 1) % 2]
    seconds = compile_now(ready.lm, spread, precision.context(session.device), lens)
    session.reporter.note(f"torch.compile: the model's blocks were compiled in {seconds:.0f} s")


def choose_questions(ready: ReadyRun) -> HeldOutQuestions | None:
    """The held-out rows to answer at each evaluation; where there are fewer than asked for, a note says so."""
    session, held_out = ready.session, ready.feed.held_out
    wanted = session.config.train.eval_generate
    if not wanted or held_out is None:
        return None
    learned = getattr(session.model_config.get_text_config(), "max_position_embeddings", None)
    context = max(learned, session.lengths.max_seq_len) if learned else None
    questions = HeldOutQuestions(held_out, session.encoder, wanted, context, session.lengths.capacity)
    if (found := len(questions.questions)) < wanted:
        session.reporter.note(
            f"note: train.eval_generate {wanted}: {found or 'none'} of the held-out rows can be answered: a row needs "
            "a prompt and a whole reply (raw text has none)"
        )
    return questions if found else None


def train_to_end(ready: ReadyRun, trainer: Trainer) -> None:
    """Run the loop; trackers and the saver are closed in any case."""
    reporter, world, train = ready.session.reporter, ready.session.world, ready.session.config.train
    for line in tracker_hints(list(train.trackers), train.output_dir):
        reporter.note(line)
    if train.profile_steps and parse_steps(train.profile_steps)[0] > ready.feed.total_steps:
        reporter.note(
            f"note: train.profile_steps {train.profile_steps}: nothing is recorded, the run ends at step "
            f"{ready.feed.total_steps:,}"
        )
    epochs = ready.feed.total_epochs if train.max_steps else train.epochs
    try:
        reporter.begin(ready.feed.total_steps, trainer.progress.step, epochs)
        _defer_signals(ready, trainer)
        # checkpointing is set to save memory, and kept memory in pieces would take more than it saves
        keeps_freed = ready.session.device.type == "cpu" and not train.gradient_checkpointing
        with (
            _watching(ready, trainer) if world.is_main else contextlib.nullcontext(),
            freed_memory_kept() if keeps_freed else contextlib.nullcontext(),
        ):
            trainer.train()
    except BaseException:
        if not trainer.stop.is_urgent:
            with contextlib.suppress(Exception):
                trainer.saver.leave()
        for tracker in trainer.all_trackers:
            with contextlib.suppress(OSError):  # a full disk must not hide the original error
                tracker.finish()
        raise
    else:
        for tracker in trainer.all_trackers:
            tracker.finish()
    finally:
        if trainer.profile is not None:
            trainer.profile.end(trainer.progress.step, trainer.stop.is_urgent)
        reporter.end()


def _defer_signals(ready: ReadyRun, trainer: Trainer) -> None:
    """From here on signals, and failures of other processes, end the run between two forwards."""
    reporter, folder, world = ready.session.reporter, ready.session.folder, ready.session.world
    stop = trainer.stop
    if not isinstance(world, Processes):
        stop.defer(trainer.explain_stop, _last_words(ready, trainer) if reporter.owns_process else None)
        return

    def tell_failure(failure: Failure) -> None:
        reporter.end()
        advice = "" if "tunesmith resume" in failure.text else f" {how_to_continue(folder, is_urgent=True)}"
        print(f"{failure.prefix}{failure.text}{advice}", file=sys.stderr, flush=True)

    world.channel.on_end = tell_failure
    world.channel.on_failure = do_nothing  # its collectives fail by themselves
    world.channel.place = trainer.pace.position
    world.channel.on_stop = stop.ask
    if not world.is_main:
        stop.defer(world.ask_stop, world.publish_interrupt)
        return
    last_words = _last_words(ready, trainer)

    def publish_last_words() -> str:
        world.publish_interrupt()
        return last_words()

    def explain() -> str:
        text = trainer.explain_stop()
        is_long = trainer.pace.left_s() > _LAUNCHER_S / 2
        return text + (_KILLED if is_long else "")

    stop.defer(explain, publish_last_words if reporter.owns_process else None)


def _last_words(ready: ReadyRun, trainer: Trainer) -> Callable[[], str]:
    def last_words() -> str:
        ready.session.reporter.end()
        return tell_interrupted(ready.session.folder, trainer.progress)

    return last_words


def _watching(ready: ReadyRun, trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """Warn of steps that take far too long."""
    world = ready.session.world

    def peers() -> list[Peer]:
        if not isinstance(world, Processes):
            return []
        signs, now = world.channel.signs(), time.monotonic()
        return [
            Peer(f"process {rank}", sign.order, sign.place, now - sign.at)
            for rank, sign in signs.items()
            if sign.place and sign.beat != LEFT
        ]

    # a step with shapes that torch.compile has not seen takes a minute by design
    floor_s = 180.0 if ready.session.config.train.compile else 10.0
    return Watchdog(trainer.pace, peers, "process 0", floor_s).watching()
