"""What the tests of the sandbox share. They are skipped only on a machine without bubblewrap."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from miles_spmd.sandbox.sandbox import Limits, Outcome, Sandbox

Run = Callable[..., Outcome]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("bwrap") is None:
        for item in items:
            if "tests/sandbox" in str(item.path):
                item.add_marker(pytest.mark.skip("bubblewrap is not installed"))


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    return Sandbox(Limits(seconds=20, cpu_seconds=10, memory_mib=256))


@pytest.fixture(scope="session")
def hasty() -> Sandbox:
    """A sandbox for programs that are to reach a limit."""
    limits = Limits(
        seconds=2, cpu_seconds=30, memory_mib=128, processes=12, file_mib=2, folder_mib=4, output_bytes=10_000
    )
    return Sandbox(limits)
