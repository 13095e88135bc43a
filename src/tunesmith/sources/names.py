"""How rows are named in messages, ledgers and pages."""

from __future__ import annotations

IN_MEMORY = ("data", "eval_data")  # arguments of the Python API; a data file has a suffix, so it has another name


def name_row(file: str, number: int) -> str:
    """FILE:ROW; of rows given in Python, data[INDEX]."""
    return f"{file}[{number}]" if file in IN_MEMORY else f"{file}:{number}"


def name_nth(file: str, count: int) -> str:
    """The same for the nth row, counted from 1; an index counts from 0."""
    return name_row(file, count - 1 if file in IN_MEMORY else count)
