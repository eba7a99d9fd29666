"""The Triton kernels, run by Triton's interpreter. ``tests/gpu`` runs the same on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys


def test_kernels() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.invariant.kernel_checks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "done", done.stderr
