"""train.precision auto: what it picks on a CPU, and that a run keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.layers import products
from tunesmith.training import precision
from tunesmith.training.precision import has_fast_bf16, keep_precision, resolve_precision

Run = Callable[..., tuple[int, str, str]]
FAST = ("--data.max_seq_len", 64, "--train.micro_batch_tokens", 128)
CPU = torch.device("cpu")
AMX, AVX512 = {"amx_bf16": True, "avx512_bf16": True}, {"amx_bf16": False, "avx512_bf16": True}
NEITHER = {"amx_bf16": False, "avx512_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "is_amd", "limit", "picked"),
    [
        (AMX, False, None, "bf16"), (AMX, False, "DEFAULT", "bf16"), (AMX, False, "", "bf16"),
        (AMX, False, "AVX512_CORE_AMX", "bf16"), (AMX, False, "AVX512_CORE", "fp32"),
        (AMX, False, "avx512_core_bf16", "fp32"), (AMX, True, "avx512_core_bf16", "bf16"),
        (AVX512, True, None, "bf16"), (AVX512, True, "AVX2", "fp32"), (AVX512, False, None, "fp32"),
        (NEITHER, True, None, "fp32"), (NEITHER, False, "AVX512_CORE_AMX", "fp32"),
    ],
)  # fmt: skip
def test_auto_on_a_cpu(
    capabilities: dict[str, bool], is_amd: bool, limit: str | None, picked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVX512_BF16 counts on AMD alone: on Intel it is slower than fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(precision, "is_amd", lambda: is_amd)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert resolve_precision("auto", CPU) == picked
    assert resolve_precision("fp32", CPU) == "fp32"


def test_tests_train_in_fp32_on_every_machine() -> None:
    assert not has_fast_bf16()


@pytest.mark.parametrize(
    ("text", "is_amd"),
    [
        (b"vendor_id\t: AuthenticAMD\nmodel name\t: Caf\xe9 CPU\n", True), (b"vendor_id\t: GenuineIntel\n\xff\xfe", False),
        (b"", False), (b"CPU implementer : 0x41\n", False), (b"model name : not AMD\n", False),
    ],
)  # fmt: skip
def test_the_maker_of_a_cpu(text: bytes, is_amd: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_bytes(text)
    monkeypatch.setattr(products, "Path", lambda _: tmp_path / "cpuinfo")
    assert products.is_amd.__wrapped__() == is_amd


def test_capabilities_are_those_of_this_cpu() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.is_file():
        pytest.skip("no /proc/cpuinfo")
    text = flags.read_text()
    assert precision._cpu_capabilities() == {name: name in text for name in ("amx_bf16", "avx512_bf16")}


@pytest.mark.parametrize(
    ("name", "recorded", "kept"),
    [("auto", "bf16", "bf16"), ("auto", "fp32", "fp32"), ("auto", None, "fp32"), ("fp32", "bf16", "fp32")],
)
def test_a_begun_run_keeps_its_precision(
    name: str, recorded: str | None, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for capabilities in (AMX, NEITHER):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        assert keep_precision(name, recorded, CPU) == kept


def test_a_run_resumed_on_another_cpu_keeps_its_precision(
    run: Run, model_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun where auto is bf16, and continued where it would be fp32; and the other way round."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    for first, then, kept in ((AMX, NEITHER, "bf16"), (NEITHER, AMX, "fp32")):
        output = tmp_path / kept
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=first: found)
        code, out, err = run("train", "--model", model_folder, "--data", chats, "--output", output, *FAST,
                             "--train.max_steps", 1, "--optim.schedule", "constant")  # fmt: skip
        assert code == 0, err
        assert f"cpu, {kept}" in out
        assert json.loads((output / "run.json").read_text())["guard"]["precision"] == kept
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=then: found)
        code, out, err = run("resume", output, "--train.max_steps", 2)
        assert code == 0, err
        assert f"cpu, {kept}" in out
