"""HTML pages from the templates in pages/, every value escaped and without control characters."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tunesmith.display import visible
from tunesmith.errors import UsageError


def render_page(name: str, **values: Any) -> str:
    """The page pages/NAME.html."""
    return _environment().get_template(f"{name}.html").render(values)


@lru_cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("tunesmith", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_show,
        keep_trailing_newline=True,
    )


def _show(value: Any) -> Any:
    """Runs on every value before it is escaped; what is Markup already was made by us."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def require_writable(path: Path) -> None:
    """Refuse a page that could not be written, before the work for it is done.

    Raises:
        UsageError: the path is a folder or a device, or its folder is missing or read-only.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(
            f"--html {path}: is a pipe or a device, which the page would replace; name a file.", code="page-not-a-file"
        )
    if path.is_dir():
        raise UsageError(
            f"--html {path}: is a folder; give the name of a file in it, as in {path / 'preview.html'}.",
            code="page-is-folder",
        )
    if not path.parent.is_dir():
        raise UsageError(
            f"--html {path}: there is no folder {path.parent}; make it first, or name another.",
            code="page-folder-missing",
        )
    if not os.access(path.parent, os.W_OK):
        raise UsageError(
            f"--html {path}: nothing may be written to {path.parent.resolve()}; name another folder.",
            code="page-not-writable",
        )
