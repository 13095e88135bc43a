"""Results of runs in a JSON Lines file, so that no run is made twice and a script can be stopped at any time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Generic, TypeVar

Setting = TypeVar("Setting")
Result = TypeVar("Result")


class Kept(Generic[Setting, Result]):
    """One line a result: {"setting": {...}, "made_from": HASH, "result": {...}}.

    Args:
        file: is appended to; created with the first result.
        setting_of, result_of: make a setting and a result, both frozen dataclasses, from their keyword arguments.
        make: makes the result of a setting.
        made_from: hash of what the result depends on besides the setting (data, weights, versions). Results of another
            hash stay in the file and are not used.
    """

    def __init__(
        self,
        file: Path,
        setting_of: Callable[..., Setting],
        result_of: Callable[..., Result],
        make: Callable[[Setting], Result],
        made_from: Callable[[Setting], str],
    ) -> None:
        self._file, self._make, self._made_from = file, make, made_from
        self._found: dict[Setting, Result] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            entry = json.loads(line)
            setting = setting_of(**entry["setting"])
            if entry["made_from"] == made_from(setting):
                self._found[setting] = result_of(**entry["result"])

    def make(self, settings: Iterable[Setting], most: int) -> None:
        """Make the results that are not there yet, at most so many."""
        for setting in [setting for setting in dict.fromkeys(settings) if setting not in self._found][:most]:
            result = self._found[setting] = self._make(setting)
            entry = {"setting": asdict(setting), "made_from": self._made_from(setting), "result": asdict(result)}  # type: ignore[call-overload]
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            print(f"{setting}: {result}", flush=True)

    def __contains__(self, setting: Setting) -> bool:
        return setting in self._found

    def __getitem__(self, setting: Setting) -> Result:
        return self._found[setting]


def hash_files(files: Iterable[Path], *texts: str) -> str:
    """Hash of the contents of files, whatever their names, and of texts."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]
