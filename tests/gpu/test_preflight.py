"""The preflight on the GPUs of this machine: they are healthy, and an all-reduce of 1 GiB is fast enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.machine import COUNT, measured, needs

NVLINK = 100.0  # GB/s, which no path without NVLink reaches between GPUs of a host


@needs(1)
@pytest.mark.parametrize(("expected", "status"), [(NVLINK, 0), (1e6, 1)])
def test_the_gpus_of_this_machine(tmp_path: Path, expected: float, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "miles_spmd", "doctor", "--cluster", str(tmp_path)],
        env=os.environ | {"MILES_SPMD_BANDWIDTH": str(expected), "MASTER_ADDR": "127.0.0.1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    node = done.stdout.splitlines()[1].split()
    if COUNT == 1:  # there is nothing to reduce
        assert (done.returncode, node[1:3]) == (0, ["ok", "1"]), done.stdout
        return
    assert done.returncode == status, done.stdout + done.stderr
    assert node[2] == str(COUNT)
    assert ("expected 1e+06 (MILES_SPMD_BANDWIDTH)" in done.stdout) == bool(status)
    measured(f"all-reduce of 1 GiB over {COUNT} GPUs", {"GB/s": float(node[-1])})
