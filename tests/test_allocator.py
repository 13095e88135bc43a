"""glibc keeps the memory of a step while a run trains."""

from __future__ import annotations

import os
import platform

import pytest

from conftest import run_apart

CODE = """
import resource, torch
from tunesmith.monitor.allocator import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        held = [torch.ones(2**24) for _ in range(2)]  # 64 MiB each: more than glibc's own threshold can become
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20

torch.set_num_threads(1)
start = resident()
outside = faults()
with freed_memory_kept() as is_kept:
    faults()
    inside = faults()
print(int(is_kept), outside, inside, resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_step_finds_its_memory_in_place() -> None:
    is_kept, outside, inside, left = map(int, run_apart(CODE).split())
    assert is_kept
    assert inside < outside / 10  # outside, each page in each round
    assert left < 64  # MiB: given back after the block


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072")],
)
def test_settings_of_the_user_are_left_alone(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, name, value)
    assert run_apart(CODE).split()[0] == "0"
