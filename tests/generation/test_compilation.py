"""Kernels compiled ahead: what fails costs time alone. That they are compiled is a test on a GPU (test_warm)."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Barrier

import pytest

from miles_spmd.generation.sglang.compilation import Product, compile_beside, compile_products

NO_DEVICE = 4096  # the number of a GPU that no machine has


def test_processes_that_cannot_compile_leave_it_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "kernels"))
    compile_products([Product(16, 64, 32), Product(8, 64, 32), Product(16, 64, 32)], NO_DEVICE)
    assert [name for name in os.listdir(tmp_path / "kernels") if not name.endswith(".lock")] == []
    assert "Error" in capfd.readouterr().err  # a rank's log says why


def test_what_is_built_beside_is_built_at_once() -> None:
    meeting = Barrier(3, timeout=30)
    threads = compile_beside([meeting.wait, meeting.wait])
    meeting.wait()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
