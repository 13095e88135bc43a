"""Tensors written and verified: what it takes beside them does not grow with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tunesmith import tensors
from tunesmith.tensors import find_not_finite, write_tensors

CHILD = """
import sys
from pathlib import Path
import torch
from tunesmith.monitor.memory import process_memory
from tunesmith.tensors import find_not_finite, write_tensors
path = Path(sys.argv[1])
write_tensors(path, {"small": torch.ones(2**20)})
find_not_finite({"small": torch.ones(2**20)})
large = {str(number): torch.full((2**24,), float(number)) for number in range(6)}  # 64 MiB each
large["whole"] = torch.ones(2**26)
before = process_memory()[0]
write_tensors(path, large)
written = process_memory()[1] - before
print(find_not_finite(large), written / 2**20, (process_memory()[1] - before) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_beside_the_tensors(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CHILD, str(tmp_path / "t.safetensors")]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    written, looked_at = map(float, found)
    assert written < 320  # of 640 MiB, with the largest tensor of 256
    assert looked_at < 320


@pytest.mark.parametrize("place", [0, 9, 10, 41])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_in_every_part(place: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_PART", 10)
    tensor = torch.zeros(6, 7)
    tensor.view(-1)[place] = value
    assert find_not_finite({"fine": torch.zeros(5), "bad": tensor}) == "bad"
    assert find_not_finite({"bad": tensor.t()}) == "bad"
    assert not find_not_finite({"none": torch.zeros(0), "number": torch.tensor(1.0), "ids": torch.arange(3)})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_types_without_an_isfinite_of_their_own(dtype: torch.dtype) -> None:
    assert not find_not_finite({"fine": torch.ones(3).to(dtype)})
    assert find_not_finite({"bad": torch.tensor([1.0, float("nan")]).to(dtype)}) == "bad"


def test_a_file_that_is_replaced_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_GROUP", 8)
    path, compare = tmp_path / "t.safetensors", tensors.is_same_bits
    meant = {key: torch.arange(3.0) for key in "abc"}

    def replace_and_compare(one: torch.Tensor, other: torch.Tensor) -> bool:
        save_file({"a": one.clone()}, path)
        return compare(one, other)

    write_tensors(path, meant)
    monkeypatch.setattr(tensors, "is_same_bits", replace_and_compare)
    with pytest.raises(OSError, match=r"t\.safetensors"):
        tensors.require_tensors(path, meant)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_lost_write_is_found_in_every_group(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_GROUP", 8)
    meant = {key: torch.arange(3.0) for key in "abc"}
    path = tmp_path / "t.safetensors"
    write_tensors(path, meant)
    with pytest.raises(OSError, match=r"t\.safetensors"):
        tensors.require_tensors(path, {**meant, name: torch.zeros(3)})
