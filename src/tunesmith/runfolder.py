"""The RUN folder: the names of what lies in it."""

from __future__ import annotations

RUN_FILE = "run.json"
