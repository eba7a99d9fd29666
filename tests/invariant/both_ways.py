"""Tests run with the compiled kernels, and as on a machine that has none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from miles_spmd.invariant import compiled

# Where there is a compiler, kernels that are not there have not been built, and tests of them fail.
can_build = compiled.LIBRARY.is_file() or shutil.which("c++")
needs_build = pytest.mark.skipif(not can_build, reason="there is no compiler here")
both_ways = pytest.mark.parametrize(
    "with_kernels", [pytest.param(True, marks=needs_build, id="compiled"), pytest.param(False, id="torch")]
)


@contextmanager
def kernels(there: bool) -> Iterator[None]:
    """``there``: as built; else the package finds no library."""
    library = compiled.LIBRARY
    compiled.LIBRARY = library if there else Path("never built")
    compiled._library.cache_clear()
    try:
        yield
    finally:
        compiled.LIBRARY = library
        compiled._library.cache_clear()
