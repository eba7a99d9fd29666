from __future__ import annotations

from pathlib import Path

import pytest

from miles_spmd.platform import cpu

cpu.install()

from tests.generation import checkpoints  # noqa: E402


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of one architecture."""
    return [checkpoints.write(tmp_path_factory.mktemp(f"checkpoint{seed}"), seed) for seed in (0, 1)]
