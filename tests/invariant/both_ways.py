"""Tests run with the compiled kernels, and as on a machine that has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from miles_spmd.invariant import compiled

built = compiled.LIBRARY.is_file()
needs_build = pytest.mark.skipif(not built, reason="the kernels are not compiled here")
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
