"""Our Triton attention in SGLang, by Triton's interpreter; on a GPU it is seen in tests/gpu/test_parity.py."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.interpreted import ENVIRONMENT


def test_an_engine_attends_by_it() -> None:
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, "-m", "tests.generation.split_attention_checks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
