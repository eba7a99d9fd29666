"""What a run on GPUs refuses before it builds anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.machine import COUNT, needs
from tests.worker.tiny_run import write_checkpoint, write_config

STALE = "/nowhere/torch_memory_saver_hook_mode_preload_cu13.abi3.so"


@needs(1)
@pytest.mark.parametrize(
    ("ranks", "variables", "message"),
    [
        (
            1,
            {"LD_PRELOAD": STALE},
            "start: RuntimeError: an engine requires torch_memory_saver's hook",
        ),
        (
            1,
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            "start: RuntimeError: unset expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF",
        ),
        (COUNT + 1, {}, f"ended: RuntimeError: {COUNT + 1} ranks on this host and {COUNT} GPUs"),
    ],
    ids=["no hook", "allocator", "too many ranks"],
)
def test_it_is_said_before_anything_is_built(
    tmp_path: Path, ranks: int, variables: dict[str, str], message: str
) -> None:
    config = write_config(tmp_path, write_checkpoint(tmp_path / "model"))
    command = [sys.executable, "-m", "miles_spmd", "train", str(config), f"--nproc-per-node={ranks}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | variables)
    assert done.returncode
    assert message in done.stderr
    for log in (tmp_path / "runs" / "tiny" / "logs" / "latest").glob("rank-*.log"):
        assert "memory, " not in log.read_text()
