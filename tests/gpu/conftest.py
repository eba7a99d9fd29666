"""Tests on GPUs, ``pytest tests/gpu``: skipped only where there are too few. They end with what was measured."""

from __future__ import annotations

import os

import pytest

from miles_spmd.platform.cuda import memory_saver_libraries
from tests.gpu import machine
from tests.rollout.conftest import folders  # noqa: F401

if machine.COUNT:  # for the processes that tests start
    os.environ["LD_PRELOAD"] = ":".join(
        [*map(str, memory_saver_libraries()), *filter(None, [os.environ.get("LD_PRELOAD")])]
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if machine.MEASURED:
        terminalreporter.section("measured")
        for line in machine.MEASURED:
            terminalreporter.write_line(line)
