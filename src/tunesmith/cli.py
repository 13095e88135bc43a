"""The command line: run one command, report errors as a message and an exit code.

Nothing here imports torch or transformers, so that `--help` and config errors are fast.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.boundary import end_at_next_interrupt, end_interrupted, report_failure, taken_signals
from tunesmith.display import visible_streams
from tunesmith.distributed.launch import VOICE, require_one_process
from tunesmith.errors import ConfigError, InterruptedRun, UsageError
from tunesmith.importing import import_libraries
from tunesmith.parser.build import build_parser
from tunesmith.parser.command import CommandParser
from tunesmith.parser.words import find_command, refuse_unknown_flags, take_open_maps, take_unknown_flags
from tunesmith.streams import lasting_streams
from tunesmith.terminal.status import show_status


def _parse_config_command(parser: CommandParser, argv: list[str]) -> tuple[argparse.Namespace, Any]:
    from tunesmith.config.runfile import OPEN_MAPS, STAGES, explain_flag, leaf_fields
    from tunesmith.config.schema import LrFindConfig, PreviewConfig, RunConfig, TokenizerConfig
    from tunesmith.config.stages import resolve_stages, resolve_training

    argv, flags = take_open_maps(argv, OPEN_MAPS if argv[0] == "resume" else (*OPEN_MAPS, STAGES))
    own_flags = parser.commands[argv[0]].flags
    argv, unknown = take_unknown_flags(argv, own_flags)
    own_names = [flag[2:] for flag in own_flags if flag.startswith("--") and not flag.endswith(".KEY")]
    problems = [explain_flag(name, own_names) for name in unknown]
    parser.commands[argv[0]].problems = problems
    options = parser.parse_args(argv)
    if getattr(options, "json_schema", False):
        return options, None
    known = leaf_fields(RunConfig)
    for dotted in known:
        if hasattr(options, dotted):
            value = getattr(options, dotted)
            flags[dotted] = None if value in ("null", ["null"]) else value
    if options.command == "resume":
        if problems:
            raise ConfigError("the command line", problems, exit_code=2)
        return options, flags
    models: dict[str, Any] = {
        "train": RunConfig,
        "preview": PreviewConfig,
        "check": PreviewConfig,
        "lr-find": LrFindConfig,
        "tokenizer": TokenizerConfig,
    }
    model = models[options.command]
    own = leaf_fields(model)
    open_maps = tuple(f"{name}." for name in (*OPEN_MAPS, STAGES) if name in own or name == STAGES)
    for dotted in [name for name in flags if name not in own and not name.startswith(open_maps)]:
        del flags[dotted]
        problems.append(explain_flag(f"--{dotted}", own_names))
    if options.command == "train":
        return options, resolve_training(options.run_yaml, flags, problems)
    stages = resolve_stages(model, options.run_yaml, flags, problems, name=options.stage)
    return options, stages


_DOING = {
    "check": "reading the data",
    "tokenizer": "reading the data",
    "merge": "reading the adapter",
    "export": "reading the model",
    "push": "reading the model",
    "evaluate": "reading the data",
    "generate": "reading the data",
}


def run_command(argv: list[str]) -> None:
    """Run one command; raises a TunesmithError for what the user can fix."""
    _require_text(argv)
    require_one_process(argv)
    if not {"-h", "--help", "--version"} & set(argv):
        show_status(_DOING.get(argv[0] if argv else "", "loading"))  # importing the libraries takes seconds
    parser = build_parser()
    if not argv:
        parser.print_help()
        return
    if argv[0] == "help":  # as in git help train
        argv = [*argv[1:2], "--help"]
    command = None if argv[0] in ("-h", "--help", "--version") else find_command(parser, argv[0])
    if argv[0] in ("train", "resume", "preview", "check", "lr-find", "tokenizer"):
        _run_config_command(parser, argv)
        return
    words: list[str] | None = None
    if argv[0] == "convert-config":
        from tunesmith.foreign.console import take_command

        argv, words = take_command(argv)
    overrides: dict[str, Any] = {}
    if argv[0] in ("chat", "export", "serve"):
        argv, overrides = take_open_maps(argv, ["model.config"])
    elif argv[0] in ("evaluate", "generate"):
        argv, overrides = take_open_maps(argv, ["model.config", "data.template_kwargs"])
    if command is not None:
        refuse_unknown_flags(command, argv[1:])
    options = parser.parse_args(argv)
    template_kwargs = {name: overrides.pop(name) for name in [*overrides] if name.startswith("data.")}
    options.model_config = _read_model_config(overrides)
    _quiet_libraries()
    _run_use_command(options, words, template_kwargs)


def _run_use_command(options: argparse.Namespace, words: list[str] | None, template_kwargs: dict[str, Any]) -> None:
    """Run a command that uses a trained model, or one of those around it.

    Args:
        words: the command that convert-config converts.
    """
    if options.command == "chat":
        import_libraries()
        from tunesmith.use.chat import run_chat

        run_chat(options)
    elif options.command == "serve":
        from tunesmith.serve.run import run_serve

        run_serve(options)
    elif options.command == "evaluate":
        _evaluate(options, template_kwargs)
    elif options.command == "generate":
        from tunesmith.distillation.command import run_generate

        run_generate(options, template_kwargs)
    elif options.command == "report":
        _report(Path(options.run))
    elif options.command == "recipes":
        _print_recipes()
    elif options.command == "convert-config":
        from tunesmith.foreign.console import run_convert_config

        run_convert_config(options, words)
    elif options.command == "merge":
        _merge(options)
    elif options.command == "export":
        from tunesmith.exports.command import run_export_command

        run_export_command(options)
    elif options.command == "push":
        _push(options)
    elif options.command == "demo":
        from tunesmith.demo.run import run_demo

        run_demo(Path(options.output))


def _read_model_config(flags: dict[str, Any]) -> dict[str, Any]:
    """The values of --model.config.KEY.

    Raises:
        ConfigError: one of them is a value that no config has.
    """
    given = {name.removeprefix("model.config."): value for name, value in flags.items()}
    if not given:
        return given
    from pydantic import ValidationError

    from tunesmith.config.runfile import explain_problems
    from tunesmith.config.schema import ModelSection

    try:
        ModelSection(path="?", config=given)
    except ValidationError as error:
        raise ConfigError("the command line", [f"model.{problem}" for problem in explain_problems(error)]) from None
    return given


def _run_config_command(parser: CommandParser, argv: list[str]) -> None:
    """Run a command whose flags are keys of a run file."""
    options, config = _parse_config_command(parser, argv)
    if getattr(options, "json_schema", False):
        _print_schema()
        return
    _quiet_libraries()
    if options.command == "train":
        _train(config)
    elif options.command == "resume":
        _resume(options, config)
    elif options.command == "check":
        _check(options, config)
    else:
        _run_on_stage(options, config[0].config)


def _run_on_stage(options: argparse.Namespace, config: Any) -> None:
    """A command that reads one stage of a run file, or one without stages."""
    if options.command == "lr-find":
        _lr_find(config)
    elif options.command == "tokenizer":
        from tunesmith.use.tokenizer import run_tokenizer

        run_tokenizer(config.data, options.vocab_size, options.output, options.sample_mb)
    else:
        from tunesmith.use.preview import run_preview

        run_preview(config, options.rows, options.json, options.html, options.row, options.only)


def _check(options: argparse.Namespace, stages: Any) -> None:
    from tunesmith.stages.check import check_stages

    check_stages(stages, options.strict, options.json, options.html)


def _begin_imports() -> None:
    """Import the libraries; say so where standard output is no terminal, on which `show_status` has said it."""
    if "torch" not in sys.modules and not sys.stdout.isatty() and VOICE.is_heard():
        print("start      importing PyTorch and transformers", flush=True)
    import_libraries()


def _train(config: Any) -> None:
    _begin_imports()
    from tunesmith.run.console import ConsoleReporter
    from tunesmith.stages.command import train_config

    train_config(config, ConsoleReporter())


def _lr_find(config: Any) -> None:
    import_libraries()
    from tunesmith.lr_find import run_lr_find

    run_lr_find(config)


def _resume(options: argparse.Namespace, flags: dict[str, Any]) -> None:
    _begin_imports()
    from tunesmith.run.console import ConsoleReporter
    from tunesmith.stages.command import resume_run

    resume_run(options.run, flags, options.allow, ConsoleReporter())


def _report(run: Path) -> None:
    from tunesmith.report.stages import report_run

    print(report_run(run))


def _merge(options: argparse.Namespace) -> None:
    from tunesmith.use.merge import run_merge

    run_merge(
        options.adapters,
        options.output,
        options.method,
        options.weights,
        options.density,
        options.seed,
        options.base,
        options.allow_changed_base,
        options.trust_remote_code,
    )


def _push(options: argparse.Namespace) -> None:
    from tunesmith.publish.plan import PushSettings
    from tunesmith.publish.push import run_push

    given = options.model, options.repository, options.public, options.license, options.base, options.include
    run_push(PushSettings(*given, options.replace, options.yes, options.trust_remote_code), can_ask=True)


def _evaluate(options: argparse.Namespace, template_kwargs: dict[str, Any]) -> None:
    from tunesmith.evaluation.settings import EvaluateSettings, data_section
    from tunesmith.judging.settings import judge_settings

    judge = judge_settings(
        options.judge, options.judge_model, options.judge_key_env, options.judge_parallel, options.judge_timeout
    )
    import_libraries()
    from tunesmith.judging.command import run_evaluate

    keys = {name: value for name, value in vars(options).items() if name.startswith("data.")}
    settings = EvaluateSettings(
        models=options.models,
        data=data_section(keys | template_kwargs),
        has_base=options.base,
        replies=options.replies,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        limit=options.limit,
        seed=options.seed,
        bleu_tokenizer=options.bleu_tokenizer,
        output=options.output,
        overwrites=options.overwrite,
        tokenizer=options.tokenizer,
        config=options.model_config,
        trust_remote_code=options.trust_remote_code,
        allow_changed_base=options.allow_changed_base,
    )
    run_evaluate(settings, judge, options.json)


def _print_recipes() -> None:
    from tunesmith.config.runfile import list_recipes

    recipes = list_recipes()
    width = max(len(name) for name, _ in recipes)
    for name, text in recipes:
        print(f"{name:<{width}}  {text}")
    print("\ntrain one:  tunesmith train recipe:NAME --data D --output RUN")


def _print_schema() -> None:
    import json

    from tunesmith.config.runfile import json_schema

    print(json.dumps(json_schema(), indent=2))


def _quiet_libraries() -> None:
    """Silence the progress lines of libraries, unless the user has set these variables."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }.items():
        os.environ.setdefault(name, value)
    if "RANK" in os.environ:  # where a process is lost, torch prints stacks of C++ for each try to reach it
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # it logs a line for every 8-bit forward
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # accelerate imports it wherever it is installed, and it sets its own level
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the command contract."""
    words = list(sys.argv[1:] if argv is None else argv)
    saves = words[:1] in (["train"], ["resume"])
    with lasting_streams() as output, visible_streams(), printed_messages(), taken_signals(saves) as signals:
        output.ends_without_reader, output.ends_when_full = _needs_output(words)
        try:
            code = _exit_code(words)
            sys.stdout.flush()
        except BaseException as error:
            code = report_failure(signals.cause_of(error), words)
        if argv is None:  # own process: at its end, Ctrl-C has nothing left to stop
            end_at_next_interrupt(code)
    if argv is None and code == InterruptedRun.exit_code:
        end_interrupted(code)
    return code


class _Printer(logging.Handler):
    """Prints messages of the package: remarks to standard output, warnings to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        if not VOICE.is_heard():
            return
        print(record.getMessage(), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout, flush=True)


@contextmanager
def printed_messages() -> Iterator[None]:
    """What the functions behind a command log is shown while the command runs."""
    logger, printer = logging.getLogger("tunesmith"), _Printer()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(printer)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(printer)
        logger.setLevel(level)
        logger.propagate = propagates


def _exit_code(words: list[str]) -> int:
    """Exit code of a command without an error; argparse exits for --help and usage errors."""
    try:
        run_command(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def _needs_output(words: list[str]) -> tuple[bool, bool]:
    """Whether the command ends when nobody reads its output, and when the output cannot be written.

    Commands that write files continue in both cases. `check` continues for its exit code, also under `| head`.
    """
    command = words[0] if words else ""
    makes_files = (
        command in ("train", "resume", "merge", "tokenizer", "report", "demo", "evaluate", "generate")
        and "--json-schema" not in words
    )
    if makes_files or any(word.partition("=")[0] == "--html" for word in words):
        return False, False
    return command != "check", True


def _require_text(words: list[str]) -> None:
    """Refuse arguments that are not text: names go into JSON, YAML and pages."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = word if len(word) <= 200 else f"{word[:200]}..."
            raise UsageError(
                f"{shown!a}: is not UTF-8 text. Rename the file or folder, or link to it by another name.",
                code="argument-not-text",
            ) from None
