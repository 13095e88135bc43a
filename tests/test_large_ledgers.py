"""Ledgers and indexes of a few bytes a row: the same JSON as before, and stores of earlier versions still open."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.data import store
from tunesmith.data.dataset import find_store_damage, hash_store
from tunesmith.data.labels import Sample
from tunesmith.data.ledger import LabelledRow, Ledger
from tunesmith.data.numbers import CutRows, RowNumbers
from tunesmith.data.store import StoreWriter, open_store
from tunesmith.files import read_sealed, sealed, spell_sealed, write_text_atomic
from tunesmith.preparation.journal import ledger_from_saved, ledger_to_saved
from tunesmith.runfolder import RunFolder

CONTENTS: list[dict[str, Any]] = [
    {}, {"a": []}, {"a": {}}, {"b": [1, 2, {"x": [], "ü\n": {}, "l": [[1], []]}], "a": None, "f": 1.5, "t": True},
    {"n": list(range(3000)), "d": [{"row": 1, "tokens_lost": 2}] * 3, "m": [1, "a", None, {"k": [2]}]},
    {5: "one", True: [True, 2], "10": 1, "9": float("inf"), "t": (1, (2, "x"))},
]  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
def test_json_in_pieces_is_that_of_json(tmp_path: Path, content: dict[str, Any]) -> None:
    assert "".join(spell_sealed(content)) == sealed(content)
    write_text_atomic(tmp_path / "a.json", spell_sealed(content))
    assert read_sealed(tmp_path / "a.json") == json.loads(json.dumps(content))


def test_row_numbers_are_a_list_in_few_bytes() -> None:
    rng = random.Random(0)
    plain = sorted(rng.sample(range(500), 300))
    numbers, halves = RowNumbers(plain), RowNumbers(plain[:150])
    halves.extend(RowNumbers(plain[150:]))
    for one in (numbers, halves, RowNumbers.from_runs(numbers.to_runs()), pickle.loads(pickle.dumps(numbers))):
        assert one == plain == list(one)
        assert (len(one), one[0], one[-1], one[20], one[5:30:2]) == (300, plain[0], plain[-1], plain[20], plain[5:30:2])
    every = RowNumbers(range(1, 100_001))
    assert (every.to_runs(), len(every)) == ([1, 100_000], 100_000)
    cuts = CutRows([(1, 5), (9, 2)])
    assert (list(cuts), list(cuts.records)[1]) == ([(1, 5), (9, 2)], {"row": 9, "tokens_lost": 2})


def rows_of(count: int) -> list[LabelledRow]:
    """Rows of every outcome, in two files."""
    rng = random.Random(1)
    found = []
    for number in range(1, count + 1):
        length = rng.randrange(2, 30)
        sample = Sample(np.arange(length, dtype=np.uint32), (np.arange(length) % 2).astype(np.uint8))
        file, notes = f"{number * 2 // count}.jsonl", ("column x is not read",) if number % 3 else ()
        if rng.random() < 0.1:
            found.append(
                LabelledRow(file, number, "refused", "", f"reason {rng.randrange(2)}", notes=notes, code="bad")
            )
            continue
        reason = rng.choice(["", "", "truncated", "split"])
        found.append(LabelledRow(file, number, "used", rng.choice(["as_rendered", "text"]), reason,
                                 (sample,) * rng.randrange(1, 3), 3 if reason == "truncated" else 0, notes,
                                 num_cut=int(reason == "truncated"), system_prompt=rng.choice([None, "p"])))  # fmt: skip
    return found


def test_ledgers_of_parts_add_up_to_the_ledger_of_all_rows() -> None:
    rows = rows_of(300)
    whole, sum_of_parts = Ledger(), Ledger()
    for row in rows:
        whole.add(row)
    for first in range(0, 300, 37):
        part = Ledger()
        for row in rows[first : first + 37]:
            part.add(row)
        sum_of_parts.merge(ledger_from_saved(json.loads(json.dumps(ledger_to_saved(part)))))
    assert sum_of_parts == whole
    assert json.dumps(sum_of_parts.to_json()) == json.dumps(whole.to_json())
    assert "".join(spell_sealed(whole.to_json(is_lazy=True))) == sealed(whole.to_json())
    again = Ledger.from_json(json.loads(json.dumps(whole.to_json())))
    assert json.dumps(again.to_json()) == json.dumps(whole.to_json())


def test_stores_of_earlier_versions_open_and_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_TOKENS", 200)
    rows = [row for row in rows_of(200) if row.samples]
    with StoreWriter(tmp_path / "new") as writer:
        for row in rows:
            writer.add(row)
    new, old = open_store(tmp_path / "new"), tmp_path / "tokens"
    old.mkdir()
    (old / "tokens.bin").write_bytes(np.concatenate([ids for ids, _ in new.shards]).tobytes())
    (old / "loss_mask.bin").write_bytes(np.concatenate([mask for _, mask in new.shards]).tobytes())
    names = ("num_targets", "file_numbers", "row_numbers")
    arrays = {name: np.array(getattr(new, name), np.int64) for name in names}
    np.savez(old / "index.npz", offsets=new.offsets, **arrays)
    (old / "files.json").write_text(json.dumps(new.files))
    opened = open_store(old)
    assert len(opened) == len(new) > 200
    for index in range(len(new)):
        assert np.array_equal(opened[index].input_ids, new[index].input_ids)
        assert np.array_equal(opened[index].loss_mask, new[index].loss_mask)
        assert opened.where(index) == new.where(index)
    assert np.array_equal(opened.row_ids, new.row_ids)
    hashes = {"tokens": hash_store(old)}
    assert not find_store_damage(RunFolder(tmp_path), hashes)
    (old / "tokens.bin").write_bytes(bytes(8))
    assert "tokens.bin" in find_store_damage(RunFolder(tmp_path), hashes)
