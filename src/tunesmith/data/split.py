"""Split samples into training and evaluation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tunesmith.data.store import TokenStore
from tunesmith.errors import TunesmithError

Numbers = npt.NDArray[np.int64]


def split_eval(store: TokenStore, share: float, seed: int) -> tuple[Numbers, Numbers]:
    """Sample numbers for training and for evaluation; all samples of a row are on the same side.

    If there are too few rows to hold any out (one long text), its pieces are split instead.

    Raises:
        TunesmithError: there are too few pieces as well.
    """
    everything = np.arange(len(store))
    if not share:
        return everything, everything[:0]
    row_ids = store.row_ids
    units = np.unique(row_ids)
    if len(units) * share < 1:
        row_ids = units = everything
    num_held_out = max(1, round(len(units) * share))
    if num_held_out >= len(units):
        raise TunesmithError(
            f"data.eval_split {share}: {len(units)} rows are too few to hold any out. Give data.eval, or more data.",
            code="too-few-to-split",
        )
    held_out = np.random.default_rng([seed, 0x5EED]).choice(units, num_held_out, replace=False)
    is_eval = np.isin(row_ids, held_out)
    return everything[~is_eval], everything[is_eval]
