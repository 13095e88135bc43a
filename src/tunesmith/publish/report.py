"""report.html of a run for others: without folders of this machine, and without rows unless they are asked for."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.cards.sections import name_data
from tunesmith.config.schema import RunConfig
from tunesmith.publish.private import run_cwd, without_paths
from tunesmith.report.page import show_run
from tunesmith.report.records import RunRecords
from tunesmith.report.replies import SampleReplies, kept_replies
from tunesmith.report.verdict import judge
from tunesmith.report.write import describe_outcome
from tunesmith.runfolder import RunFolder

_NO_CODE = "other"
_NOT_SHOWN = SampleReplies("not published")


def plain_report(run: RunRecords, with_replies: bool) -> bytes:
    """The page as it is published.

    Args:
        with_replies: also sample replies, with their prompts and the replies in the data.
    """
    samples = kept_replies(run.folder, run.last_step) if with_replies else _NOT_SHOWN
    with tempfile.TemporaryDirectory() as empty:
        folder = run.folder if with_replies else RunFolder(Path(empty) / run.folder.path.resolve().name)
        cwd = run_cwd(run.run)
        config = RunConfig.model_validate(without_paths(run.config.model_dump(mode="json"), cwd))
        shown = replace(run, folder=folder, config=config, ledger=plain_ledger(run.ledger, cwd))
        return show_run(shown, describe_outcome(run), judge(shown, samples), samples).encode()


def plain_ledger(ledger: Mapping[str, Any], cwd: Path) -> dict[str, Any]:
    """A ledger with names of files alone, and codes for the reasons of refusals, which may quote a row."""
    plain = dict(ledger)
    for part in ("train", "eval"):
        if not isinstance(found := ledger.get(part), Mapping):
            continue
        codes, seen, files = found.get("codes") or {}, Counter[str](), {}
        for name, entry in found["files"].items():
            shown = name_data(name, cwd)
            seen[shown] += 1
            refused: dict[str, list[int]] = {}
            for reason, rows in entry["refused"].items():
                refused.setdefault(codes.get(reason) or _NO_CODE, []).extend(rows)
            files[shown if seen[shown] == 1 else f"{shown} ({seen[shown]})"] = {
                **entry, "refused": refused, "notes": {},
            }  # fmt: skip
        plain[part] = {**found, "files": files, "codes": {code: code for code in codes.values()}, "passed_over": []}
    return plain
