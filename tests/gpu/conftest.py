"""Tests on GPUs, ``pytest tests/gpu``: skipped only where there are too few. They end with what was measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from miles_spmd.platform.cuda import memory_saver_libraries
from miles_spmd.quickstart.__main__ import SFT
from miles_spmd.quickstart.assets import build_assets
from tests.generation.conftest import folders  # noqa: F401
from tests.gpu import machine
from tests.gpu.test_grpo import train

if machine.COUNT:  # for the processes that tests start
    os.environ["LD_PRELOAD"] = ":".join(
        [*map(str, memory_saver_libraries()), *filter(None, [os.environ.get("LD_PRELOAD")])]
    )


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quickstart's data in ``assets`` and its warmed-up model in ``sft/export``."""
    folder = tmp_path_factory.mktemp("quickstart")
    build_assets(folder / "assets")
    model, data = f"model.hf_checkpoint={folder}/assets/model", f"data.prompt_data={folder}/assets/sft.jsonl"
    train(SFT, folder, "sft", 1, model, data)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if machine.MEASURED:
        terminalreporter.section("measured")
        for line in machine.MEASURED:
            terminalreporter.write_line(line)
