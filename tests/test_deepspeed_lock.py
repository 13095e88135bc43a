"""Locks of torch's compiler runs, which DeepSpeed waits for. DeepSpeed is not needed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tunesmith.distributed import compiling
from tunesmith.errors import RunError

pytestmark = pytest.mark.skipif(not compiling.can_find_holders(), reason="needs /proc")


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_UNHELD_S", 0.3)
    monkeypatch.setattr(compiling, "_POLL_S", 0.02)


def test_a_lock_that_nobody_holds_is_named(tmp_path: Path) -> None:
    """A killed compiler run leaves it, and torch would wait for it without end."""
    from torch.utils.file_baton import FileBaton

    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    said: list[str] = []
    with compiling.watched_compiler(said.append):
        baton = FileBaton(str(lock))
        assert not baton.try_acquire()
        with pytest.raises(RunError, match="rm ") as caught:
            baton.wait()
    assert caught.value.code == "deepspeed-lock"
    assert str(lock) in str(caught.value)
    assert said == []
    assert FileBaton.wait is not compiling.wait_for_lock


def test_a_lock_that_is_held_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    handle = os.open(lock, os.O_CREAT | os.O_EXCL)
    said: list[str] = []

    def finish() -> None:
        time.sleep(0.6)  # longer than an unheld lock is waited for
        os.close(handle)
        lock.unlink()

    thread = threading.Thread(target=finish)
    thread.start()
    compiling.wait_for_lock(lock, said.append)
    thread.join()
    assert len(said) == 1
    assert "fused_adam" in said[0]
    assert str(os.getpid()) in said[0]


def test_the_first_compiler_run_is_announced(tmp_path: Path) -> None:
    from torch.utils.file_baton import FileBaton

    said: list[str] = []
    with compiling.watched_compiler(said.append):
        for is_built in (False, True):
            if is_built:
                (tmp_path / "ops.so").touch()
            baton = FileBaton(str(tmp_path / "lock"))
            assert baton.try_acquire()
            baton.release()
    assert len(said) == 1
    assert str(tmp_path) in said[0]


def test_what_libraries_print_is_kept_and_remarks_are_shown() -> None:
    """In a process of its own: pytest has a standard output of its own."""
    code = """if True:
        import os, sys
        from tunesmith.distributed.compiling import _Quiet
        with _Quiet() as quiet:
            print("by Python", flush=True)
            os.write(1, b"by a child\\n")
            with quiet.lifted():
                print("a remark")
            print("an error", file=sys.stderr)
            kept = quiet.text().split()
        print("after", kept == ["by", "Python", "by", "a", "child"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["a", "remark", "after", "True"]
    assert "an error" in done.stderr
