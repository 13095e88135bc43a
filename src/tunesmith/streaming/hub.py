"""Rows of hub data sets as a stream: shard after shard, from any place, nothing is kept on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tunesmith.errors import DataError
from tunesmith.sources.arrow import read_batches
from tunesmith.sources.read import explain_hub
from tunesmith.streaming.cursor import Cursor, Mark

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_BATCH_ROWS = 256


def read_hub_from(
    hub: tuple[str, str | None, str], start: Cursor, max_row_mb: float
) -> Iterator[tuple[int, Any, Mark | None]]:
    """Number, value and mark of each row of a hub data set, or of a folder laid out like one, from a place on.

    Shards before the last mark are not opened; `datasets` names the place in the shard.
    """
    hub_id, _, split = hub
    opened = open_hub(hub)
    began = start.mark or {"rows": 0}
    if start.mark:
        opened.load_state_dict(start.mark["state"])
    marks: dict[int, Mark] = {}  # rows before a batch -> the place where it begins

    def batches() -> Iterator[pa.Table]:
        rows = began["rows"]
        try:
            for batch in opened.iter(batch_size=_BATCH_ROWS):
                yield batch
                rows += batch.num_rows
                marks[rows] = {"rows": rows, "state": opened.state_dict()}
        except Exception as error:  # of the network, the file system, or a damaged file
            raise explain_hub(hub_id, split, error) from None

    name = f"{hub_id}:{split}"
    for number, value in read_batches(name, batches(), max_row_mb, began["rows"]):
        mark = marks.pop(number - 1, None)
        if number > start.rows:
            yield number, value, mark


def open_hub(hub: tuple[str, str | None, str]) -> datasets.IterableDataset:
    """A hub data set as a stream of Arrow tables.

    Raises:
        DataError: it cannot be opened, or only a slice of a split is wanted.
    """
    import datasets

    hub_id, config, split = hub
    if "[" in split:
        raise DataError(
            f"{hub_id}:{split}: a slice of a split cannot be streamed. Name the whole split and set data.limit, or "
            "leave out data.stream.",
            code="slice-not-streamed",
        )
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(hub_id, config, split=split, streaming=True).with_format("arrow")
    except Exception as error:  # datasets raises many classes; the first line of the message says why
        raise explain_hub(hub_id, split, error) from None
