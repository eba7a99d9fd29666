"""Tests run with the compiled kernels, and as on a machine without them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from miles_spmd.invariant import compiled

# With a compiler, missing kernels were forgotten to build, and their tests fail; without one they are skipped.
can_build = compiled.LIBRARY.is_file() or shutil.which("c++")
needs_build = pytest.mark.skipif(not can_build, reason="needs a compiler")
both_ways = pytest.mark.parametrize(
    "with_kernels", [pytest.param(True, marks=needs_build, id="compiled"), pytest.param(False, id="torch")]
)


@contextmanager
def kernels(present: bool) -> Iterator[None]:
    """Run with the library as it was built (``present``), or as if it had not been built."""
    library = compiled.LIBRARY
    compiled.LIBRARY = library if present else Path("never built")
    compiled._library.cache_clear()
    try:
        yield
    finally:
        compiled.LIBRARY = library
        compiled._library.cache_clear()
