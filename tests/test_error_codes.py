"""Every error has a code that names its cause; docs/errors.md has all of them with their messages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tunesmith.errors import ConfigError, DataError, ModelError, RunError, TunesmithError, UsageError
from tunesmith.rows.conversation import RowRefused

DOCS = Path(__file__).resolve().parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import errors  # noqa: E402

# every package that raises our errors
DONE = sorted({one.package for one in errors.find_raised()})
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+){1,4}")


@pytest.mark.parametrize("kind", [TunesmithError, UsageError, DataError, ModelError, RunError, RowRefused])
def test_errors_carry_a_code(kind) -> None:
    error = kind("chats.jsonl: does not exist.", code="file-not-found")
    assert (str(error), error.code) == ("chats.jsonl: does not exist.", "file-not-found")


def test_problems_of_a_config_have_one_code() -> None:
    error = ConfigError("run.yaml", ["optim.lr: is negative", "data.train: is missing"])
    assert (error.code, len(error.problems), error.exit_code) == ("config", 2, 1)
    assert ConfigError("run.yaml", ["is empty"], code="file-empty").code == "file-empty"


@pytest.mark.parametrize("package", DONE)
def test_every_error_of_a_package_has_a_code(package: str) -> None:
    raised = [one for one in errors.find_raised() if one.package == package]
    assert raised
    for one in raised:
        assert one.code is None or one.code == "config" or CODE.fullmatch(one.code), (
            f"{one.where}: {one.kind} {one.code!r}"
        )


def test_the_source_is_read_as_it_is_written() -> None:
    tree = errors.ast.parse(
        "class DataError(TunesmithError):\n    exit_code = 1\n"
        "def read(path, rows):\n"
        "    why = f'{path.name}: is empty'\n"
        "    raise DataError(why, code='file-empty')\n"
        "def count(rows, refused):\n"
        "    raise RowRefused(f'{len(rows)} rows' + ' are bad', code=refused.code)\n"
    )
    classes = errors.find_classes([tree])
    assert classes == {"TunesmithError": 1, "RowRefused": None, "DataError": 1}
    found = [(one.kind, one.code, one.message) for one in errors.find_in("read.py", tree, classes)]
    assert found == [("DataError", "file-empty", "{path}: is empty"), ("RowRefused", None, "{rows} rows are bad")]
