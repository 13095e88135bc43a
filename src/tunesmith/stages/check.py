"""`tunesmith check` for a run file with stages: one stage after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.config.schema import PreviewConfig
from tunesmith.config.stages import Stage
from tunesmith.errors import DataError, UsageError
from tunesmith.stages.failures import named_stage
from tunesmith.use.check import run_check


def check_stages(
    stages: Sequence[Stage[PreviewConfig]], is_strict: bool, as_json: bool, html_path: Path | None
) -> None:
    """Check the data of each stage; as JSON, one object a stage.

    Raises:
        DataError: there are errors in a stage, or with --strict warnings; all stages are read first.
    """
    if html_path is not None and len(stages) > 1:
        names = ", ".join(stage.name for stage in stages)
        raise UsageError(f"--html: is a page about one stage. Give --stage too ({names}).", code="page-of-stages")
    found = []
    for number, stage in enumerate(stages):
        if stage.name and not as_json:
            print("\n" * bool(number) + f"stage {stage.name}")
        try:
            if stage.name:
                with named_stage(stage.name):
                    run_check(stage.config, is_strict, as_json, html_path, stage.name)
            else:
                run_check(stage.config, is_strict, as_json, html_path)
        except DataError as error:
            if error.code != "check-findings":
                raise
            found.append(str(error))
    if found:
        raise DataError("\n".join(found), code="check-findings")
