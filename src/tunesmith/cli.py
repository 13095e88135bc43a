"""The command: call the stage, turn errors into one message and an exit code.

Nothing here imports torch or transformers: `--help` and every config error answer before that.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunesmith.boundary import end_at_next_interrupt, report_failure, taken_signals
from tunesmith.display import visible_streams
from tunesmith.errors import InterruptedRun, RunError, UsageError
from tunesmith.parser import build_parser
from tunesmith.streams import lasting_streams


def _take_open_maps(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Cut --model.config.KEY VALUE and --data.template_kwargs.KEY VALUE out; their keys are the person's own."""
    from tunesmith.config.plainyaml import load
    from tunesmith.config.runfile import OPEN_MAPS

    rest: list[str] = []
    taken: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and any(name.startswith(f"{m}.") for m in OPEN_MAPS)):
            rest.append(word)
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UsageError(
                    f"--{name}: needs a value; write one that starts with -- as --{name}=VALUE",
                    code="flag-without-value",
                )
        try:
            taken[name] = load(value)  # 256 is a number, false is false, text is text
        except ValueError:
            taken[name] = value
    return rest, taken


def _take_unknown_flags(argv: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Cut flags that the command does not know out with their values, to be reported beside all other problems."""
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    known = set(commands.choices[argv[0]]._option_string_actions)
    rest: list[str] = []
    unknown: list[str] = []
    is_skipping = False
    for word in argv:
        if word.startswith("--") and word != "--":
            name = word.partition("=")[0]
            is_skipping = name not in known
            if is_skipping:
                unknown.append(name.removeprefix("--"))
        if not is_skipping:
            rest.append(word)
    return rest, unknown


def _parse_config_command(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, Any]:
    from tunesmith.config.runfile import OPEN_MAPS, leaf_fields, resolve_config
    from tunesmith.config.schema import PreviewConfig, RunConfig, TokenizerConfig

    argv, flags = _take_open_maps(argv)
    argv, unknown = _take_unknown_flags(argv, parser)
    options = parser.parse_args(argv)
    if getattr(options, "json_schema", False):
        return options, None
    known = leaf_fields(RunConfig)
    for dotted in known:
        if hasattr(options, dotted):
            value = getattr(options, dotted)
            flags[dotted] = None if value in ("null", ["null"]) else value
    if options.command == "resume":
        return options, (flags, unknown)
    models: dict[str, Any] = {
        "train": RunConfig,
        "preview": PreviewConfig,
        "check": PreviewConfig,
        "tokenizer": TokenizerConfig,
    }
    model = models[options.command]
    own = leaf_fields(model)
    open_maps = tuple(f"{name}." for name in OPEN_MAPS if name in own)
    for dotted in [name for name in flags if name not in own and not name.startswith(open_maps)]:
        del flags[dotted]
        unknown.append(dotted)
    config = resolve_config(model, options.run_yaml, flags, unknown)
    return options, config


def run_command(argv: list[str]) -> None:
    """Run one command; an error of the user's leaves it as a TunesmithError."""
    _require_text(argv)
    parser = build_parser()
    if not argv:
        parser.print_help()
        return
    if argv[0] in ("train", "resume", "preview", "check", "tokenizer"):
        options, config = _parse_config_command(parser, argv)
        if getattr(options, "json_schema", False):
            _print_schema()
            return
        _quiet_libraries()
        if options.command == "train":
            _train(config)
        elif options.command == "resume":
            _resume(options, *config)
        elif options.command == "tokenizer":
            from tunesmith.use.tokenizer import run_tokenizer

            run_tokenizer(config.data, options.vocab_size, options.output)
        elif options.command == "check":
            from tunesmith.use.check import run_check

            run_check(config, options.strict, options.json, options.html)
        else:
            from tunesmith.use.preview import run_preview

            run_preview(config, options.rows, options.json, options.html)
        return
    options = parser.parse_args(argv)
    _quiet_libraries()
    if options.command == "chat":
        from tunesmith.use.chat import run_chat

        run_chat(options)
    elif options.command == "recipes":
        _print_recipes()
    elif options.command == "convert-config":
        _convert_config(options.file)
    elif options.command == "merge":
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
    elif options.command == "demo":
        from tunesmith.demo.run import run_demo

        run_demo(Path(options.output))


def _train(config: Any) -> None:
    from tunesmith.run.start import run_training

    with _reported(Path(config.train.output_dir)):
        run_training(config)


def _resume(options: argparse.Namespace, flags: dict[str, Any], unknown: list[str]) -> None:
    from tunesmith.run.resume import run_resume

    with _reported(Path(options.run)):
        run_resume(options.run, flags, options.allow, unknown)


@contextmanager
def _reported(output: Path) -> Iterator[None]:
    """Leaves report.html in the run's folder however it ended."""
    from tunesmith.use.report import write_report_quietly

    try:
        yield
    except (RunError, InterruptedRun) as error:
        with suppress(KeyboardInterrupt):  # how the run ended is said all the same
            write_report_quietly(output.expanduser(), f"not finished: {error}")
        raise
    try:
        write_report_quietly(output.expanduser(), "finished")
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"interrupted while report.html was written; {output} is finished, without a report",
            code="interrupted-report",
        ) from None


def _print_recipes() -> None:
    from tunesmith.config.runfile import list_recipes

    recipes = list_recipes()
    width = max(len(name) for name, _ in recipes)
    for name, text in recipes:
        print(f"{name:<{width}}  {text}")
    print("\ntrain one:  tunesmith train recipe:NAME --data D --output RUN")


def _convert_config(path: Path) -> None:
    from tunesmith.config.runfile import convert_config

    text, remarks = convert_config(path)
    for remark in remarks:
        print(remark, file=sys.stderr)
    print(text, end="")


def _print_schema() -> None:
    import json

    from tunesmith.config.runfile import json_schema

    print(json.dumps(json_schema(), indent=2))


def _quiet_libraries() -> None:
    """Our own lines say what matters; set these variables yourself to see theirs."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }.items():
        os.environ.setdefault(name, value)
    # a line for every forward in 8 bits, and one for kernels that it can do without
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the command contract."""
    words = list(sys.argv[1:] if argv is None else argv)
    with lasting_streams() as output, visible_streams(), taken_signals() as signals:
        output.ends_without_reader, output.ends_when_full = _needs_output(words)
        try:
            code = _exit_code(words)
            sys.stdout.flush()
        except BaseException as error:
            code = report_failure(signals.cause_of(error), words)
        if argv is None:  # a process of its own: at its end, Ctrl-C has nothing left to stop
            end_at_next_interrupt(code)
    return code


def _exit_code(words: list[str]) -> int:
    """Of a command that ends by itself, argparse's --help and usage errors among them."""
    try:
        run_command(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def _needs_output(words: list[str]) -> tuple[bool, bool]:
    """Whether the command ends when nobody reads what it prints, and when that cannot be written.

    What makes files goes on in both cases. `check` is for its exit code too, which `| head` must not hide.
    """
    command = words[0] if words else ""
    makes_files = command in ("train", "resume", "merge", "tokenizer", "demo") and "--json-schema" not in words
    if makes_files or any(word.partition("=")[0] == "--html" for word in words):
        return False, False
    return command != "check", True


def _require_text(words: list[str]) -> None:
    """Names go into JSON, YAML and pages, which hold text only."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = word if len(word) <= 200 else f"{word[:200]}..."
            raise UsageError(
                f"{shown!a}: is not UTF-8 text. Rename the file or folder, or link to it by another name.",
                code="argument-not-text",
            ) from None
