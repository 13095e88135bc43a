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


MUCH = """
import resource, torch
from tunesmith.monitor.allocator import freed_memory_kept, give_back_much, leaves_gaps

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20

def step(count):
    pins = []
    held = []
    for _ in range(count):  # small tensors between large ones, which stay
        held.append(torch.ones(2**22))
        pins.append(torch.ones(100))
    return pins

with freed_memory_kept():
    few = step(10)
    give_back_much()
    kept = resident()
    many = step(100)
    before = resident()
    give_back_much()
    print(kept, before, resident(), int(leaves_gaps()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_much_freed_memory_is_given_back_where_it_would_lie_in_gaps() -> None:
    _, before, after, leaves_gaps = map(int, run_apart(MUCH).split())
    assert before > 1500
    if leaves_gaps:
        assert after < before - 1400
    else:
        assert after > before - 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072")],
)
def test_settings_of_the_user_are_left_alone(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, name, value)
    assert run_apart(CODE).split()[0] == "0"


OWN = """
import subprocess, sys
held = bytearray(2**30)
held[::4096] = b"x" * len(held[::4096])
code = "import torch; from tunesmith.monitor.usage import memory_gb; print(memory_gb(torch.device('cpu')))"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="others do not say")
def test_the_peak_is_the_processes_own() -> None:
    """ru_maxrss would begin with the peak of the process that started this one."""
    assert float(run_apart(OWN)) < 0.9
