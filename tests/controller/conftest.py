from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.controller.harness import Harness, Make


@pytest.fixture
def cluster() -> Iterator[Make]:
    made: list[Harness] = []

    def make(world_size: int = 2, cells: int = 1, **deadlines: float) -> Harness:
        made.append(Harness(world_size, cells, **deadlines))
        return made[-1]

    yield make
    for one in made:
        one.close()
