"""Where a streamed run is in its data: rows read so far, and marks from which a file can be read on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Mark = Mapping[str, Any]
"""JSON: "rows" of the source before the mark, "share" of the source before it (0 to 1, where known), and what the
source's reader needs to begin there."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place between two rows of an epoch.

    Attributes:
        source: number of the file or hub data set that is being read.
        rows: rows of this source before the place.
        total: rows of the epoch before the place.
        mark: the last mark of this source before the place; None: reading begins at its first row.
    """

    source: int = 0
    rows: int = 0
    total: int = 0
    mark: Mark | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Cursor:
        return cls(**saved)


@dataclass(frozen=True, slots=True)
class Start:
    """The place before a window.

    Attributes:
        number: of the window, counted over all epochs.
        epoch: that the window belongs to.
        share: of the epoch's data before the window, as far as that is known.
        ledger: counts over all rows before the window, as JSON; rows count in the first epoch only.
    """

    number: int = 0
    epoch: int = 0
    share: float = 0.0
    cursor: Cursor = field(default_factory=Cursor)
    ledger: Mapping[str, Any] | None = None

    @property
    def epochs(self) -> float:
        """Epochs completed."""
        return self.epoch + self.share

    def to_json(self) -> dict[str, Any]:
        return {"number": self.number, "epoch": self.epoch, "share": self.share, "cursor": self.cursor.to_json(),
                "ledger": self.ledger}  # fmt: skip

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Start:
        fields = {name: saved[name] for name in ("number", "epoch", "share", "ledger")}
        return cls(**fields, cursor=Cursor.from_json(saved["cursor"]))
